//! Convolutions of few input channels, such as a network's first of three colours, in 32-bit floats: products straight from the
//! image, a line at a time.
//!
//! What oneDNN and [`patches`](super::patches) have to copy first, here only is padded.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::im2col::{Shape, add};
use super::{Window, simd, threads};

/// Output channels come in whole vectors of this many.
pub(crate) const LANES: usize = 16;
/// Output lines of one piece of work, at most.
const LINES: usize = 8;

/// Whether this is the way to compute a convolution in f32 here.
pub(crate) fn suits(s: &Shape) -> bool {
    s.g == 1 && s.c <= 4 && s.o.is_multiple_of(LANES) && s.patch() <= 64 && simd::fused()
}

/// How many of `lines` lines make a piece: pieces are of one size, so that they never lie in two samples.
pub(crate) fn piece(lines: usize) -> usize {
    (1..=LINES).rev().find(|n| lines.is_multiple_of(*n)).unwrap_or(1)
}

/// Lines of a sample with their border: `[line][zeros, pixels with their border, zeros]`.
pub(crate) struct Padded {
    data: Vec<f32>,
    /// Where the elements of a patch lie behind its first.
    taps: Vec<usize>,
    /// Elements of a line.
    length: usize,
    /// Elements before the first pixel, as many as the kernel reaches to the right of its first. There are as many behind the last,
    /// and a vector more.
    before: usize,
}

impl Padded {
    /// Room for the lines under `lines` output lines, at least 1.
    pub(crate) fn new(s: &Shape, lines: usize) -> Self {
        let Window { kernel: [kh, kw], stride, padding } = s.window;
        let before = (kw - 1) * s.c;
        let length = before + (s.w + 2 * padding[1]) * s.c + before + LANES;
        let taps = (0..kh).flat_map(|ky| (0..kw * s.c).map(move |t| ky * length + t)).collect();
        Padded { data: vec![0.0; ((lines - 1) * stride[0] + kh) * length], taps, length, before }
    }

    /// Takes in the lines of `sample` from padded line `first` on, as many as there is room for.
    pub(crate) fn fill(&mut self, s: &Shape, sample: &[f32], first: usize) {
        let at = self.before + s.window.padding[1] * s.c;
        for (k, line) in self.data.chunks_exact_mut(self.length).enumerate() {
            let (left, line) = line.split_at_mut(at);
            let (inside, right) = line.split_at_mut(s.w * s.c);
            left.fill(0.0);
            right.fill(0.0);
            match (first + k).checked_sub(s.window.padding[0]).filter(|&iy| iy < s.h) {
                Some(iy) => inside.copy_from_slice(&sample[iy * s.w * s.c..][..s.w * s.c]),
                None => inside.fill(0.0),
            }
        }
    }

    /// What was taken in from the first pixel of line `k` on.
    pub(crate) fn from(&self, k: usize) -> &[f32] {
        &self.data[k * self.length + self.before..]
    }
}

/// Writes `x * weight (+ bias)` to `y`; the weight as [`patches::pack`](super::patches::pack) lays it out.
pub(crate) fn forward(s: &Shape, x: &[f32], packed: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let lines = piece(s.oh);
    let scratch = || Padded::new(s, lines);
    threads::chunks(y, lines * s.ow * s.o, scratch, |padded, i, y| {
        let (b, oy) = (i * lines / s.oh, i * lines % s.oh);
        padded.fill(s, &x[b * s.h * s.w * s.c..][..s.h * s.w * s.c], oy * s.window.stride[0]);
        for (k, y) in y.chunks_exact_mut(s.ow * s.o).enumerate() {
            line(s, padded, k, packed, bias, y);
        }
    });
}

