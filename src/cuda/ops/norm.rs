//! Group and batch normalisation with their gradients; a relu behind the norm costs nothing.
//!
//! Three launches each way: sums by channel over parts of the rows, their totals as coefficients of channels, and these
//! applied; one launch, and for several samples one for the parameters' gradients, where a block can hold its share ([`Small`]). Batch norm is
//! group norm of one sample with a group a channel.

use super::{
    Array, BLOCK, Columns, Element, Gpu, arguments, each, expect, expect_scratch, launch, pack, signed, small,
};
use crate::kernels::norm::GroupNorm;
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

/// How a batch norm computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Added to the variance.
    pub epsilon: f64,
    /// Weight of a new batch in the running statistics.
    pub momentum: f64,
    /// Whether the output is `max(·, 0)` of the normalised values.
    pub relu: bool,
}

/// Floats of scratch that norms of `shape` need, group or batch, either way.
pub fn norm_scratch(shape: &NormShape) -> usize {
    [*shape, shape.flat()].iter().map(need).max().unwrap_or(0)
}

fn need(s: &NormShape) -> usize {
    let parts = Columns::most_parts(s.samples, s.rows, s.channels);
    s.samples * s.channels * (2 * parts + 2 + 4)
}

/// Group norm of `x` into `y` (not `x`), with `weight` and `bias` `[channels]`; `statistics` `[samples, groups, 2]` gets
/// each group's mean and inverse deviation, for [`group_norm_vjp`].
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or a launch fails.
#[allow(clippy::too_many_arguments)]
pub fn group_norm(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &GroupNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    y: &Array,
    statistics: &Array,
    scratch: &Array,
) -> Result<()> {
    let job = Job::new(shape, norm.groups, norm.epsilon, norm.relu)?;
    job.forward(gpu, x, [weight, bias], y, statistics, None, scratch)
}

/// From `gy`, the cotangent of [`group_norm`]'s output: adds the gradients of weight and bias to `gw` and `gb`, and writes
/// the input's cotangent to `gx` if there is one; `gx` may be `gy` or `x`.
///
/// # Errors
/// As [`group_norm`].
#[allow(clippy::too_many_arguments)]
pub fn group_norm_vjp(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &GroupNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    statistics: &Array,
    gy: &Array,
    gx: Option<&Array>,
    gw: &Array,
    gb: &Array,
    scratch: &Array,
) -> Result<()> {
    let job = Job::new(shape, norm.groups, norm.epsilon, norm.relu)?;
    job.vjp(gpu, x, [weight, bias], statistics, gy, gx, [gw, gb], false, scratch)
}

/// Batch norm of `x` into `y` (not `x`) by the batch's own statistics, which go to `statistics` `[channels, 2]` as mean and
/// inverse deviation, and into `running_mean` and `running_variance` `[channels]` (the variance unbiased).
///
/// # Errors
/// As [`group_norm`]; [`Error::Input`] where there is one value a channel.
#[allow(clippy::too_many_arguments)]
pub fn batch_norm(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &BatchNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    running_mean: &Array,
    running_variance: &Array,
    y: &Array,
    statistics: &Array,
    scratch: &Array,
) -> Result<()> {
    if shape.samples * shape.rows < 2 {
        return Err(Error::input(format!(
            "batch normalisation in training needs more than one value a channel, but its input is {shape:?}: use a \
             larger batch, or group-norm"
        )));
    }
    let job = Job::new(&shape.flat(), shape.channels, norm.epsilon, norm.relu)?;
    let running = Some(([running_mean, running_variance], norm.momentum as f32));
    job.forward(gpu, x, [weight, bias], y, statistics, running, scratch)
}

/// As [`group_norm_vjp`], for [`batch_norm`].
///
/// # Errors
/// As [`group_norm`].
#[allow(clippy::too_many_arguments)]
pub fn batch_norm_vjp(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &BatchNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    statistics: &Array,
    gy: &Array,
    gx: Option<&Array>,
    gw: &Array,
    gb: &Array,
    scratch: &Array,
) -> Result<()> {
    let job = Job::new(&shape.flat(), shape.channels, norm.epsilon, norm.relu)?;
    job.vjp(gpu, x, [weight, bias], statistics, gy, gx, [gw, gb], false, scratch)
}

