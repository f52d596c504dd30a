//! Pooling of NHWC tensors: maximum, average, adaptive average, global average, and their cotangents.
//!
//! Windows may overlap and may reach into a border. For the maximum the border is never chosen; for the average it
//! counts as zeros (PyTorch's default, `count_include_pad = True`).

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::im2col::{Shape, add};
use super::{Host, Real, Window, by_dtype, overwritten, reduce, simd, tensor, threads};
use crate::{Error, Result};

/// Elements of a window at most: a byte tells which was the largest.
pub(crate) const MOST_ELEMENTS: usize = 256;

pub(crate) fn shape(window: &Window, dims: &[usize]) -> Result<Shape> {
    let &[b, h, w, c] = dims else {
        return Err(Error::Run(format!("pooling of {dims:?} (want [B, H, W, C])")));
    };
    let [oh, ow] = window.output(h, w)?;
    let [kh, kw] = window.kernel;
    if window.padding[0] >= kh || window.padding[1] >= kw || kh * kw > MOST_ELEMENTS {
        return Err(Error::input(format!(
            "a pooling window of {kh}x{kw} with padding {:?}: padding must be smaller than the window, and the window \
             at most {MOST_ELEMENTS} elements",
            window.padding
        )));
    }
    Ok(Shape { b, h, w, c, oh, ow, o: c, g: 1, window: *window })
}

/// Calls `f(tap, input, output)` for each kernel element and output pixel of line `oy` where that element lies inside
/// the input; `tap` counts kernel elements and `input`, `output` pixels of a sample's and of a line's. For each output
/// pixel the taps come in row-major order.
#[inline(always)]
pub(crate) fn each_tap(s: &Shape, oy: usize, mut f: impl FnMut(usize, usize, usize)) {
    let [kh, kw] = s.window.kernel;
    for ky in 0..kh {
        let Some(iy) = s.input_line(oy, ky) else { continue };
        for ox in 0..s.ow {
            let (lo, hi, ix) = s.input_columns(ox);
            (lo..hi).for_each(|kx| f(ky * kw + kx, iy * s.w + ix + kx - lo, ox));
        }
    }
}

/// Whether windows lie side by side and cover the input: each element belongs to one.
fn tiles(s: &Shape) -> bool {
    let Window { kernel, stride, .. } = s.window;
    kernel == stride && [s.oh * stride[0], s.ow * stride[1]] == [s.h, s.w]
}

/// `(y, winners)`: each window's maximum by channel, and which of the window's elements (counted row-major, u8) it was:
/// the first of equals. A value that is not a number wins, so that it is noticed.
///
/// # Errors
/// [`Error::Input`] on a window that does not fit; [`Error::Run`] on devices without a kernel.
pub fn max(x: &Tensor, window: &Window) -> Result<(Tensor, Tensor)> {
    let s = shape(window, x.dims())?;
    let x = x.contiguous()?;
    let line = s.ow * s.c;
    let mut winners = vec![0u8; s.lines() * line];
    let y = by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let mut y = overwritten::<T>(winners.len());
        threads::chunks2((&mut y, line), (&mut winners, line), || (), |(), i, y, winners| {
            let sample = &x[i / s.oh * s.h * s.w * s.c..][..s.h * s.w * s.c];
            simd::vectorized(#[inline(always)] || max_line(&s, sample, i % s.oh, y, winners));
        });
        tensor(y, (s.b, s.oh, s.ow, s.c))
    })?;
    Ok((y, Tensor::from_vec(winners, (s.b, s.oh, s.ow, s.c), &Device::Cpu)?))
}

/// The maxima of output line `oy`.
#[inline(always)]
fn max_line<T: Real>(s: &Shape, sample: &[T], oy: usize, y: &mut [T], winners: &mut [u8]) {
    let [kh, kw] = s.window.kernel;
    for (ox, (y, winners)) in y.chunks_exact_mut(s.c).zip(winners.chunks_exact_mut(s.c)).enumerate() {
        let (lo, hi, ix) = s.input_columns(ox);
        let mut started = false;
        for ky in 0..kh {
            let Some(iy) = s.input_line(oy, ky) else { continue };
            for kx in lo..hi {
                let v = &sample[(iy * s.w + ix + kx - lo) * s.c..][..s.c];
                let tap = (ky * kw + kx) as u8;
                if started {
                    meet(v, tap, y, winners);
                } else {
                    y.copy_from_slice(v);
                    winners.fill(tap);
                    started = true;
                }
            }
        }
    }
}

/// Puts the values of `tap` in the place of smaller ones.
#[inline(always)]
fn meet<T: Real>(v: &[T], tap: u8, y: &mut [T], winners: &mut [u8]) {
    for ((&v, best), winner) in v.iter().zip(y).zip(winners) {
        // The second comparison lets a value that is not a number through. Without branches: these are vectors.
        #[allow(clippy::eq_op)]
        let wins = (v > *best) | (v != v);
        *best = if wins { v } else { *best };
        *winner = if wins { tap } else { *winner };
    }
}

