//! One pass over the test clips with fixed parameters, on all ranks of a job.

use super::console::{Console, Observer, Totals};
use crate::Result;
use crate::backend::stage::Fit;
use crate::checkpoint::Checkpoint;
use crate::comm::World;
use crate::config::Config;
use crate::data::Views;
use crate::pipeline::orders::Requests;
use crate::pipeline::{self, Origin, Parts, RunRange, frames_of, stage_of};
use crate::setup::{Purpose, Setup};

/// An evaluation, or a prediction, planned.
pub struct Evaluator<'w> {
    world: &'w World,
    setup: Setup,
    range: RunRange,
}

impl<'w> Evaluator<'w> {
    /// Plans a pass of `checkpoint`'s network over `data.test` of `config`, each video in `views`; of at most `batches`, if given.
    /// Where the checkpoint has a moving average of the parameters, that is the network. Of more ranks than modules as many as make
    /// whole pipelines take part, which share the clips.
    ///
    /// # Errors
    /// [`crate::Error::Input`] for whatever in configuration, data or number of ranks cannot work.
    pub fn new(
        world: &'w World,
        config: &Config,
        checkpoint: Checkpoint,
        purpose: Purpose,
        views: Views,
        batches: Option<u64>,
    ) -> Result<Self> {
        let manifest = checkpoint.manifest();
        let trained = (&manifest.class_names[..], &*checkpoint.path().display().to_string());
        let setup = Setup { views, ..Setup::for_classes(config, world.size(), purpose, trained)? };
        // A prediction looks twice at the same shards.
        if world.rank() == 0 && purpose == Purpose::Evaluate {
            for warning in setup.unlike_trained(manifest.stored, manifest.input, manifest.fps) {
                log::warn!("{warning}");
            }
        }
        let total = setup.total_batches()?;
        setup.dataset.as_ref().map_or(Ok(()), |dataset| setup.stream(0, 0, total).fits(dataset))?;
        let end = batches.map_or(total, |batches| total.min(batches));
        let from = Some(Origin::Checkpoint(checkpoint, Fit::Averaged));
        let range = RunRange { first: 0, end, total, from, record: false, validates_first: false, trace: None };
        Ok(Evaluator { world, setup, range })
    }

    /// The same with the parameters themselves, whether there is a moving average of them or not.
    pub fn raw(mut self) -> Self {
        if let Some(Origin::Checkpoint(_, fit)) = &mut self.range.from {
            *fit = Fit::Exact;
        }
        self
    }

    /// The pass as planned.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// How many batches it takes.
    pub fn batches(&self) -> u64 {
        self.range.end
    }

    /// Runs it. `observer` is called on rank 0 after every batch; the last module's report has logits and labels. Collective.
    ///
    /// # Errors
    /// As [`super::Trainer::run`].
    pub fn run(&self, observer: Observer) -> Result<Totals> {
        let Evaluator { world, setup, range } = self;
        world.agree(setup.fingerprint(range.first)?, "configuration, dataset and checkpoint")?;
        let stage = |spec, w, site| stage_of(setup, range, spec, w, site);
        let frames = |r| frames_of(setup, range, r);
        let parts = Parts { stage: &stage, frames: &frames, gradients: None };
        let requests = Requests::default();
        let mut console = Console::new(setup, range.total, None, observer);
        pipeline::run(setup, world, range, &parts, &requests, |reports| console.follow(reports, range, &requests))?;
        Ok(console.totals())
    }
}
