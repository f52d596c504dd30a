//! Group normalisation, relu and max pooling of NHWC tensors in the same passes: what the norm writes, four times and more of
//! what is left behind the pool, never is in memory, nor is its cotangent.
//!
//! Of inputs normalised, the largest is the largest (or where the norm's weight is negative, the smallest) input, so windows need
//! no statistics: these and the winners come of one pass, and what is left to do is as small as the output. Gradients are sums
//! over windows instead of pixels.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::im2col::Shape;
use super::norm::{self, GroupNorm};
use super::{Host, Real, Window, by_dtype, overwritten, overwritten_bytes, pool, reduce, simd, tensor, threads};
use crate::Result;

/// Output lines of one piece of work, at most.
const LINES: usize = 8;

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
    by_dtype!(x, T => {
        let (x, weight, bias) = (Host::of(&x)?, Host::of(weight)?, Host::of(bias)?);
        of_samples(&s, norm, x.slice::<T>()?, [weight.slice::<T>()?, bias.slice::<T>()?])
    })
}

/// The first input line that no window above output line `oy` begins with: from there to the next one's are this one's.
fn line_of(s: &Shape, oy: usize) -> usize {
    if oy == s.oh { s.h } else { (oy * s.window.stride[0]).saturating_sub(s.window.padding[0]).min(s.h) }
}

/// How many of `lines` output lines make a piece of work: pieces are of one size, so that they never lie in two samples.
fn lines_of_a_piece(lines: usize) -> usize {
    (1..=LINES).rev().find(|n| lines.is_multiple_of(*n)).unwrap_or(1)
}

fn of_samples<T: Real>(s: &Shape, norm: &GroupNorm, x: &[T], [weight, bias]: [&[T]; 2]) -> Result<(Tensor, Kept)> {
    let (lines, line, size) = (lines_of_a_piece(s.oh), s.ow * s.c, s.b * s.oh * s.ow * s.c);
    let (piece, pooled, order) = (lines * line, s.oh * line, order(weight));
    let (mut inputs, mut winners, mut y) = (overwritten::<T>(size), overwritten_bytes(size), overwritten::<T>(size));
    let mut statistics = vec![T::ZERO; s.b * norm.groups * 2];
    let mut sums = vec![T::ZERO; s.oh / lines * 3 * s.c];
    let pixels = |n: usize| s.w * (line_of(s, (n + 1) * lines) - line_of(s, n * lines));
    // Sample by sample: what one leaves in the caches, it finds there.
    for (sample, statistics) in statistics.chunks_exact_mut(norm.groups * 2).enumerate() {
        let x = &x[sample * s.h * s.w * s.c..][..s.h * s.w * s.c];
        let of_sample = sample * pooled..(sample + 1) * pooled;
        let (inputs, winners) = (&mut inputs[of_sample.clone()], &mut winners[of_sample.clone()]);
        sums.fill(T::ZERO);
        threads::chunks3((inputs, piece), (winners, piece), (&mut sums, 3 * s.c), |i, inputs, winners, sums| {
            let (centre, sums) = sums.split_at_mut(s.c);
            let (plain, squares) = sums.split_at_mut(s.c);
            let under = |oy: usize| s.w * s.c * line_of(s, oy);
            let first = under(i * lines);
            centre.copy_from_slice(&x[first..][..s.c]);
            for (oy, (inputs, winners)) in
                (i * lines..).zip(inputs.chunks_exact_mut(line).zip(winners.chunks_exact_mut(line)))
            {
                reduce::add_shifted_moments(&x[under(oy)..under(oy + 1)], centre, [plain, squares]);
                simd::vectorized(
                    #[inline(always)]
                    || max_line(s, oy, x, &order, inputs, winners),
                );
            }
        });
        let parts = sums.chunks_exact(3 * s.c).enumerate().map(|(n, sums)| (sums, pixels(n)));
        norm::statistics_of_parts(parts, norm.epsilon, statistics);
        let (scale, shift) = norm::scale_and_shift(weight, bias, statistics);
        threads::chunks(
            &mut y[of_sample],
            piece,
            || (),
            |(), i, y| {
                let x = &inputs[i * piece..][..y.len()];
                simd::vectorized(
                    #[inline(always)]
                    || {
                        norm::affine(
                            x,
                            &scale,
                            &shift,
                            y,
                            #[inline(always)]
                            |v| if v < T::ZERO { T::ZERO } else { v },
                        );
                    },
                );
            },
        );
    }
    let dims = (s.b, s.oh, s.ow, s.c);
    let kept = Kept {
        statistics: tensor(statistics, (s.b, norm.groups, 2))?,
        inputs: tensor(inputs, dims)?,
        winners: Tensor::from_vec(winners, dims, &Device::Cpu)?,
    };
    Ok((tensor(y, dims)?, kept))
}

