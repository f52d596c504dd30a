//! What training adds to a worker: when and how parameters change, and when the module is written.

use std::ops::Range;
use std::sync::mpsc;

use super::worker::{Worker, progress};
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::backend::stage::{Lent, Stage};
use crate::checkpoint::writer::Writer;
use crate::comm::Orders;
use crate::comm::all_reduce::{AllReduce, Buckets};
use crate::config::UpdateEvery;
use crate::method::schedule::Tick;
use crate::metrics::Phase;
use crate::nn::optim::LrSchedule;
use crate::{Error, Result};

/// A module's mean gradient of one batch, one parameter after another.
pub struct Gradient {
    /// i, from 1.
    pub module: usize,
    /// Of which batch.
    pub batch: u64,
    /// As [`crate::backend::stage::Stage::gradients`], over the number of steps.
    pub values: Vec<f32>,
}

/// How parameters change.
pub struct Training {
    /// The optimiser's learning rate.
    pub base_lr: f64,
    /// What this module multiplies it by throughout.
    pub lr_factor: f64,
    /// Learning rate over the run.
    pub lr_schedule: LrSchedule,
    /// Batches in the whole run, for that.
    pub total_batches: u64,
    /// When updates are made.
    pub every: UpdateEvery,
    /// Largest Euclidean norm of a module's gradient.
    pub clip_norm: Option<f64>,
    /// The mean with the module's replicas.
    pub all_reduce: Option<AllReduce>,
    /// At which tick of its window the module has its last backward pass.
    pub last_backward: Option<usize>,
    /// Where gradients go instead of into parameters.
    pub gradients: Option<mpsc::Sender<Gradient>>,
    /// Replica 0 only: writes the module.
    pub saver: Option<Saver>,
    /// Norm of the last update's gradient, for the report.
    pub grad_norm: f64,
    /// Learning rate of the last update, for the report.
    pub lr: f64,
}

/// When a worker writes its module, and what writes it.
pub struct Saver {
    /// Writes into the run's `checkpoints` folder.
    pub writer: Writer,
    /// Batches between checkpoints.
    pub every: u64,
    /// The batch behind the last one of this run: a checkpoint is written there too.
    pub end: u64,
}

impl Saver {
    /// Is a checkpoint due when `batches` are done?
    fn is_due(&self, batches: u64) -> bool {
        batches.is_multiple_of(self.every) || batches == self.end
    }
}

/// Sums of gradients that are lent out.
struct Sums<'a> {
    stage: &'a mut dyn Stage,
    lent: Lent,
}

impl Buckets for Sums<'_> {
    fn words(&self) -> usize {
        self.lent.words()
    }

    fn is_there(&self, bucket: &Range<usize>) -> Result<bool> {
        self.lent.is_there(bucket)
    }

    fn write(&mut self, words: Range<usize>, to: SlotMut<'_>) -> Result<Done> {
        match self.lent.flat() {
            Some(flat) => flat.write(words, to),
            None => self.lent.at(&words).write(0..words.len(), to),
        }
    }

    fn sum(&mut self, words: Range<usize>, terms: &[Option<Slot<'_>>], scale: f32) -> Result<Done> {
        match self.lent.flat() {
            Some(flat) => flat.sum(words, terms, scale),
            None => self.lent.at(&words).sum(0..words.len(), terms, scale),
        }
    }

    fn read(&mut self, words: Range<usize>, from: Slot<'_>) -> Result<Done> {
        match self.lent.flat() {
            Some(flat) => flat.read(words, from),
            None => self.lent.at(&words).read(0..words.len(), from),
        }
    }

    fn done(&mut self, bucket: &Range<usize>) -> Result<()> {
        self.stage.put(&mut self.lent, bucket)
    }
}

impl Worker {
    /// Whether gradients are averaged over the replicas behind this tick's backward pass: the last one before an update, or before the
    /// end of the clips, where a checkpoint holds one sum, which must be every replica's.
    pub(super) fn shares_after(&self, tick: &Tick) -> bool {
        let Some(Training { all_reduce: Some(_), every, last_backward, .. }) = &self.training else { return false };
        let updates = matches!(every, UpdateEvery::Steps(every) if self.stage.steps() + 1 >= *every);
        tick.backward.is_some() && (updates || *last_backward == Some(tick.at))
    }

    /// Updates the parameters if steps are what counts, and so many were made.
    pub(super) fn update_between_steps(&mut self, batch: u64) -> Result<()> {
        match &self.training {
            Some(Training { every: UpdateEvery::Steps(every), .. }) if self.stage.steps() >= *every => {
                self.update(batch)
            }
            _ => Ok(()),
        }
    }

    /// Updates the parameters at the end of the module's own window, if batches are what counts: no barrier, every module updates when
    /// it is through.
    pub(super) fn update_after_window(&mut self, batch: u64) -> Result<()> {
        match &self.training {
            Some(Training { every: UpdateEvery::Named(_), .. }) if self.stage.steps() > 0 => self.update(batch),
            _ => Ok(()),
        }
    }