/// Batch norm in evaluation: by the running statistics, which stay. `statistics` `[channels, 2]` gets their mean and inverse
/// deviation, for [`running_norm_vjp`]; `y` may be `x`.
///
/// # Errors
/// As [`group_norm`].
#[allow(clippy::too_many_arguments)]
pub fn running_norm(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &BatchNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    running_mean: &Array,
    running_variance: &Array,
    y: &Array,
    statistics: &Array,
    scratch: &Array,
) -> Result<()> {
    let job = Job::new(&shape.flat(), shape.channels, norm.epsilon, norm.relu)?;
    let c = shape.channels;
    job.check(x, [weight, bias], statistics, scratch)?;
    expect("the norm's output", y, x.len(), x.element())?;
    for running in [running_mean, running_variance] {
        expect("running statistics", running, c, Element::F32)?;
    }
    launch(
        gpu,
        "norm_running",
        x.element(),
        each(c, 1),
        arguments![running_mean, running_variance, weight, bias, statistics, scratch, small(c)?, job.epsilon],
    )?;
    job.apply(gpu, x, scratch.pointer(), y)
}

/// As [`group_norm_vjp`], for [`running_norm`]: the statistics are constants.
///
/// # Errors
/// As [`group_norm`].
#[allow(clippy::too_many_arguments)]
pub fn running_norm_vjp(
    gpu: &Gpu,
    shape: &NormShape,
    norm: &BatchNorm,
    x: &Array,
    weight: &Array,
    bias: &Array,
    statistics: &Array,
    gy: &Array,
    gx: Option<&Array>,
    gw: &Array,
    gb: &Array,
    scratch: &Array,
) -> Result<()> {
    let job = Job::new(&shape.flat(), shape.channels, norm.epsilon, norm.relu)?;
    job.vjp(gpu, x, [weight, bias], statistics, gy, gx, [gw, gb], true, scratch)
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
    fn new(job: &Job, element: Element) -> Option<Small> {
        let (w, NormShape { rows, channels, .. }) = (pack(element), job.shape);
        // Two packs fill a sector of 32 bytes; more are for groups that need them, which must not straddle blocks.
        let lanes = [2, 4, 8, 16, 32].into_iter().find(|lanes| (lanes * w).is_multiple_of(job.of_group()))?;
        let fits = channels.is_multiple_of(w) && rows <= KEPT * BLOCK / lanes;
        fits.then(|| Small { lanes, tiles: channels.div_ceil(lanes * w) })
    }
}

/// One norm: its shape as the kernels see it.
struct Job {
    shape: NormShape,
    groups: usize,
    epsilon: f32,
    relu: bool,
}

impl Job {
    fn new(shape: &NormShape, groups: usize, epsilon: f64, relu: bool) -> Result<Job> {
        if groups == 0 || shape.channels == 0 || !shape.channels.is_multiple_of(groups) {
            return Err(Error::Run(format!("normalisation of {} channels in {groups} groups", shape.channels)));
        }
        Ok(Job { shape: *shape, groups, epsilon: epsilon as f32, relu })
    }

    fn of_group(&self) -> usize {
        self.shape.channels / self.groups
    }

    /// The grid of the kernels that add up parts.
    fn totals(&self) -> [usize; 3] {
        let at_once = if self.of_group() < 32 { 32 / self.of_group() } else { 1 };
        [self.groups.div_ceil(at_once), self.shape.samples, 1]
    }

