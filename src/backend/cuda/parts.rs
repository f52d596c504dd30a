//! A backward pass in parts, so that the gradients that each completes may leave before the next is through.

use super::gpu::{Array, Gpu};
use super::ops::Accumulation;
use crate::Result;

/// A parameter's gradient, in a row with all others of a module.
pub struct Gradient {
    /// The layer it belongs to; none: an adapter, which comes before all layers.
    pub layer: Option<usize>,
    /// How many words it has.
    pub words: usize,
    /// That of one pass in the type of activations, and the sum that it is added to, where they are two.
    pub fresh: Option<(Array, Array)>,
}

/// Part of a backward pass.
pub struct Part {
    /// The layer whose parameters' gradients are its last; none: the rest.
    pub layer: Option<usize>,
    /// From which word on, of all sums of gradients in a row, it leaves them as they are to be.
    pub from: usize,
    /// What adds up its own.
    pub accumulation: Option<Accumulation>,
}

/// The parts of a backward pass, from the last layer to the first: each completes a piece of `piece` words, or more, of the sums of
/// `gradients` in a row.
///
/// # Errors
/// [`crate::Error::Run`] if there is no memory.
pub fn parts(gpu: &Gpu, gradients: &[Gradient], piece: usize) -> Result<Vec<Part>> {
    let (mut from, mut end) = (gradients.iter().map(|gradient| gradient.words).sum::<usize>(), gradients.len());
    // Pieces from this one on are complete.
    let mut complete = from.div_ceil(piece);
    let mut parts = Vec::new();
    for (n, gradient) in gradients.iter().enumerate().rev() {
        from -= gradient.words;
        let is_first = n == 0 || gradients[n - 1].layer != gradient.layer;
        if is_first && gradient.layer.is_some() && from.div_ceil(piece) < complete {
            let accumulation = accumulation(gpu, &gradients[n..end])?;
            parts.push(Part { layer: gradient.layer, from, accumulation });
            (complete, end) = (from.div_ceil(piece), n);
        }
    }
    parts.push(Part { layer: None, from: 0, accumulation: accumulation(gpu, &gradients[..end])? });
    Ok(parts)
}

/// What adds gradients in the type of activations to their sums; none where there are none.
///
/// # Errors
/// As [`parts`].
pub fn accumulation(gpu: &Gpu, gradients: &[Gradient]) -> Result<Option<Accumulation>> {
    let pairs: Vec<(Array, Array)> = gradients.iter().filter_map(|gradient| gradient.fresh.clone()).collect();
    (!pairs.is_empty()).then(|| Accumulation::new(gpu, &pairs)).transpose()
}