    /// Replaces the sums of gradients by their means over the replicas, in buckets, each as soon as it is there, on the
    /// host or in the GPU's memory. Meanwhile this worker's messages go on.
    pub(super) fn average_gradients(&mut self, batch: u64, step: usize) -> Result<()> {
        let Worker { stage, training, inputs, outputs, watch, .. } = self;
        let Some(training) = training else { return Ok(()) };
        let Some(all_reduce) = &mut training.all_reduce else { return Ok(()) };
        watch.enter(Phase::Backward);
        let lent = stage.lend()?;
        let (computed, mut computing) = (lent.computed(), true);
        let mut beside = || {
            // What a backward pass hides is no time of the all-reduce's.
            if computing && computed.is_done()? {
                watch.enter(Phase::AllReduce);
                computing = false;
            }
            progress(inputs, outputs)
        };
        beside()?;
        let mut sums = Sums { stage: stage.as_mut(), lent };
        all_reduce.mean_of(&mut sums, &mut beside, batch, step as u32)?;
        let Sums { stage, lent } = sums;
        stage.take_back(lent)
    }

    /// Applies the optimiser to G, the mean of the steps' gradients since the last update (and over replicas).
    fn update(&mut self, batch: u64) -> Result<()> {
        self.watch.enter(Phase::Optimizer);
        let Some(training) = &mut self.training else { return Ok(()) };
        let divisor = self.schedule.mean_over().map_or(self.stage.steps() as f64, |losses| losses as f64);
        let mut factor = training.lr_factor * training.lr_schedule.factor(batch, training.total_batches);
        if let Some(gradients) = &training.gradients {
            let values = self.stage.gradients()?.into_iter().map(|g| (f64::from(g) / divisor) as f32).collect();
            // Nobody is left to be told when the receiver is gone.
            let _ = gradients.send(Gradient { module: self.index, batch, values });
            factor = 0.0;
        }
        let updated = self.stage.update(factor, divisor, training.clip_norm)?;
        training.lr = factor * training.base_lr;
        training.grad_norm = updated.grad_norm.unwrap_or(training.grad_norm);
        updated.not_finite.map_or(Ok(()), |what| self.non_finite.note(what))
    }

    /// Remembers the module as it is before a batch, in case that has to be undone.
    pub(super) fn mark(&mut self) -> Result<()> {
        match &self.training {
            Some(Training { saver: Some(_), .. }) => self.stage.mark(),
            _ => Ok(()),
        }
    }

    /// Hands the module over to be written if a checkpoint is due after `batch`, or was decided on; at the end of the run
    /// waits until it is written. Returns the newest checkpoint that this worker's part of is on disk.
    pub(super) fn save(&mut self, batch: u64) -> Result<Option<u64>> {
        let Some(training) = &mut self.training else { return Ok(None) };
        let Some(saver) = &mut training.saver else { return Ok(None) };
        let (done, decision) = (batch + 1, self.decision);
        let validates =
            self.validation.as_ref().is_some_and(|validation| validation.is_due(done, training.total_batches));
        let ordered = decision.intersects(Orders::CHECKPOINT | Orders::ENDS);
        if saver.is_due(done) || validates || ordered {
            self.watch.enter(Phase::Checkpoint);
            saver.writer.begin(done, self.stage.snapshot()?)?;
        }
        if done != saver.end && !decision.intersects(Orders::ENDS) {
            return saver.writer.written();
        }
        match saver.writer.wait()? {
            Some(written) if written == done => Ok(Some(written)),
            _ => Err(Error::Run(format!(
                "the run's last checkpoint, of {done} batches, could not be written (see above)"
            ))),
        }
    }

    /// Undoes `batch`: writes the module as it was before it, if no checkpoint of that was written yet.
    pub(super) fn save_before(&mut self, batch: u64) -> Result<Option<u64>> {
        let Some(Training { saver: Some(saver), .. }) = &mut self.training else { return Ok(None) };
        let Some(before) = self.stage.rewind()? else { return Ok(None) };
        self.watch.enter(Phase::Checkpoint);
        if saver.writer.wait()? != Some(batch) {
            saver.writer.begin(batch, before)?;
        }
        match saver.writer.wait()? {
            Some(written) if written == batch => Ok(Some(written)),
            _ => Err(Error::Run(format!("the checkpoint of {batch} batches could not be written (see above)"))),
        }
    }

    /// Waits until the checkpoint of `done` batches is written, which are those the module was trained on; begins with it where
    /// none is under way. It `must` be, or the policy decides.
    pub(super) fn save_as_is(&mut self, done: u64, must: bool) -> Result<Option<u64>> {
        let Some(Training { saver: Some(saver), .. }) = &mut self.training else { return Ok(None) };
        self.watch.enter(Phase::Checkpoint);
        if saver.writer.wait()? != Some(done) {
            saver.writer.begin(done, self.stage.snapshot()?)?;
        }
        match saver.writer.wait()? {
            Some(written) if must && written != done => {
                Err(Error::Run(format!("the checkpoint of {done} batches could not be written (see above)")))
            }
            written => Ok(written),
        }
    }

    /// Writes the module as it is before the first batch.
    pub(super) fn save_start(&mut self) -> Result<Option<u64>> {
        let Some(Training { saver: Some(saver), .. }) = &mut self.training else { return Ok(None) };
        self.watch.enter(Phase::Checkpoint);
        saver.writer.begin(0, self.stage.snapshot()?)?;
        saver.writer.wait()
    }
}
