//! Convolutions of NHWC slices by patches and matrix products: any window, any groups.
//!
//! A 1x1 convolution of stride 1 is a product on the tensor as it lies.

use super::im2col::{Shape, gather, scatter};
use super::matmul::{Matrix, multiply};
use super::{Real, Window, overwritten, threads};

/// Writes `x * weight (+ bias)` to `y`; the weight as [`pack`] lays it out.
pub(crate) fn forward<T: Real>(s: &Shape, x: &[T], packed: &[T], bias: Option<&[T]>, y: &mut [T]) {
    if let Some(bias) = bias {
        y.chunks_exact_mut(s.o).for_each(|pixel| pixel.copy_from_slice(bias));
    }
    products(s, x, packed, y, bias.is_some());
}

/// Writes the input's cotangent to `gx`; the weight as [`pack_backward`] lays it out.
pub(crate) fn input_gradient<T: Real>(s: &Shape, gy: &[T], packed: &[T], gx: &mut [T]) {
    match mirrored(s) {
        Some(m) => products(&m, gy, packed, gx, false),
        None => {
            gx.fill(T::ZERO);
            scatter_products(s, gy, packed, gx);
        }
    }
}

/// The weight's gradient, as the weight lies.
pub(crate) fn weight_gradient<T: Real>(s: &Shape, x: &[T], gy: &[T]) -> Vec<T> {
    let mut packed = overwritten(s.o * s.patch());
    for (group, out) in packed.chunks_mut(s.patch() * s.og()).enumerate() {
        weight_slices(s, group, x, gy, out);
    }
    unpack(s, &packed)
}

/// The weight as [`input_gradient`] wants it.
pub(crate) fn pack_backward<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    if mirrored(s).is_some() { pack_mirrored(s, weight) } else { pack(s, weight) }
}

/// The convolution that carries cotangents back where the stride is 1: the same kernel mirrored, over `gy`.
fn mirrored(s: &Shape) -> Option<Shape> {
    let Window { kernel: [kh, kw], stride, padding: [ph, pw] } = s.window;
    let padding = [(kh - 1).checked_sub(ph)?, (kw - 1).checked_sub(pw)?];
    (stride == [1, 1]).then_some(Shape {
        h: s.oh,
        w: s.ow,
        c: s.o,
        oh: s.h,
        ow: s.w,
        o: s.c,
        window: Window { kernel: [kh, kw], stride, padding },
        ..*s
    })
}

/// Writes the convolution of `x` with packed weights (`[g][ky, kx, c][o]`) to `y`, or adds it there.
fn products<T: Real>(s: &Shape, x: &[T], packed: &[T], y: &mut [T], accumulate: bool) {
    let (patch, cg, og) = (s.patch(), s.cg(), s.og());
    let pointwise = s.window.is_pointwise();
    let lines = s.lines_at_once(if pointwise { cg } else { patch });
    let scratch = || overwritten(if pointwise { 0 } else { lines * s.ow * patch });
    threads::chunks(y, lines * s.ow * s.o, scratch, |columns, i, y| {
        let pixels = y.len() / s.o;
        let first = i * lines;
        for (group, weight) in packed.chunks(patch * og).enumerate() {
            let a = if pointwise {
                Matrix::new(&x[first * s.ow * s.c + group * cg..], s.c)
            } else {
                let columns = &mut columns[..pixels * patch];
                gather(s, x, group, first..first + pixels / s.ow, 0..s.window.kernel[0], columns);
                Matrix::new(columns, patch)
            };
            multiply([pixels, og, patch], &mut y[group * og..], s.o, a, Matrix::new(weight, og), accumulate);
        }
    });
}

