//! What a worker tells the console at the end of every batch, as a message.

use bytemuck::{Pod, Zeroable};

use super::TimeAccount;
use crate::comm::Orders;
use crate::nn::head::Score;
use crate::{Error, Result};

/// One worker's batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The last module's counts; zero elsewhere.
    pub score: Score,
    /// Where the time went since the last report.
    pub time: TimeAccount,
    /// Backward passes in the batch.
    pub backward_steps: u32,
    /// Euclidean norm of the (mean) gradient of the last update in the batch; zero without one.
    pub grad_norm: f32,
    /// Learning rate of that update.
    pub lr: f32,
    /// The newest checkpoint, by batches done, that the worker's module is on disk in.
    pub saved: Option<u64>,
    /// Losses, cotangents and updates left out because they were not finite.
    pub skipped: u32,
    /// Module 1: places of the batch that damaged videos left empty.
    pub videos_skipped: u32,
    /// The link the worker waited on longest since the last report.
    pub link: u32,
    /// Seconds it waited there.
    pub waited: f32,
    /// What this worker's process was asked for.
    pub asked: Orders,
    /// What was decided for the end of this batch.
    pub decision: Orders,
    /// Evaluation, last module: the clips' mean logits `[B, K]`; or, in prediction, its outputs `[steps, B, H, W, C]`. In a validation's
    /// first batch, where frames are to be shown, the same of one clip.
    pub outputs: Vec<f32>,
    /// Evaluation, last module: the labels `[B]`, −1 where a clip does not count.
    pub labels: Vec<i32>,
}

/// The fixed part of a message; outputs and labels follow.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Wire {
    /// 0: none; else one more than [`Report::saved`].
    saved: u64,
    score: [f32; 7],
    time: TimeAccount,
    grad_norm: f32,
    lr: f32,
    waited: f32,
    link: u32,
    backward_steps: u32,
    skipped: u32,
    videos_skipped: u32,
    asked: u32,
    decision: u32,
    outputs: u32,
    labels: u32,
}

const FIXED: usize = size_of::<Wire>() / 4;

impl Report {
    /// 32-bit words of a report with so many outputs and labels.
    pub fn words(outputs: usize, labels: usize) -> usize {
        FIXED + outputs + labels
    }

    /// Writes the report at the front of a message's payload; returns the words written.
    ///
    /// # Errors
    /// [`Error::Run`] if the message is too small.
    pub fn write(&self, message: &mut [f32]) -> Result<usize> {
        let Score { loss_sum, loss_steps, clips, top1, top5, pixel_error, copy_error } = self.score;
        let wire = Wire {
            saved: self.saved.map_or(0, |batches| batches + 1),
            score: [loss_sum, loss_steps, clips, top1, top5, pixel_error, copy_error],
            time: self.time,
            grad_norm: self.grad_norm,
            lr: self.lr,
            waited: self.waited,
            link: self.link,
            backward_steps: self.backward_steps,
            skipped: self.skipped,
            videos_skipped: self.videos_skipped,
            asked: self.asked.bits(),
            decision: self.decision.bits(),
            outputs: self.outputs.len() as u32,
            labels: self.labels.len() as u32,
        };
        let words = Self::words(self.outputs.len(), self.labels.len());
        let message = message.get_mut(..words);
        let message =
            message.ok_or_else(|| Error::Run(format!("a message is too small for a report of {words} words")))?;
        let (fixed, rest) = message.split_at_mut(FIXED);
        bytemuck::cast_slice_mut(fixed).copy_from_slice(bytemuck::bytes_of(&wire));
        let (outputs, labels) = rest.split_at_mut(self.outputs.len());
        outputs.copy_from_slice(&self.outputs);
        labels.copy_from_slice(bytemuck::cast_slice(&self.labels));
        Ok(words)
    }

    /// Reads what [`Report::write`] wrote.
    ///
    /// # Errors
    /// [`Error::Transport`] if the message is not as long as it says.
    pub fn read(message: &[f32]) -> Result<Report> {
        let wrong = || Error::Transport(format!("a report of {} words is not as long as it says", message.len()));
        let (fixed, rest) = message.split_at_checked(FIXED).ok_or_else(wrong)?;
        let wire: Wire = bytemuck::pod_read_unaligned(bytemuck::cast_slice(fixed));
        let (outputs, labels) = rest.split_at_checked(wire.outputs as usize).ok_or_else(wrong)?;
        if labels.len() != wire.labels as usize {
            return Err(wrong());
        }
        let [loss_sum, loss_steps, clips, top1, top5, pixel_error, copy_error] = wire.score;
        Ok(Report {
            score: Score { loss_sum, loss_steps, clips, top1, top5, pixel_error, copy_error },
            time: wire.time,
            backward_steps: wire.backward_steps,
            grad_norm: wire.grad_norm,
            lr: wire.lr,
            saved: wire.saved.checked_sub(1),
            skipped: wire.skipped,
            videos_skipped: wire.videos_skipped,
            link: wire.link,
            waited: wire.waited,
            asked: Orders::from_bits_truncate(wire.asked),
            decision: Orders::from_bits_truncate(wire.decision),
            outputs: outputs.to_vec(),
            labels: bytemuck::cast_slice(labels).to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_as_written() {
        let mut report = Report {
            score: Score {
                loss_sum: 1.0,
                loss_steps: 2.0,
                clips: 3.0,
                top1: 4.0,
                top5: 5.0,
                pixel_error: 6.0,
                copy_error: 7.0,
            },
            time: TimeAccount::from_array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]),
            backward_steps: 8,
            grad_norm: 9.0,
            lr: 10.0,
            saved: Some((1 << 40) + 5),
            skipped: 2,
            videos_skipped: 3,
            link: 17,
            waited: 0.25,
            asked: Orders::STOP,
            decision: Orders::CHECKPOINT | Orders::FINISH,
            outputs: Vec::new(),
            labels: Vec::new(),
        };
        let mut payload = vec![0.0; Report::words(6, 2)];
        let words = report.write(&mut payload).unwrap();
        assert_eq!(words, Report::words(0, 0));
        assert_eq!(Report::read(&payload[..words]).unwrap(), report);
        assert!(Report::read(&payload[..words + 1]).is_err());
        (report.outputs, report.labels) = (vec![0.5; 6], vec![1, -1]);
        assert_eq!(report.write(&mut payload).unwrap(), payload.len());
        assert_eq!(Report::read(&payload).unwrap(), report);
        report.labels.push(0);
        assert!(report.write(&mut payload).is_err());
    }
}
