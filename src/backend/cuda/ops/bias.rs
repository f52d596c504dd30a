//! Arrays seen as `[rows, channels]`: biases and their gradients, channels copied in and out.

use super::{Array, Columns, Element, Gpu, arguments, each, launch, require, require_scratch, signed, small, width};
use crate::{Error, Result};

/// `y += b` by channel for `y` `[rows, channels]` and `b` `[channels]`.
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn bias(gpu: &Gpu, y: &Array, b: &Array, channels: usize) -> Result<()> {
    biased(gpu, y, b, channels, false)
}

/// `y = relu(y + b)`, as [`bias`].
///
/// # Errors
/// As [`bias`].
pub fn bias_relu(gpu: &Gpu, y: &Array, b: &Array, channels: usize) -> Result<()> {
    biased(gpu, y, b, channels, true)
}

fn biased(gpu: &Gpu, y: &Array, b: &Array, channels: usize, relu: bool) -> Result<()> {
    require("a bias", b, channels, Element::F32)?;
    rows_of("a bias", y, channels)?;
    let w = width(y.element(), &[channels]);
    let arguments = arguments![y, b, small(y.len())?, small(channels)?, w as i32, relu];
    launch(gpu, "bias", y.element(), each(y.len(), w), arguments)
}

/// Adds the column sums of `gy` `[rows, channels]` to `gb` `[channels]`.
///
/// # Errors
/// As [`bias`].
pub fn bias_gradient(gpu: &Gpu, gy: &Array, gb: &Array, channels: usize, scratch: &Array) -> Result<()> {
    columns(gpu, gy, None, gb, channels, scratch)
}

/// From `gy`, the cotangent of [`bias_relu`]'s output `y`: writes that of its input to `gx` (which may be `gy` or `y`), and
/// adds the bias's gradient to `gb`, in one pass.
///
/// # Errors
/// As [`bias`].
pub fn bias_relu_vjp(
    gpu: &Gpu,
    y: &Array,
    gy: &Array,
    gx: &Array,
    gb: &Array,
    channels: usize,
    scratch: &Array,
) -> Result<()> {
    for array in [y, gx] {
        require("a relu's output or cotangent", array, gy.len(), gy.element())?;
    }
    columns(gpu, gy, Some((y, gx)), gb, channels, scratch)
}

fn columns(
    gpu: &Gpu,
    gy: &Array,
    through: Option<(&Array, &Array)>,
    gb: &Array,
    channels: usize,
    scratch: &Array,
) -> Result<()> {
    require("a bias's gradient", gb, channels, Element::F32)?;
    let rows = rows_of("a bias's gradient", gy, channels)?;
    require_scratch("a bias's gradient", scratch, bias_gradient_scratch(rows, channels))?;
    small(gy.len())?;
    let cut = Columns::new(gy.element(), 1, rows, channels);
    let (y, gx) = through.unzip();
    let (r, c, of_part) = (small(rows)?, small(channels)?, small(cut.rows)?);
    let (w, lanes) = (signed(cut.width)?, signed(cut.lanes)?);
    let arguments = arguments![gy, y, gx, scratch, r, c, w, lanes, of_part];
    launch(gpu, "column_sums", gy.element(), [cut.tiles, cut.parts, 1], arguments)?;
    let grid = [channels.div_ceil(32), 1, 1];
    launch(gpu, "column_total", gy.element(), grid, arguments![scratch, signed(cut.parts)?, c, gb])
}

/// Floats of scratch that [`bias_gradient`] and [`bias_relu_vjp`] need for a cotangent `[rows, channels]`.
pub fn bias_gradient_scratch(rows: usize, channels: usize) -> usize {
    Columns::most_parts(1, rows, channels) * channels
}

/// Copies `part` `[rows, own]` into channels `first` to `first + own` of `whole` `[rows, channels]`.
///
/// # Errors
/// As [`bias`].
pub fn put_channels(gpu: &Gpu, part: &Array, whole: &Array, own: usize, channels: usize, first: usize) -> Result<()> {
    let (n, w) = block(part, whole, own, channels, first)?;
    let (own, channels, first) = (small(own)?, small(channels)?, small(first)?);
    let arguments = arguments![part, whole, n, own, own, 0u32, channels, first, w as i32];
    launch(gpu, "copy_channels", part.element(), each(part.len(), w), arguments)
}

/// Copies channels `first` to `first + own` of `whole` `[rows, channels]` into `part` `[rows, own]`.
///
/// # Errors
/// As [`bias`].
pub fn get_channels(gpu: &Gpu, whole: &Array, part: &Array, own: usize, channels: usize, first: usize) -> Result<()> {
    let (n, w) = block(part, whole, own, channels, first)?;
    let (own, channels, first) = (small(own)?, small(channels)?, small(first)?);
    let arguments = arguments![whole, part, n, own, channels, first, own, 0u32, w as i32];
    launch(gpu, "copy_channels", part.element(), each(part.len(), w), arguments)
}

/// Elements of `part`, and how many a thread takes.
fn block(part: &Array, whole: &Array, own: usize, channels: usize, first: usize) -> Result<(u32, usize)> {
    let rows = rows_of("a copy of channels", part, own)?;
    require("what channels are copied into or out of", whole, rows * channels, part.element())?;
    if first + own > channels {
        return Err(Error::Run(format!("{own} channels from {first} on of an array of {channels}")));
    }
    Ok((small(part.len())?, width(part.element(), &[own, channels, first])))
}

/// How many rows of `channels` an array has.
fn rows_of(what: &str, array: &Array, channels: usize) -> Result<usize> {
    if channels == 0 || !array.len().is_multiple_of(channels) {
        return Err(Error::Run(format!("{what} of {channels} channels with an array of {} elements", array.len())));
    }
    Ok(array.len() / channels)
}
