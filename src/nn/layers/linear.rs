//! Linear map of everything a sample holds: `[B, H, W, C]`, flattened in that order, to `[B, 1, 1, O]`.

use candle_core::{Tensor, TensorId};

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::conv::{self, Conv, Convolution, InputCotangent};
use crate::nn::param::{Init, Param};

/// `y = W x + b`, weight `[O, H W C]`. Computed as a 1x1 convolution of one pixel.
pub struct Linear {
    product: Convolution,
    weight: Param,
    bias: Option<Param>,
    input: Vec<usize>,
    kernel: Option<(TensorId, Tensor)>,
}

impl Linear {
    /// Parameters `{prefix}.weight` and, with `bias`, `{prefix}.bias`; `inputs` elements a sample.
    pub fn new(prefix: &str, inputs: usize, out: usize, bias: bool, init: &Init) -> Result<Self> {
        let weight = init.weight(format!("{prefix}.weight"), &[out, inputs])?;
        let bias = if bias { Some(init.constant(format!("{prefix}.bias"), out, 0.0)?) } else { None };
        Ok(Linear { product: Convolution::new(Conv::pointwise()), weight, bias, input: Vec::new(), kernel: None })
    }

    /// The weight as a 1x1 convolution has it: the same tensor for as long as the weight is the same.
    fn kernel(&mut self) -> Result<Tensor> {
        let weight = &self.weight.value;
        match &self.kernel {
            Some((of, kernel)) if *of == weight.id() => Ok(kernel.clone()),
            _ => {
                let (o, i) = weight.dims2()?;
                let kernel = weight.reshape((o, i, 1, 1))?;
                Ok(self.kernel.insert((weight.id(), kernel)).1.clone())
            }
        }
    }
}

impl Layer for Linear {
    fn forward(&mut self, x: &Tensor, _: &Pass, tape: &mut Tape) -> Result<Tensor> {
        self.input = x.dims().to_vec();
        let (b, h, w, c) = x.dims4()?;
        let flat = x.contiguous()?.reshape((b, 1, 1, h * w * c))?;
        let kernel = self.kernel()?;
        let bias = self.bias.as_ref().map(|b| &b.value);
        let (y, kept) = self.product.forward(&flat, &kernel, bias)?;
        tape.push(kept);
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, _: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let kept = tape.pop()?;
        let flat = [self.input[0], 1, 1, self.input[1..].iter().product()];
        let (kernel, wanted) = (self.kernel()?, InputCotangent::new(need_input));
        let gx = match self.weight.trainable {
            true => {
                let (gw, gx) = self.product.vjp(&flat, kept, &kernel, gy, self.weight.grad.take(), wanted)?;
                self.weight.grad = Some(gw.reshape(self.weight.value.dims())?);
                gx
            }
            false => self.product.input_vjp(&flat, &kernel, gy, wanted)?,
        };
        if let Some(bias) = self.bias.as_mut().filter(|bias| bias.trainable) {
            bias.accumulate(conv::bias_gradient(gy)?)?;
        }
        Ok(gx.map(|gx| gx.reshape(self.input.as_slice())).transpose()?)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }
}
