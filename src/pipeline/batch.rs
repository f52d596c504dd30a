//! One batch of one module: what comes before its first tick and after its last.

use super::pixels::{PixelError, Predictions};
use super::role::Source;
use super::worker::{At, Worker};
use crate::Result;
use crate::comm::{BatchId, Header, Kind, Orders};
use crate::method::Schedule;
use crate::method::schedule::Tick;
use crate::metrics::{Phase, Place, Report};
use crate::nn::head::Score;

impl Worker {
    /// One batch.
    ///
    /// # Errors
    /// Whatever fails, with module, batch, step and tick in front.
    pub(super) fn run_batch(&mut self, batch: u64) -> Result<()> {
        let schedule = self.schedule.clone();
        let validated = self.validation.as_ref().map_or(0, |validation| validation.ticks_before_batch(batch));
        let first = schedule.first_tick(batch) + validated;
        self.record_from(batch, first)?;
        self.mark()?;
        self.follow(&schedule, batch.into(), first)?;
        self.end(batch)?;
        self.record_as_ordered();
        Ok(())
    }

    /// The module's window of one batch, which begins at tick `first` at module 1.
    pub(super) fn follow(&mut self, schedule: &Schedule, batch: BatchId, first: u64) -> Result<()> {
        self.watch.at(Place { batch, tick: first, ..Place::default() });
        self.begin(batch)?;
        let window = schedule.window(self.index);
        for (n, tick) in window.iter().enumerate() {
            let at = At { batch, step: tick.step(), tick: first + tick.at as u64 };
            self.watch.at(place(tick, at));
            self.tick(tick, window.get(n + 1), at).map_err(|e| e.within(&at.place(self.index)))?;
        }
        Ok(())
    }

    /// Clears every register and passes the clips' labels on.
    fn begin(&mut self, batch: BatchId) -> Result<()> {
        self.decision = Orders::empty();
        self.watch.enter(Phase::Data);
        if let Some(Err(e)) = self.role.source().map(|source| source.begin(batch)) {
            let error = e.within(&format!("module 1, {batch}"));
            match self.role.source_if_undoable(0, self.decision_step) {
                Some(source) => source.give_up(error.to_string()),
                None => return Err(error),
            }
        }
        self.role.send_labels(batch)?;
        self.watch.enter(Phase::WaitActivations);
        let labels = self.role.labels(batch, self.clips)?;
        self.stage.begin(labels.as_ref(), self.trains_on(batch))
    }

    /// The end of the module's own window.
    fn end(&mut self, batch: u64) -> Result<()> {
        if self.decision.contains(Orders::UNDO) {
            let saved = self.save_before(batch)?;
            return self.send_report(batch, Report { saved, ..Report::default() });
        }
        self.stage.unmark();
        self.update_after_window(batch)?;
        self.watch.enter(Phase::Backward);
        let end = self.stage.end()?;
        end.not_finite.into_iter().try_for_each(|what| self.non_finite.note(what))?;
        self.watch.enter(Phase::Other);
        let saved = self.save(batch)?;
        let (link, waited) = self.longest_wait();
        let mut report = Report {
            score: self.score(end.score),
            backward_steps: self.schedule.backwards(self.index).count() as u32,
            saved,
            skipped: self.non_finite.take(),
            link,
            waited,
            videos_skipped: self.role.source().map_or(0, |source| source.skipped() as u32),
            ..Report::default()
        };
        match &mut self.training {
            Some(training) => {
                training.grad_norm = end.grad_norm.unwrap_or(training.grad_norm);
                (report.grad_norm, report.lr) = (training.grad_norm as f32, training.lr as f32);
            }
            None if end.score.is_some() => {
                report.outputs = self.predictions.as_mut().map_or(end.logits, Predictions::take);
                report.labels = end.labels;
            }
            None => {}
        }
        report.time = self.watch.take();
        self.send_report(batch, report)
    }

    /// Says that it is ready; before the first batch of all also writes its module into checkpoint 0.
    pub(super) fn start(&mut self, first: u64) -> Result<()> {
        let saved = if first == 0 { self.save_start()? } else { None };
        let report = Report { saved, time: self.watch.take(), ..Report::default() };
        self.send_report(first, report)
    }

    /// What the stage has counted, and in evaluation of future frames the errors of pixels.
    pub(super) fn score(&mut self, counted: Option<Score>) -> Score {
        let mut score = counted.unwrap_or_default();
        score.pixel_error = self.pixels.as_mut().map_or(0.0, PixelError::take);
        score.copy_error = self.role.source().map_or(0.0, Source::take_copy_error);
        score
    }

    /// Sends a report of `batch` to the console.
    pub(super) fn send_report(&mut self, batch: impl Into<BatchId>, report: Report) -> Result<()> {
        self.watch.enter(Phase::Other);
        let (id, sender) = &mut self.console;
        let report = Report { asked: self.requests.pending(), decision: self.decision, ..report };
        let words = report.write(sender.host_slot()?)?;
        sender.start(&Header::new(Kind::Report, *id, batch, 0, [words as u32, 1, 1, 1]))
    }
}

/// A tick, for a recording.
fn place(tick: &Tick, at: At) -> Place {
    let forward = tick.forward.as_ref().map(|forward| forward.step);
    let backward = tick.backward.as_ref().map(|backward| backward.step);
    Place { batch: at.batch, tick: at.tick, forward, backward }
}
