//! One function a kernel: checks sizes and launches it into the compute stream.

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::gpu::{Array, Gpu, failed};
use crate::{Error, Result};

const BLOCK: u32 = 256;

/// A grid of one thread an element.
fn each(elements: usize) -> Result<LaunchConfig> {
    let blocks = u32::try_from(elements.div_ceil(BLOCK as usize).max(1))
        .map_err(|_| Error::Run(format!("{elements} elements are too many for one launch")))?;
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (BLOCK, 1, 1), shared_mem_bytes: 0 })
}

/// `y = max(x, 0)`; `y` may be `x`. What is not a number stays one.
///
/// # Errors
/// [`Error::Run`] if sizes differ or the launch fails.
pub fn relu(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    if x.len() != y.len() || x.element() != y.element() {
        return Err(Error::Run(format!("relu of {} elements into {}", x.len(), y.len())));
    }
    let function = gpu.function("relu", x.element())?;
    let (x, y, n) = (x.pointer(), y.pointer(), x.len() as u64);
    let mut launch = gpu.compute.launch_builder(function);
    launch.arg(&x).arg(&y).arg(&n);
    // SAFETY: the arguments are the kernel's, the arrays are n long.
    unsafe { launch.launch(each(n as usize)?) }.map(|_| ()).map_err(|e| failed("launching relu", &e))
}
