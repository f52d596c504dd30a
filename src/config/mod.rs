//! The configuration of a run: one TOML file, strict keys, every default beside its key; a section a file.
//!
//! [`Config::load`] reads a file and applies `--set` overrides; [`Config::validate`] is the only place where values
//! are checked that need no dataset and no shapes (those follow in [`crate::network::Network::new`]).

mod data;
mod limits;
mod load;
mod model;
mod run;
mod train;

use serde::{Deserialize, Serialize};

pub use data::{DataConfig, Globs};
pub(crate) use limits::MOST_BATCHES;
pub use model::{AlignedDelay, Delay, ModelConfig, SkipConfig, SkipEdge};
pub use run::{Batches, DeviceChoice, OnCheckpointError, OnNonfinite, RunConfig, Wire};
pub use train::{AutoDepth, ClipNorm, Freeze, LrDepth, NamedPeriod, NoClipping, TrainConfig, Until, UpdateEvery};

pub use crate::backend::Precision;
pub use crate::comm::exchange::Exchange;
pub use crate::method::{Rule, Stash};
pub use crate::nn::head::Task;

use crate::data::Mixup;
use crate::method::{Edge, Graph};
use crate::nn::module::Fuse;
use crate::{Error, Result};

/// `train.lr_depth` where gradients are fresh pseudo-gradients. `datasets/motion/study.sh
/// defaults` ends at 100 % test top-1 with it on each of seeds 1 to 8. What it does alone, beside clipping and the last layer's smaller
/// initial weights, has not been measured.
const FRESH_LR_DEPTH: f64 = 0.5;

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

impl Config {
    /// Checks every value that needs neither dataset nor shapes.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key, its value, and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.validate_numbers()?;
        self.validate_scale()?;
        self.data.augmentation().validate(self.data.crop)?;
        if let Some(alpha) = self.data.mixup {
            Mixup::validate(alpha)?;
            if self.model.task != Task::Recognition {
                return Err(Error::input(
                    "data.mixup mixes labels: it needs model.task = \"recognition\"; remove it for future frames",
                ));
            }
        }
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
        if self.train.rule == Rule::Sideways && self.has_skips() {
            return Err(Error::input(
                "train.rule = \"sideways\" has no skips, but model.skip gives some: use rule = \"skip-sideways\" or \
                 remove model.skip",
            ));
        }
        if let UpdateEvery::Steps(steps) = self.train.update_every {
            if steps == 0 {
                return Err(Error::input("train.update_every = 0: it is \"batch\" or a number of steps from 1"));
            }
            if self.train.rule.is_exact() {
                return Err(Error::input(format!(
                    "train.update_every = {steps} steps does not go with train.rule = \"{}\", which updates once a batch",
                    self.train.rule
                )));
            }
        }
        let beta = self.lr_depth();
        if !(beta > 0.0 && beta <= 1.0) {
            return Err(Error::input(format!(
                "train.lr_depth = {beta}: module i of D learns at the learning rate times train.lr_depth to the power D - i, so it \
                 is above 0 and at most 1 (1: all modules at the same rate)"
            )));
        }
        if let Some(norm) = self.train.clip_norm.limit()
            && !(norm.is_finite() && norm > 0.0)
        {
            return Err(Error::input(format!(
                "train.clip_norm = {norm}: it must be a positive number, or \"none\" for no clipping"
            )));
        }
        let smoothing = self.train.label_smoothing;
        if !(0.0..1.0).contains(&smoothing) {
            return Err(Error::input(format!(
                "train.label_smoothing = {smoothing}: it is the part of a label that is spread over all classes, from 0 to below 1"
            )));
        }
        if smoothing > 0.0 && self.model.task != Task::Recognition {
            return Err(Error::input(
                "train.label_smoothing is about labels: it needs model.task = \"recognition\"; remove it for future frames",
            ));
        }
        if let Some(decay) = self.train.ema
            && !(decay > 0.0 && decay < 1.0)
        {
            return Err(Error::input(format!(
                "train.ema = {decay}: it is the part of itself that the moving average keeps at an update, between 0 and 1, for \
                 instance 0.999; remove the key to keep no average"
            )));
        }
        self.validate_until()?;
        self.train.optimizer.validate()?;
        self.train.lr_schedule.validate()?;
        self.validate_device()
    }

    /// Whether `train.until` is something that a validation can come to.
    fn validate_until(&self) -> Result<()> {
        let Some(until) = self.train.until else { return Ok(()) };
        let recognition = self.model.task == Task::Recognition;
        let wrong = match until {
            Until::Top1(_) if !recognition => "model.task has no top-1 accuracy: give { mse = ERROR }",
            Until::Mse(_) if recognition => "model.task has no mean squared error: give { top1 = SHARE }",
            Until::Top1(share) if !(share > 0.0 && share <= 1.0) => "it is a share of the clips, above 0 and at most 1",
            Until::Mse(error) if !(error > 0.0 && error.is_finite()) => "it is an error above 0",
            _ if self.train.validate_every == 0 => "nothing is validated: set train.validate_every as well",
            _ => return Ok(()),
        };
        Err(Error::input(format!("train.until = {until}: {wrong}")))
    }

    /// Whether any skip is asked for.
    pub fn has_skips(&self) -> bool {
        self.model.skip.as_ref().is_some_and(|s| !s.spans.is_empty() || !s.edges.is_empty())
    }

    /// Clips that all replicas work on at once.
    pub fn global_batch(&self) -> usize {
        self.data.batch * self.train.replicas
    }

    /// By how much the global batch is larger than that which the optimiser's learning rate is meant for.
    pub fn lr_scale(&self) -> f64 {
        self.train.scale_lr.map_or(1.0, |meant| self.global_batch() as f64 / meant as f64)
    }

    /// β: what the learning rate is multiplied by for each module between a module and the loss.
    pub fn lr_depth(&self) -> f64 {
        let fresh = !self.train.rule.is_exact() && self.train.stash == Stash::None;
        match self.train.lr_depth {
            LrDepth::By(beta) => beta,
            LrDepth::Named(AutoDepth::Auto) if fresh => FRESH_LR_DEPTH,
            LrDepth::Named(AutoDepth::Auto) => 1.0,
        }
    }

    /// What module `i` of `modules` multiplies the optimiser's learning rate by, at every batch.
    pub fn lr_factor(&self, i: usize, modules: usize) -> f64 {
        (i..modules).fold(self.lr_scale(), |factor, _| factor * self.lr_depth())
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
