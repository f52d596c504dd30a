//! Convolution: `[B, H, W, C]` to `[B, H', W', O]`, H' = (H + 2 padding - kernel) / stride + 1.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::conv::{self, Conv, Convolution, InputCotangent};
use crate::nn::param::{Init, Param};

/// A two-dimensional convolution, with or without a bias. Weight `[O, C/groups, kH, kW]`.
pub struct Conv2d {
    conv: Convolution,
    weight: Param,
    bias: Option<Param>,
    input: Vec<usize>,
}

impl Conv2d {
    /// Parameters `{prefix}.weight` and, with `bias`, `{prefix}.bias`. `channels` are those of the input; they and `out`
    /// are multiples of the groups.
    pub fn new(prefix: &str, conv: Conv, channels: usize, out: usize, bias: bool, init: &Init) -> Result<Self> {
        let [kh, kw] = conv.window.kernel;
        let weight = init.weight(format!("{prefix}.weight"), &[out, channels / conv.groups, kh, kw])?;
        let bias = if bias { Some(init.constant(format!("{prefix}.bias"), out, 0.0)?) } else { None };
        Ok(Conv2d { conv: Convolution::new(conv), weight, bias, input: Vec::new() })
    }

    /// [`Layer::vjp`], with the input's cotangent as `wanted`.
    pub(super) fn vjp_as(&mut self, gy: &Tensor, tape: &mut Tape, wanted: InputCotangent) -> Result<Option<Tensor>> {
        let kept = tape.pop()?;
        let gx = match self.weight.trainable {
            true => {
                let sum = self.weight.grad.take();
                let (gw, gx) = self.conv.vjp(&self.input, kept, &self.weight.value, gy, sum, wanted)?;
                self.weight.grad = Some(gw);
                gx
            }
            false => self.conv.input_vjp(&self.input, &self.weight.value, gy, wanted)?,
        };
        if let Some(bias) = self.bias.as_mut().filter(|bias| bias.trainable) {
            bias.accumulate(conv::bias_gradient(gy)?)?;
        }
        Ok(gx)
    }
}

impl Layer for Conv2d {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        self.input = x.dims().to_vec();
        let (y, kept) = self.conv.forward(x, &self.weight.value, self.bias.as_ref().map(|b| &b.value))?;
        tape.push(kept);
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        self.vjp_as(gy, tape, InputCotangent::new(need_input))
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }
}
