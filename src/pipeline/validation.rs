//! Validation while training: after a batch, the validation clips pass through the pipeline as further batches do.
//!
//! A module begins them as soon as its own window of the batch, and its update, are done, and goes on training as soon as it is
//! through with them: modules need not wait for one another, and nothing drains for longer than a clip. Only forward passes and
//! losses are computed, at the parameters that every module has after the same batch. Headers tell these batches from those that
//! are trained on ([`BatchId`]). Replicas share the clips.

use super::pixels::Predictions;
use super::worker::Worker;
use crate::Result;
use crate::comm::{BatchId, Orders};
use crate::metrics::Report;

impl Worker {
    /// The validation after `done` batches, if there is to be one: all of its clips, or as many as are through when it is decided
    /// that the run ends. Then the parameters as they are here are in a checkpoint.
    ///
    /// # Errors
    /// As [`Worker::run_batch`].
    pub(super) fn validate(&mut self, done: u64) -> Result<()> {
        let Some(validation) = self.validation.clone() else { return Ok(()) };
        self.watch.validate(true);
        for place in 0..validation.batches {
            let batch = BatchId::of_validation(done, place);
            self.follow(&validation.schedule, batch, validation.first_tick(&self.schedule, done, place))?;
            let end = self.stage.end()?;
            end.not_finite.into_iter().try_for_each(|what| self.non_finite.note(what))?;
            let ends = self.decision.intersects(Orders::ENDS);
            let saved = if ends || place + 1 == validation.batches { self.save_as_is(done, ends)? } else { None };
            // Waits are counted where clips are trained on.
            self.longest_wait();
            let score = self.score(end.score);
            let (skipped, time) = (self.non_finite.take(), self.watch.take());
            let outputs = self.predictions.as_mut().map_or(Vec::new(), Predictions::take);
            self.send_report(batch, Report { score, saved, skipped, time, outputs, ..Report::default() })?;
            if ends {
                break;
            }
        }
        self.watch.validate(false);
        Ok(())
    }
}
