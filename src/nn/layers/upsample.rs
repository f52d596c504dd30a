//! Nearest-neighbour up-sampling: `[B, H, W, C]` to `[B, H factor, W factor, C]`.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::resample;

/// Repeats every pixel `factor` times each way.
pub struct Upsample {
    /// The whole factor, at least 1.
    pub factor: usize,
}

impl Layer for Upsample {
    fn forward(&mut self, x: &Tensor, _: &Pass, _: &mut Tape) -> Result<Tensor> {
        resample::upsample(x, self.factor)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, _: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        need_input.then(|| resample::upsample_vjp(gy, self.factor)).transpose()
    }
}
