//! The configuration of a run: one TOML file, strict keys, every default in one place.
//!
//! [`Config::load`] reads a file and applies `--set` overrides; [`Config::validate`] is the only place where values
//! are checked that need no dataset and no shapes (those follow in [`crate::network::Network::new`]).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::data::Augmentation;
use crate::graph::{Edge, Graph};
use crate::model::loss::PixelLoss;
use crate::model::module::Fuse;
use crate::model::spec::LayerSpec;
use crate::optim::{OptimizerSpec, ScheduleSpec};
use crate::schedule::Boundary;
use crate::{Error, Result};

mod load;

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What is read.
    pub data: DataConfig,
    /// The network and how it is cut.
    pub model: ModelConfig,
    /// How it is trained.
    pub train: TrainConfig,
    /// Where and on what it runs.
    pub run: RunConfig,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Glob(s) of training shards.
    pub train: Globs,
    /// Glob(s) of test shards.
    pub test: Globs,
    /// T, frames of a clip.
    pub frames: usize,
    /// Source frames from one frame of a clip to the next.
    pub stride: usize,
    /// B, the clips a replica works on in lock-step.
    pub batch: usize,
    /// Side of the square crop in pixels; absent: the whole frame. Random in training, centred in evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<usize>,
    /// Mirror clips left to right at random (not for labels that depend on direction).
    pub flip: bool,
    /// Random resized crop in training: the part of a frame's area that is kept, from and to; absent: crops are not resized.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop_scale: Option<[f64; 2]>,
    /// Random resized crop: width to height of what is kept, from and to.
    pub crop_ratio: [f64; 2],
    /// Colour jitter in training: brightness is multiplied by a factor out of 1 ± this, one for all frames of a clip.
    pub brightness: f64,
    /// As `brightness`, of the distance to mid-grey.
    pub contrast: f64,
    /// As `brightness`, of the distance to the pixel's grey.
    pub saturation: f64,
    /// Draw the order of clips and their windows anew each epoch; otherwise shard order from frame 0.
    pub shuffle: bool,
    /// Compare each video with its checksum when it is first met (all of it is read then); damaged ones are skipped in
    /// training. Without, damage is met where the JPEG decoder stumbles, and the clip counts with black frames from there.
    pub verify: bool,
    /// Threads that decode, crop and scale frames, on each first module's rank.
    pub decode_threads: usize,
    /// Frames of each clip that are made ahead of the one in use, about.
    pub prefetch: usize,
    /// Per-channel mean of u8/255.
    pub mean: [f32; 3],
    /// Per-channel standard deviation of u8/255.
    pub std: [f32; 3],
}

impl DataConfig {
    /// The random changes of clips in training.
    pub fn augmentation(&self) -> Augmentation {
        let &DataConfig { flip, crop_scale, crop_ratio, brightness, contrast, saturation, .. } = self;
        Augmentation { flip, crop_scale, crop_ratio, brightness, contrast, saturation }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        let augmentation = Augmentation::default();
        DataConfig {
            train: Globs::default(),
            test: Globs::default(),
            frames: 16,
            stride: 1,
            batch: 16,
            crop: None,
            flip: false,
            crop_scale: None,
            crop_ratio: augmentation.crop_ratio,
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
            shuffle: true,
            verify: true,
            decode_threads: 1,
            prefetch: 16,
            // Kinetics-400's, as torchvision's video models use them.
            mean: [0.43216, 0.394666, 0.37645],
            std: [0.22803, 0.22145, 0.216989],
        }
    }
}

/// One glob or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Globs {
    /// `"data/train-*.h5"`
    One(String),
    /// `["a/*.h5", "b/*.h5"]`
    Many(Vec<String>),
}

impl Default for Globs {
    fn default() -> Self {
        Globs::Many(Vec::new())
    }
}

impl Globs {
    /// The globs as a list; empty if none was given.
    pub fn list(&self) -> Vec<String> {
        match self {
            Globs::One(g) => vec![g.clone()],
            Globs::Many(g) => g.clone(),
        }
    }
}

