//! Group normalisation, relu and max pooling of NHWC tensors in the same passes: what the norm writes, four times and more of
//! what is left behind the pool, never is in memory, nor is its cotangent.
//!
//! Forward results are those of the three apart, to the bit. Gradients are the same sums over windows instead of pixels.

use candle_core::{Device, Tensor};

use super::im2col::Shape;
use super::norm::{self, GroupNorm};
use super::{Host, Real, Window, by_dtype, overwritten, pool, reduce, simd, tensor, threads};
use crate::Result;

/// What [`vjp`] needs of [`forward`].
pub struct Kept {
    /// Mean and inverse deviation of each group, `[B, groups, 2]`.
    pub statistics: Tensor,
    /// The norm's input where each window's maximum is, of the output's shape.
    pub inputs: Tensor,
    /// Which of its window's elements each maximum is, row-major, u8.
    pub winners: Tensor,
}

/// Each window's maximum of the relu of `x` `[B, H, W, C]` normalised; see [`norm::group`] and [`pool::max`].
///
/// # Errors
/// As these.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    norm: &GroupNorm,
    window: &Window,
) -> Result<(Tensor, Kept)> {
    let s = pool::shape(window, x.dims())?;
    norm::check(s.c, norm.groups, weight)?;
    let x = x.contiguous()?;
    let (sample, pooled) = (s.h * s.w * s.c, s.oh * s.ow * s.c);
    by_dtype!(x, T => {
        let (x, weight, bias) = (Host::of(&x)?, Host::of(weight)?, Host::of(bias)?);
        let (x, weight, bias) = (x.slice::<T>()?, weight.slice::<T>()?, bias.slice::<T>()?);
        let mut statistics = vec![T::ZERO; s.b * norm.groups * 2];
        threads::chunks(&mut statistics, norm.groups * 2, || (), |(), i, statistics| {
            norm::group_statistics(&x[i * sample..][..sample], s.c, norm.epsilon, statistics);
        });
        let affine: Vec<_> = statistics.chunks_exact(norm.groups * 2).map(|of| norm::scale_and_shift(weight, bias, of)).collect();
        let (line, size) = (s.ow * s.c, s.b * pooled);
        let (mut y, mut inputs, mut winners) = (overwritten::<T>(size), overwritten::<T>(size), vec![0u8; size]);
        threads::chunks3((&mut y, line), (&mut inputs, line), (&mut winners, line), |i, y, inputs, winners| {
            let (x, (scale, shift)) = (&x[i / s.oh * sample..][..sample], &affine[i / s.oh]);
            simd::vectorized(#[inline(always)] || max_line(&s, i % s.oh, x, [scale, shift], y, inputs, winners));
        });
        let dims = (s.b, s.oh, s.ow, s.c);
        let kept = Kept {
            statistics: tensor(statistics, (s.b, norm.groups, 2))?,
            inputs: tensor(inputs, dims)?,
            winners: Tensor::from_vec(winners, dims, &Device::Cpu)?,
        };
        Ok((tensor(y, dims)?, kept))
    })
}

/// The maxima of output line `oy`, and the inputs there.
#[inline(always)]
fn max_line<T: Real>(
    s: &Shape,
    oy: usize,
    x: &[T],
    affine: [&[T]; 2],
    y: &mut [T],
    inputs: &mut [T],
    winners: &mut [u8],
) {
    let [kh, kw] = s.window.kernel;
    for (ox, y) in y.chunks_exact_mut(s.c).enumerate() {
        let inputs = &mut inputs[ox * s.c..][..s.c];
        let winners = &mut winners[ox * s.c..][..s.c];
        let (lo, hi, ix) = s.input_columns(ox);
        let mut started = false;
        for ky in 0..kh {
            let Some(iy) = s.input_line(oy, ky) else { continue };
            for kx in lo..hi {
                let x = &x[(iy * s.w + ix + kx - lo) * s.c..][..s.c];
                let tap = (ky * kw + kx) as u8;
                if started {
                    meet(x, affine, tap, inputs, winners);
                } else {
                    inputs.copy_from_slice(x);
                    winners.fill(tap);
                    started = true;
                }
            }
        }
        let [scale, shift] = affine;
        for (((y, &x), &scale), &shift) in y.iter_mut().zip(&*inputs).zip(scale).zip(shift) {
            *y = relu(x * scale + shift);
        }
    }
}

#[inline(always)]
fn relu<T: Real>(v: T) -> T {
    if v < T::ZERO { T::ZERO } else { v }
}

/// Puts the inputs of `tap` in the place of those of smaller values. (The values so far are computed anew: with one slice more
/// to be written, the compiler would have too many to compare for overlaps, and make no vectors of the loop.)
#[inline(always)]
fn meet<T: Real>(x: &[T], [scale, shift]: [&[T]; 2], tap: u8, inputs: &mut [T], winners: &mut [u8]) {
    let each = x.iter().zip(scale).zip(shift).zip(inputs).zip(winners);
    for ((((&x, &scale), &shift), input), winner) in each {
        let (v, best) = (relu(x * scale + shift), relu(*input * scale + shift));
        // As in `pool`: a value that is not a number wins, and no branches.
        #[allow(clippy::eq_op)]
        let wins = (v > best) | (v != v);
        *input = if wins { x } else { *input };
        *winner = if wins { tap } else { *winner };
    }
}

/// `(gx, gweight, gbias)` from the output's cotangent `gy`; `gx` only where `need_input`.
///
/// # Errors
/// As [`forward`].
pub fn vjp(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    kept: &Kept,
    gy: &Tensor,
    norm: &GroupNorm,
    window: &Window,
    need_input: bool,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let s = pool::shape(window, x.dims())?;
    norm::check(s.c, norm.groups, weight)?;
    let (x, gy) = (x.contiguous()?, gy.contiguous()?);
    let (sample, pooled, c) = (s.h * s.w * s.c, s.oh * s.ow * s.c, s.c);
    by_dtype!(x, T => {
        let (x, gy, statistics) = (Host::of(&x)?, Host::of(&gy)?, Host::of(&kept.statistics)?);
        let (weight, bias) = (Host::of(weight)?, Host::of(bias)?);
        let (inputs, winners) = (Host::of(&kept.inputs)?, Host::of(&kept.winners)?);
        let (x, gy, statistics) = (x.slice::<T>()?, gy.slice::<T>()?, statistics.slice::<T>()?);
        let (weight, bias) = (weight.slice::<T>()?, bias.slice::<T>()?);
        let (inputs, winners) = (inputs.slice::<T>()?, winners.slice::<u8>()?);
        let mut gx = overwritten::<T>(if need_input { x.len() } else { 0 });
        let mut sums = vec![T::ZERO; s.b * 2 * c];
        let each = |i: usize, sums: &mut [T], gx: Option<&mut [T]>| {
            let (gy, winners) = (&gy[i * pooled..][..pooled], &winners[i * pooled..][..pooled]);
            let statistics = &statistics[i * norm.groups * 2..][..norm.groups * 2];
            let affine = norm::scale_and_shift(weight, bias, statistics);
            norm::parameter_sums(&inputs[i * pooled..][..pooled], gy, statistics, &affine, sums, through);
            if let Some(gx) = gx {
                let k = norm::coefficients(weight, statistics, sums, s.h * s.w);
                let by_channel = [&*k[0], &k[1], &k[2], &affine.0, &affine.1];
                let x = &x[i * sample..][..sample];
                simd::vectorized(#[inline(always)] || input_cotangent(&s, x, gy, winners, by_channel, gx));
            }
        };
        if need_input {
            threads::chunks2(&mut sums, 2 * c, &mut gx, sample, |i, sums, gx| each(i, sums, Some(gx)));
        } else {
            threads::chunks(&mut sums, 2 * c, || (), |(), i, sums| each(i, sums, None));
        }
        let total = reduce::column_sums(&sums, 2 * c);
        let gx = if need_input { Some(tensor(gx, (s.b, s.h, s.w, c))?) } else { None };
        Ok((gx, tensor(total[c..].to_vec(), c)?, tensor(total[..c].to_vec(), c)?))
    })
}

/// The relu's cotangent.
#[inline(always)]
fn through<T: Real>(y: T, g: T) -> T {
    if y > T::ZERO { g } else { T::ZERO }
}

/// One sample's `gx = k0 through(scale x + shift, g) + k1 x + k2`, for g the pool's cotangent at that pixel.
#[inline(always)]
fn input_cotangent<T: Real>(s: &Shape, x: &[T], gy: &[T], winners: &[u8], by_channel: [&[T]; 5], gx: &mut [T]) {
    let c = s.c;
    let tiles = pool::tiles(s);
    if !tiles {
        gx.fill(T::ZERO);
    }
    for oy in 0..s.oh {
        let (gy, winners) = (&gy[oy * s.ow * c..][..s.ow * c], &winners[oy * s.ow * c..][..s.ow * c]);
        pool::each_tap(
            s,
            oy,
            #[inline(always)]
            |tap, input, output| {
                let gx = &mut gx[input * c..][..c];
                let from = gy[output * c..][..c].iter().zip(&winners[output * c..][..c]);
                let routed = gx.iter_mut().zip(from);
                if tiles {
                    routed.for_each(|(gx, (&g, &k))| *gx = if k == tap as u8 { g } else { T::ZERO });
                    combine(&x[input * c..][..c], by_channel, gx);
                } else {
                    routed.for_each(|(gx, (&g, &k))| *gx += if k == tap as u8 { g } else { T::ZERO });
                }
            },
        );
    }
    if !tiles {
        for (gx, x) in gx.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            combine(x, by_channel, gx);
        }
    }
}

/// One pixel's `k0 through(scale x + shift, g) + k1 x + k2` in g's place.
#[inline(always)]
fn combine<T: Real>(x: &[T], by_channel: [&[T]; 5], g: &mut [T]) {
    let c = x.len();
    let [k0, k1, k2, scale, shift] = by_channel;
    let (k0, k1, k2, scale, shift, g) = (&k0[..c], &k1[..c], &k2[..c], &scale[..c], &shift[..c], &mut g[..c]);
    for n in 0..c {
        g[n] = k0[n] * through(x[n] * scale[n] + shift[n], g[n]) + k1[n] * x[n] + k2[n];
    }
}