/// By channel, 1 where a larger input is a larger output, -1 where it is a smaller one, 0 where it makes no difference.
fn order<T: Real>(weight: &[T]) -> Vec<T> {
    weight
        .iter()
        .map(|&w| {
            if w > T::ZERO {
                T::ONE
            } else if w < T::ZERO {
                -T::ONE
            } else {
                w * T::ZERO
            }
        })
        .collect()
}

/// The inputs that make the maxima of output line `oy`, and which of their windows' they are.
#[inline(always)]
fn max_line<T: Real>(s: &Shape, oy: usize, x: &[T], order: &[T], inputs: &mut [T], winners: &mut [u8]) {
    let (c, kw) = (s.c, s.window.kernel[1]);
    let whole = c - c % LANES;
    let inside = taps(s, oy, 0..kw);
    for ox in 0..s.ow {
        let (inputs, winners) = (&mut inputs[ox * c..][..c], &mut winners[ox * c..][..c]);
        let (lo, hi, ix) = s.input_columns(ox);
        let x = &x[ix * c..];
        let at_border;
        let of_window = if hi - lo == kw {
            &inside
        } else {
            at_border = taps(s, oy, lo..hi);
            &at_border
        };
        for first in (0..whole).step_by(LANES) {
            max::<T, LANES>(of_window, &x[first..], &order[first..], &mut inputs[first..], &mut winners[first..]);
        }
        for first in whole..c {
            max::<T, 1>(of_window, &x[first..], &order[first..], &mut inputs[first..], &mut winners[first..]);
        }
    }
}

/// Where the elements of a window's `columns` lie inside the input, from the first of them on, and which they are.
#[inline(never)]
fn taps(s: &Shape, oy: usize, columns: Range<usize>) -> Vec<(usize, u32)> {
    let [kh, kw] = s.window.kernel;
    let rows = (0..kh).filter_map(|ky| s.input_line(oy, ky).map(|iy| (ky, iy)));
    rows.flat_map(|(ky, iy)| {
        let start = columns.start;
        columns.clone().map(move |kx| ((iy * s.w + kx - start) * s.c, (ky * kw + kx) as u32))
    })
    .collect()
}

/// Channels that are treated at once.
const LANES: usize = 16;

