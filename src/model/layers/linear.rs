//! Linear map of everything a sample holds: `[B, H, W, C]`, flattened in that order, to `[B, 1, 1, O]`.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::kernels::conv::{self, Conv};
use crate::model::param::{Init, Param};

/// `y = W x + b`, weight `[O, H W C]`. Computed as a 1x1 convolution of one pixel.
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// Parameters `{prefix}.weight` and, with `bias`, `{prefix}.bias`; `inputs` elements a sample.
    pub fn new(prefix: &str, inputs: usize, out: usize, bias: bool, init: &Init) -> Result<Self> {
        let weight = init.kaiming(format!("{prefix}.weight"), &[out, inputs])?;
        let bias = if bias { Some(init.constant(format!("{prefix}.bias"), out, 0.0)?) } else { None };
        Ok(Linear { weight, bias })
    }

    fn kernel(&self) -> Result<Tensor> {
        let (o, i) = self.weight.value.dims2()?;
        Ok(self.weight.value.reshape((o, i, 1, 1))?)
    }
}

impl Layer for Linear {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let x = x.contiguous()?;
        let (b, h, w, c) = x.dims4()?;
        let flat = x.reshape((b, 1, 1, h * w * c))?;
        tape.push(x);
        conv::forward(&Conv::pointwise(), &flat, &self.kernel()?, self.bias.as_ref().map(|b| &b.value))
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let x = tape.pop()?;
        let (b, h, w, c) = x.dims4()?;
        let flat = x.reshape((b, 1, 1, h * w * c))?;
        let kernel = self.kernel()?;
        let gw = conv::weight_gradient(&Conv::pointwise(), &flat, kernel.dims(), gy)?;
        self.weight.accumulate(gw.reshape(self.weight.value.dims())?)?;
        if let Some(bias) = &mut self.bias {
            bias.accumulate(conv::bias_gradient(gy)?)?;
        }
        if !need_input {
            return Ok(None);
        }
        let gx = conv::input_gradient(&Conv::pointwise(), flat.dims(), &kernel, gy)?;
        Ok(Some(gx.reshape(x.dims())?))
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }
}
