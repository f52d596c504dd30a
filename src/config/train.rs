//! `[train]`: how gradients are made, and what becomes of them.

use std::path::PathBuf;

use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::method::{Boundary, Rule, Stash};
use crate::nn::optim::{LrSchedule, OptimizerSpec};

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How gradients are made.
    pub rule: Rule,
    /// Which activations a cotangent meets: those of the step at hand (`"none"`), or its own, whose `"inputs"` or `"activations"`
    /// are kept until it comes. By the exact rules it meets its own in any case; `"none"` keeps activations.
    pub stash: Stash,
    /// How modules cross from one clip to the next.
    pub boundary: Boundary,
    /// Passes over the training videos (unless `batches` is given).
    pub epochs: u64,
    /// Stop after so many batches instead (formerly `clips`).
    #[serde(alias = "clips", skip_serializing_if = "Option::is_none")]
    pub batches: Option<u64>,
    /// The optimiser and its settings.
    #[serde(deserialize_with = "with_default_kind")]
    pub optimizer: OptimizerSpec,
    /// The learning rate over the run, in batches (formerly `schedule`).
    #[serde(alias = "schedule", deserialize_with = "with_default_kind")]
    pub lr_schedule: LrSchedule,
    /// The linear scaling rule (Goyal et al., 2017): the global batch for which `optimizer.lr` is meant; with `data.batch` clips for each
    /// of `replicas`, modules learn at lr · batch · replicas / this. Absent: at lr.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_lr: Option<usize>,
    /// Damping by depth: module i of D learns at the learning rate times this to the power D − i; above 0, up to 1. "auto" (the
    /// default): 0.5 with fresh pseudo-gradients, whose noise grows with the way back from the loss; 1 with `stash`
    /// and by the exact rules.
    pub lr_depth: LrDepth,
    /// Scale a module's gradient down to this Euclidean norm: a number, or "none": never.
    pub clip_norm: ClipNorm,
    /// Recognition: the part of every label that is spread evenly over all classes in training, 0 up to below 1.
    pub label_smoothing: f64,
    /// What keeps its initial values: modules by number, layers and parameters by patterns of their names, such as `"layers.0.*"`.
    pub freeze: Vec<Freeze>,
    /// Keep an exponential moving average of the parameters, which evaluation uses: the part of itself that it keeps at an update,
    /// between 0 and 1, such as 0.999; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// When the optimiser is applied.
    pub update_every: UpdateEvery,
    /// Score the parameters on `data.validation` each time so many more batches were trained on, and at the end; 0: never. The best
    /// so far are kept as a checkpoint.
    pub validate_every: u64,
    /// End the run once a validation comes to this: `{ top1 = 0.95 }`, or for future frames `{ mse = 0.002 }`; absent: all batches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Until>,
    /// R, pipelines side by side whose gradients are averaged.
    pub replicas: usize,
    /// Seed of initial values, order, augmentation and dropout.
    pub seed: u64,
    /// A checkpoint to take initial weights from, of which a head of another size starts anew; or a safetensors file, of which is
    /// taken what fits (see [`crate::torch`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            rule: Rule::default(),
            stash: Stash::None,
            boundary: Boundary::default(),
            epochs: 10,
            batches: None,
            optimizer: OptimizerSpec::default(),
            lr_schedule: LrSchedule::default(),
            scale_lr: None,
            lr_depth: LrDepth::default(),
            clip_norm: ClipNorm::default(),
            label_smoothing: 0.0,
            freeze: Vec::new(),
            ema: None,
            update_every: UpdateEvery::Named(NamedPeriod::Batch),
            validate_every: 0,
            until: None,
            replicas: 1,
            seed: 1,
            init: None,
        }
    }
}

/// What the learning rate is multiplied by for each module between a module and the loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number or \"auto\"")]
pub enum LrDepth {
    /// This.
    By(f64),
    /// `"auto"`: by what the gradients are.
    Named(AutoDepth),
}

/// The one named choice of [`LrDepth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AutoDepth {
    /// By rule and stash.
    Auto,
}

impl Default for LrDepth {
    fn default() -> Self {
        LrDepth::Named(AutoDepth::Auto)
    }
}

/// The Euclidean norm to which a module's gradient is scaled down.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number or \"none\"")]
pub enum ClipNorm {
    /// To this norm, where it is larger.
    To(f64),
    /// `"none"`: gradients are as they are.
    Named(NoClipping),
}

/// The one named choice of [`ClipNorm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoClipping {
    /// No gradient is clipped.
    None,
}

impl Default for ClipNorm {
    fn default() -> Self {
        ClipNorm::To(1.0)
    }
}

impl ClipNorm {
    /// The largest norm; `None`: any.
    pub fn limit(self) -> Option<f64> {
        match self {
            ClipNorm::To(norm) => Some(norm),
            ClipNorm::Named(NoClipping::None) => None,
        }
    }
}

/// An entry of `train.freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected the number of a module or a pattern of layer names, such as \"layers.0.*\"")]
pub enum Freeze {
    /// A whole module, numbered from 1, with the adapters of its skips.
    Module(usize),
    /// A pattern of names: `*`, `?` and `[ ]` as in a shell.
    Layers(String),
}

/// What a validation has to come to for the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Until {
    /// At least this share of the clips with their label first.
    Top1(f64),
    /// At most this mean squared error of pixels.
    Mse(f64),
}

impl std::fmt::Display for Until {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Until::Top1(share) => write!(f, "{{ top1 = {share} }}"),
            Until::Mse(error) => write!(f, "{{ mse = {error} }}"),
        }
    }
}

/// When the optimiser is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"batch\" or a number of steps")]
pub enum UpdateEvery {
    /// After so many steps with backward work, wherever batches end.
    Steps(u64),
    /// `"batch"`: at the end of a module's window.
    Named(NamedPeriod),
}

/// The one named update period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamedPeriod {
    /// Once a batch (formerly `"clip"`).
    #[serde(alias = "clip")]
    Batch,
}

/// A table with a `kind`; one that names none is of the default's kind.
fn with_default_kind<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Serialize + DeserializeOwned,
{
    let default = toml::Value::try_from(T::default()).map_err(D::Error::custom)?;
    let toml::Value::Table(mut table) = toml::Value::deserialize(deserializer)? else {
        return Err(D::Error::custom(format!("expected a table, such as {{ kind = {} }}", default["kind"])));
    };
    table.entry("kind").or_insert_with(|| default["kind"].clone());
    table.try_into().map_err(|e: toml::de::Error| D::Error::custom(e.message()))
}