/// `N` channels, the first ones of those given, of an output pixel, whose window's elements are at `taps`.
#[inline(always)]
fn max<T: Real, const N: usize>(taps: &[(usize, u32)], x: &[T], order: &[T], inputs: &mut [T], winners: &mut [u8]) {
    let Some((&(at, tap), others)) = taps.split_first() else { return };
    // Of a length known here and in places nobody else has: they stay in registers.
    let (mut best, mut winner, mut signs) = ([T::ZERO; N], [tap; N], [T::ZERO; N]);
    best.copy_from_slice(&x[at..][..N]);
    signs.copy_from_slice(&order[..N]);
    let mut largest = [T::ZERO; N];
    for n in 0..N {
        largest[n] = best[n] * signs[n];
    }
    for &(at, tap) in others {
        let x = &x[at..][..N];
        for n in 0..N {
            // What is no number need not win here to be noticed: the norm's statistics are none then either.
            let v = x[n] * signs[n];
            let wins = v > largest[n];
            largest[n] = if wins { v } else { largest[n] };
            best[n] = if wins { x[n] } else { best[n] };
            winner[n] = if wins { tap } else { winner[n] };
        }
    }
    inputs[..N].copy_from_slice(&best);
    winners[..N].iter_mut().zip(winner).for_each(|(to, tap)| *to = tap as u8);
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
    let (pooled, c) = (s.oh * s.ow * s.c, s.c);
    by_dtype!(x, T => {
        let (x, gy, statistics) = (Host::of(&x)?, Host::of(&gy)?, Host::of(&kept.statistics)?);
        let (weight, bias) = (Host::of(weight)?, Host::of(bias)?);
        let (inputs, winners) = (Host::of(&kept.inputs)?, Host::of(&kept.winners)?);
        let (x, gy, statistics) = (x.slice::<T>()?, gy.slice::<T>()?, statistics.slice::<T>()?);
        let (weight, bias) = (weight.slice::<T>()?, bias.slice::<T>()?);
        let (inputs, winners) = (inputs.slice::<T>()?, winners.slice::<u8>()?);
        let sums = parameter_sums(&s, [weight, bias], statistics, inputs, gy);
        let mut gx = overwritten::<T>(if need_input { x.len() } else { 0 });
        let by_channel = statistics.chunks_exact(norm.groups * 2).zip(sums.chunks_exact(2 * c)).map(|(statistics, sums)| {
            let (scale, shift) = norm::scale_and_shift(weight, bias, statistics);
            let [k0, k1, k2] = norm::coefficients(weight, statistics, sums, s.h * s.w);
            [k0, k1, k2, scale, shift]
        });
        let by_channel: Vec<_> = by_channel.collect();
        threads::chunks(&mut gx, s.w * c, || Windows::new(&s), |windows, i, gx| {
            let (b, iy) = (i / s.h, i % s.h);
            let (gy, winners) = (&gy[b * pooled..][..pooled], &winners[b * pooled..][..pooled]);
            windows.over(iy);
            let by_channel = by_channel[b].each_ref().map(Vec::as_slice);
            let x = &x[i * s.w * c..][..s.w * c];
            simd::vectorized(#[inline(always)] || windows.input_cotangent(x, gy, winners, by_channel, gx));
        });
        let total = reduce::column_sums(&sums, 2 * c);
        let gx = if need_input { Some(tensor(gx, (s.b, s.h, s.w, c))?) } else { None };
        Ok((gx, tensor(total[c..].to_vec(), c)?, tensor(total[..c].to_vec(), c)?))
    })
}

/// Each sample's [`norm::parameter_sums`], over windows.
fn parameter_sums<T: Real>(s: &Shape, [weight, bias]: [&[T]; 2], statistics: &[T], inputs: &[T], gy: &[T]) -> Vec<T> {
    let (pooled, groups) = (s.oh * s.ow * s.c, statistics.len() / s.b);
    let mut sums = vec![T::ZERO; s.b * 2 * s.c];
    threads::chunks(
        &mut sums,
        2 * s.c,
        || (),
        |(), i, sums| {
            let statistics = &statistics[i * groups..][..groups];
            let affine = norm::scale_and_shift(weight, bias, statistics);
            norm::parameter_sums(
                &inputs[i * pooled..][..pooled],
                &gy[i * pooled..][..pooled],
                statistics,
                &affine,
                sums,
                through,
            );
        },
    );
    sums
}

/// The relu's cotangent.
#[inline(always)]
fn through<T: Real>(y: T, g: T) -> T {
    if y > T::ZERO { g } else { T::ZERO }
}

/// The windows over each pixel of an input line.
struct Windows<'a> {
    s: &'a Shape,
    /// By column: windows over it, and which of the window's columns it is.
    columns: Vec<Vec<(usize, usize)>>,
    /// Where a window's output is, and which of the window's elements the pixel is.
    taps: Vec<(usize, u32)>,
    /// Behind the last of each pixel's.
    ends: Vec<usize>,
}

