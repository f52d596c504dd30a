//! Progress of a run: a bar on a terminal, plain lines in the log.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::logging;
use crate::nn::head::Score;
use crate::trainer::BatchSummary;

/// Plain lines come this often.
const EVERY: Duration = Duration::from_secs(10);

/// Shows batches as they are done.
pub struct Progress {
    bar: Option<ProgressBar>,
    recognition: bool,
    since: Score,
    begun: Instant,
    first: Option<u64>,
    last_line: Instant,
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
    /// Progress of a run of recognition, or of future frames.
    pub fn new(recognition: bool) -> Self {
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            // The template is constant; an unusable one would only lose the look.
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} batches  {msg}  ETA {eta}") {
                bar.set_style(style);
            }
            bar
        });
        logging::around(bar.clone());
        let (since, lines) = (Score::default(), Score::default());
        Progress { bar, recognition, since, begun: now, first: None, last_line: now, lines, speed: Speed::default() }
    }

    /// One more batch is done.
    pub fn show(&mut self, summary: &BatchSummary) {
        let first = *self.first.get_or_insert(summary.batches - 1);
        self.speed.add(summary.frames, summary.seconds);
        self.since.add(&summary.score);
        self.lines.add(&summary.score);
        let finished = summary.batches == summary.total;
        if let Some(bar) = &self.bar {
            bar.set_length(summary.total);
            if bar.position() == 0 && first > 0 {
                bar.reset_eta();
            }
            bar.set_position(summary.batches);
            bar.set_message(self.text(&self.since));
            // The bar shows a moving window.
            if self.since.loss_steps > 50.0 * summary.score.loss_steps {
                self.since = Score::default();
            }
        }
        if self.last_line.elapsed() >= EVERY || finished {
            let rate = (summary.batches - first) as f64 / self.begun.elapsed().as_secs_f64().max(1e-9);
            let left = (summary.total - summary.batches) as f64 / rate;
            let line =
                format!("batch {}/{}  {}  ETA {:.0} s", summary.batches, summary.total, self.text(&self.lines), left);
            match self.bar {
                Some(_) => logging::to_file(&line),
                None => log::info!("{line}"),
            }
            self.last_line = Instant::now();
            self.lines = Score::default();
        }
    }

    fn text(&self, score: &Score) -> String {
        let accuracy = if self.recognition {
            format!("  top-1 {:.1} %", 100.0 * score.top1 / score.clips.max(1.0))
        } else {
            String::new()
        };
        format!("loss {:.4}{accuracy}  {:.0} frames/s", score.loss(), self.speed.per_second())
    }

    /// Takes the bar away.
    pub fn finish(self) {
        logging::around(None);
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
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
}
