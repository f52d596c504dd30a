//! Group and batch normalisation with their gradients; a relu behind the norm costs nothing.
//!
//! Three launches each way: sums by channel over parts of the rows, their totals as coefficients of channels, and these
//! applied. Where a block can hold its share of the rows ([`Small`]) it is one launch, and backward another for the parameters'
//! gradients if there are several samples. Batch norm is group norm of one sample with a group a channel.

use super::{
    Array, BLOCK, Columns, Element, Gpu, arguments, each, launch, pack, require, require_scratch, signed, small,
};
use crate::{Error, Result};

/// What is normalised: `[samples, rows, channels]`, rows being positions (height times width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormShape {
    /// Samples.
    pub samples: usize,
    /// Positions of each.
    pub rows: usize,
    /// Channels.
    pub channels: usize,
}

impl NormShape {
    fn elements(&self) -> usize {
        self.samples * self.rows * self.channels
    }

    /// As batch norm sees it.
    fn flat(&self) -> NormShape {
        NormShape { samples: 1, rows: self.samples * self.rows, channels: self.channels }
    }
}

/// Floats of scratch that norms of `shape` need, group or batch, either way.
pub fn norm_scratch(shape: &NormShape) -> usize {
    [*shape, shape.flat()].iter().map(need).max().unwrap_or(0)
}

fn need(s: &NormShape) -> usize {
    let parts = Columns::most_parts(s.samples, s.rows, s.channels);
    s.samples * s.channels * (2 * parts + 2 + 4)
}

