//! Group normalisation: the shape stays, unless it takes over a max pool.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::norm_pool::{self, Kept};
use crate::backend::cpu::{Window, norm};
use crate::nn::param::{Init, Param};
use crate::nn::spec::LayerSpec;

/// Added to the variance, as in PyTorch.
const EPSILON: f64 = 1e-5;

/// Each sample's channels in groups, each brought to mean 0 and variance 1 over channels and positions; then a scale and
/// a shift by channel, and the relu that follows, if one does, and a max pool behind that. The same in training and evaluation, and blind to the
/// batch: the norm of choice for Sideways.
pub struct GroupNorm {
    norm: norm::GroupNorm,
    pool: Option<Window>,
    weight: Param,
    bias: Param,
}

impl GroupNorm {
    /// Parameters `{prefix}.weight` (ones) and `{prefix}.bias` (zeros), `[channels]`; `groups` divides `channels`.
    pub fn new(prefix: &str, channels: usize, groups: usize, init: &Init) -> Result<Self> {
        let weight = init.constant(format!("{prefix}.weight"), channels, 1.0)?;
        let bias = init.constant(format!("{prefix}.bias"), channels, 0.0)?;
        Ok(GroupNorm { norm: norm::GroupNorm { groups, epsilon: EPSILON, relu: false }, pool: None, weight, bias })
    }

    /// The forward pass with `shortcut` added and a relu behind that, of a norm that has taken over nothing; [`Layer::vjp`] then
    /// takes the cotangent in front of both.
    pub(super) fn forward_add_relu(&mut self, x: &Tensor, shortcut: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let (weight, bias) = (&self.weight.value, &self.bias.value);
        let (y, statistics) = norm::group_add_relu(x, weight, bias, &self.norm, shortcut)?;
        tape.push(x.clone());
        tape.push(statistics);
        Ok(y)
    }
}

impl Layer for GroupNorm {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        if let Some(window) = &self.pool {
            let (y, kept) = norm_pool::forward(x, &self.weight.value, &self.bias.value, &self.norm, window)?;
            [x.clone(), kept.statistics, kept.inputs, kept.winners].into_iter().for_each(|kept| tape.push(kept));
            return Ok(y);
        }
        let (y, statistics) = norm::group(x, &self.weight.value, &self.bias.value, &self.norm)?;
        tape.push(x.clone());
        tape.push(statistics);
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let (weight, bias) = (&self.weight.value, &self.bias.value);
        let (gx, gw, gb) = match &self.pool {
            Some(window) => {
                let (winners, inputs, statistics) = (tape.pop()?, tape.pop()?, tape.pop()?);
                let kept = Kept { statistics, inputs, winners };
                norm_pool::vjp(&tape.pop()?, [weight, bias], &kept, gy, &self.norm, window, need_input)?
            }
            None => {
                let (statistics, x) = (tape.pop()?, tape.pop()?);
                norm::group_vjp(&x, weight, bias, &statistics, gy, &self.norm, need_input)?
            }
        };
        self.weight.accumulate(gw)?;
        self.bias.accumulate(gb)?;
        Ok(gx)
    }

    fn absorb(&mut self, next: &LayerSpec) -> bool {
        match *next {
            LayerSpec::Relu {} if !self.norm.relu => self.norm.relu = true,
            LayerSpec::MaxPool { kernel, stride, padding } if self.norm.relu && self.pool.is_none() => {
                self.pool = Some(Window::square(kernel, stride.unwrap_or(kernel), padding));
            }
            _ => return false,
        }
        true
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        f(&mut self.bias)
    }
}