impl<'a> Windows<'a> {
    fn new(s: &'a Shape) -> Self {
        let columns = (0..s.w).map(|ix| windows(s, 1, ix, s.ow).collect()).collect();
        Windows { s, columns, taps: Vec::new(), ends: Vec::new() }
    }

    /// Those over line `iy`.
    fn over(&mut self, iy: usize) {
        let (s, kw) = (self.s, self.s.window.kernel[1]);
        let lines: Vec<(usize, usize)> = windows(s, 0, iy, s.oh).collect();
        self.taps.clear();
        self.ends.clear();
        for columns in &self.columns {
            for &(oy, ky) in &lines {
                for &(ox, kx) in columns {
                    self.taps.push(((oy * s.ow + ox) * s.c, (ky * kw + kx) as u32));
                }
            }
            self.ends.push(self.taps.len());
        }
    }

    /// The line's `gx = k0 through(scale x + shift, g) + k1 x + k2`, for g the pool's cotangent there.
    #[inline(always)]
    fn input_cotangent<T: Real>(&self, x: &[T], gy: &[T], winners: &[u8], by_channel: [&[T]; 5], gx: &mut [T]) {
        let c = by_channel[0].len();
        let whole = c - c % LANES;
        let mut begin = 0;
        for ((x, gx), &end) in x.chunks_exact(c).zip(gx.chunks_exact_mut(c)).zip(&self.ends) {
            let taps = &self.taps[begin..end];
            begin = end;
            for first in (0..whole).step_by(LANES) {
                channels::<T, LANES>(first, taps, x, gy, winners, by_channel, gx);
            }
            for first in whole..c {
                channels::<T, 1>(first, taps, x, gy, winners, by_channel, gx);
            }
        }
    }
}

/// The windows, of `outputs`, over place `at` of the lines (0) or columns (1), and which of the window's places it is.
fn windows(s: &Shape, side: usize, at: usize, outputs: usize) -> impl Iterator<Item = (usize, usize)> {
    let [kernel, stride, at] = [s.window.kernel[side], s.window.stride[side], at + s.window.padding[side]];
    let windows = (at + 1).saturating_sub(kernel).div_ceil(stride)..(at / stride + 1).min(outputs);
    windows.map(move |o| (o, at - o * stride))
}

/// `N` channels of a pixel's cotangent from `first` on.
#[inline(always)]
fn channels<T: Real, const N: usize>(
    first: usize,
    taps: &[(usize, u32)],
    x: &[T],
    gy: &[T],
    winners: &[u8],
    [k0, k1, k2, scale, shift]: [&[T]; 5],
    gx: &mut [T],
) {
    // Of a length known here and in places nobody else has: they stay in registers.
    let copy = |from: &[T]| {
        let mut to = [T::ZERO; N];
        to.copy_from_slice(&from[first..][..N]);
        to
    };
    let mut g = [T::ZERO; N];
    for &(at, tap) in taps {
        let (come, winners) = (copy(&gy[at..]), &winners[at + first..][..N]);
        for n in 0..N {
            g[n] += if u32::from(winners[n]) == tap { come[n] } else { T::ZERO };
        }
    }
    let (x, k0, k1, k2, scale, shift) = (copy(x), copy(k0), copy(k1), copy(k2), copy(scale), copy(shift));
    let mut sum = [T::ZERO; N];
    for n in 0..N {
        sum[n] = k0[n] * through(x[n] * scale[n] + shift[n], g[n]) + k1[n] * x[n] + k2[n];
    }
    gx[first..][..N].copy_from_slice(&sum);
}