/// What the network is to learn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Softmax cross-entropy at every step of the last module.
    #[default]
    Recognition,
    /// The mean pixel difference to the frame `horizon` after the newest one seen.
    FutureFrames,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// What the network is to learn.
    pub task: Task,
    /// Future frames: how many frames past the newest seen one the target is.
    pub horizon: usize,
    /// Future frames: the pixel difference.
    pub loss: PixelLoss,
    /// A named network; or write out `layers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// The layers, in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<LayerSpec>>,
    /// Number of classes; absent: the dataset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// D, the number of modules, cut to balance arithmetic; absent: as many as there are ranks for a replica, cut by times
    /// measured on this machine, or as the run's checkpoint was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<usize>,
    /// The layers (counted from 0) before which to cut, instead of `modules`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuts: Option<Vec<usize>>,
    /// Skip connections between modules; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<SkipConfig>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            task: Task::default(),
            horizon: 1,
            loss: PixelLoss::default(),
            preset: None,
            layers: None,
            classes: None,
            modules: None,
            cuts: None,
            skip: None,
        }
    }
}

/// `[model.skip]`: spans, single edges, or both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SkipConfig {
    /// Span s adds every skip from module i − s to module i.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<usize>,
    /// Single skips.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub edges: Vec<SkipEdge>,
    /// How skips join the main path.
    pub fuse: Fuse,
    /// Ticks a skip takes: 1 brings the newest features, the span aligns them with the main path.
    pub delay: Delay,
}

impl Default for SkipConfig {
    fn default() -> Self {
        SkipConfig { spans: Vec::new(), edges: Vec::new(), fuse: Fuse::Sum, delay: Delay::Ticks(1) }
    }
}

/// A skip's delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Delay {
    /// So many ticks.
    Ticks(usize),
    /// `"aligned"`: as many as the span, the ordinary non-temporal residual network (an ablation).
    Named(AlignedDelay),
}

/// The one named delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlignedDelay {
    /// The span of each skip.
    Aligned,
}

impl Delay {
    fn ticks(self, span: usize) -> usize {
        match self {
            Delay::Ticks(n) => n,
            Delay::Named(AlignedDelay::Aligned) => span,
        }
    }
}

/// One skip edge: `[from, to]`, or `{ from, to, delay }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SkipEdge {
    /// `[1, 3]`
    Pair(usize, usize),
    /// `{ from = 1, to = 3, delay = 2 }`
    Full {
        /// The module whose output travels.
        from: usize,
        /// The module that reads it.
        to: usize,
        /// Ticks it takes.
        delay: Delay,
    },
}

/// How gradients are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Pseudo-gradients, main path only (Malinowski et al., CVPR 2020).
    Sideways,
    /// Pseudo-gradients with skips (Malinowski et al., CVPR 2021).
    #[default]
    SkipSideways,
    /// Exact back-propagation through the same unrolled graph; blocking, in one process.
    Bp,
}

/// When the optimiser is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum UpdateEvery {
    /// After so many steps with backward work, clips notwithstanding.
    Steps(u64),
    /// `"clip"`: at the end of a module's window.
    Named(ClipWord),
}

/// The one named update period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipWord {
    /// Once a clip.
    Clip,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How gradients are made.
    pub rule: Rule,
    /// How modules cross from one clip to the next.
    pub boundary: Boundary,
    /// Passes over the training videos (unless `clips` is given).
    pub epochs: u64,
    /// Stop after so many batches of clips instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clips: Option<u64>,
    /// The optimiser and its settings.
    pub optimizer: OptimizerSpec,
    /// The learning rate over the run, in batches of clips.
    pub schedule: ScheduleSpec,
    /// Scale a module's gradient down to this Euclidean norm; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// When the optimiser is applied.
    pub update_every: UpdateEvery,
    /// R, pipelines side by side whose gradients are averaged.
    pub replicas: usize,
    /// Seed of initial values, order, augmentation and dropout.
    pub seed: u64,
    /// A checkpoint to take initial weights from; a head of another size starts anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            rule: Rule::default(),
            boundary: Boundary::default(),
            epochs: 10,
            clips: None,
            optimizer: OptimizerSpec::default(),
            schedule: ScheduleSpec::default(),
            clip_norm: None,
            update_every: UpdateEvery::Named(ClipWord::Clip),
            replicas: 1,
            seed: 1,
            init: None,
        }
    }
}

/// Where modules compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best this build and machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU a rank.
    Cuda,
}

/// Number format of activations. Parameters and their gradients are 32-bit floats always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// The same, but factors of convolutions are rounded to 10 bits of mantissa (GPU only).
    Tf32,
    /// bfloat16, with sums in 32-bit floats (GPU only).
    Bf16,
}

