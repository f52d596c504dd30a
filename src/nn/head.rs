//! The loss at the last module, and what is counted there.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::loss::{self, Mixed, PixelLoss};
use super::spec::Shape;
use crate::{Error, Result};

/// What a network is to learn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Softmax cross-entropy at every step of the last module.
    #[default]
    Recognition,
    /// The mean pixel difference to the frame `horizon` after the newest one seen.
    FutureFrames,
}

/// What a head is made from.
#[derive(Clone, Copy, Debug)]
pub struct HeadSpec {
    /// What is learned.
    pub task: Task,
    /// Future frames: the pixel difference.
    pub pixel_loss: PixelLoss,
    /// K; 0 for future frames.
    pub classes: usize,
    /// Recognition: the part of every label that is spread over all classes.
    pub smoothing: f64,
    /// Recognition: whether clips are mixtures of two.
    pub mixed: bool,
}

/// What the last module counted over one batch (or several, added up).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// Sum of the losses of clips' steps.
    pub loss_sum: f32,
    /// Steps with a loss, of each clip.
    pub loss_steps: f32,
    /// Clips counted.
    pub clips: f32,
    /// Of these, how many had the label first.
    pub top1: f32,
    /// Of these, how many had the label among the first five.
    pub top5: f32,
    /// Evaluation of future frames: the mean squared difference of predicted pixels, within 0..=1, from true ones, of every clip and
    /// step with a loss added up.
    pub pixel_error: f32,
    /// The same of the newest frame seen: what a copy of it would be wrong by.
    pub copy_error: f32,
}

impl Score {
    /// Adds another score.
    pub fn add(&mut self, other: &Score) {
        self.loss_sum += other.loss_sum;
        self.loss_steps += other.loss_steps;
        self.clips += other.clips;
        self.top1 += other.top1;
        self.top5 += other.top5;
        self.pixel_error += other.pixel_error;
        self.copy_error += other.copy_error;
    }

    /// Mean loss of a step; NaN without steps.
    pub fn loss(&self) -> f32 {
        self.loss_sum / self.loss_steps
    }
}

/// A batch's labels as module D has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Labels {
    /// `[B]`, −1 for a clip that does not count; for future frames nothing else matters.
    pub own: Vec<i32>,
    /// Where clips are mixtures of two.
    pub mixed: Option<Mixed>,
}

impl Labels {
    /// 32-bit words of their message: the labels, and where clips are `mixed`, the partners' and the weight.
    pub fn words(batch: usize, mixed: bool) -> usize {
        if mixed { 2 * batch + 1 } else { batch }
    }

    /// Such a message.
    pub fn message(&self) -> Vec<f32> {
        let mut words: Vec<f32> = bytemuck::cast_slice(&self.own).to_vec();
        if let Some(Mixed { partners, weight }) = &self.mixed {
            words.extend_from_slice(bytemuck::cast_slice(partners));
            words.push(*weight);
        }
        words
    }

    /// The labels in a message of `batch` clips.
    ///
    /// # Errors
    /// [`Error::Run`] on a message of another size.
    pub fn read(message: &[f32], batch: usize, mixed: bool) -> Result<Self> {
        let wanted = Labels::words(batch, mixed);
        if message.len() != wanted {
            return Err(Error::Run(format!("the labels' message has {} words, not {wanted}", message.len())));
        }
        let list = |words: &[f32]| bytemuck::cast_slice(words).to_vec();
        let (own, rest) = message.split_at(batch);
        let mixed = rest.split_last().map(|(&weight, partners)| Mixed { partners: list(partners), weight });
        Ok(Labels { own: list(own), mixed })
    }
}

/// A target frame as a message carries it: B labels (32-bit integers; −1 for a clip that does not count), then the frames
/// `[B, H, W, C]`.
pub struct Target;

impl Target {
    /// 32-bit words of such a message.
    pub fn words(batch: usize, frame: Shape) -> usize {
        batch + batch * frame.iter().product::<usize>()
    }

    /// Fills a message.
    ///
    /// # Errors
    /// [`Error::Run`] on a message of another size.
    pub fn write(message: &mut [f32], labels: &[i32], frames: &[f32]) -> Result<()> {
        if message.len() != labels.len() + frames.len() {
            return Err(wrong_size(message.len(), labels.len() + frames.len()));
        }
        let (front, rest) = message.split_at_mut(labels.len());
        front.copy_from_slice(bytemuck::cast_slice(labels));
        rest.copy_from_slice(frames);
        Ok(())
    }

    /// The labels and frames of a message of `batch` clips.
    ///
    /// # Errors
    /// As [`Target::write`].
    pub fn read(message: &[f32], batch: usize) -> Result<(&[i32], &[f32])> {
        let (labels, frames) = message.split_at_checked(batch).ok_or_else(|| wrong_size(message.len(), batch))?;
        Ok((bytemuck::cast_slice(labels), frames))
    }
}

fn wrong_size(found: usize, wanted: usize) -> Error {
    Error::Run(format!("a target's message has {found} words, not {wanted}"))
}