/// The weight's gradient, packed as the weight in [`forward`].
pub(crate) fn weight_gradient(s: &Shape, x: &[f32], gy: &[f32]) -> Vec<f32> {
    let (lines, size) = (piece(s.oh), s.patch() * s.o);
    let mut parts = vec![0.0; s.lines() / lines * size];
    let scratch = || Padded::new(s, lines);
    threads::chunks(&mut parts, size, scratch, |padded, i, part| {
        let (b, oy) = (i * lines / s.oh, i * lines % s.oh);
        padded.fill(s, &x[b * s.h * s.w * s.c..][..s.h * s.w * s.c], oy * s.window.stride[0]);
        for (k, gy) in gy[i * lines * s.ow * s.o..].chunks_exact(s.ow * s.o).take(lines).enumerate() {
            add_line_gradient(s, padded, k, gy, part);
        }
    });
    sum_of(&parts, size)
}

/// The sum of parts of `size` elements, in order.
fn sum_of(parts: &[f32], size: usize) -> Vec<f32> {
    let mut total = vec![0.0; size];
    parts.chunks_exact(size).for_each(|part| add(&mut total, part));
    total
}

/// Output line `k` of those whose input `padded` holds.
pub(crate) fn line(s: &Shape, padded: &Padded, k: usize, packed: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    simd::dispatch(Line { s, padded, k, packed, bias, y });
}

/// Adds to `part` (packed) the weight's gradient of that line, from its output's cotangent.
pub(crate) fn add_line_gradient(s: &Shape, padded: &Padded, k: usize, gy: &[f32], part: &mut [f32]) {
    let Window { kernel: [kh, kw], stride, .. } = s.window;
    let (taps, step) = (kw * s.c, stride[1] * s.c);
    for (ky, part) in part.chunks_exact_mut(taps * s.o).enumerate().take(kh) {
        let x = Steps { data: padded.from(k * stride[0] + ky), step };
        add_outer(0..s.ow, taps, x, Steps { data: gy, step: s.o }, s.o, part);
    }
}

/// Vectors that lie `step` elements one behind the other, and may overlap.
#[derive(Clone, Copy)]
struct Steps<'a> {
    data: &'a [f32],
    step: usize,
}

/// Adds the sum over `at` of the outer products of `rows` elements of x and `columns` of y, a multiple of 16, to `out`.
fn add_outer(at: Range<usize>, rows: usize, x: Steps, y: Steps, columns: usize, out: &mut [f32]) {
    simd::dispatch(Outer { at, rows, x, y, columns, out });
}

struct Line<'a> {
    s: &'a Shape,
    padded: &'a Padded,
    k: usize,
    packed: &'a [f32],
    bias: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl WithSimd for Line<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (o, mut channel) = (self.s.o, 0);
        // As many sums as registers hold beside the weights of a tap: 24 of 32, or 12 of 16.
        while channel < o {
            let vectors = (o - channel) / S::F32_LANES;
            match vectors {
                4.. if S::F32_LANES != 8 => self.channels::<S, 4>(simd, &mut channel),
                2.. => self.channels::<S, 2>(simd, &mut channel),
                _ => self.channels::<S, 1>(simd, &mut channel),
            }
        }
    }
}

impl Line<'_> {
    /// `V` vectors of channels from `channel` on, which moves behind them.
    #[inline(always)]
    fn channels<S: Simd, const V: usize>(&mut self, simd: S, channel: &mut usize) {
        const PIXELS: usize = 6;
        let ow = self.s.ow;
        let whole = ow - ow % PIXELS;
        for ox in (0..whole).step_by(PIXELS) {
            self.pixels::<S, PIXELS, V>(simd, ox, *channel);
        }
        for ox in whole..ow {
            self.pixels::<S, 1, V>(simd, ox, *channel);
        }
        *channel += V * S::F32_LANES;
    }

    #[inline(always)]
    fn pixels<S: Simd, const P: usize, const V: usize>(&mut self, simd: S, ox: usize, channel: usize) {
        let (s, width) = (self.s, V * S::F32_LANES);
        let step = s.window.stride[1] * s.c;
        let mut sums = [[simd.splat_f32s(0.0); V]; P];
        if let Some(bias) = self.bias {
            let bias = S::as_simd_f32s(&bias[channel..][..width]).0;
            for sums in &mut sums {
                sums.copy_from_slice(bias);
            }
        }
        let taps = &self.padded.taps;
        let reach = taps.last().map_or(0, |last| last + 1);
        let lines = &self.padded.from(self.k * s.window.stride[0])[ox * step..];
        let mut x = [lines; P];
        for (p, x) in x.iter_mut().enumerate() {
            *x = &lines[p * step..][..reach];
        }
        for (&at, weights) in taps.iter().zip(self.packed.chunks_exact(s.o)) {
            let mut w = [simd.splat_f32s(0.0); V];
            w.copy_from_slice(S::as_simd_f32s(&weights[channel..][..width]).0);
            for p in 0..P {
                let x = simd.splat_f32s(x[p][at]);
                for v in 0..V {
                    sums[p][v] = simd.mul_add_f32s(x, w[v], sums[p][v]);
                }
            }
        }
        for (p, sums) in sums.iter().enumerate() {
            let y = &mut self.y[(ox + p) * s.o + channel..][..width];
            S::as_mut_simd_f32s(y).0.copy_from_slice(sums);
        }
    }
}