/// What is normalised by.
#[derive(Clone, Copy, Debug)]
pub enum Over<'a> {
    /// Group norm: mean and variance of each sample's so many groups of channels.
    Groups(usize),
    /// Batch norm in training: each channel's over the batch.
    Batch {
        /// Running mean and (unbiased) variance `[channels]`, into which they are blended.
        running: [&'a Array; 2],
        /// Their weight in that.
        momentum: f64,
    },
    /// Batch norm in evaluation: running mean and variance `[channels]`, which stay.
    Running([&'a Array; 2]),
}

/// A norm with its arrays.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// What is normalised.
    pub shape: NormShape,
    /// By what.
    pub over: Over<'a>,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether the output is `max(·, 0)` of the normalised values.
    pub relu: bool,
    /// Scale `[channels]`.
    pub weight: &'a Array,
    /// Shift `[channels]`.
    pub bias: &'a Array,
    /// Gets each group's mean and inverse deviation, `[samples, groups, 2]` or of a batch norm `[channels, 2]`, for
    /// [`Norm::vjp`].
    pub statistics: &'a Array,
    /// See [`norm_scratch`].
    pub scratch: &'a Array,
}

impl Norm<'_> {
    /// The norm of `x` into `y`, which may be `x` by running statistics alone.
    ///
    /// # Errors
    /// [`Error::Run`] if sizes do not fit or a launch fails; [`Error::Input`] for a batch norm of one value a channel.
    pub fn forward(&self, gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
        let seen = self.seen(x)?;
        require("the norm's output", y, x.len(), x.element())?;
        match self.over {
            Over::Groups(_) => self.normalise(gpu, &seen, x, y, None),
            Over::Batch { .. } if seen.shape.rows < 2 => Err(Error::input(format!(
                "batch normalisation in training needs more than one value a channel, but its input is {:?}: use a larger \
                 batch, or group-norm",
                self.shape
            ))),
            Over::Batch { running, momentum } => self.normalise(gpu, &seen, x, y, Some((running, momentum as f32))),
            Over::Running([mean, variance]) => {
                let Norm { weight, bias, statistics, scratch, .. } = *self;
                let (c, epsilon) = (self.shape.channels, self.epsilon as f32);
                let arguments = arguments![mean, variance, weight, bias, statistics, scratch, small(c)?, epsilon];
                launch(gpu, "norm_running", x.element(), each(c, 1), arguments)?;
                self.apply(gpu, &seen, x, scratch.pointer(), y)
            }
        }
    }

    /// From `gy`, the cotangent of [`Norm::forward`]'s output for `x`: adds the gradients of weight and bias to `gw` and
    /// `gb`, and writes the input's cotangent to `gx` if there is one; `gx` may be `gy` or `x`. Running statistics are
    /// constants.
    ///
    /// # Errors
    /// As [`Norm::forward`].
    pub fn vjp(&self, gpu: &Gpu, x: &Array, gy: &Array, gx: Option<&Array>, [gw, gb]: [&Array; 2]) -> Result<()> {
        let seen = self.seen(x)?;
        let NormShape { samples, rows, channels } = seen.shape;
        let element = x.element();
        for cotangent in [Some(gy), gx].into_iter().flatten() {
            require("a norm's cotangent", cotangent, x.len(), element)?;
        }
        for gradient in [gw, gb] {
            require("a norm's gradient", gradient, channels, Element::F32)?;
        }
        let Norm { relu, weight, bias, statistics, scratch, .. } = *self;
        let constant = matches!(self.over, Over::Running(_));
        let (r, c, of_group) = (small(rows)?, small(channels)?, small(seen.of_group())?);
        let (n, sample, all) = (small(x.len())?, small(rows * channels)?, signed(samples)?);
        let of_channels = channels.div_ceil(BLOCK);
        if let Some(Small { lanes, tiles }) = Small::new(&seen, element) {
            let lanes = signed(lanes)?;
            let arguments =
                arguments![x, gy, weight, bias, statistics, scratch, gw, gb, gx, r, c, lanes, of_group, relu, constant];
            launch(gpu, "norm_vjp_small", element, [tiles, samples, 1], arguments)?;
            if samples == 1 {
                return Ok(());
            }
            let none = 0u64;
            let arguments = arguments![x, gy, none, scratch, none, gw, gb, n, sample, c, 1i32, relu, 0u32, all];
            return launch(gpu, "norm_vjp_apply", element, [of_channels, 1, 1], arguments);
        }
        let cut = seen.columns(element);
        let (w, lanes, of_part) = (signed(cut.width)?, signed(cut.lanes)?, small(cut.rows)?);
        let arguments = arguments![x, gy, weight, bias, statistics, scratch, r, c, w, lanes, of_part, of_group, relu];
        launch(gpu, "norm_vjp_sums", element, [cut.tiles, cut.parts, samples], arguments)?;
        let sums = scratch.pointer() + 4 * (samples * cut.parts * 2 * channels) as u64;
        let coefficients = sums + 4 * (samples * 2 * channels) as u64;
        let parts = signed(cut.parts)?;
        let arguments =
            arguments![scratch, parts, weight, bias, statistics, sums, coefficients, r, c, of_group, constant];
        launch(gpu, "norm_vjp_coefficients", element, seen.totals(), arguments)?;
        let blocks = if gx.is_some() { each(x.len(), cut.width)[0] } else { 0 };
        let apply = small(blocks)?;
        let arguments = arguments![x, gy, coefficients, sums, gx, gw, gb, n, sample, c, w, relu, apply, all];
        launch(gpu, "norm_vjp_apply", element, [blocks + of_channels, 1, 1], arguments)
    }

    /// By mean and variance of `x` itself, which are blended into the running ones where there are any.
    fn normalise(
        &self,
        gpu: &Gpu,
        seen: &Seen,
        x: &Array,
        y: &Array,
        running: Option<([&Array; 2], f32)>,
    ) -> Result<()> {
        let (element, NormShape { samples, rows, channels }) = (x.element(), seen.shape);
        let Norm { relu, weight, bias, statistics, scratch, .. } = *self;
        let epsilon = self.epsilon as f32;
        let ([mean, variance], momentum) =
            running.map_or(([0, 0], 0.0), |(arrays, momentum)| (arrays.map(Array::pointer), momentum));
        let (r, c, of_group) = (small(rows)?, small(channels)?, small(seen.of_group())?);
        if let Some(Small { lanes, tiles }) = Small::new(seen, element) {
            let lanes = signed(lanes)?;
            let arguments = arguments![
                x, weight, bias, y, statistics, mean, variance, r, c, lanes, of_group, epsilon, momentum, relu
            ];
            return launch(gpu, "norm_small", element, [tiles, samples, 1], arguments);
        }
        let cut = seen.columns(element);
        let (w, lanes, of_part, parts) = (signed(cut.width)?, signed(cut.lanes)?, small(cut.rows)?, signed(cut.parts)?);
        let arguments = arguments![x, scratch, r, c, w, lanes, of_part, of_group];
        launch(gpu, "norm_sums", element, [cut.tiles, cut.parts, samples], arguments)?;
        let coefficients = scratch.pointer() + 4 * (samples * cut.parts * 2 * channels) as u64;
        let arguments = arguments![
            x,
            scratch,
            parts,
            weight,
            bias,
            statistics,
            coefficients,
            mean,
            variance,
            r,
            c,
            of_group,
            epsilon,
            momentum
        ];
        launch(gpu, "norm_statistics", element, seen.totals(), arguments)?;
        self.apply(gpu, seen, x, coefficients, y)
    }

    fn apply(&self, gpu: &Gpu, seen: &Seen, x: &Array, coefficients: u64, y: &Array) -> Result<()> {
        let NormShape { rows, channels, .. } = seen.shape;
        let width = seen.columns(x.element()).width;
        let (n, sample, c) = (small(x.len())?, small(rows * channels)?, small(channels)?);
        let arguments = arguments![x, coefficients, y, n, sample, c, signed(width)?, self.relu];
        launch(gpu, "norm_apply", x.element(), each(x.len(), width), arguments)
    }

    /// The norm as kernels see it, if its arrays fit.
    fn seen(&self, x: &Array) -> Result<Seen> {
        let channels = self.shape.channels;
        let (shape, groups) = match self.over {
            Over::Groups(groups) => (self.shape, groups),
            Over::Batch { .. } | Over::Running(_) => (self.shape.flat(), channels),
        };
        if groups == 0 || channels == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Run(format!("normalisation of {channels} channels in {groups} groups")));
        }
        require("the norm's input", x, shape.elements(), x.element())?;
        for parameter in [self.weight, self.bias] {
            require("the norm's weight or bias", parameter, channels, Element::F32)?;
        }
        if let Over::Batch { running, .. } | Over::Running(running) = self.over {
            for array in running {
                require("running statistics", array, channels, Element::F32)?;
            }
        }
        require("the norm's statistics", self.statistics, shape.samples * groups * 2, Element::F32)?;
        require_scratch("a norm", self.scratch, need(&shape))?;
        Ok(Seen { shape, groups })
    }
}