/// How activations and cotangents get from one module's GPU to another's. The results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exchange {
    /// On each edge the fastest that works, by a test when the run starts.
    #[default]
    Auto,
    /// By way of host memory: works everywhere.
    Staged,
    /// Copied by the GPU into the receiver's memory: between modules of one process, and of processes of one node whose GPUs
    /// have peer access.
    Peer,
    /// By an MPI library that works on GPU memory, between processes; as peers within one.
    CudaAware,
}

/// Number format of activations and cotangents in messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As activations are: bfloat16 with `precision = "bf16"`, which loses nothing, else 32-bit floats.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16: half the bytes; values are rounded to 8 bits of mantissa, wherever modules run (GPU only).
    Bf16,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The run folder: resolved configuration, metrics, log, checkpoints.
    pub dir: PathBuf,
    /// Where modules compute.
    pub device: DeviceChoice,
    /// Number format.
    pub precision: Precision,
    /// Whether a GPU's passes are replayed as CUDA graphs.
    pub graphs: bool,
    /// How messages get from GPU to GPU.
    pub exchange: Exchange,
    /// Number format of messages.
    pub wire: Wire,
    /// Compute threads a module (CPU).
    pub threads: usize,
    /// Batches of clips between checkpoints; one is also written at the start and at the end.
    pub checkpoint_every: u64,
    /// Checkpoints kept, the newest ones (the start's is always kept).
    pub keep: usize,
    /// Seconds without an awaited message after which a rank gives up.
    pub timeout: u64,
    /// Whether a checkpoint that cannot be written ends the run.
    pub on_checkpoint_error: OnCheckpointError,
    /// Whether a loss, a cotangent or a gradient that is not finite ends the run.
    pub on_nonfinite: OnNonfinite,
}

/// What to do when a checkpoint cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCheckpointError {
    /// End the run with the error; the last good checkpoint is kept.
    #[default]
    Stop,
    /// Report it, and try again when the next is due. At the run's end it is an error all the same.
    Continue,
}

/// What to do about a loss, a cotangent or a gradient that is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNonfinite {
    /// End the run with an error that names rank, module, clip, step and tick.
    #[default]
    Stop,
    /// Leave it out (zeros in its place; an update is not made), and count it in the metrics.
    Skip,
}

impl RunConfig {
    /// Whether messages carry bfloat16.
    pub fn halves_messages(&self) -> bool {
        self.wire == Wire::Bf16 || self.wire == Wire::Auto && self.precision == Precision::Bf16
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            dir: PathBuf::from("runs/run"),
            device: DeviceChoice::default(),
            precision: Precision::default(),
            graphs: true,
            exchange: Exchange::default(),
            wire: Wire::default(),
            threads: 1,
            checkpoint_every: 100,
            keep: 2,
            timeout: 300,
            on_checkpoint_error: OnCheckpointError::default(),
            on_nonfinite: OnNonfinite::default(),
        }
    }
}

