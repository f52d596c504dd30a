//! Group and batch normalisation, with the relu behind them.

use super::{Backward, Builder, Layer, Scratch, Use};
use crate::Result;
use crate::cuda::gpu::{Array, Element, Gpu};
use crate::cuda::ops::{self, Norm, NormShape, Over};
use crate::cuda::param::Param;
use crate::model::spec::Shape;

/// Added to the variance, as the host's layers do.
const EPSILON: f64 = 1e-5;

/// See [`crate::model::layers::GroupNorm`].
pub struct GroupNorm {
    shape: NormShape,
    groups: usize,
    relu: bool,
    weight: Param,
    bias: Param,
    statistics: Array,
}

impl GroupNorm {
    /// Parameters `{name}.weight` and `{name}.bias`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(builder: &mut Builder, name: &str, input: Shape, groups: usize, relu: bool) -> Result<Self> {
        let shape = shape_of(builder, input);
        Ok(GroupNorm {
            shape,
            groups,
            relu,
            weight: builder.params.take(builder.gpu, &format!("{name}.weight"))?,
            bias: builder.params.take(builder.gpu, &format!("{name}.bias"))?,
            statistics: builder.gpu.array(shape.samples * groups * 2, Element::F32)?,
        })
    }

    fn norm<'a>(&'a self, scratch: &'a Scratch) -> Norm<'a> {
        Norm {
            shape: self.shape,
            over: Over::Groups(self.groups),
            epsilon: EPSILON,
            relu: self.relu,
            weight: &self.weight.value,
            bias: &self.bias.value,
            statistics: &self.statistics,
            scratch: scratch.partial(),
        }
    }
}

impl Layer for GroupNorm {
    fn forward(&mut self, gpu: &Gpu, x: &Array, y: &Array, scratch: &Scratch) -> Result<()> {
        self.norm(scratch).forward(gpu, x, y)
    }

    fn backward(&mut self, gpu: &Gpu, arrays: &Backward, scratch: &Scratch) -> Result<()> {
        let gradients = [self.weight.gradient()?, self.bias.gradient()?];
        self.norm(scratch).vjp(gpu, arrays.x, arrays.gy, arrays.gx, gradients)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        f(&mut self.bias)
    }
}

/// See [`crate::model::layers::BatchNorm`].
pub struct BatchNorm {
    shape: NormShape,
    momentum: f64,
    relu: bool,
    training: bool,
    weight: Param,
    bias: Param,
    mean: Param,
    variance: Param,
    statistics: Array,
}

impl BatchNorm {
    /// Parameters and buffers as the host's layer has them.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(builder: &mut Builder, name: &str, input: Shape, momentum: f64, relu: bool) -> Result<Self> {
        let shape = shape_of(builder, input);
        let (gpu, params) = (builder.gpu, &mut builder.params);
        let mut take = |part: &str| params.take(gpu, &format!("{name}.{part}"));
        Ok(BatchNorm {
            shape,
            momentum,
            relu,
            training: builder.training,
            weight: take("weight")?,
            bias: take("bias")?,
            mean: take("running_mean")?,
            variance: take("running_var")?,
            statistics: gpu.array(input[2] * 2, Element::F32)?,
        })
    }

    fn norm<'a>(&'a self, scratch: &'a Scratch) -> Norm<'a> {
        let running = [&self.mean.value, &self.variance.value];
        Norm {
            shape: self.shape,
            over: match self.training {
                true => Over::Batch { running, momentum: self.momentum },
                false => Over::Running(running),
            },
            epsilon: EPSILON,
            relu: self.relu,
            weight: &self.weight.value,
            bias: &self.bias.value,
            statistics: &self.statistics,
            scratch: scratch.partial(),
        }
    }
}

impl Layer for BatchNorm {
    fn forward(&mut self, gpu: &Gpu, x: &Array, y: &Array, scratch: &Scratch) -> Result<()> {
        self.norm(scratch).forward(gpu, x, y)
    }

    fn backward(&mut self, gpu: &Gpu, arrays: &Backward, scratch: &Scratch) -> Result<()> {
        let gradients = [self.weight.gradient()?, self.bias.gradient()?];
        self.norm(scratch).vjp(gpu, arrays.x, arrays.gy, arrays.gx, gradients)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        [&mut self.weight, &mut self.bias, &mut self.mean, &mut self.variance].into_iter().try_for_each(f)
    }
}

fn shape_of(builder: &mut Builder, [h, w, channels]: Shape) -> NormShape {
    let shape = NormShape { samples: builder.batch, rows: h * w, channels };
    builder.needs.raise(Use::Partial, ops::norm_scratch(&shape));
    shape
}
