//! Progress of a run: a bar on a terminal, plain lines in the log.

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
    speed: f64,
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
        Progress { bar, recognition, since, begun: now, first: None, last_line: now, lines, speed: 0.0 }
    }

    /// One more batch is done.
    pub fn show(&mut self, summary: &BatchSummary) {
        let first = *self.first.get_or_insert(summary.batches - 1);
        self.speed = if self.speed == 0.0 {
            summary.frames_per_second
        } else {
            0.95 * self.speed + 0.05 * summary.frames_per_second
        };
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
        format!("loss {:.4}{accuracy}  {:.0} frames/s", score.loss(), self.speed)
    }

    /// Takes the bar away.
    pub fn finish(self) {
        logging::around(None);
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