    fn check(&self, x: &Array, weight_and_bias: [&Array; 2], statistics: &Array, scratch: &Array) -> Result<()> {
        expect("the norm's input", x, self.shape.elements(), x.element())?;
        for parameter in weight_and_bias {
            expect("the norm's weight or bias", parameter, self.shape.channels, Element::F32)?;
        }
        expect("the norm's statistics", statistics, self.shape.samples * self.groups * 2, Element::F32)?;
        expect_scratch("a norm", scratch, need(&self.shape))
    }

    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        gpu: &Gpu,
        x: &Array,
        [weight, bias]: [&Array; 2],
        y: &Array,
        statistics: &Array,
        running: Option<([&Array; 2], f32)>,
        scratch: &Array,
    ) -> Result<()> {
        self.check(x, [weight, bias], statistics, scratch)?;
        expect("the norm's output", y, x.len(), x.element())?;
        let NormShape { samples, rows, channels } = self.shape;
        for array in running.iter().flat_map(|(arrays, _)| arrays) {
            expect("running statistics", array, channels, Element::F32)?;
        }
        let element = x.element();
        let (mean, variance) = running.map_or((0, 0), |([m, v], _)| (m.pointer(), v.pointer()));
        let momentum = running.map_or(0.0, |(_, momentum)| momentum);
        if let Some(Small { lanes, tiles }) = Small::new(self, element) {
            let (r, c, lanes, of_group) = (small(rows)?, small(channels)?, signed(lanes)?, small(self.of_group())?);
            let (epsilon, relu) = (self.epsilon, self.relu);
            let arguments = arguments![
                x, weight, bias, y, statistics, mean, variance, r, c, lanes, of_group, epsilon, momentum, relu
            ];
            return launch(gpu, "norm_small", element, [tiles, samples, 1], arguments);
        }
        let cut = Columns::new(element, samples, rows, channels);
        let (r, c, of_group) = (small(rows)?, small(channels)?, small(self.of_group())?);
        let (w, lanes, of_part) = (signed(cut.width)?, signed(cut.lanes)?, small(cut.rows)?);
        let grid = [cut.tiles, cut.parts, samples];
        launch(gpu, "norm_sums", element, grid, arguments![x, scratch, r, c, w, lanes, of_part, of_group])?;
        let coefficients = scratch.pointer() + 4 * (samples * cut.parts * 2 * channels) as u64;
        launch(
            gpu,
            "norm_statistics",
            element,
            self.totals(),
            arguments![
                x,
                scratch,
                signed(cut.parts)?,
                weight,
                bias,
                statistics,
                coefficients,
                mean,
                variance,
                r,
                c,
                of_group,
                self.epsilon,
                momentum
            ],
        )?;
        self.apply(gpu, x, coefficients, y)
    }

    fn apply(&self, gpu: &Gpu, x: &Array, coefficients: u64, y: &Array) -> Result<()> {
        let NormShape { samples, rows, channels } = self.shape;
        let cut = Columns::new(x.element(), samples, rows, channels);
        let (n, sample, c) = (small(x.len())?, small(rows * channels)?, small(channels)?);
        let grid = each(x.len(), cut.width);
        launch(
            gpu,
            "norm_apply",
            x.element(),
            grid,
            arguments![x, coefficients, y, n, sample, c, signed(cut.width)?, self.relu],
        )
    }

    #[allow(clippy::too_many_arguments)]
    fn vjp(
        &self,
        gpu: &Gpu,
        x: &Array,
        [weight, bias]: [&Array; 2],
        statistics: &Array,
        gy: &Array,
        gx: Option<&Array>,
        [gw, gb]: [&Array; 2],
        constant: bool,
        scratch: &Array,
    ) -> Result<()> {
        self.check(x, [weight, bias], statistics, scratch)?;
        let NormShape { samples, rows, channels } = self.shape;
        let element = x.element();
        for cotangent in [Some(gy), gx].into_iter().flatten() {
            expect("a norm's cotangent", cotangent, x.len(), element)?;
        }
        for gradient in [gw, gb] {
            expect("a norm's gradient", gradient, channels, Element::F32)?;
        }
        let (r, c, of_group) = (small(rows)?, small(channels)?, small(self.of_group())?);
        let (n, sample) = (small(x.len())?, small(rows * channels)?);
        let of_channels = channels.div_ceil(BLOCK);
        if let Some(Small { lanes, tiles }) = Small::new(self, element) {
            let (lanes, relu) = (signed(lanes)?, self.relu);
            let arguments =
                arguments![x, gy, weight, bias, statistics, scratch, gw, gb, gx, r, c, lanes, of_group, relu, constant];
            launch(gpu, "norm_vjp_small", element, [tiles, samples, 1], arguments)?;
            if samples == 1 {
                return Ok(());
            }
            let none = 0u64;
            let arguments =
                arguments![x, gy, none, scratch, none, gw, gb, n, sample, c, 1i32, relu, 0u32, signed(samples)?];
            return launch(gpu, "norm_vjp_apply", element, [of_channels, 1, 1], arguments);
        }
        let cut = Columns::new(element, samples, rows, channels);
        let (w, lanes, of_part) = (signed(cut.width)?, signed(cut.lanes)?, small(cut.rows)?);
        launch(
            gpu,
            "norm_vjp_sums",
            element,
            [cut.tiles, cut.parts, samples],
            arguments![x, gy, weight, bias, statistics, scratch, r, c, w, lanes, of_part, of_group, self.relu],
        )?;
        let sums = scratch.pointer() + 4 * (samples * cut.parts * 2 * channels) as u64;
        let coefficients = sums + 4 * (samples * 2 * channels) as u64;
        launch(
            gpu,
            "norm_vjp_coefficients",
            element,
            self.totals(),
            arguments![
                scratch,
                signed(cut.parts)?,
                weight,
                bias,
                statistics,
                sums,
                coefficients,
                r,
                c,
                of_group,
                constant
            ],
        )?;
        let blocks = if gx.is_some() { each(x.len(), cut.width)[0] } else { 0 };
        launch(
            gpu,
            "norm_vjp_apply",
            element,
            [blocks + of_channels, 1, 1],
            arguments![
                x,
                gy,
                coefficients,
                sums,
                gx,
                gw,
                gb,
                n,
                sample,
                c,
                w,
                self.relu,
                small(blocks)?,
                signed(samples)?
            ],
        )
    }
}
