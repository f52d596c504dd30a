//! Clips of a batch mixed with one another.

use candle_core::Tensor;

use super::{Host, overwritten, tensor, vectorized};
use crate::{Error, Result};

/// How a batch is mixed: clip n becomes `weight` of itself and the rest of clip `partners[n]`.
#[derive(Clone, Copy, Debug)]
pub struct Mixing<'a> {
    /// The part of a clip that is its own, 0 to 1.
    pub weight: f32,
    /// By place in the batch, the place of its partner.
    pub partners: &'a [usize],
}

impl Mixing<'_> {
    /// Whether frames `[B, H, W, C]` of these dimensions can be mixed so.
    ///
    /// # Errors
    /// [`Error::Run`] for those of another batch.
    pub fn fits(&self, dims: &[usize]) -> Result<()> {
        let places = self.partners.len();
        if dims.first() != Some(&places) || places == 0 || self.partners.iter().any(|&n| n >= places) {
            return Err(Error::Run(format!("a frame of {dims:?} where {places} clips are mixed")));
        }
        Ok(())
    }
}

/// A frame of every clip, `[B, H, W, C]`, mixed.
///
/// # Errors
/// As [`Mixing::fits`].
pub fn mix(frame: &Tensor, mixing: &Mixing) -> Result<Tensor> {
    mixing.fits(frame.dims())?;
    let (own, other) = (mixing.weight, 1.0 - mixing.weight);
    let length = frame.elem_count() / mixing.partners.len();
    let mut mixed = overwritten::<f32>(frame.elem_count());
    let frame = frame.contiguous()?;
    let values = Host::of(&frame)?;
    let values = values.slice::<f32>()?;
    for ((place, out), &partner) in mixed.chunks_exact_mut(length).enumerate().zip(mixing.partners) {
        let [a, b] = [place, partner].map(|n| &values[n * length..][..length]);
        vectorized(
            #[inline(always)]
            || out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = own * a + other * b),
        );
    }
    tensor(mixed, frame.dims())
}
