//! Layers as configured: what a TOML file says, checked, and turned into layers.
//!
//! ```toml
//! layers = [
//!     { kind = "conv2d", out = 64, kernel = 3, padding = 1, bias = false },
//!     { kind = "group-norm", groups = 8 },
//!     { kind = "relu" },
//!     { kind = "global-avg-pool" },
//!     { kind = "linear", out = 10 },
//! ]
//! ```

use serde::{Deserialize, Serialize};

use super::layers::batch_norm::MOMENTUM;
use super::layers::{
    AvgPool, BatchNorm, Conv2d, Dropout, Gelu, GlobalAvgPool, GroupNorm, Layer, Linear, MaxPool, Relu, Residual,
    Upsample,
};
use super::limits;
use super::param::Init;
use crate::backend::cpu::Window;
use crate::backend::cpu::conv::Conv;
use crate::{Error, Result};

/// Height, width and channels of one sample's activation.
pub type Shape = [usize; 3];

/// One layer of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum LayerSpec {
    /// Convolution to `out` channels with a square kernel.
    Conv2d {
        /// Output channels.
        out: usize,
        /// Side of the kernel.
        kernel: usize,
        /// Step between outputs.
        #[serde(default = "one")]
        stride: usize,
        /// Zeros added on each side.
        #[serde(default)]
        padding: usize,
        /// Groups of channels.
        #[serde(default = "one")]
        groups: usize,
        /// Whether there is a bias; superfluous before a norm.
        #[serde(default = "yes")]
        bias: bool,
    },
    /// Linear map of the flattened sample.
    Linear {
        /// Output elements.
        out: usize,
        /// Whether there is a bias.
        #[serde(default = "yes")]
        bias: bool,
    },
    /// Group normalisation.
    GroupNorm {
        /// Groups; they divide the channels.
        #[serde(default = "default_groups")]
        groups: usize,
    },
    /// Batch normalisation.
    BatchNorm {
        /// Weight of a new batch in the running statistics, above 0 and up to 1.
        #[serde(default = "batch_norm_momentum")]
        momentum: f64,
    },
    /// max(x, 0).
    Relu {},
    /// Gaussian error linear unit.
    Gelu {},
    /// Maximum of each window.
    MaxPool {
        /// Side of the window.
        kernel: usize,
        /// Step between windows; the kernel's side where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stride: Option<usize>,
        /// Border on each side, never chosen.
        #[serde(default)]
        padding: usize,
    },
    /// Mean of each window.
    AvgPool {
        /// Side of the window.
        kernel: usize,
        /// Step between windows; the kernel's side where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stride: Option<usize>,
        /// Zeros added on each side, which count.
        #[serde(default)]
        padding: usize,
    },
    /// Mean over all positions.
    GlobalAvgPool {},
    /// Residual block.
    Residual(ResidualSpec),
    /// Nearest-neighbour up-sampling.
    Upsample {
        /// Whole factor.
        factor: usize,
    },
    /// Dropout in training.
    Dropout {
        /// Probability that an element is zeroed, 0 up to below 1.
        rate: f64,
    },
}

/// A residual block (see [`Residual`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidualSpec {
    /// Output channels (of a bottleneck: after widening).
    pub out: usize,
    /// Stride of the block.
    #[serde(default = "one")]
    pub stride: usize,
    /// Which branch.
    #[serde(default)]
    pub block: Block,
    /// Which norm.
    #[serde(default)]
    pub norm: NormKind,
    /// Groups of a group norm; they divide every channel count in the block.
    #[serde(default = "default_groups")]
    pub groups: usize,
}

/// The branch of a residual block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Block {
    /// Two 3x3 convolutions.
    #[default]
    Basic,
    /// 1x1 to a quarter, 3x3, 1x1 back.
    Bottleneck,
}

