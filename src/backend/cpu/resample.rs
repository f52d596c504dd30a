//! Nearest-neighbour up-sampling of NHWC tensors by a whole factor, and its cotangent.

use candle_core::Tensor;

use super::im2col::add;
use super::{Host, Real, by_dtype, overwritten, tensor, threads};
use crate::{Error, Result};

/// `[B, H, W, C]` to `[B, H f, W f, C]`, every pixel repeated `factor` times each way.
///
/// # Errors
/// [`Error::Run`] on devices without a kernel.
pub fn upsample(x: &Tensor, factor: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.contiguous()?;
    let line = w * c;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let mut y = overwritten::<T>(x.len() * factor * factor);
        threads::chunks(&mut y, line * factor * factor, || (), |(), i, y| {
            let (first, rest) = y.split_at_mut(line * factor);
            for (to, from) in first.chunks_exact_mut(c * factor).zip(x[i * line..][..line].chunks_exact(c)) {
                to.chunks_exact_mut(c).for_each(|to| to.copy_from_slice(from));
            }
            rest.chunks_exact_mut(line * factor).for_each(|to| to.copy_from_slice(first));
        });
        tensor(y, (b, h * factor, w * factor, c))
    })
}

/// The input's cotangent of [`upsample`]: each block of `gy` summed.
///
/// # Errors
/// As [`upsample`], and where `gy`'s sides are no multiples of `factor`.
pub fn upsample_vjp(gy: &Tensor, factor: usize) -> Result<Tensor> {
    let (b, high, wide, c) = gy.dims4()?;
    if factor == 0 || high % factor != 0 || wide % factor != 0 {
        return Err(Error::Run(format!("up-sampling by {factor} cannot have the output {:?}", gy.dims())));
    }
    let (h, w) = (high / factor, wide / factor);
    let gy = gy.contiguous()?;
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let gy = gy.slice::<T>()?;
        let mut gx = vec![T::ZERO; b * h * w * c];
        threads::chunks(&mut gx, w * c, || (), |(), i, gx| {
            for from in gy[i * factor * wide * c..][..factor * wide * c].chunks_exact(wide * c) {
                for (to, from) in gx.chunks_exact_mut(c).zip(from.chunks_exact(c * factor)) {
                    from.chunks_exact(c).for_each(|from| add(to, from));
                }
            }
        });
        tensor(gx, (b, h, w, c))
    })
}
