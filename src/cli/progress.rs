//! Progress of training and evaluation, batch by batch.

use std::collections::VecDeque;

use super::live::{Live, lasting};
use crate::config::{Config, Task};
use crate::nn::head::Score;
use crate::trainer::{BatchSummary, Validated};

/// Shows batches as they are done.
pub struct Progress {
    live: Live,
    recognition: bool,
    /// Checkpoints come every so many batches.
    checkpoints: Vec<u64>,
    since: Score,
    first: Option<u64>,
    lines: Score,
    speed: Speed,
}

/// Frames per second over the last seconds of training: reports of several batches may come at once, and show nothing of it.
#[derive(Default)]
struct Speed {
    /// Frames and seconds of training so far, from time to time, the newest behind.
    marks: VecDeque<(u64, f64)>,
    frames: u64,
    seconds: f64,
}

impl Speed {
    /// The seconds that it is over, if there were so many.
    const OVER: f64 = 10.0;
    /// The seconds from a mark to the next.
    const APART: f64 = 0.5;

    /// So many more frames, in so many seconds.
    fn add(&mut self, frames: u64, seconds: f64) {
        if self.marks.back().is_none_or(|(_, at)| self.seconds - at >= Self::APART) {
            self.marks.push_back((self.frames, self.seconds));
        }
        (self.frames, self.seconds) = (self.frames + frames, self.seconds + seconds);
        while self.marks.get(1).is_some_and(|(_, at)| self.seconds - at >= Self::OVER) {
            self.marks.pop_front();
        }
    }

    fn per_second(&self) -> f64 {
        let (frames, seconds) = self.marks.front().copied().unwrap_or_default();
        (self.frames - frames) as f64 / (self.seconds - seconds).max(1e-9)
    }
}

impl Progress {
    /// Progress of an evaluation of `task`, where this process is to `show` it.
    pub fn new(task: Task, show: bool) -> Self {
        let live = Live::new(0, "[{bar:8}] {pos}/{len} batches  {wide_msg}", show);
        let (since, lines) = (Score::default(), Score::default());
        let recognition = task == Task::Recognition;
        Progress { live, recognition, checkpoints: Vec::new(), since, first: None, lines, speed: Speed::default() }
    }

    /// Progress of a training run.
    pub fn of_training(config: &Config, show: bool) -> Self {
        let checkpoints = [config.run.checkpoint_every, config.train.validate_every];
        let checkpoints = checkpoints.into_iter().filter(|&every| every > 0).collect();
        Progress { checkpoints, ..Progress::new(config.model.task, show) }
    }

    /// One more batch is done.
    pub fn show(&mut self, summary: &BatchSummary) {
        let &BatchSummary { batches, total, .. } = summary;
        let first = *self.first.get_or_insert(batches - 1);
        self.speed.add(summary.frames, summary.seconds);
        self.since.add(&summary.score);
        self.lines.add(&summary.score);
        let rate = (batches - first) as f64 / self.live.seconds();
        let remaining = |to: u64| lasting((to - batches) as f64 / rate);
        let mut ends = format!("ETA {}", remaining(total));
        if let Some(next) = next_checkpoint(&self.checkpoints, batches, total) {
            ends += &format!(", checkpoint {}", remaining(next));
        }
        let text = |score: &Score| self.text(score, summary.validated.as_ref(), &ends);
        let (now, line) = (text(&self.since), format!("batch {batches}/{total}  {}", text(&self.lines)));
        if self.live.tell([batches, total], || now, || line) {
            self.lines = Score::default();
        }
        // The line that lives shows a moving window.
        if self.since.loss_steps > 50.0 * summary.score.loss_steps {
            self.since = Score::default();
        }
    }

    fn text(&self, score: &Score, validated: Option<&Validated>, ends: &str) -> String {
        let mut text = format!("loss {:.4}", score.loss());
        if self.recognition {
            text += &format!("  top-1 {:.1} %", 100.0 * score.top1 / score.clips.max(1.0));
        }
        if let Some(validated) = validated {
            text += &match (validated.top1, validated.mse) {
                (Some(top1), _) => format!("  validation {:.1} %", 100.0 * top1),
                (None, Some(mse)) => format!("  validation MSE {mse:.5}"),
                (None, None) => format!("  validation {:.4}", validated.loss),
            };
        }
        format!("{text}  {ends}  {:.0} frames/s", self.speed.per_second())
    }
}

/// The next number of batches after `done` at which a checkpoint is written: a multiple of one of `every`, or the `total`.
fn next_checkpoint(every: &[u64], done: u64, total: u64) -> Option<u64> {
    let next = |&every: &u64| (done / every).saturating_add(1).saturating_mul(every).min(total);
    every.iter().map(next).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thousand frames a second, of which reports come four at once; a slow start is forgotten.
    #[test]
    fn speed_is_over_seconds_whatever_comes_at_once() {
        let mut speed = Speed::default();
        speed.add(100, 7.0);
        assert!((speed.per_second() - 100.0 / 7.0).abs() < 1e-9);
        for _ in 0..100 {
            speed.add(100, 0.4);
            for _ in 0..3 {
                speed.add(100, 1e-9);
            }
        }
        assert!((speed.per_second() - 1000.0).abs() < 50.0, "{}", speed.per_second());
        assert!(speed.marks.len() < 30);
        // A batch that takes longer than what the speed is over.
        speed.add(100, 50.0);
        assert!((2.0..20.0).contains(&speed.per_second()), "{}", speed.per_second());
    }

    #[test]
    fn a_checkpoint_is_due_at_a_multiple_or_at_the_end() {
        assert_eq!(next_checkpoint(&[], 3, 10), None);
        assert_eq!([0, 3, 4, 8, 9].map(|done| next_checkpoint(&[4], done, 10).unwrap()), [4, 4, 8, 10, 10]);
        assert_eq!(next_checkpoint(&[4, 3], 4, 10), Some(6));
        assert_eq!(next_checkpoint(&[u64::MAX], 4, 10), Some(10));
    }
}
