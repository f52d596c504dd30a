//! Dropout: the shape stays.

use candle_core::Tensor;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::activation;

/// In training, zeroes each element with probability `rate` and scales the others by 1/(1 - rate); else the identity. The
/// mask is a pure function of (pass key, layer name, place): it is made anew for the vjp, not kept.
pub struct Dropout {
    name: String,
    rate: f64,
}

impl Dropout {
    /// `name` tells this layer's masks from others'; `0 <= rate < 1`.
    pub fn new(name: &str, rate: f64) -> Self {
        Dropout { name: name.to_string(), rate }
    }

    fn mask(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        if !pass.training || self.rate == 0.0 {
            return Ok(x.clone());
        }
        activation::dropout(x, self.rate, xxh3_64_with_seed(self.name.as_bytes(), pass.key))
    }
}

impl Layer for Dropout {
    fn forward(&mut self, x: &Tensor, pass: &Pass, _: &mut Tape) -> Result<Tensor> {
        self.mask(x, pass)
    }

    fn vjp(&mut self, gy: &Tensor, pass: &Pass, _: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        need_input.then(|| self.mask(gy, pass)).transpose()
    }
}