/// The norm of a residual block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormKind {
    /// Group normalisation.
    #[default]
    Group,
    /// Batch normalisation.
    Batch,
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn batch_norm_momentum() -> f64 {
    MOMENTUM
}

fn default_groups() -> usize {
    32
}

impl LayerSpec {
    /// The kind as configurations and parameter names have it.
    pub fn kind(&self) -> &'static str {
        match self {
            LayerSpec::Conv2d { .. } => "conv2d",
            LayerSpec::Linear { .. } => "linear",
            LayerSpec::GroupNorm { .. } => "group-norm",
            LayerSpec::BatchNorm { .. } => "batch-norm",
            LayerSpec::Relu {} => "relu",
            LayerSpec::Gelu {} => "gelu",
            LayerSpec::MaxPool { .. } => "max-pool",
            LayerSpec::AvgPool { .. } => "avg-pool",
            LayerSpec::GlobalAvgPool {} => "global-avg-pool",
            LayerSpec::Residual(_) => "residual",
            LayerSpec::Upsample { .. } => "upsample",
            LayerSpec::Dropout { .. } => "dropout",
        }
    }

    /// Whether automatic cuts may be made before this layer: it does real work.
    pub fn is_heavy(&self) -> bool {
        matches!(self, LayerSpec::Conv2d { .. } | LayerSpec::Linear { .. } | LayerSpec::Residual(_))
    }

    /// The window of a convolution or pool.
    pub(crate) fn window(&self) -> Option<Window> {
        match *self {
            LayerSpec::Conv2d { kernel, stride, padding, .. } => Some(Window::square(kernel, stride, padding)),
            LayerSpec::MaxPool { kernel, stride, padding } | LayerSpec::AvgPool { kernel, stride, padding } => {
                Some(Window::square(kernel, stride.unwrap_or(kernel), padding))
            }
            _ => None,
        }
    }

    /// The output's shape for an input `[H, W, C]`.
    ///
    /// # Errors
    /// [`Error::Input`] that names the layer's kind, the input's shape and what does not fit.
    pub fn output_shape(&self, input: Shape) -> Result<Shape> {
        let [h, w, c] = input;
        let wrong = |why: String| Error::input(format!("{} on an input of {h}x{w}x{c}: {why}", self.kind()));
        limits::elements(input).map_err(wrong)?;
        limits::numbers(self).map_err(wrong)?;
        let output = self.shape_of(input)?;
        limits::elements(output).map_err(|why| wrong(format!("of the output, {why}")))?;
        Ok(output)
    }

    fn shape_of(&self, input: Shape) -> Result<Shape> {
        let [h, w, c] = input;
        let wrong = |why: String| Error::input(format!("{} on an input of {h}x{w}x{c}: {why}", self.kind()));
        let windowed = |window: Window| window.output(h, w).map_err(|e| wrong(e.to_string()));
        match *self {
            LayerSpec::Conv2d { out, groups, kernel, stride, padding, .. } => {
                divides(groups, &[c, out]).map_err(wrong)?;
                positive("out", out).map_err(wrong)?;
                let [h, w] = windowed(Window::square(kernel, stride, padding))?;
                Ok([h, w, out])
            }
            LayerSpec::Linear { out, .. } => positive("out", out).map_err(wrong).map(|()| [1, 1, out]),
            LayerSpec::GroupNorm { groups } => divides(groups, &[c]).map_err(wrong).map(|()| input),
            LayerSpec::MaxPool { kernel, padding, .. } | LayerSpec::AvgPool { kernel, padding, .. } => {
                if padding >= kernel || kernel > 16 {
                    return Err(wrong(format!(
                        "kernel {kernel} and padding {padding}: the kernel must be at most 16, and larger than the padding"
                    )));
                }
                let [h, w] = windowed(self.window().unwrap_or(Window::square(kernel, kernel, padding)))?;
                Ok([h, w, c])
            }
            LayerSpec::GlobalAvgPool {} => Ok([1, 1, c]),
            LayerSpec::Residual(ref block) => block.output_shape(input).map_err(wrong),
            LayerSpec::Upsample { factor } => {
                positive("factor", factor).map_err(wrong).map(|()| [h * factor, w * factor, c])
            }
            LayerSpec::Dropout { rate } if !(0.0..1.0).contains(&rate) => {
                Err(wrong(format!("rate = {rate} is not a probability below 1")))
            }
            LayerSpec::BatchNorm { momentum } if !(momentum > 0.0 && momentum <= 1.0) => {
                Err(wrong(format!("momentum = {momentum} is not above 0 and up to 1")))
            }
            LayerSpec::BatchNorm { .. } | LayerSpec::Relu {} | LayerSpec::Gelu {} | LayerSpec::Dropout { .. } => {
                Ok(input)
            }
        }
    }

    /// The layer itself, its parameters named `layers.{n}.{kind}.…` for its place `n` in the whole network.
    ///
    /// # Errors
    /// As [`LayerSpec::output_shape`].
    pub fn build(&self, n: usize, input: Shape, init: &Init) -> Result<Box<dyn Layer>> {
        self.output_shape(input)?;
        let [h, w, c] = input;
        let name = format!("layers.{n}.{}", self.kind());
        Ok(match *self {
            LayerSpec::Conv2d { out, kernel, stride, padding, groups, bias } => {
                let conv = Conv { window: Window::square(kernel, stride, padding), groups };
                Box::new(Conv2d::new(&name, conv, c, out, bias, init)?)
            }
            LayerSpec::Linear { out, bias } => Box::new(Linear::new(&name, h * w * c, out, bias, init)?),
            LayerSpec::GroupNorm { groups } => Box::new(GroupNorm::new(&name, c, groups, init)?),
            LayerSpec::BatchNorm { momentum } => Box::new(BatchNorm::new(&name, c, momentum, init)?),
            LayerSpec::Relu {} => Box::new(Relu),
            LayerSpec::Gelu {} => Box::new(Gelu),
            LayerSpec::MaxPool { kernel, stride, padding } => {
                Box::new(MaxPool::new(Window::square(kernel, stride.unwrap_or(kernel), padding)))
            }
            LayerSpec::AvgPool { kernel, stride, padding } => {
                Box::new(AvgPool::new(Window::square(kernel, stride.unwrap_or(kernel), padding)))
            }
            LayerSpec::GlobalAvgPool {} => Box::new(GlobalAvgPool::default()),
            LayerSpec::Residual(ref block) => Box::new(Residual::new(&name, block, c, init)?),
            LayerSpec::Upsample { factor } => Box::new(Upsample { factor }),
            LayerSpec::Dropout { rate } => Box::new(Dropout::new(&name, rate)),
        })
    }
}

impl ResidualSpec {
    fn output_shape(&self, [h, w, c]: Shape) -> std::result::Result<Shape, String> {
        positive("out", self.out)?;
        positive("stride", self.stride)?;
        if self.block == Block::Bottleneck && !self.out.is_multiple_of(4) {
            return Err(format!("out = {} of a bottleneck is not a multiple of 4", self.out));
        }
        if self.norm == NormKind::Group {
            let channels: Vec<usize> = self.convolutions(c).iter().map(|&(_, _, to)| to).collect();
            divides(self.groups, &channels)?;
        }
        Ok([h.div_ceil(self.stride), w.div_ceil(self.stride), self.out])
    }
}

fn divides(groups: usize, channels: &[usize]) -> std::result::Result<(), String> {
    if groups > 0 && channels.iter().all(|c| c.is_multiple_of(groups)) {
        return Ok(());
    }
    Err(format!("groups = {groups} does not divide the channel counts {channels:?}: choose a common divisor"))
}

fn positive(what: &str, value: usize) -> std::result::Result<(), String> {
    if value > 0 { Ok(()) } else { Err(format!("{what} must be at least 1")) }
}
