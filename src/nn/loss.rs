//! Losses and their gradients, and what counts as a correct answer.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Softmax cross-entropy of `logits` `[B, 1, 1, K]` with `labels` (length B), averaged over the batch: the mean loss and
/// its gradient, of the logits' shape. A negative label marks padding: it has no loss and is not counted.
///
/// # Errors
/// [`Error::Input`] on a label of K or above, [`Error::Run`] on lengths that differ.
pub fn cross_entropy(logits: &Tensor, labels: &[i32]) -> Result<(f64, Tensor)> {
    soft_cross_entropy(logits, labels, None, 0.0)
}

/// [`cross_entropy`] with the part `smoothing`, 0 up to below 1, of every label spread evenly over the classes (Szegedy et al., CVPR
/// 2016): as PyTorch has it, (1 - smoothing) times the loss of the label, plus smoothing times the mean of all K classes' losses. Of
/// samples that are `mixed` (Zhang et al., ICLR 2018), that of the label times the weight, and that of the partner's label times the
/// rest.
///
/// # Errors
/// As [`cross_entropy`].
pub fn soft_cross_entropy(
    logits: &Tensor,
    labels: &[i32],
    mixed: Option<&Mixed>,
    smoothing: f64,
) -> Result<(f64, Tensor)> {
    let (b, h, w, k) = logits.dims4()?;
    if b != labels.len() || h * w != 1 || mixed.is_some_and(|mixed| mixed.partners.len() != b) {
        return Err(Error::Run(format!("cross-entropy of {:?} with {} labels", logits.dims(), labels.len())));
    }
    let counted = labels.iter().filter(|&&label| label >= 0).count().max(1) as f64;
    let mut values = to_f64(logits)?;
    let mut loss = 0.0;
    for (n, (row, &label)) in values.chunks_exact_mut(k).zip(labels).enumerate() {
        let Ok(label) = usize::try_from(label) else {
            row.fill(0.0);
            continue;
        };
        let (partner, weight) = mixed.map_or((label, 1.0), |mixed| mixed.of(n, label));
        if label.max(partner) >= k {
            let label = label.max(partner);
            return Err(Error::input(format!(
                "label {label} where the network tells {k} classes apart: the data has more classes than the head"
            )));
        }
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|v| (v - top).exp()).sum();
        let of = |label: usize| sum.ln() + top - row[label];
        let mut own = of(label);
        if mixed.is_some() {
            own = weight * own + (1.0 - weight) * of(partner);
        }
        if smoothing > 0.0 {
            let mean = sum.ln() + top - row.iter().sum::<f64>() / k as f64;
            own = (1.0 - smoothing) * own + smoothing * mean;
        }
        loss += own;
        let spread = smoothing / k as f64;
        row.iter_mut().for_each(|v| *v = ((*v - top).exp() / sum - spread) / counted);
        row[label] -= (1.0 - smoothing) * weight / counted;
        row[partner] -= (1.0 - smoothing) * (1.0 - weight) / counted;
    }
    Ok((loss / counted, like(values, logits)?))
}

/// Second labels, where every sample of a batch is a mixture of itself and a partner.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// The partners' labels, `[B]`.
    pub partners: Vec<i32>,
    /// The part of a sample that is its own, 0 to 1.
    pub weight: f32,
}

impl Mixed {
    /// The partner's label of sample `n`, whose own is `label`, and the weight of its own.
    fn of(&self, n: usize, label: usize) -> (usize, f64) {
        match usize::try_from(self.partners[n]) {
            Ok(partner) => (partner, f64::from(self.weight)),
            // It has none.
            Err(_) => (label, 1.0),
        }
    }
}

/// How a predicted frame is compared with the true one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PixelLoss {
    /// Mean squared difference.
    #[default]
    Squared,
    /// Mean absolute difference; its derivative at 0 is 0.
    Absolute,
}

/// The mean over all elements of the squared or absolute difference of two tensors `[B, ..]` of one shape, and its
/// gradient with respect to `output`. As in [`cross_entropy`], a negative label marks padding: that sample has no loss
/// and is not counted.
///
/// # Errors
/// [`Error::Run`] with both shapes where they differ, or where there is not a label a sample.
pub fn pixel(kind: PixelLoss, output: &Tensor, target: &Tensor, labels: &[i32]) -> Result<(f64, Tensor)> {
    if output.dims() != target.dims() || output.dims().first() != Some(&labels.len()) || labels.is_empty() {
        let (found, wanted) = (output.dims(), target.dims());
        return Err(Error::Run(format!(
            "the output is {found:?} and its target {wanted:?}, with {} labels",
            labels.len()
        )));
    }
    let sample = output.elem_count() / labels.len();
    let counted = labels.iter().filter(|&&label| label >= 0).count().max(1);
    let n = (counted * sample) as f64;
    let mut values = to_f64(output)?;
    let target = to_f64(target)?;
    let mut loss = 0.0;
    for ((values, target), &label) in values.chunks_mut(sample).zip(target.chunks(sample)).zip(labels) {
        if label < 0 {
            values.fill(0.0);
            continue;
        }
        for (v, t) in values.iter_mut().zip(target) {
            let d = *v - t;
            (loss, *v) = match kind {
                PixelLoss::Squared => (loss + d * d, 2.0 * d / n),
                PixelLoss::Absolute if d == 0.0 => (loss, 0.0),
                PixelLoss::Absolute => (loss + d.abs(), d.signum() / n),
            };
        }
    }
    Ok((loss / n, like(values, output)?))
}

/// Whether `label` is among the `k` highest of one sample's logits (or probabilities). Ties count against the network, so that
/// constant logits score nothing; so does a logit that is not a number.
pub fn topk_correct<T: PartialOrd>(logits: &[T], label: i32, k: usize) -> bool {
    let Some(own) = usize::try_from(label).ok().and_then(|i| logits.get(i)) else { return false };
    // Not `v >= own`: a comparison with what is not a number must count against the network too.
    let ahead = logits.iter().filter(|v| !matches!(v.partial_cmp(&own), Some(std::cmp::Ordering::Less))).count();
    own.partial_cmp(own).is_some() && ahead <= k
}

fn to_f64(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

fn like(values: Vec<f64>, t: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, t.shape(), &Device::Cpu)?.to_dtype(t.dtype())?.to_device(t.device())?)
}