impl Config {
    /// Checks every value that needs neither dataset nor shapes.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key, its value, and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("data.frames", self.data.frames),
            ("data.stride", self.data.stride),
            ("data.batch", self.data.batch),
            ("data.crop", self.data.crop.unwrap_or(1)),
            ("data.decode_threads", self.data.decode_threads),
            ("data.prefetch", self.data.prefetch),
            ("model.horizon", self.model.horizon),
            ("model.classes", self.model.classes.unwrap_or(1)),
            ("model.modules", self.model.modules.unwrap_or(1)),
            ("train.replicas", self.train.replicas),
            ("run.threads", self.run.threads),
            ("run.keep", self.run.keep),
            ("train.epochs", self.train.epochs.min(1) as usize),
            ("train.clips", self.train.clips.unwrap_or(1).min(1) as usize),
            ("run.checkpoint_every", self.run.checkpoint_every.min(1) as usize),
            ("run.timeout", self.run.timeout.min(1) as usize),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("{key} = 0: it must be at least 1")));
        }
        if self.data.std.iter().any(|s| !s.is_finite() || *s <= 0.0) || self.data.mean.iter().any(|m| !m.is_finite()) {
            return Err(Error::input(format!(
                "data.mean = {:?}, data.std = {:?}: means must be finite and deviations positive",
                self.data.mean, self.data.std
            )));
        }
        self.data.augmentation().validate(self.data.crop)?;
        match (&self.model.preset, &self.model.layers) {
            (Some(_), Some(_)) => return Err(Error::input("model.preset and model.layers are both given: keep one")),
            (None, None) => {
                return Err(Error::input(
                    "no network: set model.preset (for instance \"motion-small\") or write out model.layers",
                ));
            }
            (None, Some(layers)) if layers.is_empty() => {
                return Err(Error::input("model.layers is empty: a network needs at least one layer"));
            }
            _ => {}
        }
        if let (Some(modules), Some(cuts)) = (self.model.modules, &self.model.cuts)
            && modules != cuts.len() + 1
        {
            return Err(Error::input(format!(
                "model.modules = {modules}, but model.cuts = {cuts:?} makes {} modules: keep one of the two",
                cuts.len() + 1
            )));
        }
        let has_skips = self.model.skip.as_ref().is_some_and(|s| !s.spans.is_empty() || !s.edges.is_empty());
        if self.train.rule == Rule::Sideways && has_skips {
            return Err(Error::input(
                "train.rule = \"sideways\" has no skips, but model.skip gives some: use rule = \"skip-sideways\" or \
                 remove model.skip",
            ));
        }
        if self.train.rule == Rule::Bp && self.train.replicas > 1 {
            return Err(Error::input(
                "train.rule = \"bp\" runs in one process with train.replicas = 1; raise data.batch instead",
            ));
        }
        if let UpdateEvery::Steps(steps) = self.train.update_every {
            if steps == 0 {
                return Err(Error::input("train.update_every = 0: it is \"clip\" or a number of steps from 1"));
            }
            if self.train.rule == Rule::Bp {
                return Err(Error::input(
                    "train.update_every = a number of steps does not go with rule = \"bp\", which updates once a clip",
                ));
            }
        }
        if let Some(norm) = self.train.clip_norm
            && !(norm.is_finite() && norm > 0.0)
        {
            return Err(Error::input(format!("train.clip_norm = {norm}: it must be a positive number")));
        }
        self.train.optimizer.validate()?;
        self.train.schedule.validate()?;
        self.validate_device()
    }

    /// What must fit together for a GPU; whether there is one is not asked here: a cluster's configuration is checked on laptops.
    fn validate_device(&self) -> Result<()> {
        let run = &self.run;
        if run.device != DeviceChoice::Cuda && run.precision != Precision::F32 {
            return Err(Error::input(
                "run.precision: \"tf32\" and \"bf16\" need run.device = \"cuda\"; on the CPU everything is \"f32\"",
            ));
        }
        if run.device != DeviceChoice::Cuda && run.exchange != Exchange::Auto {
            return Err(Error::input(
                "run.exchange is about GPUs: it needs run.device = \"cuda\"; on the CPU leave it at \"auto\"",
            ));
        }
        if run.device != DeviceChoice::Cuda && run.wire == Wire::Bf16 {
            return Err(Error::input(
                "run.wire = \"bf16\" needs run.device = \"cuda\"; on the CPU messages are \"f32\"",
            ));
        }
        if run.device == DeviceChoice::Cuda && self.train.rule == Rule::Bp {
            return Err(Error::input(
                "train.rule = \"bp\" is exact back-propagation on the CPU: set run.device = \"cpu\"",
            ));
        }
        Ok(())
    }

    /// The graph for `modules` modules.
    ///
    /// # Errors
    /// [`Error::Input`] for a skip that does not fit.
    pub fn graph(&self, modules: usize) -> Result<Graph> {
        let mut skips = Vec::new();
        if let Some(skip) = &self.model.skip {
            for &span in &skip.spans {
                skips.extend(Graph::skips_of_spans(modules, &[span], skip.delay.ticks(span))?);
            }
            for edge in &skip.edges {
                let (from, to, delay) = match *edge {
                    SkipEdge::Pair(from, to) => (from, to, skip.delay),
                    SkipEdge::Full { from, to, delay } => (from, to, delay),
                };
                skips.push(Edge { from, to, delay: delay.ticks(to.saturating_sub(from)) });
            }
        }
        Graph::new(modules, &skips)
    }

    /// Whether it is left open where the network is cut.
    pub fn cut_is_open(&self) -> bool {
        self.model.modules.is_none() && self.model.cuts.is_none()
    }

    /// How skips join the main path.
    pub fn fuse(&self) -> Fuse {
        self.model.skip.as_ref().map_or(Fuse::Sum, |s| s.fuse)
    }
}
