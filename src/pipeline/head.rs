//! The loss at the last module, and what is counted there.

use candle_core::Tensor;

use crate::config::Task;
use crate::nn::loss::{self, PixelLoss};
use crate::pipeline::metrics::Score;
use crate::{Error, Result};

/// Computes the loss of every step of module D and scores clips.
///
/// *Recognition*: softmax cross-entropy at every step, mean over the batch; a clip's logits are the mean over steps.
/// *Future frames*: mean squared or absolute difference over all elements of the output and the target frame.
pub struct Head {
    task: Task,
    frame_loss: PixelLoss,
    classes: usize,
    labels: Vec<i32>,
    logits: Vec<f32>,
    steps: usize,
    score: Score,
}

impl Head {
    /// A head for batches of `batch` clips and, in recognition, `classes` classes.
    pub fn new(task: Task, frame_loss: PixelLoss, batch: usize, classes: usize) -> Self {
        let (labels, logits) = (vec![-1; batch], vec![0.0; batch * classes]);
        Head { task, frame_loss, classes, labels, logits, steps: 0, score: Score::default() }
    }

    /// Recognition needs labels, future frames target frames.
    pub fn needs_labels(&self) -> bool {
        self.task == Task::Recognition
    }

    /// Begins a clip with `labels` (`[B]`, −1 where the batch is padded; for future frames nothing else matters).
    pub fn begin(&mut self, labels: &[i32]) {
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        self.logits.fill(0.0);
        self.steps = 0;
        self.score = Score::default();
    }

    /// The loss of one step's output `y` (recognition `[B, 1, 1, K]`, future frames `[B, H, W, C]` with `target`) and
    /// its gradient with respect to `y` if `training`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the loss is not a finite number.
    pub fn loss(&mut self, y: &Tensor, target: Option<&Tensor>, training: bool) -> Result<Option<Tensor>> {
        let (value, gradient) = match (self.task, target) {
            (Task::Recognition, _) => {
                let step = y.flatten_all()?.to_vec1::<f32>()?;
                self.logits.iter_mut().zip(&step).for_each(|(sum, x)| *sum += x);
                loss::cross_entropy(y, &self.labels)?
            }
            (Task::FutureFrames, Some(target)) => {
                // Module 1 says so with the target where a damaged video is passed over.
                let first = target.flatten_from(1)?.narrow(1, 0, 1)?.flatten_all()?.to_vec1::<f32>()?;
                self.labels.iter_mut().zip(first).filter(|(_, x)| x.is_nan()).for_each(|(label, _)| *label = -1);
                loss::pixel(self.frame_loss, y, target, &self.labels)?
            }
            (Task::FutureFrames, None) => return Err(Error::Run("a step with a loss came without its target".into())),
        };
        if !value.is_finite() {
            return Err(diverged(value));
        }
        self.steps += 1;
        // The mean over clips, whatever the padding of the last batch.
        let counted = self.labels.iter().filter(|&&label| label >= 0).count() as f32;
        self.score.loss_sum += value as f32 * counted;
        self.score.loss_steps += counted;
        Ok(training.then_some(gradient))
    }

    /// What it computes, for a GPU to do the same: nothing in recognition, else the loss of frames.
    pub fn frame_loss(&self) -> Option<PixelLoss> {
        (self.task == Task::FutureFrames).then_some(self.frame_loss)
    }

    /// Counts `steps` steps whose losses a GPU has summed: over clips `loss_sum`, of `loss_steps` steps of clips. `logits`
    /// (`[B, K]`, in recognition) are sums over steps; `labels` are those that counted.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the sum is not a finite number.
    pub fn count(
        &mut self,
        loss_sum: f32,
        loss_steps: f32,
        logits: &[f32],
        labels: &[i32],
        steps: usize,
    ) -> Result<()> {
        if !loss_sum.is_finite() {
            return Err(diverged(f64::from(loss_sum)));
        }
        self.begin(labels);
        self.logits.iter_mut().zip(logits).for_each(|(sum, x)| *sum = *x);
        self.steps = steps;
        (self.score.loss_sum, self.score.loss_steps) = (loss_sum, loss_steps);
        Ok(())
    }

    /// Ends the clip: its score. In recognition clips are ranked by their mean logits.
    pub fn end(&mut self) -> Score {
        if self.task == Task::Recognition && self.steps > 0 {
            let scale = 1.0 / self.steps as f32;
            self.logits.iter_mut().for_each(|x| *x *= scale);
            for (row, &label) in self.logits.chunks_exact(self.classes).zip(&self.labels) {
                if label >= 0 {
                    self.score.clips += 1.0;
                    self.score.top1 += f32::from(u8::from(loss::topk_correct(row, label, 1)));
                    self.score.top5 += f32::from(u8::from(loss::topk_correct(row, label, 5)));
                }
            }
        } else {
            self.score.clips += self.labels.iter().filter(|&&label| label >= 0).count() as f32;
        }
        self.score
    }

    /// After [`Head::end`]: the clips' mean logits `[B, K]` and labels `[B]`.
    pub fn logits_and_labels(&self) -> (&[f32], &[i32]) {
        (&self.logits, &self.labels)
    }
}

fn diverged(loss: f64) -> Error {
    Error::NonFinite(format!(
        "the loss is {loss}: training has diverged; lower train.optimizer.lr, warm up longer, or set train.clip_norm"
    ))
}
