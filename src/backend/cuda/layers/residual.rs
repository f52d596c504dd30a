//! Residual blocks: `relu(branch(x) + shortcut(x))`.

use super::{Backward, Builder, Launch, Layer, Sequence, Use, elements};
use crate::Result;
use crate::backend::cuda::gpu::{Array, Gpu};
use crate::backend::cuda::ops;
use crate::backend::cuda::param::Param;
use crate::nn::layers::Pass;
use crate::nn::layers::batch_norm::MOMENTUM;
use crate::nn::spec::{LayerSpec, NormKind, ResidualSpec, Shape};

/// A residual block; see [`crate::nn::layers::Residual`].
pub struct Residual {
    branch: Sequence,
    projection: Option<Sequence>,
}

impl Residual {
    /// Parameters as the host's block has them.
    ///
    /// # Errors
    /// As [`Sequence::new`].
    pub fn new(builder: &mut Builder, name: &str, spec: &ResidualSpec, input: Shape) -> Result<Self> {
        let norm = || match spec.norm {
            NormKind::Group => LayerSpec::GroupNorm { groups: spec.groups },
            NormKind::Batch => LayerSpec::BatchNorm { momentum: MOMENTUM },
        };
        let conv2d = |conv: crate::backend::cpu::conv::Conv, out| LayerSpec::Conv2d {
            out,
            kernel: conv.window.kernel[0],
            stride: conv.window.stride[0],
            padding: conv.window.padding[0],
            groups: conv.groups,
            bias: false,
        };
        let mut specs = Vec::new();
        let convolutions = spec.convolutions(input[2]);
        for (i, &(conv, _, to)) in convolutions.iter().enumerate() {
            let n = i + 1;
            specs.push((format!("{name}.conv{n}"), conv2d(conv, to)));
            specs.push((format!("{name}.norm{n}"), norm()));
            if n < convolutions.len() {
                specs.push((format!("{name}.relu{n}"), LayerSpec::Relu {}));
            }
        }
        let branch = Sequence::new(builder, &specs, input, true, Use::Inner)?;
        let projection = match spec.projection(input[2]) {
            Some(conv) => {
                let name = format!("{name}.projection");
                let specs = [(name.clone(), conv2d(conv, spec.out)), (format!("{name}-norm"), norm())];
                Some(Sequence::new(builder, &specs, input, true, Use::Inner)?)
            }
            None => None,
        };
        builder.needs.raise(Use::Sum, elements(builder.batch, branch.output_shape()));
        builder.needs.raise(Use::Shortcut, elements(builder.batch, input));
        Ok(Residual { branch, projection })
    }
}

impl Layer for Residual {
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()> {
        self.branch.forward(at, x)?;
        if let Some(projection) = &mut self.projection {
            projection.forward(at, x)?;
        }
        let shortcut = self.projection.as_ref().map_or(x, |p| p.output(at.place, x));
        ops::add_relu(at.gpu, self.branch.output(at.place, x), shortcut, y)
    }

    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        let (&Launch { gpu, scratch, .. }, &Backward { x, y, gy, gx }) = (at, arrays);
        let sum = scratch.get(Use::Sum, y.len())?;
        ops::relu_vjp(gpu, y, gy, &sum)?;
        self.branch.backward(at, x, &sum, gx)?;
        match (&mut self.projection, gx) {
            (Some(projection), None) => projection.backward(at, x, &sum, None),
            (Some(projection), Some(gx)) => {
                let shortcut = scratch.get(Use::Shortcut, x.len())?;
                projection.backward(at, x, &sum, Some(&shortcut))?;
                ops::add_to(gpu, &shortcut, gx)
            }
            (None, Some(gx)) => ops::add_to(gpu, &sum, gx),
            (None, None) => Ok(()),
        }
    }

    fn prepare(&mut self, gpu: &Gpu, pass: &Pass) -> Result<()> {
        self.branch.prepare(gpu, pass)?;
        self.projection.as_mut().map_or(Ok(()), |projection| projection.prepare(gpu, pass))
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.branch.visit(f)?;
        self.projection.as_mut().map_or(Ok(()), |projection| projection.visit(f))
    }
}
