//! Batch normalisation of NHWC tensors and its gradients: each channel over all samples and positions (Ioffe and
//! Szegedy, 2015), with PyTorch's conventions.

use candle_core::Tensor;

use super::norm::{affine, combine};
use super::{Host, Real, by_dtype, overwritten, reduce, simd, tensor, threads};
use crate::{Error, Result};

/// Pixels a thread takes at once.
const PIXELS: usize = 1024;

/// Mean and biased variance of each channel, `[2, C]`.
///
/// # Errors
/// [`Error::Input`] where there is one value a channel, whose variance says nothing.
pub fn statistics(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if b * h * w < 2 {
        return Err(Error::input(format!(
            "batch normalisation in training needs more than one value a channel, but its input is {:?}: use a larger \
             batch, or group-norm",
            x.dims()
        )));
    }
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let n = T::of((b * h * w) as f64);
        let mut mean = reduce::column_sums(x, c);
        mean.iter_mut().for_each(|m| *m /= n);
        let variance = reduce::centred_squares(x, &mean).into_iter().map(|v| v / n);
        let both = mean.iter().copied().chain(variance).collect();
        tensor(both, (2, c))
    })
}

/// `x` `[B, H, W, C]` normalised by `statistics` `[2, C]` (mean, variance), with `weight` and `bias` `[C]`.
///
/// # Errors
/// [`Error::Run`] on devices without a kernel.
pub fn apply(x: &Tensor, weight: &Tensor, bias: &Tensor, statistics: &Tensor, epsilon: f64) -> Result<Tensor> {
    let c = x.dim(3)?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let (input, weight, bias, s) = (Host::of(&x)?, Host::of(weight)?, Host::of(bias)?, Host::of(statistics)?);
        let (input, weight, bias, s) = (input.slice::<T>()?, weight.slice::<T>()?, bias.slice::<T>()?, s.slice::<T>()?);
        let scale: Vec<T> = weight.iter().zip(inverse(&s[c..], epsilon)).map(|(&w, i)| w * i).collect();
        let shift: Vec<T> = bias.iter().zip(&scale).zip(s).map(|((&b, &a), &m)| b - m * a).collect();
        let mut y = overwritten::<T>(input.len());
        threads::chunks(&mut y, PIXELS * c, || (), |(), i, y| {
            simd::vectorized(#[inline(always)] || affine(&input[i * PIXELS * c..], &scale, &shift, y, #[inline(always)] |v| v));
        });
        tensor(y, x.dims())
    })
}

/// `(gx, gweight, gbias)` from the output's cotangent; `gx` only where `need_input`. `of_batch`: the statistics were
/// this batch's, so the cotangent flows through them too; otherwise they are constants.
///
/// # Errors
/// As [`apply`].
pub fn vjp(
    x: &Tensor,
    weight: &Tensor,
    statistics: &Tensor,
    gy: &Tensor,
    epsilon: f64,
    of_batch: bool,
    need_input: bool,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let (b, h, w, c) = x.dims4()?;
    let (x, gy) = (x.contiguous()?, gy.contiguous()?);
    by_dtype!(x, T => {
        let (input, cotangent, weight, s) = (Host::of(&x)?, Host::of(&gy)?, Host::of(weight)?, Host::of(statistics)?);
        let (input, cotangent, weight, s) =
            (input.slice::<T>()?, cotangent.slice::<T>()?, weight.slice::<T>()?, s.slice::<T>()?);
        let mean = &s[..c];
        let inverse: Vec<T> = inverse(&s[c..], epsilon).collect();
        let mut sums = reduce::moments(input, cotangent, [mean; 3], #[inline(always)] |_, g| g);
        sums[c..].iter_mut().zip(&inverse).for_each(|(v, &i)| *v *= i);
        let (plain, times) = sums.split_at(c);
        let gx = if need_input {
            let n = T::of((b * h * w) as f64);
            let mut k = [vec![T::ZERO; c], vec![T::ZERO; c], vec![T::ZERO; c]];
            for j in 0..c {
                let a = weight[j] * inverse[j];
                k[0][j] = a;
                if of_batch {
                    k[1][j] = -a * inverse[j] * times[j] / n;
                    k[2][j] = -a * plain[j] / n - k[1][j] * mean[j];
                }
            }
            let mut gx = overwritten::<T>(input.len());
            threads::chunks(&mut gx, PIXELS * c, || (), |(), i, gx| {
                let (gy, x) = (&cotangent[i * PIXELS * c..], &input[i * PIXELS * c..]);
                simd::vectorized(#[inline(always)] || combine(gy, x, [&k[0], &k[1], &k[2], mean, mean], gx, #[inline(always)] |_, g| g));
            });
            Some(tensor(gx, x.dims())?)
        } else {
            None
        };
        Ok((gx, tensor(times.to_vec(), c)?, tensor(plain.to_vec(), c)?))
    })
}

fn inverse<T: Real>(variance: &[T], epsilon: f64) -> impl Iterator<Item = T> {
    variance.iter().map(move |&v| T::ONE / (v + T::of(epsilon)).root())
}