/// Adds the input's cotangent to `gx` by way of the patches' cotangents: any stride.
fn scatter_products<T: Real>(s: &Shape, gy: &[T], packed: &[T], gx: &mut [T]) {
    let (patch, og) = (s.patch(), s.og());
    let lines = s.lines_at_once(patch).min(s.oh);
    let sample = s.oh * s.ow * s.o;
    threads::chunks(
        gx,
        s.h * s.w * s.c,
        || overwritten(lines * s.ow * patch),
        |columns, b, gx| {
            for first in (0..s.oh).step_by(lines) {
                let last = (first + lines).min(s.oh);
                let pixels = (last - first) * s.ow;
                for (group, weight) in packed.chunks(patch * og).enumerate() {
                    let columns = &mut columns[..pixels * patch];
                    let a = Matrix::new(&gy[b * sample + first * s.ow * s.o + group * og..], s.o);
                    multiply([pixels, patch, og], columns, patch, a, Matrix::new(weight, og).transposed(), false);
                    scatter(s, gx, group, first..last, columns);
                }
            }
        },
    );
}

/// One group's weight gradient, packed (`[ky, kx, c][o]`). Pieces of it, each one kernel row (or for 1x1 kernels a block
/// of channels), are summed over the batch independently: threads share nothing, and the order of sums is fixed.
fn weight_slices<T: Real>(s: &Shape, group: usize, x: &[T], gy: &[T], out: &mut [T]) {
    let (cg, og) = (s.cg(), s.og());
    let pointwise = s.window.is_pointwise();
    let piece = if pointwise { cg.div_ceil(4).max(64).min(cg) } else { s.window.kernel[1] * cg };
    let lines = s.lines_at_once(piece);
    let scratch = || overwritten(if pointwise { 0 } else { lines * s.ow * piece });
    threads::chunks(out, piece * og, scratch, |columns, i, out| {
        let rows = out.len() / og;
        for first in (0..s.lines()).step_by(lines) {
            let last = (first + lines).min(s.lines());
            let pixels = (last - first) * s.ow;
            let a = if pointwise {
                Matrix::new(&x[first * s.ow * s.c + group * cg + i * piece..], s.c)
            } else {
                let columns = &mut columns[..pixels * piece];
                gather(s, x, group, first..last, i..i + 1, columns);
                Matrix::new(columns, piece)
            };
            let b = Matrix::new(&gy[first * s.ow * s.o + group * og..], s.o);
            multiply([rows, og, pixels], out, og, a.transposed(), b, first > 0);
        }
    });
}

/// `[O, C/g, kH, kW]` as `[g][kH, kW, C/g][O/g]`.
pub(crate) fn pack<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut packed = overwritten(weight.len());
    for (o, from) in weight.chunks_exact(cg * taps).enumerate() {
        let to = &mut packed[(o / og) * taps * cg * og + o % og..];
        for (c, from) in from.chunks_exact(taps).enumerate() {
            from.iter().enumerate().for_each(|(tap, &v)| to[(tap * cg + c) * og] = v);
        }
    }
    packed
}

/// The inverse of [`pack`].
fn unpack<T: Real>(s: &Shape, packed: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut weight = overwritten(packed.len());
    for (o, to) in weight.chunks_exact_mut(cg * taps).enumerate() {
        let from = &packed[(o / og) * taps * cg * og + o % og..];
        for (c, to) in to.chunks_exact_mut(taps).enumerate() {
            to.iter_mut().enumerate().for_each(|(tap, v)| *v = from[(tap * cg + c) * og]);
        }
    }
    weight
}

/// `[O, C/g, kH, kW]` as `[g][kH, kW mirrored, O/g][C/g]`: the weights of the [`mirrored`] convolution.
fn pack_mirrored<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut packed = overwritten(weight.len());
    for (o, from) in weight.chunks_exact(cg * taps).enumerate() {
        let to = &mut packed[(o / og) * taps * cg * og..][..taps * cg * og];
        for (c, from) in from.chunks_exact(taps).enumerate() {
            from.iter().enumerate().for_each(|(tap, &v)| to[((taps - 1 - tap) * og + o % og) * cg + c] = v);
        }
    }
    packed
}
