//! One function an operator: checks sizes and launches its kernels into the compute stream.
//!
//! Nothing here allocates on the device or waits, and no argument changes from tick to tick, so that all of it but the
//! optimiser can be captured in a graph. Activations are NHWC, of either type, and of one type within a call; parameters,
//! their gradients, statistics and scratch are 32-bit floats. Results are those of [`crate::backend::cpu`] to rounding, and the
//! same to the bit from run to run: sums are taken in an order that depends on shapes alone, in scratch arrays whose
//! length the functions named `*_scratch` tell. A scratch array may be shared by all operators of a stream.

mod bias;
mod elementwise;
mod loss;
mod norm;
mod optimizer;
mod pool;

use std::sync::Arc;

use cudarc::driver::{CudaStream, LaunchConfig, PushKernelArg};

pub use bias::{bias, bias_gradient, bias_gradient_scratch, bias_relu, bias_relu_vjp, get_channels, put_channels};
pub(super) use elementwise::SUMMANDS;
pub use elementwise::{
    add, add_relu, add_to, dropout, fill, from_f32, gelu, gelu_vjp, guard, guard_scratch, mix, relu, relu_vjp,
    set_words, sum_in_order, to_f32,
};
pub use loss::{Labels, cross_entropy, loss_scratch, pixel};
pub use norm::{Norm, NormShape, Over, norm_scratch};
pub use optimizer::{Accumulation, Parameter, Parameters};
pub use pool::{
    adaptive_average, adaptive_average_vjp, average_pool, average_pool_vjp, global_average, global_average_vjp,
    max_pool, max_pool_vjp, spread, spread_vjp, upsample, upsample_vjp,
};

use super::gpu::{Array, Element, Gpu, failed};
use crate::{Error, Result};

/// Threads of a block, as in common.cu.
const BLOCK: usize = 256;
/// Blocks that keep a large GPU busy with loops over rows: about eight for each of its multiprocessors, so that enough reads
/// are under way. Part of what fixes the order of sums.
const BUSY: usize = 1056;

/// A kernel's argument.
#[derive(Clone, Copy)]
enum Argument {
    Address(u64),
    Unsigned(u32),
    Signed(i32),
    Float(f32),
    Double(f64),
}

impl From<&Array> for Argument {
    fn from(array: &Array) -> Self {
        Argument::Address(array.pointer())
    }
}

impl From<Option<&Array>> for Argument {
    fn from(array: Option<&Array>) -> Self {
        Argument::Address(array.map_or(0, Array::pointer))
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Argument::Address(value)
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Argument::Unsigned(value)
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Argument::Signed(value)
    }
}

impl From<bool> for Argument {
    fn from(value: bool) -> Self {
        Argument::Signed(i32::from(value))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Argument::Float(value)
    }
}

impl From<f64> for Argument {
    fn from(value: f64) -> Self {
        Argument::Double(value)
    }
}

/// Arguments of a kernel, in its order and of its types: `count` u64, `unsigned` u32, `int` i32 or bool.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$($crate::backend::cuda::ops::Argument::from($value)),*] };
}
use arguments;

/// Launches kernel `name` for activations of `element` on a grid of blocks of [`BLOCK`] threads.
fn launch(gpu: &Gpu, name: &'static str, element: Element, grid: [usize; 3], arguments: &[Argument]) -> Result<()> {
    launch_into(gpu, &gpu.compute, name, element, grid, arguments)
}