/// Shape and groups of a norm as kernels see it.
struct Seen {
    shape: NormShape,
    groups: usize,
}

impl Seen {
    fn of_group(&self) -> usize {
        self.shape.channels / self.groups
    }

    fn columns(&self, element: Element) -> Columns {
        Columns::new(element, self.shape.samples, self.shape.rows, self.shape.channels)
    }

    /// The grid of the kernels that add up parts.
    fn totals(&self) -> [usize; 3] {
        let at_once = if self.of_group() < 32 { 32 / self.of_group() } else { 1 };
        [self.groups.div_ceil(at_once), self.shape.samples, 1]
    }
}

/// How a norm runs in one launch, where a block's threads can hold its rows of a few packs of channels.
struct Small {
    /// Packs of channels a block takes: a power of 2.
    lanes: usize,
    /// Blocks over the channels.
    tiles: usize,
}

/// Rows that a thread holds, as in norm_small.cu.
const KEPT: usize = 8;

impl Small {
    fn new(seen: &Seen, element: Element) -> Option<Small> {
        let (w, NormShape { rows, channels, .. }) = (pack(element), seen.shape);
        // Two packs fill a sector of 32 bytes; more are for groups that need them, which must not straddle blocks.
        let lanes = [2, 4, 8, 16, 32].into_iter().find(|lanes| (lanes * w).is_multiple_of(seen.of_group()))?;
        let fits = channels.is_multiple_of(w) && rows <= KEPT * BLOCK / lanes;
        fits.then(|| Small { lanes, tiles: channels.div_ceil(lanes * w) })
    }
}
