//! From a configuration to everything that is fixed before a tensor is made: the same on every rank.

pub mod footprint;
pub mod grid;
pub mod neighbours;
mod predicted;
pub mod site;
pub mod validation;
mod warnings;
pub mod wiring;

use std::path::Path;
use std::sync::Arc;

use crate::backend::stage::{Lends, OutputPort, StageSpec};
use crate::comm::all_reduce::BUCKET;
use crate::config::{Config, MOST_BATCHES, OnNonfinite, Task};
use crate::data::{Dataset, Mixup, Sampler, StreamOptions, Views};
use crate::method::{LossAt, Rule, Schedule};
use crate::metrics::Report;
use crate::network::Network;
use crate::network::freeze::Frozen;
use crate::nn::head::HeadSpec;
use crate::setup::grid::Grid;
use crate::setup::validation::Validation;
use crate::setup::wiring::{Truth, Wiring};
use crate::{Error, Result};

pub use predicted::Predicted;

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Training on `data.train`.
    Train,
    /// One pass over `data.test` with fixed parameters.
    Evaluate,
    /// The same, and the last module's outputs are reported.
    Predict,
}

/// A run, planned.
pub struct Setup {
    /// The configuration as resolved.
    pub config: Config,
    /// What for.
    pub purpose: Purpose,
    /// The videos; absent in a dry run without data.
    pub dataset: Option<Arc<Dataset>>,
    /// Training: what is validated on meanwhile.
    pub validation: Option<Arc<Validation>>,
    /// Classes in label order; empty for future frames.
    pub class_names: Vec<String>,
    /// K; 0 for future frames.
    pub classes: usize,
    /// Layers, modules, edges, shapes.
    pub network: Network,
    /// What of it does not learn.
    pub frozen: Frozen,
    /// Who does what at which tick.
    pub schedule: Arc<Schedule>,
    /// Who runs where.
    pub grid: Grid,
    /// How they are joined.
    pub wiring: Wiring,
    /// Future frames: how many frames after a step's own its target is.
    pub ahead: Option<usize>,
    /// Prediction; and training on future frames where TensorBoard is to show them (replica 0, a validation's first clip).
    pub predicted: Option<Predicted>,
    /// Evaluation: how often each video is looked at.
    pub views: Views,
}

impl Setup {
    /// Plans a run on `ranks` ranks with its dataset.
    ///
    /// # Errors
    /// [`Error::Input`] for whatever in configuration, dataset or number of ranks cannot work.
    pub fn new(config: &Config, ranks: usize, purpose: Purpose) -> Result<Self> {
        Self::of(config, ranks, purpose, None)
    }

    /// Plans a pass over shards that must have the classes `names`, those of a network that `source` was trained on.
    ///
    /// # Errors
    /// As [`Setup::new`], and for other classes.
    pub fn for_classes(
        config: &Config,
        ranks: usize,
        purpose: Purpose,
        (names, source): (&[String], &str),
    ) -> Result<Self> {
        Self::of(config, ranks, purpose, Some((names, source)))
    }

    fn of(config: &Config, ranks: usize, purpose: Purpose, trained: Option<(&[String], &str)>) -> Result<Self> {
        config.validate()?;
        let (key, globs) = match purpose {
            Purpose::Train => ("data.train", config.data.train.list()),
            Purpose::Evaluate | Purpose::Predict => ("data.test", config.data.test.list()),
        };
        if globs.is_empty() {
            return Err(Error::input(format!("{key} is not set: give a glob of shards, such as \"data/train-*.h5\"")));
        }
        let dataset = open(key, &globs)?;
        // Before the network, which does not fit another number of classes.
        if let Some((names, source)) = trained.filter(|_| config.model.task == Task::Recognition)
            && dataset.class_names != names
        {
            return Err(Error::input(format!(
                "the shards have {}, but {source} was trained on {}: give shards of the same dataset (--data)",
                some_classes(&dataset.class_names),
                some_classes(names)
            )));
        }
        let validated = purpose == Purpose::Train && config.train.validate_every > 0;
        let validated = if validated { Some(validation::videos(config, &dataset)?) } else { None };
        Self::plan(config, ranks, purpose, Some(Arc::new(dataset)), validated.map(Arc::new))
    }

