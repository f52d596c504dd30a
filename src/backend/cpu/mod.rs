//! Numerical kernels: the seam between layers and whatever computes them.
//!
//! Every function here takes and returns candle tensors in NHWC layout, of 32- or 64-bit floats, and picks an
//! implementation by the tensor's device. Today there is one device, the CPU: plain loops on slices, compiled for the
//! widest vectors there are, and for products oneDNN (where the program was built with it) or the `gemm` crate.
//!
//! Results do not depend on the number of threads, to the bit: work is cut into pieces by its shape alone, and sums
//! over pieces are taken in a fixed order (see [`threads`]).

pub mod activation;
pub mod batch_norm;
pub mod conv;
mod host;
mod im2col;
mod large_weights;
mod matmul;
mod memory;
pub mod mix;
pub mod norm;
pub mod norm_pool;
#[cfg(onednn)]
mod onednn;
mod patches;
pub mod pool;
mod real;
mod reduce;
pub mod resample;
mod simd;
pub mod threads;
mod winograd;

pub(crate) use host::{Host, by_dtype, overwritten, overwritten_bytes, tensor, update_together};
pub use memory::Recycling;
pub use real::Real;
pub(crate) use simd::vectorized;
pub use threads::{set_threads, with_threads};

use crate::{Error, Result};

/// Whether the program was built with oneDNN.
pub fn has_onednn() -> bool {
    cfg!(onednn)
}

/// What computes convolutions, for a log: oneDNN with its version, or what is there without it.
pub fn back_end() -> String {
    #[cfg(onednn)]
    {
        let [major, minor, patch] = onednn::version();
        format!("oneDNN {major}.{minor}.{patch}")
    }
    #[cfg(not(onednn))]
    "built without oneDNN".into()
}

/// A sliding window over height and width, as convolutions and pools have it: `[vertical, horizontal]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Extent in elements.
    pub kernel: [usize; 2],
    /// Step from one output to the next.
    pub stride: [usize; 2],
    /// Border added on each side.
    pub padding: [usize; 2],
}

impl Window {
    /// A square window with the same stride and padding both ways.
    pub fn square(kernel: usize, stride: usize, padding: usize) -> Self {
        Window { kernel: [kernel; 2], stride: [stride; 2], padding: [padding; 2] }
    }

    /// The window whose tiles, side by side, average `from` (height, width) down to `to`: where both ratios are whole and a tile is no
    /// larger than a window may be.
    pub(crate) fn of_whole_ratio(from: [usize; 2], to: [usize; 2]) -> Option<Self> {
        let whole = (0..2).all(|i| to[i] > 0 && from[i] > 0 && from[i].is_multiple_of(to[i]));
        let kernel = whole.then(|| [from[0] / to[0], from[1] / to[1]])?;
        (kernel[0] * kernel[1] <= pool::MOST_ELEMENTS).then_some(Window { kernel, stride: kernel, padding: [0, 0] })
    }

    /// Output height and width for an input of `height` by `width`.
    ///
    /// # Errors
    /// [`Error::Input`] where the window has no extent or stride, or does not fit into the padded input.
    pub fn output(&self, height: usize, width: usize) -> Result<[usize; 2]> {
        let axis = |i: usize, size: usize| {
            let (kernel, stride, padded) = (self.kernel[i], self.stride[i], size + 2 * self.padding[i]);
            (kernel > 0 && stride > 0 && padded >= kernel).then(|| (padded - kernel) / stride + 1)
        };
        match (axis(0, height), axis(1, width)) {
            (Some(h), Some(w)) => Ok([h, w]),
            _ => Err(Error::input(format!(
                "a window of {:?} with stride {:?} and padding {:?} does not fit an input of {height}x{width}: \
                 use a smaller kernel, a stride of at least 1, or more padding",
                self.kernel, self.stride, self.padding
            ))),
        }
    }

    /// One element, step one, no border: the window of a 1x1 convolution.
    pub(crate) fn is_pointwise(&self) -> bool {
        *self == Window::square(1, 1, 0)
    }
}
