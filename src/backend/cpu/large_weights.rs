//! Convolutions by products with the weights as they lie, where those outweigh the activations: no second and third copy of
//! them in a layout of an algorithm's choice.
//!
//! A weight `[O, C, kH, kW]` is a matrix of O rows and C kH kW columns. With the patches as a matrix P, `[C kH kW][pixel]`, the
//! products are y = W P, W's gradient = gy Pᵀ, and P's cotangent = Wᵀ gy, whose elements are added where they came from.
//!
//! What it gains: with oneDNN 2.6.3 in its place `resnet18` trains at 0.91 of the frames/s (median of 15 pairs of clips, by
//! processor time, on one core of a 2-core AMD EPYC virtual machine: `taskset -c 0 target/release/sideways bench train
//! benches/pytorch/resnet18.toml --set model.modules=8 --set 'model.skip.spans=[2]'`) and needs 376 MiB at its peak instead of
//! 272. The speed is the weight's gradient's; the other two products take some 3 % longer than oneDNN's and save 85 MiB.
//! `vgg8`, with one linear layer of this kind, is as fast without.

use super::im2col::{Shape, gather};
use super::matmul::{Matrix, multiply};
use super::{Real, overwritten, simd, threads};

/// Pixels of a batch up to which weights may outweigh activations.
const PIXELS: usize = 512;
/// Output channels that a thread takes at once.
const OUTPUTS: usize = 128;
/// Input channels that a thread takes at once.
const INPUTS: usize = 64;
/// Channels whose patches are transposed at once.
const LANES: usize = 16;

/// Whether weights are so many that copies of them cost more, in memory and after each update, than the products here lose
/// to better ones.
pub(crate) fn suits(s: &Shape) -> bool {
    outweighs(s, 8)
}

/// Whether the weight's gradient is best computed here: passes over the weights, not products, take the time.
pub(crate) fn suits_weight_gradient(s: &Shape) -> bool {
    outweighs(s, 4)
}

fn outweighs(s: &Shape, times: usize) -> bool {
    s.g == 1 && s.b * s.oh * s.ow <= PIXELS && s.o * s.patch() > times * s.b * s.h * s.w * s.c
}

fn pixels(s: &Shape) -> usize {
    s.b * s.oh * s.ow
}

/// Patches of an input, `[pixel][tap][channel]`.
fn gathered<T: Real>(s: &Shape, x: &[T]) -> Vec<T> {
    let mut rows = overwritten(pixels(s) * s.patch());
    gather(s, x, 0, 0..s.lines(), 0..s.window.kernel[0], &mut rows);
    rows
}

/// P `[C kH kW][pixel]` of an input.
fn columns<T: Real>(s: &Shape, x: &[T]) -> Vec<T> {
    let (pixels, patch, taps) = (pixels(s), s.patch(), s.patch() / s.c);
    let (rows, mut columns) = (gathered(s, x), overwritten(pixels * patch));
    threads::chunks(
        &mut columns,
        LANES * taps * pixels,
        || (),
        |(), block, columns| {
            for (pixel, row) in rows.chunks_exact(patch).enumerate() {
                for (tap, row) in row.chunks_exact(s.c).enumerate() {
                    let to = columns[tap * pixels + pixel..].iter_mut().step_by(taps * pixels);
                    to.zip(&row[block * LANES..]).for_each(|(to, &v)| *to = v);
                }
            }
        },
    );
    columns
}

/// Writes `x * weight (+ bias)` to `y`.
pub(crate) fn forward<T: Real>(s: &Shape, x: &[T], weight: &[T], bias: Option<&[T]>, y: &mut [T]) {
    let (pixels, patch, columns) = (pixels(s), s.patch(), columns(s, x));
    let mut transposed = overwritten(s.o * pixels);
    threads::chunks(
        &mut transposed,
        OUTPUTS * pixels,
        || (),
        |(), block, y| {
            let weight = Matrix::new(&weight[block * OUTPUTS * patch..], patch);
            multiply([y.len() / pixels, pixels, patch], y, pixels, weight, Matrix::new(&columns, pixels), false);
        },
    );
    for (pixel, y) in y.chunks_exact_mut(s.o).enumerate() {
        let from = transposed[pixel..].iter().step_by(pixels);
        match bias {
            Some(bias) => y.iter_mut().zip(from).zip(bias).for_each(|((y, &v), &b)| *y = v + b),
            None => y.iter_mut().zip(from).for_each(|(y, &v)| *y = v),
        }
    }
}

/// Adds the weight's gradient to `sum`. (From whole patches: a product over [`columns`], if they were kept, takes as much longer
/// as it takes to make these.)
pub(crate) fn add_weight_gradient<T: Real>(s: &Shape, x: &[T], gy: &[T], sum: &mut [T]) {
    let (patch, taps) = (s.patch(), s.patch() / s.c);
    let mut patches = overwritten(pixels(s) * patch);
    for (to, from) in patches.chunks_exact_mut(patch).zip(gathered(s, x).chunks_exact(patch)) {
        for (tap, from) in from.chunks_exact(s.c).enumerate() {
            to[tap..].iter_mut().step_by(taps).zip(from).for_each(|(to, &v)| *to = v);
        }
    }
    let pixels = pixels(s);
    threads::chunks(
        sum,
        OUTPUTS * patch,
        || (),
        |(), block, sum| {
            let gy = Matrix::new(&gy[block * OUTPUTS..], s.o).transposed();
            multiply([sum.len() / patch, patch, pixels], sum, patch, gy, Matrix::new(&patches, patch), true);
        },
    );
}

/// Writes the input's cotangent to `gx`.
pub(crate) fn input_gradient<T: Real>(s: &Shape, gy: &[T], weight: &[T], gx: &mut [T]) {
    let (pixels, patch, taps) = (pixels(s), s.patch(), s.patch() / s.c);
    // [block of channels][pixel][channel][tap].
    let mut patches = overwritten(pixels * patch);
    threads::chunks(
        &mut patches,
        pixels * INPUTS * taps,
        || (),
        |(), block, patches| {
            let width = patches.len() / pixels;
            let weight = Matrix::new(&weight[block * INPUTS * taps..], patch);
            multiply([pixels, width, s.o], patches, width, Matrix::new(gy, s.o), weight, false);
        },
    );
    gx.fill(T::ZERO);
    for (block, patches) in patches.chunks(pixels * INPUTS * taps).enumerate() {
        let width = patches.len() / pixels;
        for (pixel, patch) in patches.chunks_exact(width).enumerate() {
            simd::vectorized(
                #[inline(always)]
                || scatter(s, pixel, taps, patch, block * INPUTS, gx),
            );
        }
    }
}

/// Adds one output pixel's patch, `[channel][tap]` of channels from `first` on, to `gx`.
#[inline(always)]
fn scatter<T: Real>(s: &Shape, pixel: usize, taps: usize, patch: &[T], first: usize, gx: &mut [T]) {
    let (line, ox) = (pixel / s.ow, pixel % s.ow);
    let (b, oy) = (line / s.oh, line % s.oh);
    let [kh, kw] = s.window.kernel;
    let (lo, hi, ix) = s.input_columns(ox);
    for ky in 0..kh {
        let Some(iy) = s.input_line(oy, ky) else { continue };
        for kx in lo..hi {
            let to = &mut gx[((b * s.h + iy) * s.w + ix + kx - lo) * s.c + first..];
            let from = patch[ky * kw + kx..].iter().step_by(taps);
            to.iter_mut().zip(from).for_each(|(to, &v)| *to += v);
        }
    }
}
