//! Activations, element by element: the shape stays.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::activation;

/// `max(x, 0)`, with derivative 0 at 0. Keeps its output, which a following layer keeps too: they share it.
pub struct Relu;

impl Layer for Relu {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let y = activation::relu(x)?;
        tape.push(y.clone());
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let y = tape.pop()?;
        need_input.then(|| activation::relu_vjp(&y, gy)).transpose()
    }
}

/// The exact Gaussian error linear unit. Keeps its input.
pub struct Gelu;

impl Layer for Gelu {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        tape.push(x.clone());
        activation::gelu(x)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let x = tape.pop()?;
        need_input.then(|| activation::gelu_vjp(&x, gy)).transpose()
    }
}
