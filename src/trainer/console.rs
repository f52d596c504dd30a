//! What rank 0 does with the workers' reports: metrics, progress, and completing checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::recorder::{Line, Recorder, WorkerLine};
use super::validation::{Tally, Validated};
use crate::Result;
use crate::comm::{BatchId, Orders};
use crate::config::Until;
use crate::metrics::{Report, TimeAccount};
use crate::nn::head::{Score, Task};
use crate::pipeline::orders::Requests;
use crate::pipeline::{Reports, RunRange};
use crate::setup::Setup;
use crate::setup::grid::Grid;
use crate::setup::validation::Validation;

/// One batch, all replicas together, as rank 0 shows it.
#[derive(Clone, Debug)]
pub struct BatchSummary {
    /// Batches done, this one included.
    pub batches: u64,
    /// Batches in the whole run.
    pub total: u64,
    /// The last module's counts.
    pub score: Score,
    /// Its frames: R·B·T.
    pub frames: u64,
    /// Seconds since the batch before it was done, validations aside.
    pub seconds: f64,
    /// Frames per second, from these two.
    pub frames_per_second: f64,
    /// The newest validation of this process's life.
    pub validated: Option<Validated>,
    /// Every worker's report, by worker number.
    pub reports: Vec<Report>,
}

/// What is called after each batch.
pub type Observer<'a> = &'a mut (dyn FnMut(&BatchSummary) + Send);

/// What a run amounted to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Batches done in this process's life.
    pub batches: u64,
    /// Counts of the last quarter of them.
    pub recent: Score,
    /// Counts of all of them.
    pub score: Score,
    /// Time accounts by worker, summed.
    pub time: Vec<TimeAccount>,
    /// Seconds from the first batch's begin to the last one's end, but for validations.
    pub seconds: f64,
    /// Frames worked on.
    pub frames: u64,
    /// By link, seconds that workers waited on it where it was the one they waited on longest in a batch.
    pub waits: BTreeMap<u32, f64>,
    /// Losses, cotangents and updates left out because they were not finite.
    pub skipped: u64,
    /// Times a damaged video was passed over.
    pub videos_skipped: u64,
    /// The validations made.
    pub validations: Vec<Validated>,
    /// What ended the run early; empty if nothing did.
    pub decision: Orders,
    /// Why the batch that was undone could not be read.
    pub failure: Option<String>,
}

/// The reports of one batch and what was decided, with what others were asked for passed on to this process's workers.
fn heard(reports: &mut Reports, batch: BatchId, requests: &Requests) -> Result<(Vec<Report>, Orders)> {
    let reports = reports.gather(batch)?;
    let all = |of: fn(&Report) -> Orders| reports.iter().map(of).fold(Orders::empty(), |all, one| all | one);
    let (asked, decided) = (all(|r| r.asked), all(|r| r.decision));
    requests.raise(asked);
    Ok((reports, decided))
}

/// Gathers reports batch by batch.
pub struct Console<'a> {
    grid: Grid,
    total: u64,
    frames_a_batch: u64,
    recorder: Option<Recorder>,
    observer: Observer<'a>,
    begun: Instant,
    last: Instant,
    done: Vec<Score>,
    time: Vec<TimeAccount>,
    waits: BTreeMap<u32, f64>,
    skipped: u64,
    videos_skipped: u64,
    task: Task,
    validation: Option<Arc<Validation>>,
    until: Option<Until>,
    validations: Vec<Validated>,
    /// Seconds of `begun` to `last` that went into them.
    validating: f64,
}

impl<'a> Console<'a> {
    /// A console for a run of `total` batches.
    pub fn new(setup: &Setup, total: u64, recorder: Option<Recorder>, observer: Observer<'a>) -> Self {
        let (grid, data) = (setup.grid, &setup.config.data);
        let now = Instant::now();
        Console {
            grid,
            total,
            frames_a_batch: (grid.replicas * data.batch * data.frames) as u64,
            recorder,
            observer,
            begun: now,
            last: now,
            done: Vec::new(),
            time: vec![TimeAccount::default(); grid.workers()],
            waits: BTreeMap::new(),
            skipped: 0,
            videos_skipped: 0,
            task: setup.config.model.task,
            validation: setup.validation.clone(),
            until: setup.config.train.until,
            validations: Vec::new(),
            validating: 0.0,
        }
    }

    /// Takes all reports of a range, and passes on to this process's workers what others were asked for.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a worker is gone; [`crate::Error::Io`] if metrics or a checkpoint cannot be written.
    pub fn follow(&mut self, reports: &mut Reports, range: &RunRange, requests: &Requests) -> Result<()> {
        self.started(&reports.gather(range.first)?)?;
        if range.validates_first && self.validate(reports, range.first, requests)? {
            return Ok(());
        }
        for batch in range.first..range.end {
            let (of_batch, decided) = heard(reports, batch.into(), requests)?;
            let ends = decided.intersects(Orders::ENDS);
            if decided.contains(Orders::UNDO) {
                self.undone(&of_batch)?;
            } else {
                self.batch(batch, of_batch, ends || batch + 1 == range.end)?;
            }
            let validates = |validation: &Arc<Validation>| range.record && validation.is_due(batch + 1, range.total);
            let due = self.validation.as_ref().is_some_and(validates);
            if ends || due && self.validate(reports, batch + 1, requests)? {
                break;
            }
        }
        Ok(())
    }

