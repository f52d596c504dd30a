//! Residual blocks: `[B, H, W, C]` to `[B, H', W', out]`, H' = H / stride rounded up (He et al., CVPR 2016).

use candle_core::Tensor;

use super::{Conv2d, Layer, Norm, Pass, Relu, Tape};
use crate::Result;
use crate::backend::cpu::activation;
use crate::backend::cpu::conv::{Conv, InputCotangent};
use crate::nn::param::{Init, Param};
use crate::nn::spec::{Block, LayerSpec, ResidualSpec};

/// `relu(branch(x) + shortcut(x))`.
///
/// The branch of a basic block is 3x3 (with the stride), norm, relu, 3x3, norm; of a bottleneck 1x1 to a quarter of the
/// channels, norm, relu, 3x3 (with the stride), norm, relu, 1x1, norm. The shortcut is the identity, or a 1x1 convolution
/// with the stride and a norm where the shape changes.
pub struct Residual {
    /// The branch's first convolution.
    first: Conv2d,
    /// Its norms, relus and further convolutions.
    between: Vec<Box<dyn Layer>>,
    /// Its last norm.
    last: Norm,
    /// The shortcut's convolution and norm, where it is not the identity.
    projection: Option<(Conv2d, Norm)>,
}

impl Residual {
    /// Parameters `{prefix}.conv1.weight`, `{prefix}.norm1.weight`, ..., `{prefix}.projection.weight` and
    /// `{prefix}.projection-norm.weight`; `channels` are those of the input.
    pub fn new(prefix: &str, spec: &ResidualSpec, channels: usize, init: &Init) -> Result<Self> {
        let convolutions = spec.convolutions(channels);
        let pair = |n: usize| -> Result<(Conv2d, Norm)> {
            let (conv, from, to) = convolutions[n - 1];
            let conv = Conv2d::new(&format!("{prefix}.conv{n}"), conv, from, to, false, init)?;
            Ok((conv, Norm::new(spec.norm, &format!("{prefix}.norm{n}"), to, spec.groups, init)?))
        };
        let (first, mut last) = pair(1)?;
        let mut between: Vec<Box<dyn Layer>> = Vec::new();
        for n in 2..=convolutions.len() {
            let (conv, next) = pair(n)?;
            let relu = !last.absorb(&LayerSpec::Relu {});
            between.push(Box::new(std::mem::replace(&mut last, next)));
            if relu {
                between.push(Box::new(Relu));
            }
            between.push(Box::new(conv));
        }
        let projection = match spec.projection(channels) {
            Some(conv) => {
                let name = format!("{prefix}.projection");
                let norm = Norm::new(spec.norm, &format!("{name}-norm"), spec.out, spec.groups, init)?;
                Some((Conv2d::new(&name, conv, channels, spec.out, false, init)?, norm))
            }
            None => None,
        };
        Ok(Residual { first, between, last, projection })
    }
}

impl Layer for Residual {
    fn forward(&mut self, x: &Tensor, pass: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let mut y = self.first.forward(x, pass, tape)?;
        for layer in &mut self.between {
            y = layer.forward(&y, pass, tape)?;
        }
        let shortcut = match &mut self.projection {
            Some((conv, norm)) => {
                let projected = conv.forward(x, pass, tape)?;
                norm.forward(&projected, pass, tape)?
            }
            None => x.clone(),
        };
        let y = self.last.forward_add_relu(&y, &shortcut, pass, tape)?;
        tape.push(y.clone());
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let sum = activation::relu_vjp(&tape.pop()?, gy)?;
        let mut g = self.last.vjp(&sum, pass, tape, true)?;
        let shortcut = match &mut self.projection {
            Some((conv, norm)) => {
                let g = norm.vjp(&sum, pass, tape, true)?;
                drop(sum);
                match g {
                    Some(g) => conv.vjp(&g, pass, tape, need_input)?,
                    None => None,
                }
            }
            None => Some(sum),
        };
        for layer in self.between.iter_mut().rev() {
            g = match g {
                Some(g) => layer.vjp(&g, pass, tape, true)?,
                None => None,
            };
        }
        let Some(g) = g else { return Ok(None) };
        let input = match shortcut.filter(|_| need_input) {
            Some(shortcut) => InputCotangent::AddTo(shortcut),
            None => InputCotangent::new(need_input),
        };
        self.first.vjp_as(&g, tape, input)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.first.visit(f)?;
        self.between.iter_mut().try_for_each(|layer| layer.visit(f))?;
        self.last.visit(f)?;
        match &mut self.projection {
            Some((conv, norm)) => conv.visit(f).and_then(|()| norm.visit(f)),
            None => Ok(()),
        }
    }
}

impl ResidualSpec {
    /// The branch's convolutions: (geometry, input channels, output channels).
    pub(crate) fn convolutions(&self, channels: usize) -> Vec<(Conv, usize, usize)> {
        let conv = |kernel, stride, padding| Conv {
            window: crate::backend::cpu::Window::square(kernel, stride, padding),
            groups: 1,
        };
        match self.block {
            Block::Basic => vec![(conv(3, self.stride, 1), channels, self.out), (conv(3, 1, 1), self.out, self.out)],
            Block::Bottleneck => {
                let narrow = self.out / 4;
                vec![
                    (conv(1, 1, 0), channels, narrow),
                    (conv(3, self.stride, 1), narrow, narrow),
                    (conv(1, 1, 0), narrow, self.out),
                ]
            }
        }
    }

    /// The shortcut's convolution, where the shape changes.
    pub(crate) fn projection(&self, channels: usize) -> Option<Conv> {
        let window = crate::backend::cpu::Window::square(1, self.stride, 0);
        (self.stride != 1 || channels != self.out).then_some(Conv { window, groups: 1 })
    }
}
