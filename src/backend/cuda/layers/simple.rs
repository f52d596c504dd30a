//! Layers without parameters.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Backward, Builder, Kept, Launch, Layer};
use crate::Result;
use crate::backend::cpu::Window;
use crate::backend::cuda::gpu::{Array, Element, Gpu};
use crate::backend::cuda::ops;
use crate::nn::layers::Pass;
use crate::nn::spec::Shape;

/// See [`crate::nn::layers::Relu`].
pub struct Relu;

impl Layer for Relu {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::relu(at.gpu, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| ops::relu_vjp(at.gpu, arrays.y, arrays.gy, gx))
    }

    // Of the layers that may come before it, those that read their output again (relu, the end of a residual block) find it
    // as they left it: it was not negative.
    fn in_place(&self) -> bool {
        true
    }
}

/// See [`crate::nn::layers::Gelu`].
pub struct Gelu;

impl Layer for Gelu {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::gelu(at.gpu, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| ops::gelu_vjp(at.gpu, arrays.x, arrays.gy, gx))
    }
}

/// See [`crate::nn::layers::MaxPool`].
struct MaxPool {
    window: Window,
    input: [usize; 4],
    winners: Kept,
}

impl Layer for MaxPool {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::max_pool(at.gpu, self.input, &self.window, x, y, self.winners.at(at.place))
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        let Some(gx) = arrays.gx else { return Ok(()) };
        ops::max_pool_vjp(at.gpu, self.input, &self.window, self.winners.at(at.place), arrays.gy, gx)
    }
}

/// See [`crate::nn::layers::AvgPool`].
struct AvgPool {
    window: Window,
    input: [usize; 4],
}

impl Layer for AvgPool {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::average_pool(at.gpu, self.input, &self.window, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| ops::average_pool_vjp(at.gpu, self.input, &self.window, arrays.gy, gx))
    }
}

/// The maximum or mean of windows.
///
/// # Errors
/// [`crate::Error::Run`] if there is no memory.
pub fn pool(builder: &Builder, max: bool, window: Window, input: Shape, output: Shape) -> Result<Box<dyn Layer>> {
    let batch = builder.batch;
    let input = batched(batch, input);
    if !max {
        return Ok(Box::new(AvgPool { window, input }));
    }
    // A byte an output element.
    let bytes = super::elements(batch, output);
    let winners = Kept::new(builder.gpu, builder.kept, bytes.div_ceil(4), Element::F32)?;
    Ok(Box::new(MaxPool { window, input, winners }))
}

/// See [`crate::nn::layers::GlobalAvgPool`].
pub struct GlobalAvgPool {
    input: [usize; 4],
}

impl GlobalAvgPool {
    /// For `batch` inputs `[H, W, C]`.
    pub fn new(batch: usize, input: Shape) -> Self {
        GlobalAvgPool { input: batched(batch, input) }
    }
}

impl Layer for GlobalAvgPool {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::global_average(at.gpu, self.input, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| ops::global_average_vjp(at.gpu, self.input, arrays.gy, gx))
    }
}

/// See [`crate::nn::layers::Upsample`].
pub struct Upsample {
    input: [usize; 4],
    factor: usize,
}

impl Upsample {
    /// For `batch` inputs `[H, W, C]`.
    pub fn new(batch: usize, input: Shape, factor: usize) -> Self {
        Upsample { input: batched(batch, input), factor }
    }
}

impl Layer for Upsample {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        ops::upsample(at.gpu, self.input, self.factor, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| ops::upsample_vjp(at.gpu, self.input, self.factor, arrays.gy, gx))
    }
}

/// See [`crate::nn::layers::Dropout`]: the masks are the host's, bit for bit.
pub struct Dropout {
    name: String,
    rate: f64,
    /// Whether the last pass prepared is a training one.
    training: bool,
    /// The pass's key, in device memory, so that a graph reads each pass's own.
    key: Array,
}

impl Dropout {
    /// `name` tells this layer's masks from others'.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(builder: &Builder, name: &str, rate: f64) -> Result<Self> {
        let key = builder.gpu.zeros(2, Element::F32)?;
        Ok(Dropout { name: name.into(), rate, training: builder.training, key })
    }

    fn mask(&self, gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
        match self.training && self.rate > 0.0 {
            true => ops::dropout(gpu, x, y, self.rate, &self.key, 0),
            false => gpu.copy(x, y),
        }
    }
}

impl Layer for Dropout {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        self.mask(at.gpu, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        arrays.gx.map_or(Ok(()), |gx| self.mask(at.gpu, arrays.gy, gx))
    }

    fn prepare(&mut self, gpu: &Gpu, pass: &Pass) -> Result<()> {
        self.training = pass.training;
        ops::set_words(gpu, &self.key, 0, &[xxh3_64_with_seed(self.name.as_bytes(), pass.key)])
    }
}

fn batched(batch: usize, [h, w, c]: Shape) -> [usize; 4] {
    [batch, h, w, c]
}