struct Outer<'a> {
    at: Range<usize>,
    rows: usize,
    x: Steps<'a>,
    y: Steps<'a>,
    columns: usize,
    out: &'a mut [f32],
}

impl WithSimd for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut row = 0;
        // Nine are the row of a 3x3 kernel over three colours.
        while row < self.rows {
            match self.rows - row {
                9.. => self.rows::<S, 9>(simd, &mut row),
                3.. => self.rows::<S, 3>(simd, &mut row),
                _ => self.rows::<S, 1>(simd, &mut row),
            }
        }
    }
}

impl Outer<'_> {
    /// `R` rows from `row` on, which moves behind them.
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, simd: S, row: &mut usize) {
        let mut column = 0;
        while column < self.columns {
            let vectors = (self.columns - column) / S::F32_LANES;
            match vectors {
                2.. if S::F32_LANES != 8 => self.sums::<S, R, 2>(simd, *row, &mut column),
                _ => self.sums::<S, R, 1>(simd, *row, &mut column),
            }
        }
        *row += R;
    }

    #[inline(always)]
    fn sums<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, column: &mut usize) {
        // Few sums would wait for one another: then those of even and of odd places apart.
        if R * V < 6 {
            self.sums_apart::<S, R, V, 2>(simd, row, *column);
        } else {
            self.sums_apart::<S, R, V, 1>(simd, row, *column);
        }
        *column += V * S::F32_LANES;
    }

    #[inline(always)]
    fn sums_apart<S: Simd, const R: usize, const V: usize, const N: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let width = V * S::F32_LANES;
        let mut sums = [[[simd.splat_f32s(0.0); V]; R]; N];
        let mut at = self.at.start;
        while at + N <= self.at.end {
            for sums in &mut sums {
                self.add::<S, R, V>(simd, at, row, column, sums);
                at += 1;
            }
        }
        while at < self.at.end {
            self.add::<S, R, V>(simd, at, row, column, &mut sums[0]);
            at += 1;
        }
        for r in 0..R {
            let out = &mut self.out[(row + r) * self.columns + column..][..width];
            for (v, out) in S::as_mut_simd_f32s(out).0.iter_mut().enumerate() {
                for sums in &sums {
                    *out = simd.add_f32s(*out, sums[r][v]);
                }
            }
        }
    }

    #[inline(always)]
    fn add<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        at: usize,
        row: usize,
        column: usize,
        sums: &mut [[S::f32s; V]; R],
    ) {
        let x = &self.x.data[at * self.x.step + row..][..R];
        let y = &self.y.data[at * self.y.step + column..][..V * S::F32_LANES];
        let mut columns = [simd.splat_f32s(0.0); V];
        columns.copy_from_slice(S::as_simd_f32s(y).0);
        for r in 0..R {
            let x = simd.splat_f32s(x[r]);
            for v in 0..V {
                sums[r][v] = simd.mul_add_f32s(x, columns[v], sums[r][v]);
            }
        }
    }
}
