//! Losses with their gradients, and the sums a score is made of.

use super::{Array, BLOCK, BUSY, Element, Gpu, arguments, launch, require, require_scratch, signed, small, width};
use crate::nn::loss::PixelLoss;
use crate::{Error, Result};

/// What cross-entropy compares logits with.
#[derive(Clone, Copy, Debug)]
pub struct Labels<'a> {
    /// A class a sample, `[B]` (32-bit integers, whatever the array's type says); negative: the sample does not count.
    pub own: &'a Array,
    /// Of mixtures of two samples: the partners' classes, as `own`, of all that count, and the weight of the own class.
    pub mixed: Option<(&'a Array, f32)>,
    /// The part of every label that is spread over all classes.
    pub smoothing: f64,
}

impl<'a> Labels<'a> {
    /// Nothing but a class a sample.
    pub fn plain(own: &'a Array) -> Self {
        Labels { own, mixed: None, smoothing: 0.0 }
    }
}

/// Softmax cross-entropy of `logits` `[B, K]` with `labels`, as [`crate::nn::loss::soft_cross_entropy`] has it, averaged over the
/// samples that count. Writes the gradient of the mean to `gradient`, adds the logits of
/// every sample to `logits_sum` (floats `[B, K]`), and to `score` (two floats) the sum of the samples' losses and how many
/// counted. A label of K or above makes the loss not a number: check labels on the host.
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or a launch fails.
pub fn cross_entropy(
    gpu: &Gpu,
    logits: &Array,
    labels: &Labels,
    gradient: Option<&Array>,
    logits_sum: Option<&Array>,
    score: &Array,
    scratch: &Array,
) -> Result<()> {
    let Labels { own, mixed, smoothing } = *labels;
    let samples = samples_of(own, logits)?;
    if let Some((partners, _)) = mixed {
        require("the partners' labels", partners, samples, Element::F32)?;
    }
    let (partners, weight) = mixed.map_or((None, 1.0), |(partners, weight)| (Some(partners), weight));
    let element = logits.element();
    if let Some(gradient) = gradient {
        require("the logits' gradient", gradient, logits.len(), element)?;
    }
    if let Some(sum) = logits_sum {
        require("the sum of logits", sum, logits.len(), Element::F32)?;
    }
    require("a score", score, 2, Element::F32)?;
    require_scratch("a loss", scratch, loss_scratch(logits.len(), samples))?;
    let (b, k) = (signed(samples)?, signed(logits.len() / samples)?);
    let arguments = arguments![logits, own, partners, gradient, logits_sum, scratch, b, k, weight, smoothing as f32];
    launch(gpu, "cross_entropy", element, [samples, 1, 1], arguments)?;
    let arguments = arguments![scratch, b, own, b, 1.0f32, score];
    launch(gpu, "loss_total", element, [1, 1, 1], arguments)
}

/// Mean squared or absolute difference of `output` and `target` `[B, ..]` (of either type), over the samples whose label in
/// `labels` (as in [`Labels`]) is not negative. Writes the gradient of the
/// mean to `gradient`, and adds to `score` (two floats) the sum over these samples of their mean difference and their number.
///
/// # Errors
/// As [`cross_entropy`].
#[allow(clippy::too_many_arguments)]
pub fn pixel(
    gpu: &Gpu,
    kind: PixelLoss,
    output: &Array,
    target: &Array,
    labels: &Array,
    gradient: Option<&Array>,
    score: &Array,
    scratch: &Array,
) -> Result<()> {
    let samples = samples_of(labels, output)?;
    let element = output.element();
    require("the target", target, output.len(), target.element())?;
    if element == Element::F32 {
        require("the target of an output of floats", target, output.len(), Element::F32)?;
    }
    if let Some(gradient) = gradient {
        require("the output's gradient", gradient, output.len(), element)?;
    }
    require("a score", score, 2, Element::F32)?;
    require_scratch("a loss", scratch, loss_scratch(output.len(), samples))?;
    let sample = output.len() / samples;
    let w = width(element, &[sample]);
    let parts = parts(samples, sample);
    let (narrow, wide) = match target.element() {
        Element::F32 => (0, target.pointer()),
        Element::Bf16 => (target.pointer(), 0),
    };
    let (b, n) = (signed(samples)?, small(sample)?);
    let absolute = kind == PixelLoss::Absolute;
    launch(
        gpu,
        "pixel_loss",
        element,
        [parts, samples, 1],
        arguments![output, narrow, wide, labels, gradient, scratch, b, n, w as i32, absolute],
    )?;
    let number = signed(samples * parts)?;
    let scale = (1.0 / sample as f64) as f32;
    let arguments = arguments![scratch, number, labels, b, scale, score];
    launch(gpu, "loss_total", element, [1, 1, 1], arguments)
}

/// Floats of scratch that a loss needs for an output of `elements` in all, of `samples`.
pub fn loss_scratch(elements: usize, samples: usize) -> usize {
    samples * parts(samples, elements / samples.max(1))
}

/// Blocks a sample of so many elements.
fn parts(samples: usize, elements: usize) -> usize {
    BUSY.div_ceil(samples.max(1)).min(elements.div_ceil(BLOCK * 8)).max(1)
}

fn samples_of(labels: &Array, output: &Array) -> Result<usize> {
    let samples = labels.bytes() / 4;
    if samples == 0 || output.is_empty() || !output.len().is_multiple_of(samples) {
        let n = output.len();
        return Err(Error::Run(format!("a loss of {n} elements with {samples} labels")));
    }
    Ok(samples)
}
