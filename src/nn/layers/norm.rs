//! The norm inside a residual block: one of the kinds, chosen by configuration.

use candle_core::Tensor;

use super::batch_norm;
use super::{BatchNorm, GroupNorm, Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::activation;
use crate::nn::param::{Init, Param};
use crate::nn::spec::{LayerSpec, NormKind};

/// Group or batch normalisation.
pub enum Norm {
    /// See [`GroupNorm`].
    Group(GroupNorm),
    /// See [`BatchNorm`].
    Batch(BatchNorm),
}

impl Norm {
    /// A norm of `kind` over `channels`; `groups` matters to group norm only.
    pub fn new(kind: NormKind, prefix: &str, channels: usize, groups: usize, init: &Init) -> Result<Self> {
        Ok(match kind {
            NormKind::Group => Norm::Group(GroupNorm::new(prefix, channels, groups, init)?),
            NormKind::Batch => Norm::Batch(BatchNorm::new(prefix, channels, batch_norm::MOMENTUM, init)?),
        })
    }

    /// `relu(norm(x) + shortcut)`; [`Layer::vjp`] is that of the norm alone, from a cotangent in front of the sum.
    pub(super) fn forward_add_relu(
        &mut self,
        x: &Tensor,
        shortcut: &Tensor,
        pass: &Pass,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        match self {
            Norm::Group(norm) => norm.forward_add_relu(x, shortcut, tape),
            Norm::Batch(norm) => activation::add_relu(&norm.forward(x, pass, tape)?, shortcut),
        }
    }

    fn layer(&mut self) -> &mut dyn Layer {
        match self {
            Norm::Group(norm) => norm,
            Norm::Batch(norm) => norm,
        }
    }
}

impl Layer for Norm {
    fn forward(&mut self, x: &Tensor, pass: &Pass, tape: &mut Tape) -> Result<Tensor> {
        self.layer().forward(x, pass, tape)
    }

    fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        self.layer().vjp(gy, pass, tape, need_input)
    }

    fn absorb(&mut self, next: &LayerSpec) -> bool {
        self.layer().absorb(next)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.layer().visit(f)
    }
}
