//! Group and batch normalisation, with the relu behind them.

use super::{Backward, Builder, Kept, Launch, Layer, Use};
use crate::Result;
use crate::backend::cuda::gpu::{Array, Element, Gpu};
use crate::backend::cuda::ops::{self, Norm, NormShape, Over};
use crate::backend::cuda::param::Param;
use crate::nn::layers::Pass;
use crate::nn::spec::Shape;

/// Added to the variance, as the host's layers do.
const EPSILON: f64 = 1e-5;

/// What both have.
struct Affine {
    shape: NormShape,
    relu: bool,
    weight: Param,
    bias: Param,
    statistics: Kept,
}

impl Affine {
    /// With room for the statistics of so many groups in all.
    fn new(builder: &mut Builder, name: &str, shape: NormShape, groups: usize, relu: bool) -> Result<Self> {
        builder.needs.raise(Use::Partial, ops::norm_scratch(&shape));
        Ok(Affine {
            shape,
            relu,
            weight: builder.params.take(builder.gpu, &format!("{name}.weight"))?,
            bias: builder.params.take(builder.gpu, &format!("{name}.bias"))?,
            statistics: Kept::new(builder.gpu, builder.kept, 2 * groups, Element::F32)?,
        })
    }

    fn norm<'a>(&'a self, over: Over<'a>, at: &Launch<'a>) -> Norm<'a> {
        Norm {
            shape: self.shape,
            over,
            epsilon: EPSILON,
            relu: self.relu,
            weight: &self.weight.value,
            bias: &self.bias.value,
            statistics: self.statistics.at(at.place),
            scratch: at.scratch.partial(),
        }
    }

    fn gradients(&self) -> Result<[&Array; 2]> {
        Ok([self.weight.gradient()?, self.bias.gradient()?])
    }
}

/// See [`crate::nn::layers::GroupNorm`].
pub struct GroupNorm {
    affine: Affine,
    groups: usize,
}

impl GroupNorm {
    /// Parameters `{name}.weight` and `{name}.bias`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(builder: &mut Builder, name: &str, input: Shape, groups: usize, relu: bool) -> Result<Self> {
        let shape = shape_of(builder, input);
        Ok(GroupNorm { affine: Affine::new(builder, name, shape, shape.samples * groups, relu)?, groups })
    }
}

impl Layer for GroupNorm {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        self.affine.norm(Over::Groups(self.groups), at).forward(at.gpu, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        let norm = self.affine.norm(Over::Groups(self.groups), at);
        norm.vjp(at.gpu, arrays.x, arrays.gy, arrays.gx, self.affine.gradients()?)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        [&mut self.affine.weight, &mut self.affine.bias].into_iter().try_for_each(f)
    }
}

/// See [`crate::nn::layers::BatchNorm`].
pub struct BatchNorm {
    affine: Affine,
    momentum: f64,
    /// Whether something of it learns: else it computes as in evaluation.
    learns: bool,
    /// By the batch's statistics, or the running ones; as the last pass was prepared.
    training: bool,
    mean: Param,
    variance: Param,
}

impl BatchNorm {
    /// Parameters and buffers as the host's layer has them.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(builder: &mut Builder, name: &str, input: Shape, momentum: f64, relu: bool) -> Result<Self> {
        let shape = shape_of(builder, input);
        let affine = Affine::new(builder, name, shape, shape.channels, relu)?;
        let learns = affine.weight.grad.is_some() || affine.bias.grad.is_some();
        Ok(BatchNorm {
            learns,
            training: learns,
            affine,
            momentum,
            mean: builder.params.take_buffer(builder.gpu, &format!("{name}.running_mean"))?,
            variance: builder.params.take_buffer(builder.gpu, &format!("{name}.running_var"))?,
        })
    }

    fn over(&self, at: &Launch) -> Over<'_> {
        let running = [&self.mean.value, &self.variance.value];
        match self.training {
            true => Over::Batch { running, momentum: if at.again { 0.0 } else { self.momentum } },
            false => Over::Running(running),
        }
    }
}

impl Layer for BatchNorm {
    fn prepare(&mut self, _: &Gpu, pass: &Pass) -> Result<()> {
        self.training = pass.training && self.learns;
        Ok(())
    }

    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        self.affine.norm(self.over(at), at).forward(at.gpu, x, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        let norm = self.affine.norm(self.over(at), at);
        norm.vjp(at.gpu, arrays.x, arrays.gy, arrays.gx, self.affine.gradients()?)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        let Affine { weight, bias, .. } = &mut self.affine;
        [weight, bias, &mut self.mean, &mut self.variance].into_iter().try_for_each(f)
    }
}

fn shape_of(builder: &Builder, [h, w, channels]: Shape) -> NormShape {
    NormShape { samples: builder.batch, rows: h * w, channels }
}
