//! Layers: each one struct in one file, with its forward pass and its vector–Jacobian product written out.
//!
//! A layer keeps what its vjp needs on a [`Tape`], a stack, and takes it from there in reverse. Activations are
//! `[B, H, W, C]`.

mod activation;
pub(crate) mod batch_norm;
mod conv2d;
mod dropout;
mod group_norm;
mod linear;
mod norm;
mod pool;
mod residual;
mod upsample;

use std::collections::HashSet;

use candle_core::Tensor;

pub use activation::{Gelu, Relu};
pub use batch_norm::BatchNorm;
pub use conv2d::Conv2d;
pub use dropout::Dropout;
pub use group_norm::GroupNorm;
pub use linear::Linear;
pub use norm::Norm;
pub use pool::{AvgPool, GlobalAvgPool, MaxPool};
pub use residual::Residual;
pub use upsample::Upsample;

use super::param::Param;
use super::spec::LayerSpec;
use crate::{Error, Result};

/// What one pass needs to know beside its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Training: dropout drops, batch norm uses the batch's statistics.
    pub training: bool,
    /// A pure function of (seed, batch, step, replica): what is random in a layer derives from it and the layer's name,
    /// so that a vjp (or a repeat) with the same key sees the same.
    pub key: u64,
    /// A step's forward pass once more, for its vjp: what follows the data (running statistics) does not move again.
    pub again: bool,
}

/// Activations kept between a step's forward pass and its vjp: a stack.
///
/// Sideways has one a module, overwritten at every tick; back-propagation one a step.
#[derive(Debug, Default)]
pub struct Tape {
    kept: Vec<Tensor>,
    /// Whether nothing is kept.
    blank: bool,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Tape::default()
    }

    /// A tape that keeps nothing: for forward passes without a vjp.
    pub fn blank() -> Self {
        Tape { kept: Vec::new(), blank: true }
    }

    /// Keeps `tensor`.
    pub fn push(&mut self, tensor: Tensor) {
        if !self.blank {
            self.kept.push(tensor);
        }
    }

    /// The tensor kept last.
    ///
    /// # Errors
    /// [`Error::Run`] on an empty tape: a vjp without its forward pass.
    pub fn pop(&mut self) -> Result<Tensor> {
        self.kept
            .pop()
            .ok_or_else(|| Error::Run("a vjp was asked for without its forward pass (the tape is empty)".into()))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// Bytes held; a tensor kept twice counts once.
    pub fn bytes(&self) -> usize {
        let mut seen = HashSet::new();
        let fresh = self.kept.iter().filter(|t| seen.insert(t.id()));
        fresh.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

/// A differentiable function with parameters.
pub trait Layer: Send {
    /// The output for `x`; pushes onto `tape` what [`Layer::vjp`] needs.
    ///
    /// # Errors
    /// [`Error::Run`] or [`Error::Tensor`] where shapes do not fit.
    fn forward(&mut self, x: &Tensor, pass: &Pass, tape: &mut Tape) -> Result<Tensor>;

    /// Adds the parameters' gradients for the output's cotangent `gy` into [`Param::grad`], and returns the input's
    /// cotangent if and only if `need_input`. Takes from `tape` what the forward pass pushed.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>>;

    /// Takes over the work of the layer that follows, which then need not be built, if this one can do both in the same
    /// passes over memory; says whether it does.
    fn absorb(&mut self, next: &LayerSpec) -> bool {
        let _ = next;
        false
    }

    /// Calls `f` on every parameter and buffer, in a fixed order.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        let _ = f;
        Ok(())
    }
}
