//! A convolution of few channels, a group norm and what that takes over, as one layer: `[B, H, W, C]` to `[B, H', W', O]`.

use candle_core::Tensor;

use super::{Conv2d, GroupNorm, Layer, Pass, Tape};
use crate::backend::cpu::conv::InputCotangent;
use crate::backend::cpu::norm_pool;
use crate::backend::cpu::stem::{self, Kept};
use crate::nn::param::Param;
use crate::nn::spec::LayerSpec;
use crate::{Error, Result};

/// Channels of an image, up to which the two may be computed together.
const FEW: usize = 4;

/// The two layers one after the other, or where relu and max pool follow and the kernel has it, in the same passes over memory:
/// the convolution's output then is neither kept nor ever whole.
pub struct Stem {
    conv: Conv2d,
    norm: GroupNorm,
    together: bool,
}

impl Stem {
    /// Whether `layer`, on inputs of `channels`, may be a stem's first.
    pub fn begins(layer: &LayerSpec, channels: usize) -> bool {
        channels <= FEW && matches!(layer, LayerSpec::Conv2d { .. })
    }

    /// Of its two layers.
    pub fn new(conv: Conv2d, norm: GroupNorm) -> Self {
        Stem { conv, norm, together: false }
    }

    fn kernel(&self) -> Option<stem::Stem<'_>> {
        Some(stem::Stem {
            conv: self.conv.conv.geometry(),
            weight: &self.conv.weight.value,
            bias: self.conv.bias.as_ref().map(|bias| &bias.value),
            norm: &self.norm.norm,
            affine: [&self.norm.weight.value, &self.norm.bias.value],
            window: self.norm.pool.as_ref()?,
        })
    }

    /// The input's cotangent, by the convolution's output computed once more.
    fn input_cotangent(&mut self, x: &Tensor, gy: &Tensor, pass: &Pass) -> Result<Option<Tensor>> {
        let Some(window) = &self.norm.pool else { return Ok(None) };
        let mut tape = Tape::new();
        let y = self.conv.forward(x, pass, &mut tape)?;
        let affine = [&self.norm.weight.value, &self.norm.bias.value];
        let (_, kept) = norm_pool::forward(&y, affine[0], affine[1], &self.norm.norm, window)?;
        let (g, _, _) = norm_pool::vjp(&y, affine, &kept, gy, &self.norm.norm, window, true)?;
        let Some(g) = g else { return Ok(None) };
        Ok(self.conv.conv.vjp(x.dims(), tape.pop()?, &self.conv.weight.value, &g, None, InputCotangent::Compute)?.1)
    }
}

impl Layer for Stem {
    fn forward(&mut self, x: &Tensor, pass: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let together = match self.kernel() {
            Some(kernel) if kernel.suits(x) => Some(kernel.forward(x)?),
            _ => None,
        };
        self.together = together.is_some();
        let Some((y, kept)) = together else {
            let y = self.conv.forward(x, pass, tape)?;
            return self.norm.forward(&y, pass, tape);
        };
        [x.clone(), kept.moments, kept.statistics, kept.winners].into_iter().for_each(|kept| tape.push(kept));
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        if !self.together {
            let g = self.norm.vjp(gy, pass, tape, true)?;
            return g.map_or(Ok(None), |g| self.conv.vjp(&g, pass, tape, need_input));
        }
        let (winners, statistics, moments, x) = (tape.pop()?, tape.pop()?, tape.pop()?, tape.pop()?);
        let kept = Kept { moments, statistics, winners };
        let sum = self.conv.weight.grad.take();
        let Some(kernel) = self.kernel() else { return Err(Error::Run("a stem without its pool".into())) };
        let gradients = kernel.vjp(&x, &kept, gy, sum)?;
        self.conv.weight.grad = Some(gradients.weight);
        if let (Some(bias), Some(gradient)) = (&mut self.conv.bias, gradients.bias) {
            bias.accumulate(gradient)?;
        }
        let [weight, bias] = gradients.affine;
        self.norm.weight.accumulate(weight)?;
        self.norm.bias.accumulate(bias)?;
        if need_input { self.input_cotangent(&x, gy, pass) } else { Ok(None) }
    }

    fn absorb(&mut self, next: &LayerSpec) -> bool {
        self.norm.absorb(next)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.conv.visit(f)?;
        self.norm.visit(f)
    }
}