/// The input's cotangent of [`max`], of shape `x`: `gy` at each window's winner, added where windows overlap.
///
/// # Errors
/// As [`max`].
pub fn max_vjp(x: &[usize], window: &Window, winners: &Tensor, gy: &Tensor) -> Result<Tensor> {
    let s = shape(window, x)?;
    if winners.dtype() != DType::U8 || winners.dims() != gy.dims() {
        return Err(Error::Run(format!("max pooling's winners {:?} and cotangent {:?}", winners.dims(), gy.dims())));
    }
    let gy = gy.contiguous()?;
    let winners = Host::of(winners)?;
    let winners = winners.slice::<u8>()?;
    let line = s.ow * s.c;
    let tiles = tiles(&s);
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let gy = gy.slice::<T>()?;
        let mut gx = overwritten::<T>(s.b * s.h * s.w * s.c);
        threads::chunks(&mut gx, s.h * s.w * s.c, || (), |(), b, gx| {
            if !tiles {
                gx.fill(T::ZERO);
            }
            for oy in 0..s.oh {
                let (gy, winners) = (&gy[(b * s.oh + oy) * line..][..line], &winners[(b * s.oh + oy) * line..][..line]);
                simd::vectorized(#[inline(always)] || each_tap(&s, oy, #[inline(always)] |tap, input, output| {
                    let from = output * s.c..(output + 1) * s.c;
                    let cotangent = gy[from.clone()].iter().zip(&winners[from]);
                    let gx = gx[input * s.c..][..s.c].iter_mut().zip(cotangent);
                    if tiles {
                        gx.for_each(|(x, (&g, &k))| *x = if k == tap as u8 { g } else { T::ZERO });
                    } else {
                        gx.for_each(|(x, (&g, &k))| *x += if k == tap as u8 { g } else { T::ZERO });
                    }
                }));
            }
        });
        tensor(gx, x)
    })
}

/// Each window's mean by channel.
///
/// # Errors
/// As [`max`].
pub fn average(x: &Tensor, window: &Window) -> Result<Tensor> {
    let s = shape(window, x.dims())?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let scale = T::of(1.0 / (window.kernel[0] * window.kernel[1]) as f64);
        let mut y = overwritten::<T>(s.lines() * s.ow * s.c);
        threads::chunks(&mut y, s.ow * s.c, || (), |(), i, y| {
            y.fill(T::ZERO);
            let sample = &x[i / s.oh * s.h * s.w * s.c..][..s.h * s.w * s.c];
            simd::vectorized(#[inline(always)] || {
                each_tap(&s, i % s.oh, #[inline(always)] |_, input, output| {
                    add(&mut y[output * s.c..][..s.c], &sample[input * s.c..][..s.c]);
                });
            });
            y.iter_mut().for_each(|v| *v *= scale);
        });
        tensor(y, (s.b, s.oh, s.ow, s.c))
    })
}

/// The input's cotangent of [`average`], of shape `x`.
///
/// # Errors
/// As [`max`].
pub fn average_vjp(x: &[usize], window: &Window, gy: &Tensor) -> Result<Tensor> {
    let s = shape(window, x)?;
    let gy = gy.contiguous()?;
    let line = s.ow * s.c;
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let gy = gy.slice::<T>()?;
        let scale = T::of(1.0 / (window.kernel[0] * window.kernel[1]) as f64);
        let mut gx = overwritten::<T>(s.b * s.h * s.w * s.c);
        threads::chunks(&mut gx, s.h * s.w * s.c, || (), |(), b, gx| {
            gx.fill(T::ZERO);
            for oy in 0..s.oh {
                let gy = &gy[(b * s.oh + oy) * line..][..line];
                simd::vectorized(#[inline(always)] || {
                    each_tap(&s, oy, #[inline(always)] |_, input, output| add(&mut gx[input * s.c..][..s.c], &gy[output * s.c..][..s.c]));
                });
            }
            gx.iter_mut().for_each(|v| *v *= scale);
        });
        tensor(gx, x)
    })
}

/// Which of `from` rows (or columns) row `r` of `to` averages in [`adaptive_average`]: from ⌊r·from/to⌋ to before
/// ⌈(r + 1)·from/to⌉. With the sizes exchanged, which of the `to` rows average row `r` of `from`.
fn averaged(r: usize, from: usize, to: usize) -> Range<usize> {
    r * from / to..((r + 1) * from).div_ceil(to)
}

