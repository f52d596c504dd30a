//! What a worker tells the console at the end of every clip.

use crate::pipeline::metrics::{PHASES, Score, TimeAccount};

/// One worker's clip.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The last module's counts; zero elsewhere.
    pub score: Score,
    /// Where the time went since the last report.
    pub time: TimeAccount,
    /// Steps of the clip with backward work.
    pub backward_steps: f32,
    /// Euclidean norm of the (mean) gradient of the last update in the clip; zero without one.
    pub grad_norm: f32,
    /// Learning rate of that update.
    pub lr: f32,
    /// The newest checkpoint, by batches of clips done, that the worker's module is on disk in.
    pub saved: Option<u64>,
    /// Losses, cotangents and updates left out because they were not finite.
    pub skipped: f32,
    /// Module 1: places of the batch that damaged videos left empty.
    pub videos_skipped: f32,
    /// The link the worker waited on longest since the last report.
    pub link: u32,
    /// Seconds it waited there.
    pub waited: f32,
    /// Evaluation, last module: the clips' mean logits, `[B, K]`; labels are in [`Report::labels`].
    pub logits: Vec<f32>,
    /// Evaluation, last module: the labels, `[B]`, −1 where the batch is padded.
    pub labels: Vec<f32>,
}

/// Words in front of the logits.
const FIXED: usize = Score::WORDS + PHASES + 9;
/// Whole numbers up to this are exact as a float.
const EXACT: u64 = 1 << 24;

/// In a report's header flags: how far the decision about its clip is shifted; below it is what was asked for.
pub const DECIDED: u32 = 8;

impl Report {
    /// Words of a report with the logits and labels of `batch` clips over `classes` (0: without).
    pub fn words(batch: usize, classes: usize) -> usize {
        FIXED + if classes > 0 { batch * (classes + 1) } else { 0 }
    }

    /// Writes the report at the front of a message's payload; returns the words written.
    pub fn write(&self, out: &mut [f32]) -> usize {
        let saved = self.saved.map_or(0, |clips| clips + 1);
        let fixed = self.score.to_array().into_iter().chain(self.time.to_array()).chain([
            self.backward_steps,
            self.grad_norm,
            self.lr,
            self.skipped,
            self.videos_skipped,
            self.link as f32,
            self.waited,
            (saved % EXACT) as f32,
            (saved / EXACT) as f32,
        ]);
        let all = fixed.chain(self.logits.iter().copied()).chain(self.labels.iter().copied());
        let mut words = 0;
        for (place, value) in out.iter_mut().zip(all) {
            *place = value;
            words += 1;
        }
        words
    }

    /// Reads what [`Report::write`] wrote; `batch` is the number of clips if logits are in it.
    pub fn read(words: &[f32], batch: usize) -> Report {
        let at = |n: usize| words.get(n).copied().unwrap_or(0.0);
        let mut time = [0.0; PHASES];
        time.iter_mut().enumerate().for_each(|(n, t)| *t = at(Score::WORDS + n));
        let rest = words.get(FIXED..).unwrap_or(&[]);
        let (logits, labels) = rest.split_at(rest.len().saturating_sub(batch));
        let logits = if logits.is_empty() { &[] } else { logits };
        Report {
            score: Score::from_array([at(0), at(1), at(2), at(3), at(4)]),
            time: TimeAccount::from_array(time),
            backward_steps: at(FIXED - 9),
            grad_norm: at(FIXED - 8),
            lr: at(FIXED - 7),
            skipped: at(FIXED - 6),
            videos_skipped: at(FIXED - 5),
            link: at(FIXED - 4) as u32,
            waited: at(FIXED - 3),
            saved: (at(FIXED - 2) as u64 + at(FIXED - 1) as u64 * EXACT).checked_sub(1),
            logits: logits.to_vec(),
            labels: if logits.is_empty() { Vec::new() } else { labels.to_vec() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_as_written() {
        let mut report = Report {
            score: Score { loss_sum: 1.0, loss_steps: 2.0, clips: 3.0, top1: 4.0, top5: 5.0 },
            time: TimeAccount::from_array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]),
            backward_steps: 8.0,
            grad_norm: 9.0,
            lr: 10.0,
            saved: Some(EXACT * 3 + 5),
            skipped: 2.0,
            videos_skipped: 3.0,
            link: 17,
            waited: 0.25,
            logits: Vec::new(),
            labels: Vec::new(),
        };
        let mut payload = vec![0.0; Report::words(2, 3)];
        let words = report.write(&mut payload);
        assert_eq!(words, Report::words(0, 0));
        assert_eq!(Report::read(&payload[..words], 2), report);
        report.logits = vec![0.5; 6];
        report.labels = vec![1.0, -1.0];
        assert_eq!(report.write(&mut payload), payload.len());
        assert_eq!(Report::read(&payload, 2), report);
    }
}
