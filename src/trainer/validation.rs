//! What a validation came to.

use std::fmt;

use serde::Serialize;

use crate::checkpoint::best::{Best, Metric};
use crate::config::Until;
use crate::metrics::Report;
use crate::nn::head::{Score, Task};

/// A validation's result.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Validated {
    /// Batches trained on before.
    pub batches: u64,
    /// Clips scored: all there are, each once.
    pub clips: u64,
    /// Mean loss of a step.
    pub loss: f64,
    /// Recognition: the share of clips whose label came first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    /// And among the first five.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Future frames: mean squared error of pixels within 0..=1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
    /// The same as peak signal-to-noise ratio, in decibels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psnr: Option<f64>,
    /// The mean squared error of a copy of the newest frame seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_mse: Option<f64>,
    /// Losses left out because they were not finite.
    pub skipped: u64,
    /// How long it took.
    pub seconds: f64,
    /// Seconds from the begin of the first batch to its end: of this process's life, as a batch's `elapsed`.
    pub elapsed: f64,
    /// Whether these are the best parameters so far, and kept.
    pub best: bool,
}

impl Validated {
    /// Whether training was to go on `until` this.
    pub fn reaches(&self, until: Until) -> bool {
        self.as_best().is_some_and(|best| best.reaches(until))
    }

    /// The checkpoint of these parameters with what it is compared by; none where losses were left out.
    pub(super) fn as_best(&self) -> Option<Best> {
        let (metric, value) = self.top1.map(|top1| (Metric::Top1, top1)).or(self.mse.map(|mse| (Metric::Mse, mse)))?;
        (self.skipped == 0).then(|| Best::new(self.batches, metric, value))
    }
}

impl fmt::Display for Validated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "validation after {} batches: loss {:.4}", self.batches, self.loss)?;
        if let (Some(top1), Some(top5)) = (self.top1, self.top5) {
            write!(f, "  top-1 {:.2} %  top-5 {:.2} %", 100.0 * top1, 100.0 * top5)?;
        }
        if let (Some(mse), Some(psnr), Some(copy)) = (self.mse, self.psnr, self.copy_mse) {
            write!(f, "  MSE {mse:.6}  PSNR {psnr:.2} dB  (copy of the newest frame seen: MSE {copy:.6})")?;
        }
        write!(f, "  {} clips in {:.1} s", self.clips, self.seconds)?;
        if self.best { f.write_str("; the best so far") } else { Ok(()) }
    }
}

/// Sums of the scores of an evaluation's batches, the same for any number of ranks and replicas: they are added in the order of
/// the clips, which replicas share batch by batch.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    loss_sum: f64,
    loss_steps: f64,
    clips: u64,
    top1: u64,
    top5: u64,
    pixel_error: f64,
    copy_error: f64,
    skipped: u64,
}

impl Tally {
    /// Adds one batch's reports of all workers, in their order.
    pub fn add(&mut self, reports: &[Report]) {
        for Report { score, skipped, .. } in reports {
            let &Score { loss_sum, loss_steps, clips, top1, top5, pixel_error, copy_error } = score;
            self.loss_sum += f64::from(loss_sum);
            self.loss_steps += f64::from(loss_steps);
            self.clips += clips as u64;
            self.top1 += top1 as u64;
            self.top5 += top5 as u64;
            self.pixel_error += f64::from(pixel_error);
            self.copy_error += f64::from(copy_error);
            self.skipped += u64::from(*skipped);
        }
    }

    /// Losses left out.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// What it comes to, after `batches` of training.
    pub fn result(&self, task: Task, batches: u64, seconds: f64) -> Validated {
        let share = |correct: u64| correct as f64 / self.clips.max(1) as f64;
        let (mse, copy) = (self.pixel_error / self.loss_steps, self.copy_error / self.loss_steps);
        let recognition = task == Task::Recognition;
        Validated {
            batches,
            clips: self.clips,
            loss: self.loss_sum / self.loss_steps,
            top1: recognition.then(|| share(self.top1)),
            top5: recognition.then(|| share(self.top5)),
            mse: (!recognition).then_some(mse),
            psnr: (!recognition).then(|| psnr(mse)),
            copy_mse: (!recognition).then_some(copy),
            skipped: self.skipped,
            seconds,
            elapsed: 0.0,
            best: false,
        }
    }
}

/// Peak signal-to-noise ratio, in decibels, of a mean squared error of values within 0..=1.
pub fn psnr(mean_square: f64) -> f64 {
    -10.0 * mean_square.log10()
}