    /// Plans a run without opening its shards where they are not there: the frame size is `data.crop`, the classes
    /// are `model.classes`.
    ///
    /// # Errors
    /// As [`Setup::new`], and if size or classes are then unknown.
    pub fn dry(config: &Config, ranks: usize) -> Result<Self> {
        config.validate()?;
        let globs = config.data.train.list();
        let present = globs.iter().any(|g| glob::glob(g).is_ok_and(|mut found| found.next().is_some()));
        if present {
            return Self::new(config, ranks, Purpose::Train);
        }
        Self::plan(config, ranks, Purpose::Train, None, None)
    }

    fn plan(
        config: &Config,
        ranks: usize,
        purpose: Purpose,
        dataset: Option<Arc<Dataset>>,
        validated: Option<Arc<Dataset>>,
    ) -> Result<Self> {
        let (height, width) = frame_size(config, dataset.as_deref())?;
        let class_names = match config.model.task {
            Task::Recognition => class_names(config, dataset.as_deref())?,
            Task::FutureFrames => Vec::new(),
        };
        let classes = class_names.len();
        // Evaluation takes as many pipelines as there are ranks for. Ranks that are left over have nothing to do.
        let modules = config.model.cuts.as_ref().map(|cuts| cuts.len() + 1).or(config.model.modules).unwrap_or(ranks);
        let (replicas, ranks) = match purpose {
            Purpose::Train => (config.train.replicas, ranks),
            Purpose::Evaluate if ranks > modules => (ranks / modules, ranks / modules * modules),
            Purpose::Evaluate => (1, ranks),
            Purpose::Predict => (1, ranks.min(modules)),
        };
        if config.train.rule == Rule::Bp && purpose == Purpose::Train && ranks > 1 {
            return Err(Error::input(format!(
                "train.rule = \"bp\" runs in one process, but there are {ranks} ranks: start it without mpirun or srun, or set \
                 train.rule = \"1f1b\" or \"gpipe\", which give the same gradients on any number of ranks"
            )));
        }
        let network = Network::new(config, [height, width, 3], classes, ranks.div_ceil(replicas))?;
        let ahead =
            (config.model.task == Task::FutureFrames).then(|| network.graph.newest_lead() + config.model.horizon);
        let loss = ahead.map_or(LossAt::EveryStep, LossAt::Ahead);
        let training = purpose == Purpose::Train;
        let (graph, frames, boundary) = (&network.graph, config.data.frames, config.train.boundary);
        let frozen = Frozen::new(if training { &config.train.freeze } else { &[] }, &network)?;
        let schedule = match training {
            true => {
                let (rule, stash, lowest) = (config.train.rule, config.train.stash, frozen.lowest());
                Schedule::training_from(graph, frames, rule, stash, boundary, loss, lowest)?
            }
            false => Schedule::evaluation(graph, frames, boundary, loss)?,
        };
        let grid = Grid::new(network.graph.modules(), replicas, ranks)?;
        let mixed = training && config.data.mixup.is_some();
        let truth = if ahead.is_some() { Truth::Targets } else { Truth::Labels { mixed } };
        let last = grid.modules;
        let batch = config.data.batch;
        let predicted = match (purpose, ahead) {
            (Purpose::Predict, _) => Some(Predicted { clips: batch, steps: 0..schedule.steps(last) }),
            (Purpose::Train, Some(ahead)) if config.run.tensorboard && validated.is_some() => {
                Some(Predicted::shown(frames, ahead))
            }
            _ => None,
        };
        let outputs = match &predicted {
            Some(predicted) => predicted.values(network.modules[last - 1].output),
            None if training => 0,
            None => batch * classes,
        };
        let reports = (Report::words(outputs, if training { 0 } else { batch }), Report::words(0, 0));
        let (learned, halved) = (training.then_some(&frozen), config.run.halves_messages());
        let wiring = Wiring::new(&network, &schedule, grid, (batch, truth), reports, learned, halved);
        let evaluation = || Schedule::evaluation(graph, frames, boundary, loss);
        let validation = match validated {
            Some(dataset) => Some(Arc::new(Validation {
                every: config.train.validate_every,
                batches: dataset.videos.len().div_ceil(batch * replicas) as u64,
                schedule: Arc::new(evaluation()?),
                dataset,
            })),
            None => None,
        };
        Ok(Setup {
            config: config.clone(),
            purpose,
            dataset,
            validation,
            class_names,
            classes,
            network,
            frozen,
            schedule: Arc::new(schedule),
            grid,
            wiring,
            ahead,
            predicted,
            views: Views::ONE,
        })
    }

