//! Arrays seen as `[rows, channels]`: biases and their gradients, channels copied in and out.

use std::ops::Range;

use super::{Array, Columns, Element, Gpu, arguments, each, expect, expect_scratch, launch, signed, small, width};
use crate::{Error, Result};

/// `y = x + b` by channel for `x` `[rows, C]` and `b` `[C]`, with a relu behind it if `relu`; `y` may be `x`.
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn bias(gpu: &Gpu, x: &Array, b: &Array, y: &Array, relu: bool) -> Result<()> {
    let channels = b.len();
    expect("a bias", b, channels, Element::F32)?;
    expect("the output of a bias", y, x.len(), x.element())?;
    rows_of("a bias", x, channels)?;
    let w = width(x.element(), &[channels]);
    let (n, c) = (small(x.len())?, small(channels)?);
    launch(gpu, "bias", x.element(), each(x.len(), w), arguments![x, b, y, n, c, w as i32, relu])
}

/// `gb += ` the column sums of `gy` `[rows, C]`, for `gb` `[C]`; `scratch` has [`bias_scratch`] floats.
///
/// # Errors
/// As [`bias`].
pub fn bias_gradient(gpu: &Gpu, gy: &Array, gb: &Array, scratch: &Array) -> Result<()> {
    let channels = gb.len();
    expect("a bias's gradient", gb, channels, Element::F32)?;
    let rows = rows_of("a bias's gradient", gy, channels)?;
    expect_scratch("a bias's gradient", scratch, bias_scratch(rows, channels))?;
    small(gy.len())?;
    let cut = Columns::new(gy.element(), 1, rows, channels);
    let c = small(channels)?;
    launch(
        gpu,
        "column_sums",
        gy.element(),
        [cut.tiles, cut.parts, 1],
        arguments![gy, scratch, small(rows)?, c, signed(cut.width)?, signed(cut.lanes)?, small(cut.rows)?],
    )?;
    let grid = [channels.div_ceil(32), 1, 1];
    launch(gpu, "column_total", gy.element(), grid, arguments![scratch, signed(cut.parts)?, c, gb])
}

/// Floats of scratch that [`bias_gradient`] needs for a cotangent `[rows, channels]`.
pub fn bias_scratch(rows: usize, channels: usize) -> usize {
    Columns::most_parts(1, rows, channels) * channels
}

/// Copies channels `range` of `from` `[rows, from_channels]` into `to` `[rows, to_channels]`, from channel `first` on.
/// Concatenation is one call an input, its transpose one a cotangent.
///
/// # Errors
/// As [`bias`].
pub fn copy_channels(
    gpu: &Gpu,
    from: (&Array, usize),
    range: Range<usize>,
    to: (&Array, usize),
    first: usize,
) -> Result<()> {
    channels(gpu, from, range, to, first, false)
}

/// As [`copy_channels`], adding to what is there.
///
/// # Errors
/// As [`bias`].
pub fn add_channels(
    gpu: &Gpu,
    from: (&Array, usize),
    range: Range<usize>,
    to: (&Array, usize),
    first: usize,
) -> Result<()> {
    channels(gpu, from, range, to, first, true)
}

fn channels(
    gpu: &Gpu,
    (from, from_channels): (&Array, usize),
    range: Range<usize>,
    (to, to_channels): (&Array, usize),
    first: usize,
    add: bool,
) -> Result<()> {
    let rows = rows_of("a copy of channels", from, from_channels)?;
    expect("a copy of channels", to, rows * to_channels, from.element())?;
    if range.start > range.end || range.end > from_channels || first + range.len() > to_channels {
        return Err(Error::Run(format!(
            "channels {range:?} of {from_channels} do not fit into {to_channels} from {first} on"
        )));
    }
    let (n, count) = (rows * range.len(), range.len());
    let w = width(from.element(), &[count, from_channels, to_channels, range.start, first]);
    launch(
        gpu,
        "copy_channels",
        from.element(),
        each(n, w),
        arguments![
            from,
            to,
            small(n)?,
            small(count)?,
            small(from_channels)?,
            small(range.start)?,
            small(to_channels)?,
            small(first)?,
            w as i32,
            add
        ],
    )
}

/// How many rows of `channels` an array has.
fn rows_of(what: &str, array: &Array, channels: usize) -> Result<usize> {
    if channels == 0 || !array.len().is_multiple_of(channels) {
        return Err(Error::Run(format!("{what} of {channels} channels with an array of {} elements", array.len())));
    }
    Ok(array.len() / channels)
}
