//! Sums of cotangents, by step.

use crate::Result;
use crate::backend::cuda::{Array, Element, Gpu};

/// Sums of cotangents `[B, H, W, C]`, each begun with its first part: that of step t has place t, counted round.
pub(super) struct Sums {
    /// Where there are several; else the one is the module's own output cotangent.
    arrays: Vec<Array>,
    /// The step whose sum each place holds.
    of: Vec<Option<usize>>,
}

impl Sums {
    /// Sums of `steps` steps in a row.
    pub(super) fn new(gpu: &Gpu, steps: usize, elements: usize, element: Element) -> Result<Self> {
        let several = if steps > 1 { steps } else { 0 };
        let arrays = (0..several).map(|_| gpu.array(elements, element)).collect::<Result<_>>()?;
        Ok(Sums { arrays, of: vec![None; steps] })
    }

    pub(super) fn clear(&mut self) {
        self.of.fill(None);
    }

    /// Where the sum of `step` is, with the module's output cotangent `gy`, and whether it has begun; it has now.
    pub(super) fn begin(&mut self, step: usize, gy: &Array) -> (Array, bool) {
        let place = step % self.of.len();
        let begun = self.of[place].replace(step) == Some(step);
        (self.arrays.get(place).unwrap_or(gy).clone(), begun)
    }

    /// Makes the sum of `step` the module's output cotangent `gy`; whether there was one.
    pub(super) fn end(&mut self, gpu: &Gpu, step: usize, gy: &Array) -> Result<bool> {
        let place = step % self.of.len();
        if self.of[place].take() != Some(step) {
            return Ok(false);
        }
        self.arrays.get(place).map_or(Ok(()), |sum| gpu.copy(sum, gy))?;
        Ok(true)
    }
}