    /// The validation after `done` batches. Returns whether it was decided that the run ends.
    fn validate(&mut self, reports: &mut Reports, done: u64, requests: &Requests) -> Result<bool> {
        let Some(validation) = self.validation.clone() else { return Ok(false) };
        let (mut tally, begun, mut frames) = (Tally::default(), Instant::now(), Vec::new());
        let mut ends = false;
        for place in 0..validation.batches {
            let (mut of_batch, decided) = heard(reports, BatchId::of_validation(done, place), requests)?;
            of_batch.iter_mut().for_each(|report| frames.append(&mut report.outputs));
            ends = decided.intersects(Orders::ENDS);
            self.time.iter_mut().zip(&of_batch).for_each(|(time, report)| time.add(&report.time));
            tally.add(&of_batch);
            let whole = place + 1 == validation.batches && !decided.contains(Orders::UNDO);
            if let Some(recorder) = self.recorder.as_mut().filter(|_| ends || whole) {
                recorder.complete(&of_batch, self.grid.modules, ends)?;
            }
            if whole {
                let mut validated = tally.result(self.task, done, begun.elapsed().as_secs_f64());
                validated.elapsed = self.begun.elapsed().as_secs_f64();
                if let Some(recorder) = &mut self.recorder {
                    recorder.validated(&mut validated)?;
                    recorder.frames(done, &frames)?;
                }
                log::info!("{validated}");
                if let Some(until) = self.until.filter(|&until| validated.reaches(until) && done < self.total) {
                    log::info!("train.until = {until} is reached: the run ends");
                    requests.raise(Orders::FINISH);
                }
                self.skipped += tally.skipped();
                self.validations.push(validated);
            }
            if ends {
                break;
            }
        }
        if let Some(recorder) = self.recorder.as_mut().filter(|_| ends || done == self.total) {
            recorder.flush()?;
        }
        // The time between batches is training's.
        self.validating += self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        Ok(ends)
    }

    /// All workers are set up; if they wrote their modules, checkpoint 0 is completed.
    fn started(&mut self, reports: &[Report]) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            recorder.complete(reports, self.grid.modules, false)?;
        }
        (self.begun, self.last) = (Instant::now(), Instant::now());
        Ok(())
    }

    /// One batch is through all modules; `last`: no other follows.
    fn batch(&mut self, batch: u64, reports: Vec<Report>, last: bool) -> Result<()> {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64().max(1e-9);
        self.last = now;
        let (mut score, mut skipped, mut videos_skipped) = (Score::default(), 0, 0);
        for (time, report) in self.time.iter_mut().zip(&reports) {
            score.add(&report.score);
            skipped += u64::from(report.skipped);
            videos_skipped += u64::from(report.videos_skipped);
            *self.waits.entry(report.link).or_default() += f64::from(report.waited);
            time.add(&report.time);
        }
        self.done.push(score);
        self.skipped += skipped;
        self.videos_skipped += videos_skipped;
        let summary = BatchSummary {
            batches: batch + 1,
            total: self.total,
            score,
            frames: self.frames_a_batch,
            seconds,
            frames_per_second: self.frames_a_batch as f64 / seconds,
            validated: self.validations.last().cloned(),
            reports,
        };
        if let Some(recorder) = &mut self.recorder {
            let workers = summary.reports.iter().enumerate().map(|(w, report)| {
                let (module, replica) = self.grid.module_and_replica(w);
                let &Report { backward_steps, grad_norm, ref time, .. } = report;
                WorkerLine { module, replica, rank: self.grid.rank_of(w), backward_steps, grad_norm, time }
            });
            let counted = score.clips.max(1.0);
            recorder.write(&Line {
                batches: batch + 1,
                loss: score.loss(),
                top1: score.top1 / counted,
                top5: score.top5 / counted,
                lr: summary.reports.last().map_or(0.0, |r| r.lr),
                frames_per_second: summary.frames_per_second,
                elapsed: (now - self.begun).as_secs_f64(),
                skipped,
                videos_skipped,
                workers: workers.collect(),
            })?;
            recorder.complete(&summary.reports, self.grid.modules, last)?;
            if last {
                recorder.flush()?;
            }
        }
        (self.observer)(&summary);
        Ok(())
    }

    /// A batch was undone: the checkpoint of what was before it is completed, and that is all.
    fn undone(&mut self, reports: &[Report]) -> Result<()> {
        match &mut self.recorder {
            Some(recorder) => recorder.complete(reports, self.grid.modules, true).and_then(|()| recorder.flush()),
            None => Ok(()),
        }
    }

    /// What it all amounted to.
    pub fn totals(self) -> Totals {
        let sum = |scores: &[Score]| {
            scores.iter().fold(Score::default(), |mut sum, s| {
                sum.add(s);
                sum
            })
        };
        let batches = self.done.len() as u64;
        let recent = self.done.len() - self.done.len().div_ceil(4);
        Totals {
            batches,
            recent: sum(&self.done[recent..]),
            score: sum(&self.done),
            time: self.time,
            seconds: ((self.last - self.begun).as_secs_f64() - self.validating).max(0.0),
            frames: batches * self.frames_a_batch,
            waits: self.waits,
            skipped: self.skipped,
            videos_skipped: self.videos_skipped,
            validations: self.validations,
            decision: Orders::empty(),
            failure: None,
        }
    }
}
