//! Nearest-neighbour up-sampling of NHWC tensors, by a whole factor or to any larger size, and its cotangent.

use std::ops::Range;

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

/// Which of `to` rows (or columns) take row `r` of `from` in [`spread`]: those t with ⌊t·from/to⌋ = r.
fn taking(r: usize, from: usize, to: usize) -> Range<usize> {
    (r * to).div_ceil(from)..((r + 1) * to).div_ceil(from)
}

/// `x` `[B, H, W, C]` spread to any larger `[h, w]` by nearest neighbour, `[B, h, w, C]`: output row r takes input row ⌊r·H/h⌋, columns
/// alike. To its own size, the same tensor.
///
/// # Errors
/// [`Error::Run`] where `[h, w]` is smaller than the input, and on devices without a kernel.
pub fn spread(x: &Tensor, [oh, ow]: [usize; 2]) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if [h, w] == [oh, ow] {
        return Ok(x.clone());
    }
    grows([h, w], [oh, ow])?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let mut y = overwritten::<T>(b * oh * ow * c);
        threads::chunks(&mut y, oh * ow * c, || (), |(), i, y| {
            for (iy, from) in x[i * h * w * c..][..h * w * c].chunks_exact(w * c).enumerate() {
                let rows = taking(iy, h, oh);
                let (first, rest) = y[rows.start * ow * c..rows.end * ow * c].split_at_mut(ow * c);
                for (ix, from) in from.chunks_exact(c).enumerate() {
                    let columns = taking(ix, w, ow);
                    let to = &mut first[columns.start * c..columns.end * c];
                    to.chunks_exact_mut(c).for_each(|to| to.copy_from_slice(from));
                }
                rest.chunks_exact_mut(ow * c).for_each(|to| to.copy_from_slice(first));
            }
        });
        tensor(y, (b, oh, ow, c))
    })
}

/// The input's cotangent of [`spread`], of height and width `[h, w]`: the sum of `gy` over the pixels that took each.
///
/// # Errors
/// As [`spread`].
pub fn spread_vjp([h, w]: [usize; 2], gy: &Tensor) -> Result<Tensor> {
    let (b, oh, ow, c) = gy.dims4()?;
    if [h, w] == [oh, ow] {
        return Ok(gy.clone());
    }
    grows([h, w], [oh, ow])?;
    let gy = gy.contiguous()?;
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let gy = gy.slice::<T>()?;
        let mut gx = vec![T::ZERO; b * h * w * c];
        threads::chunks(&mut gx, w * c, || (), |(), i, gx| {
            let sample = &gy[i / h * oh * ow * c..][..oh * ow * c];
            for oy in taking(i % h, h, oh) {
                let line = &sample[oy * ow * c..][..ow * c];
                for (ix, to) in gx.chunks_exact_mut(c).enumerate() {
                    taking(ix, w, ow).for_each(|ox| add(to, &line[ox * c..][..c]));
                }
            }
        });
        tensor(gx, (b, h, w, c))
    })
}

fn grows(from: [usize; 2], to: [usize; 2]) -> Result<()> {
    if (0..2).all(|i| from[i] > 0 && from[i] <= to[i]) {
        return Ok(());
    }
    let ([h, w], [oh, ow]) = (from, to);
    Err(Error::Run(format!("{h}x{w} pixels cannot be spread to {oh}x{ow}")))
}
