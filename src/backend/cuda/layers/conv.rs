//! Convolution, and the linear map as one of a single pixel.

use super::{Backward, Builder, Launch, Layer, Use, elements};
use crate::Result;
use crate::backend::cpu::conv::Conv;
use crate::backend::cuda::gpu::Array;
use crate::backend::cuda::ops;
use crate::backend::cuda::param::Param;
use crate::backend::cuda::product::Product;
use crate::nn::spec::Shape;

/// A convolution with or without a bias, `[B, H, W, C]` to `[B, H', W', O]`.
pub struct Conv2d {
    product: Product,
    weight: Param,
    bias: Option<Param>,
    /// Whether the relu that follows the bias is this layer's too.
    relu: bool,
    out: usize,
}

impl Conv2d {
    /// Parameters `{name}.weight` and, with `bias`, `{name}.bias`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if cuDNN cannot, or there is no memory.
    pub fn new(builder: &mut Builder, name: &str, conv: Conv, input: Shape, out: usize, bias: bool) -> Result<Self> {
        let [h, w, c] = input;
        let gpu = builder.gpu;
        let product = Product::new(gpu, &conv, [builder.batch, h, w, c], out, builder.element, builder.kept)?;
        let weight = builder.params.take_operand(gpu, &format!("{name}.weight"))?;
        let bias = if bias { Some(builder.params.take(gpu, &format!("{name}.bias"))?) } else { None };
        if bias.is_some() {
            let [oh, ow] = conv.window.output(h, w)?;
            let rows = elements(builder.batch, [oh, ow, 1]);
            builder.needs.raise(Use::Partial, ops::bias_gradient_scratch(rows, out));
        }
        Ok(Conv2d { product, weight, bias, relu: false, out })
    }

    /// The same with the relu behind it, if `relu`; there is a bias then.
    pub fn with_relu(self, relu: bool) -> Self {
        Conv2d { relu, ..self }
    }
}

impl Layer for Conv2d {
    fn forward(&mut self, &Launch { gpu, place, .. }: &Launch, x: &Array, y: &Array) -> Result<()> {
        self.product.forward(gpu, place, x, self.weight.operand(), y)?;
        match &self.bias {
            Some(bias) if self.relu => ops::bias_relu(gpu, y, &bias.value, self.out),
            Some(bias) => ops::bias(gpu, y, &bias.value, self.out),
            None => Ok(()),
        }
    }

    fn backward(&mut self, &Launch { gpu, scratch, place, .. }: &Launch, arrays: &Backward) -> Result<()> {
        let (x, gy) = (arrays.x, arrays.gy);
        match &self.bias {
            Some(bias) if self.relu => {
                ops::bias_relu_vjp(gpu, arrays.y, gy, gy, bias.gradient()?, self.out, scratch.partial())?;
            }
            Some(Param { grad: Some(grad), .. }) => ops::bias_gradient(gpu, gy, grad, self.out, scratch.partial())?,
            _ => {}
        }
        match (&self.weight.fresh, &self.weight.grad) {
            (Some(fresh), _) => self.product.backward_filter(gpu, place, x, gy, fresh, false)?,
            (None, Some(grad)) => self.product.backward_filter(gpu, place, x, gy, grad, true)?,
            (None, None) => {}
        }
        Ok(())
    }

    fn backward_input(&mut self, &Launch { gpu, .. }: &Launch, arrays: &Backward) -> Result<()> {
        match arrays.gx {
            Some(gx) => self.product.backward_data(gpu, self.weight.operand(), arrays.gy, gx),
            None => Ok(()),
        }
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }
}