    /// The same run, cut before the layers `cuts`.
    ///
    /// # Errors
    /// As [`Setup::new`].
    pub fn recut(&self, cuts: Vec<usize>) -> Result<Self> {
        let mut config = self.config.clone();
        (config.model.modules, config.model.cuts) = (None, Some(cuts));
        let validated = self.validation.as_ref().map(|validation| validation.dataset.clone());
        Self::plan(&config, self.grid.ranks, self.purpose, self.dataset.clone(), validated)
    }

    /// The layers before which the network is cut.
    pub fn cuts(&self) -> Vec<usize> {
        self.network.modules.iter().skip(1).map(|m| m.layers.start).collect()
    }

    /// The loss at the last module.
    pub fn head(&self) -> HeadSpec {
        let model = &self.config.model;
        // Scores are of plain cross-entropy.
        let smoothing = if self.purpose == Purpose::Train { self.config.train.label_smoothing } else { 0.0 };
        let mixed = self.mixup(0).is_some();
        HeadSpec { task: model.task, pixel_loss: model.loss, classes: self.classes, smoothing, mixed }
    }

    /// What the stage of module `i` is made from.
    pub fn stage_spec(&self, i: usize) -> StageSpec {
        let (network, config) = (&self.network, &self.config);
        let module = &network.modules[i - 1];
        let returns = |e: &crate::method::Edge| {
            let k = network.inputs(e.to).iter().position(|other| other.edge == *e);
            k.is_some_and(|k| self.schedule.returns(e.to, k))
        };
        let outputs = network.outputs(i).into_iter();
        StageSpec {
            index: i,
            layers: network.layers_of(i),
            main: module.main,
            skips: module.skips.clone(),
            fuse: network.fuse,
            output: module.output,
            frames: i == 1,
            outputs: outputs.map(|e| OutputPort { shape: e.shape, returns: returns(&e.edge) }).collect(),
            returns: (0..network.inputs(i).len()).map(|k| self.schedule.returns(i, k)).collect(),
            batch: config.data.batch,
            seed: config.train.seed,
            last_layer: Some(network.last_layer()),
            kept: self.schedule.kept(i),
            sums: self.schedule.sums(i),
            recompute: self.schedule.recomputes(i),
            optimizer: (self.purpose == Purpose::Train).then_some(config.train.optimizer),
            ema: config.train.ema.filter(|_| self.purpose == Purpose::Train),
            frozen: self.frozen.names().clone(),
            lends: self.wiring.averaging(i, |_| Lends { piece: BUCKET, on_gpu: None }),
            head: (i == self.grid.modules).then(|| self.head()),
            leave_out: config.run.on_nonfinite == OnNonfinite::Skip,
        }
    }

    /// How replica `replica`'s frames are read, from batch `first` to before `end`.
    pub fn stream(&self, replica: usize, first: u64, end: u64) -> StreamOptions {
        let data = &self.config.data;
        StreamOptions {
            frames: data.frames,
            stride: data.stride,
            batch: data.batch,
            crop: data.crop,
            augmentation: data.augmentation(),
            verify: data.verify,
            shuffle: data.shuffle,
            seed: self.config.train.seed,
            training: self.purpose == Purpose::Train,
            views: self.views,
            mean: data.mean,
            std: data.std,
            replicas: self.grid.replicas,
            replica,
            ahead: self.ahead.unwrap_or(0),
            first_batch: first,
            end_batch: end,
            decoders: data.decode_threads,
            ..StreamOptions::default()
        }
        .reading_ahead(data.prefetch)
    }

    /// How replica `replica`'s batches are mixed, in training.
    pub fn mixup(&self, replica: usize) -> Option<Mixup> {
        let alpha = self.config.data.mixup.filter(|_| self.purpose == Purpose::Train)?;
        Some(Mixup { alpha, seed: self.config.train.seed, replica })
    }