/// Computes the loss of every step of module D and scores clips.
///
/// *Recognition*: softmax cross-entropy at every step, mean over the batch; a clip's logits are the mean over steps.
/// *Future frames*: mean squared or absolute difference over all elements of the output and the target frame.
pub struct Head {
    spec: HeadSpec,
    /// As in [`Head::smoothing`].
    smoothing: f64,
    labels: Labels,
    logits: Vec<f32>,
    steps: usize,
    score: Score,
}

impl Head {
    /// A head for batches of `batch` clips.
    pub fn new(spec: HeadSpec, batch: usize) -> Self {
        let labels = Labels { own: vec![-1; batch], mixed: None };
        let logits = vec![0.0; batch * spec.classes];
        Head { spec, smoothing: 0.0, labels, logits, steps: 0, score: Score::default() }
    }

    /// What it was made from.
    pub fn spec(&self) -> HeadSpec {
        self.spec
    }

    /// Begins a batch with `labels`, which are smoothed in `training` alone.
    pub fn begin(&mut self, labels: &Labels, training: bool) {
        self.smoothing = if training { self.spec.smoothing } else { 0.0 };
        self.labels.clone_from(labels);
        self.logits.fill(0.0);
        self.steps = 0;
        self.score = Score::default();
    }

    /// Replaces the labels: a damaged video may be met in the middle of a clip.
    pub fn set_labels(&mut self, labels: &[i32]) {
        self.labels.own.clear();
        self.labels.own.extend_from_slice(labels);
    }

    /// The part of every label that is spread over all classes in this batch.
    pub fn smoothing(&self) -> f64 {
        self.smoothing
    }

    /// The labels `[B]`.
    pub fn labels(&self) -> &[i32] {
        &self.labels.own
    }

    /// The partners' labels, where clips are mixtures of two.
    pub fn mixed(&self) -> Option<&Mixed> {
        self.labels.mixed.as_ref()
    }

    /// The labels that count as the right answers: a mixture's of whichever there is more of.
    fn answers(&self) -> &[i32] {
        match &self.labels.mixed {
            Some(mixed) if mixed.weight < 0.5 => &mixed.partners,
            _ => &self.labels.own,
        }
    }

    /// The loss of one step's output `y` (recognition `[B, 1, 1, K]`, future frames `[B, H, W, C]` with a `target` of as many
    /// elements), which is counted, and its gradient with respect to `y`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the loss is not a finite number; it is not counted then.
    pub fn loss(&mut self, y: &Tensor, target: Option<&[f32]>) -> Result<Tensor> {
        let (value, gradient) = match (self.spec.task, target) {
            (Task::Recognition, _) => {
                let step = y.flatten_all()?.to_vec1::<f32>()?;
                self.logits.iter_mut().zip(&step).for_each(|(sum, x)| *sum += x);
                loss::soft_cross_entropy(y, &self.labels.own, self.labels.mixed.as_ref(), self.smoothing)?
            }
            (Task::FutureFrames, Some(target)) => {
                let target = Tensor::from_slice(target, y.shape(), &Device::Cpu)?;
                loss::pixel(self.spec.pixel_loss, y, &target, &self.labels.own)?
            }
            (Task::FutureFrames, None) => return Err(Error::Run("a step with a loss came without its target".into())),
        };
        if !value.is_finite() {
            return Err(diverged(value));
        }
        self.steps += 1;
        // The mean over clips, whatever the padding of the last batch.
        let counted = self.labels.own.iter().filter(|&&label| label >= 0).count() as f32;
        self.score.loss_sum += value as f32 * counted;
        self.score.loss_steps += counted;
        Ok(gradient)
    }

    /// Counts `steps` steps whose losses a GPU has summed: over clips `loss_sum`, of `loss_steps` steps of clips. `logits`
    /// (`[B, K]`, in recognition) are sums over steps.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the sum is not a finite number.
    pub fn count(&mut self, loss_sum: f32, loss_steps: f32, logits: &[f32], steps: usize) -> Result<()> {
        if !loss_sum.is_finite() {
            return Err(diverged(f64::from(loss_sum)));
        }
        self.logits.copy_from_slice(logits);
        self.steps = steps;
        (self.score.loss_sum, self.score.loss_steps) = (loss_sum, loss_steps);
        Ok(())
    }

    /// Ends the batch: its score. In recognition clips are ranked by their mean logits.
    pub fn end(&mut self) -> Score {
        if self.spec.task == Task::Recognition && self.steps > 0 {
            let scale = 1.0 / self.steps as f32;
            self.logits.iter_mut().for_each(|x| *x *= scale);
            let mut score = self.score;
            for (row, &label) in self.logits.chunks_exact(self.spec.classes).zip(self.answers()) {
                if label >= 0 {
                    score.clips += 1.0;
                    score.top1 += f32::from(u8::from(loss::topk_correct(row, label, 1)));
                    score.top5 += f32::from(u8::from(loss::topk_correct(row, label, 5)));
                }
            }
            self.score = score;
        } else {
            self.score.clips += self.labels.own.iter().filter(|&&label| label >= 0).count() as f32;
        }
        self.score
    }

    /// After [`Head::end`]: the clips' mean logits `[B, K]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

fn diverged(loss: f64) -> Error {
    Error::NonFinite(format!(
        "the loss is {loss}: training has diverged; lower train.optimizer.lr, warm up longer, or set train.clip_norm"
    ))
}
