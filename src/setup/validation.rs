//! What is validated on while training, and when.

use std::sync::Arc;

use super::{frame_size, open};
use crate::config::{Config, Task};
use crate::data::Dataset;
use crate::method::Schedule;
use crate::{Error, Result};

/// Validation while training.
#[derive(Clone, Debug)]
pub struct Validation {
    /// The videos.
    pub dataset: Arc<Dataset>,
    /// It comes whenever so many more batches were trained on, and at the end.
    pub every: u64,
    /// How many batches it takes, of all replicas together.
    pub batches: u64,
    /// Forward passes and losses alone.
    pub schedule: Arc<Schedule>,
}

impl Validation {
    /// Whether there is one when `done` batches of `total` were trained on.
    pub fn is_due(&self, done: u64, total: u64) -> bool {
        done > 0 && (done.is_multiple_of(self.every) || done == total)
    }

    fn ticks(&self) -> u64 {
        self.batches * self.schedule.period() as u64
    }

    /// The ticks of all validations before batch number `batch` is trained on.
    pub fn ticks_before_batch(&self, batch: u64) -> u64 {
        batch / self.every * self.ticks()
    }

    /// The tick, counted from the run's first, at which batch `place` of the validation after `done` batches begins at module 1.
    pub fn first_tick(&self, training: &Schedule, done: u64, place: u64) -> u64 {
        let before = done.div_ceil(self.every) - 1;
        training.first_tick(done) + before * self.ticks() + place * self.schedule.period() as u64
    }
}

/// The videos to validate on, which must be like those trained on.
pub(super) fn videos(config: &Config, trained_on: &Dataset) -> Result<Dataset> {
    let (key, globs) = match config.data.validation.list() {
        globs if globs.is_empty() => ("data.test", config.data.test.list()),
        globs => ("data.validation", globs),
    };
    if globs.is_empty() {
        return Err(Error::input(
            "train.validate_every is set, but there is nothing to validate on: give shards as data.validation or data.test",
        ));
    }
    let dataset = open(key, &globs)?;
    if config.model.task == Task::Recognition && dataset.class_names != trained_on.class_names {
        return Err(Error::input(format!(
            "{key}: these shards have other classes than those of data.train: validation needs the same, in the same order"
        )));
    }
    let (size, wanted) = (frame_size(config, Some(&dataset))?, frame_size(config, Some(trained_on))?);
    if size != wanted {
        return Err(Error::input(format!(
            "{key}: its frames are {}x{} (height x width), those of data.train {}x{}: set data.crop, or prepare both alike",
            size.0, size.1, wanted.0, wanted.1
        )));
    }
    Ok(dataset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::{Boundary, Graph, LossAt};

    /// With a validation of two batches after every three, and one at the end: ticks never go back, nor stand for two things.
    #[test]
    fn ticks_go_on_through_validations() {
        let graph = Graph::new(2, &[]).unwrap();
        let schedule = Schedule::evaluation(&graph, 5, Boundary::Flow, LossAt::EveryStep).unwrap();
        let dataset = Dataset {
            shards: Vec::new(),
            class_names: Vec::new(),
            height: 1,
            width: 1,
            fps: 1.0,
            name: String::new(),
            encoding: crate::data::Encoding::Raw,
            videos: Vec::new(),
        };
        let validation =
            Validation { dataset: Arc::new(dataset), every: 3, batches: 2, schedule: Arc::new(schedule.clone()) };
        let total = 7;
        let mut first = Vec::new();
        for batch in 0..total {
            first.push(schedule.first_tick(batch) + validation.ticks_before_batch(batch));
            if validation.is_due(batch + 1, total) {
                first.extend((0..2).map(|place| validation.first_tick(&schedule, batch + 1, place)));
            }
        }
        // Seven batches of five ticks, and three validations of two.
        assert_eq!(first, (0..13).map(|n| 5 * n).collect::<Vec<_>>());
        assert!(!validation.is_due(0, total) && !validation.is_due(4, total));
    }
}