/// The same into another stream.
fn launch_into(
    gpu: &Gpu,
    stream: &Arc<CudaStream>,
    name: &'static str,
    element: Element,
    grid: [usize; 3],
    arguments: &[Argument],
) -> Result<()> {
    let function = gpu.function(name, element)?;
    let [x, y, z] = grid;
    if x == 0 || y == 0 || z == 0 {
        return Ok(());
    }
    if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
        return Err(Error::Run(format!("{name}: a grid of {x}x{y}x{z} blocks is too large for one launch")));
    }
    let config =
        LaunchConfig { grid_dim: (x as u32, y as u32, z as u32), block_dim: (BLOCK as u32, 1, 1), shared_mem_bytes: 0 };
    let mut launch = stream.launch_builder(function);
    for argument in arguments {
        match argument {
            Argument::Address(value) => launch.arg(value),
            Argument::Unsigned(value) => launch.arg(value),
            Argument::Signed(value) => launch.arg(value),
            Argument::Float(value) => launch.arg(value),
            Argument::Double(value) => launch.arg(value),
        };
    }
    // SAFETY: the caller gives the kernel's arguments, and arrays of the lengths it has checked.
    unsafe { launch.launch(config) }.map(|_| ()).map_err(|e| failed(&format!("launching {name}"), &e))
}

/// Elements of `element` in 16 bytes: `PACK` in common.cu.
fn pack(element: Element) -> usize {
    16 / element.size()
}

/// Neighbouring channels that a thread takes, where `sizes` (of channels, offsets) are all multiples of it.
fn width(element: Element, sizes: &[usize]) -> usize {
    if sizes.iter().all(|size| size.is_multiple_of(pack(element))) { pack(element) } else { 1 }
}

/// A grid of one thread for each `of` elements.
fn each(elements: usize, of: usize) -> [usize; 3] {
    [elements.div_ceil(of * BLOCK), 1, 1]
}

/// A size as the kernels take it, with room for a grid's last block.
fn small(size: usize) -> Result<u32> {
    u32::try_from(size).ok().filter(|&size| size < 1 << 31).ok_or_else(|| {
        Error::Run(format!(
            "{size} elements are too many for one operator on a GPU: use a smaller batch or more modules"
        ))
    })
}

fn signed(size: usize) -> Result<i32> {
    small(size).map(|size| size as i32)
}

/// Refuses an array that has not `length` elements of `element`.
fn require(what: &str, array: &Array, length: usize, element: Element) -> Result<()> {
    if array.len() == length && array.element() == element {
        return Ok(());
    }
    let (found, of) = (array.len(), array.element());
    Err(Error::Run(format!(
        "{what} is an array of {found} elements of {of:?}, and should have {length} of {element:?}"
    )))
}

/// Refuses a scratch array of less than `length` floats.
fn require_scratch(what: &str, scratch: &Array, length: usize) -> Result<()> {
    if scratch.bytes() >= length * 4 {
        return Ok(());
    }
    Err(Error::Run(format!("{what} needs a scratch array of {length} floats, not of {} bytes", scratch.bytes())))
}

/// How sums over the rows of `samples` arrays `[rows, channels]` are cut into blocks.
#[derive(Clone, Copy)]
struct Columns {
    /// Channels of a thread.
    width: usize,
    /// Threads side by side over channels.
    lanes: usize,
    /// Blocks over the channels.
    tiles: usize,
    /// Parts of the rows, a block each.
    parts: usize,
    /// Rows of a part.
    rows: usize,
}

impl Columns {
    fn new(element: Element, samples: usize, rows: usize, channels: usize) -> Self {
        let width = width(element, &[channels]);
        let lanes = channels.div_ceil(width).next_power_of_two().min(32);
        let tiles = channels.div_ceil(width * lanes).max(1);
        let deep = BLOCK / lanes;
        let parts = BUSY.div_ceil(samples.max(1) * tiles).min(rows.div_ceil(4 * deep)).max(1);
        let of_part = rows.div_ceil(parts).max(1);
        Columns { width, lanes, tiles, parts: rows.div_ceil(of_part).max(1), rows: of_part }
    }

    /// The most parts for either type of activations.
    fn most_parts(samples: usize, rows: usize, channels: usize) -> usize {
        [Element::F32, Element::Bf16]
            .map(|e| Columns::new(e, samples, rows, channels).parts)
            .into_iter()
            .max()
            .unwrap_or(1)
    }
}