/// The mean by channel of `x` `[B, H, W, C]` down to any `[h, w]`, `[B, h, w, C]`: output row r averages input rows
/// ⌊r·H/h⌋ … ⌈(r + 1)·H/h⌉ − 1, columns alike (PyTorch's `adaptive_avg_pool2d`). Neighbouring outputs may share a row.
///
/// # Errors
/// [`Error::Run`] where `[h, w]` is empty or larger than the input, and on devices without a kernel.
pub fn adaptive_average(x: &Tensor, [oh, ow]: [usize; 2]) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if let Some(window) = Window::of_whole_ratio([h, w], [oh, ow]) {
        return average(x, &window);
    }
    shrinks([h, w], [oh, ow])?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let x = x.slice::<T>()?;
        let mut y = overwritten::<T>(b * oh * ow * c);
        threads::chunks(&mut y, ow * c, || (), |(), i, y| {
            y.fill(T::ZERO);
            let (sample, rows) = (&x[i / oh * h * w * c..][..h * w * c], averaged(i % oh, h, oh));
            simd::vectorized(#[inline(always)] || {
                for (ox, y) in y.chunks_exact_mut(c).enumerate() {
                    let columns = averaged(ox, w, ow);
                    for iy in rows.clone() {
                        columns.clone().for_each(|ix| add(y, &sample[(iy * w + ix) * c..][..c]));
                    }
                    let scale = T::of(1.0 / (rows.len() * columns.len()) as f64);
                    y.iter_mut().for_each(|v| *v *= scale);
                }
            });
        });
        tensor(y, (b, oh, ow, c))
    })
}

/// The input's cotangent of [`adaptive_average`], of height and width `[h, w]`.
///
/// # Errors
/// As [`adaptive_average`].
pub fn adaptive_average_vjp([h, w]: [usize; 2], gy: &Tensor) -> Result<Tensor> {
    let (b, oh, ow, c) = gy.dims4()?;
    if let Some(window) = Window::of_whole_ratio([h, w], [oh, ow]) {
        return average_vjp(&[b, h, w, c], &window, gy);
    }
    shrinks([h, w], [oh, ow])?;
    let gy = gy.contiguous()?;
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let gy = gy.slice::<T>()?;
        let mut gx = overwritten::<T>(b * h * w * c);
        threads::chunks(&mut gx, w * c, || (), |(), i, gx| {
            gx.fill(T::ZERO);
            let sample = &gy[i / h * oh * ow * c..][..oh * ow * c];
            simd::vectorized(#[inline(always)] || {
                for (ix, gx) in gx.chunks_exact_mut(c).enumerate() {
                    for oy in averaged(i % h, oh, h) {
                        for ox in averaged(ix, ow, w) {
                            let of = averaged(oy, h, oh).len() * averaged(ox, w, ow).len();
                            let scale = T::of(1.0 / of as f64);
                            let gy = &sample[(oy * ow + ox) * c..][..c];
                            gx.iter_mut().zip(gy).for_each(|(x, &g)| *x += g * scale);
                        }
                    }
                }
            });
        });
        tensor(gx, (b, h, w, c))
    })
}

fn shrinks(from: [usize; 2], to: [usize; 2]) -> Result<()> {
    if (0..2).all(|i| (1..=from[i]).contains(&to[i])) {
        return Ok(());
    }
    let ([h, w], [oh, ow]) = (from, to);
    Err(Error::Run(format!("{h}x{w} pixels cannot be averaged down to {oh}x{ow}")))
}

/// The mean over all positions: `[B, H, W, C]` to `[B, 1, 1, C]`.
///
/// # Errors
/// [`Error::Run`] on devices without a kernel.
pub fn global_average(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        let scale = T::of(1.0 / (h * w) as f64);
        let samples = x.slice::<T>()?.chunks_exact(h * w * c);
        let y = samples.flat_map(|sample| reduce::column_sums(sample, c)).map(|v| v * scale).collect();
        tensor(y, (b, 1, 1, c))
    })
}

/// The input's cotangent of [`global_average`], of shape `x`.
///
/// # Errors
/// As [`global_average`].
pub fn global_average_vjp(x: &[usize], gy: &Tensor) -> Result<Tensor> {
    let &[b, h, w, c] = x else {
        return Err(Error::Run(format!("global pooling of {x:?} (want [B, H, W, C])")));
    };
    let gy = gy.contiguous()?;
    if gy.elem_count() != b * c {
        return Err(Error::Run(format!("global pooling's cotangent is {:?}, its input {x:?}", gy.dims())));
    }
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        let scale = T::of(1.0 / (h * w) as f64);
        let mut gx = Vec::with_capacity(b * h * w * c);
        for of_sample in gy.slice::<T>()?.chunks_exact(c) {
            let scaled: Vec<T> = of_sample.iter().map(|&g| g * scale).collect();
            (0..h * w).for_each(|_| gx.extend_from_slice(&scaled));
        }
        tensor(gx, x)
    })
}