    /// How replica `replica`'s share of the validation clips is read, validation after validation.
    pub fn validation_stream(&self, replica: usize) -> StreamOptions {
        StreamOptions { training: false, again: true, ..self.stream(replica, 0, u64::MAX) }
    }

    /// Batches in the whole run: `train.batches`, or `train.epochs` passes; one pass in evaluation.
    ///
    /// # Errors
    /// [`Error::Input`] if there are fewer videos than one batch takes.
    pub fn total_batches(&self) -> Result<u64> {
        let Some(dataset) = &self.dataset else { return Ok(self.config.train.batches.unwrap_or(0)) };
        let an_epoch = Sampler::of(dataset, self.stream(0, 0, u64::MAX).sampler())?.batches_per_epoch();
        match (self.purpose, self.config.train.batches) {
            (Purpose::Evaluate | Purpose::Predict, _) => Ok(an_epoch),
            (Purpose::Train, Some(batches)) => Ok(batches),
            (Purpose::Train, None) => {
                let epochs = self.config.train.epochs;
                an_epoch.checked_mul(epochs).filter(|total| *total <= MOST_BATCHES).ok_or_else(|| {
                    Error::input(format!(
                        "train.epochs = {epochs}: at {an_epoch} batches each a run would have more than {MOST_BATCHES}"
                    ))
                })
            }
        }
    }

    /// A number that is the same on two ranks only if they plan the same run.
    ///
    /// # Errors
    /// As [`Config::to_toml`].
    pub fn fingerprint(&self, first_batch: u64) -> Result<u64> {
        let data = self.dataset.as_ref().map(|d| d.digest()).unwrap_or_default();
        let validation = self.validation.as_ref().map(|validation| validation.dataset.digest()).unwrap_or_default();
        let text = format!(
            "{}\n{:?}\n{:?}\n{}\n{data}\n{validation}\n{first_batch}\n{}",
            env!("CARGO_PKG_VERSION"),
            self.class_names,
            self.views,
            self.config.to_toml()?,
            self.wiring.numbers()
        );
        Ok(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    /// The folder of this run's checkpoints.
    pub fn checkpoints(&self) -> std::path::PathBuf {
        Path::new(&self.config.run.dir).join("checkpoints")
    }
}

/// Some of many names.
fn some_classes(names: &[String]) -> String {
    let first = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    format!("{} classes ({first}{})", names.len(), if names.len() > 8 { ", …" } else { "" })
}

fn open(key: &str, globs: &[String]) -> Result<Dataset> {
    Dataset::open(globs).map_err(|e| match e {
        Error::Input(text) => Error::Input(format!("{key}: {text}")),
        e => e,
    })
}

fn frame_size(config: &Config, dataset: Option<&Dataset>) -> Result<(usize, usize)> {
    match (config.data.crop, dataset) {
        (Some(crop), Some(data)) if crop > data.height || crop > data.width => Err(Error::input(format!(
            "data.crop = {crop}, but the shards' frames are {}x{} (height x width): crop at most {}",
            data.height,
            data.width,
            data.height.min(data.width)
        ))),
        (Some(crop), _) => Ok((crop, crop)),
        (None, Some(data)) => Ok((data.height, data.width)),
        (None, None) => Err(Error::input(
            "the frame size is unknown: no shards match data.train, and data.crop is not set; set data.crop to plan \
             without data",
        )),
    }
}

fn class_names(config: &Config, dataset: Option<&Dataset>) -> Result<Vec<String>> {
    match (config.model.classes, dataset) {
        (Some(classes), Some(data)) if classes != data.class_names.len() => Err(Error::input(format!(
            "model.classes = {classes}, but the shards have {} classes: remove the key, it follows the data",
            data.class_names.len()
        ))),
        (_, Some(data)) => Ok(data.class_names.clone()),
        (Some(classes), None) => Ok((0..classes).map(|k| format!("class {k}")).collect()),
        (None, None) => Err(Error::input(
            "the number of classes is unknown: no shards match data.train, and model.classes is not set; set it to \
             plan without data",
        )),
    }
}
