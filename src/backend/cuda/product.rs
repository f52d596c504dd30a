//! A convolution's three products, whatever its number of input channels.
//!
//! Tensor cores take channels in packs of 16 bytes. cuDNN fills fewer up itself, at every call, and has slower kernels for them
//! than for whole packs. Here they are filled up with zeros once a pass.

use super::dnn::Convolution;
use super::gpu::{Array, Element, Gpu};
use super::layers::Kept;
use super::ops;
use crate::Result;
use crate::backend::cpu::conv::Conv;

/// The products of a convolution of one shape, `[B, H, W, C]` to `[B, H', W', O]`.
pub struct Product {
    plain: Convolution,
    filled: Option<Filled>,
}

/// The same with zeros behind the channels.
struct Filled {
    product: Convolution,
    /// C, and how many there are with the zeros.
    channels: [usize; 2],
    /// `[B, H, W, filled]` by step kept, `[O, kH, kW, filled]` and its gradient.
    x: Kept,
    w: Array,
    gw: Array,
}

impl Product {
    /// For inputs `[B, H, W, C]` of `element` and `out` output channels, of `kept` steps in a row.
    ///
    /// # Errors
    /// As [`Convolution::new`].
    pub fn new(gpu: &Gpu, conv: &Conv, input: [usize; 4], out: usize, element: Element, kept: usize) -> Result<Self> {
        let plain = Convolution::new(gpu, conv, input, out, element)?;
        let pack = 16 / element.size();
        let cores = element == Element::Bf16 || gpu.tf32();
        let [b, h, w, c] = input;
        if !cores || conv.groups != 1 || c >= pack {
            return Ok(Product { plain, filled: None });
        }
        let [kh, kw] = conv.window.kernel;
        let zeros = |rows: usize| gpu.zeros(rows * pack, element);
        let filled = Filled {
            product: Convolution::new(gpu, conv, [b, h, w, pack], out, element)?,
            channels: [c, pack],
            x: Kept::zeros(gpu, kept, b * h * w * pack, element)?,
            w: zeros(out * kh * kw)?,
            gw: zeros(out * kh * kw)?,
        };
        Ok(Product { plain, filled: Some(filled) })
    }

    /// `y = x * w`, for the step in `place`.
    ///
    /// # Errors
    /// As [`Convolution::forward`].
    pub fn forward(&self, gpu: &Gpu, place: usize, x: &Array, w: &Array, y: &Array) -> Result<()> {
        let Some(filled) = &self.filled else { return self.plain.forward(gpu, x, w, y) };
        let [own, all] = filled.channels;
        ops::put_channels(gpu, x, filled.x.at(place), own, all, 0)?;
        ops::put_channels(gpu, w, &filled.w, own, all, 0)?;
        filled.product.forward(gpu, filled.x.at(place), &filled.w, y)
    }

    /// The input's cotangent, `gx`.
    ///
    /// # Errors
    /// As [`Convolution::backward_data`].
    pub fn backward_data(&self, gpu: &Gpu, w: &Array, gy: &Array, gx: &Array) -> Result<()> {
        self.plain.backward_data(gpu, w, gy, gx)
    }

    /// The filter's gradient for the input that the last [`Product::forward`] of the step in `place` had, into `gw`, of the activations' type: in its
    /// place, or added to it.
    ///
    /// # Errors
    /// As [`Convolution::backward_filter`].
    pub fn backward_filter(&self, gpu: &Gpu, place: usize, x: &Array, gy: &Array, gw: &Array, add: bool) -> Result<()> {
        let Some(filled) = &self.filled else { return self.plain.backward_filter(gpu, x, gy, gw, add) };
        let [own, all] = filled.channels;
        // The sum so far goes along.
        if add {
            ops::put_channels(gpu, gw, &filled.gw, own, all, 0)?;
        }
        filled.product.backward_filter(gpu, filled.x.at(place), gy, &filled.gw, add)?;
        ops::get_channels(gpu, &filled.gw, gw, own, all, 0)
    }
}
