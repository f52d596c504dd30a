//! Pooling: `[B, H, W, C]` to `[B, H', W', C]`, or to `[B, 1, 1, C]` for the global average.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::{Window, pool};

/// Each window's maximum. The cotangent goes to the first maximum in row-major order. Keeps one byte an output element.
pub struct MaxPool {
    window: Window,
    input: Vec<usize>,
}

impl MaxPool {
    /// Pools by `window`.
    pub fn new(window: Window) -> Self {
        MaxPool { window, input: Vec::new() }
    }
}

impl Layer for MaxPool {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let (y, winners) = pool::max(x, &self.window)?;
        self.input = x.dims().to_vec();
        tape.push(winners);
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let winners = tape.pop()?;
        need_input.then(|| pool::max_vjp(&self.input, &self.window, &winners, gy)).transpose()
    }
}

/// Each window's mean; the border counts as zeros.
pub struct AvgPool {
    window: Window,
    input: Vec<usize>,
}

impl AvgPool {
    /// Pools by `window`.
    pub fn new(window: Window) -> Self {
        AvgPool { window, input: Vec::new() }
    }
}

impl Layer for AvgPool {
    fn forward(&mut self, x: &Tensor, _: &Pass, _: &mut Tape) -> Result<Tensor> {
        self.input = x.dims().to_vec();
        pool::average(x, &self.window)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, _: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        need_input.then(|| pool::average_vjp(&self.input, &self.window, gy)).transpose()
    }
}

/// The mean over all positions.
#[derive(Default)]
pub struct GlobalAvgPool {
    input: Vec<usize>,
}

impl Layer for GlobalAvgPool {
    fn forward(&mut self, x: &Tensor, _: &Pass, _: &mut Tape) -> Result<Tensor> {
        self.input = x.dims().to_vec();
        pool::global_average(x)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, _: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        need_input.then(|| pool::global_average_vjp(&self.input, gy)).transpose()
    }
}
