//! Sums over a sample's patches, and what they say about a convolution of few channels without its output: mean and variance by
//! output channel, and products of patches with the output.
//!
//! The output is the weight times the patch, so these are the weight, once or twice, times the sum of patches times patches. That is
//! small, and since neighbouring patches share most of their elements it costs a fraction of one product.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::few::{self, Padded};
use super::im2col::Shape;
use super::simd;

/// Sums over one sample's patches, of stride 1, of K elements.
pub(crate) struct PatchMoments<'a> {
    s: &'a Shape,
    /// Of the patches, `[K]`.
    sums: &'a [f64],
    /// Of their products with themselves, `[K][K]`.
    products: &'a [f64],
}

/// A convolution's parameters: the weight as [`patches::pack`](super::patches::pack) lays it out, and the bias.
pub(crate) type Parameters<'a> = (&'a [f32], Option<&'a [f32]>);

impl<'a> PatchMoments<'a> {
    /// Numbers that a sample takes.
    pub(crate) fn len(s: &Shape) -> usize {
        s.patch() * (s.patch() + 1)
    }

    /// Those that [`write`] has written.
    pub(crate) fn of(s: &'a Shape, moments: &'a [f64]) -> Self {
        let (sums, products) = moments.split_at(s.patch());
        PatchMoments { s, sums, products }
    }

    /// Pixels of the output.
    pub(crate) fn pixels(&self) -> f64 {
        (self.s.oh * self.s.ow) as f64
    }

    /// The output's sum over pixels, by channel.
    pub(crate) fn output_sums(&self, (packed, bias): Parameters) -> Vec<f64> {
        let mut sums = match bias {
            Some(bias) => bias.iter().map(|&bias| f64::from(bias) * self.pixels()).collect(),
            None => vec![0.0; self.s.o],
        };
        for (weights, &sum) in packed.chunks_exact(self.s.o).zip(self.sums) {
            add_scaled(&mut sums, weights, sum);
        }
        sums
    }

    /// The sum over pixels of squared differences of the output from its mean, by channel.
    pub(crate) fn output_squares(&self, packed: &[f32]) -> Vec<f64> {
        let (o, n) = (self.s.o, self.pixels());
        let mut squares = vec![0.0; o];
        let rows = packed.chunks_exact(o).zip(self.sums).zip(self.products.chunks_exact(self.s.patch()));
        for ((weights, &sum), products) in rows {
            let mut with_output = vec![0.0; o];
            for ((others, &of_other), &product) in packed.chunks_exact(o).zip(self.sums).zip(products) {
                add_scaled(&mut with_output, others, product - sum * of_other / n);
            }
            let terms = weights.iter().zip(with_output);
            squares.iter_mut().zip(terms).for_each(|(square, (&w, v))| *square += f64::from(w) * v);
        }
        squares
    }

    /// Adds to `total` (packed) the sum over pixels of patches times `k1 y + k2`, by channel, for y the output.
    pub(crate) fn add_weight_gradient(&self, (packed, bias): Parameters, [k1, k2]: [&[f32]; 2], total: &mut [f64]) {
        let o = self.s.o;
        let rows = total.chunks_exact_mut(o).zip(self.sums).zip(self.products.chunks_exact(self.s.patch()));
        for ((total, &sum), products) in rows {
            // By channel, the sum over pixels of this element of the patch times the output.
            let mut with_output: Vec<f64> = match bias {
                Some(bias) => bias.iter().map(|&bias| f64::from(bias) * sum).collect(),
                None => vec![0.0; o],
            };
            for (weights, &product) in packed.chunks_exact(o).zip(products) {
                add_scaled(&mut with_output, weights, product);
            }
            for (((total, with_output), &k1), &k2) in total.iter_mut().zip(with_output).zip(k1).zip(k2) {
                *total += f64::from(k1) * with_output + f64::from(k2) * sum;
            }
        }
    }
}

fn add_scaled(sums: &mut [f64], values: &[f32], factor: f64) {
    sums.iter_mut().zip(values).for_each(|(sum, &v)| *sum += f64::from(v) * factor);
}

/// Writes the sums over the patches of the sample that `padded` holds to `moments`: of the patches, then of their products.
///
/// An element of one patch is another element of the next one, so products depend, but for what lies at the borders, on the
/// distance alone. Lines and columns are summed in zones: single ones at both ends, and those between, which belong to every element
/// of the kernel. Element ky of a column of the kernel meets zones `ky..ky + kh`.
pub(crate) fn write(s: &Shape, padded: &mut Padded, moments: &mut [f64]) {
    let (c, [kh, kw]) = (s.c, s.window.kernel);
    let lines = s.oh + kh - 1;
    let width = ((2 * kw - 1) * c).next_multiple_of(few::LANES);
    let (zones, before) = ([2 * kh - 1, 2 * kw - 1], (kw - 1) * c);
    let (cell, plane) = (c * width, zones[1] * c * width);
    // [zone of lines][distance of lines][zone of columns][channel][distance of columns, channel], and without distances.
    let mut products = vec![0f64; zones[0] * kh * plane];
    let mut plain = vec![0f64; zones[0] * zones[1] * c];
    for line in 0..lines {
        let zone = zone_of(line, kh, s.oh);
        for z in 0..zones[1] {
            let columns = range_of(z, kw, s.ow);
            let sums = sum_of_pixels(&padded.from(line)[columns.start * c..columns.end * c], c);
            let to = plain[(zone * zones[1] + z) * c..][..c].iter_mut();
            to.zip(sums).for_each(|(to, sum)| *to += f64::from(sum));
        }
    }
    // Products of differences from the mean: sums of 32-bit squares far from it would lose the variance.
    let pixels = (lines * (s.ow + kw - 1)) as f64;
    let mean = |channel| plain.iter().skip(channel).step_by(c).sum::<f64>() / pixels;
    let centre: Vec<f32> = (0..c).map(|channel| mean(channel) as f32).collect();
    padded.shift(&centre);
    let padded = &*padded;
    // The line at hand, which is in zone `line`, times itself and those below, within a zone of columns.
    let mut sums = vec![0f32; ROWS * cell];
    let mut sum = |(line, z): (usize, usize), at: Range<usize>, step: usize, x: &[f32], ys: &[&[f32]], first: usize| {
        let sums = &mut sums[..ys.len() * cell];
        simd::dispatch(Outer { at, step, c, x, ys, width, sums });
        for (distance, sums) in (first..).zip(sums.chunks_exact(cell)) {
            let to = &mut products[(line * kh + distance) * plane + z * cell..][..cell];
            to.iter_mut().zip(sums).for_each(|(to, &sum)| *to += f64::from(sum));
        }
    };
    for first in (0..kh).step_by(ROWS) {
        let distances = first..kh.min(first + ROWS);
        for line in 0..lines {
            let below = |distance: usize| padded.reaching_before(line + distance, before);
            let ys: Vec<&[f32]> = distances.clone().take_while(|d| line + d < lines).map(below).collect();
            sum((zone_of(line, kh, s.oh), kw - 1), kw - 1..s.ow, c, padded.from(line), &ys, first);
        }
        // Single columns go down the lines.
        for (zone, z) in
            (0..zones[0]).flat_map(|zone| (0..zones[1]).map(move |z| (zone, z))).filter(|at| at.1 != kw - 1)
        {
            let column = range_of(z, kw, s.ow).start * c;
            let below = |distance: usize| &padded.reaching_before(distance, before)[column..];
            let here = range_of(zone, kh, s.oh);
            // The lowest lines have not all distances.
            let whole = here.start..here.end.min((lines + 1).saturating_sub(distances.end)).max(here.start);
            let ys: Vec<&[f32]> = distances.clone().map(below).collect();
            sum((zone, z), whole.clone(), padded.length(), &padded.from(0)[column..], &ys, first);
            for line in whole.end..here.end {
                let ys = &ys[..ys.len().min((lines - line).saturating_sub(first))];
                sum((zone, z), line..line + 1, padded.length(), &padded.from(0)[column..], ys, first);
            }
        }
    }
    let (of_patches, of_products) = moments.split_at_mut(s.patch());
    let elements = |k: usize| [k / (kw * c), k / c % kw, k % c];
    for (k, sum) in of_patches.iter_mut().enumerate() {
        let [ky, kx, channel] = elements(k);
        let zone = |zy: usize| (kx..kx + kw).map(move |zx| (zy * zones[1] + zx) * c + channel);
        *sum = (ky..ky + kh).flat_map(zone).map(|at| plain[at]).sum();
    }
    for k in 0..s.patch() {
        let [ky, kx, channel] = elements(k);
        for other in 0..s.patch() {
            let [qy, qx, of_other] = elements(other);
            let Some(distance) = qy.checked_sub(ky) else { continue };
            let inside = channel * width + (qx + kw - 1 - kx) * c + of_other;
            let line = |zy: usize| (zy * kh + distance) * plane + inside;
            let product = (ky..ky + kh).flat_map(|zy| (kx..kx + kw).map(move |zx| line(zy) + zx * cell));
            let product: f64 = product.map(|at| products[at]).sum();
            let [a, b] = [channel, of_other].map(|channel| f64::from(centre[channel]));
            let shifted = a * of_patches[other] + b * of_patches[k] - a * b * (s.oh * s.ow) as f64;
            let product = product + shifted;
            of_products[k * s.patch() + other] = product;
            of_products[other * s.patch() + k] = product;
        }
    }
}

/// By channel, of `c` up to 4.
fn sum_of_pixels(pixels: &[f32], c: usize) -> [f32; 4] {
    // As many pixels as make whole vectors of every number of channels.
    const PIXELS: usize = few::LANES;
    let mut lanes = [0f32; 4 * PIXELS];
    let together = pixels.chunks_exact(PIXELS * c);
    let rest = together.remainder();
    simd::vectorized(
        #[inline(always)]
        || together.for_each(|x| lanes.iter_mut().zip(x).for_each(|(sum, x)| *sum += x)),
    );
    let mut sums = [0f32; 4];
    // By halves: additions one after the other would wait for each other.
    let mut half = if pixels.len() < PIXELS * c { 0 } else { PIXELS * c / 2 };
    while half >= c {
        let (to, from) = lanes.split_at_mut(half);
        to.iter_mut().zip(from).for_each(|(to, v)| *to += *v);
        half /= 2;
    }
    for pixel in [&lanes[..c]].into_iter().chain(rest.chunks_exact(c)) {
        sums.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
    }
    sums
}

/// The zone of line `n` under `outputs` output lines of a kernel of `kernel`.
fn zone_of(n: usize, kernel: usize, outputs: usize) -> usize {
    if n < kernel - 1 {
        n
    } else if n < outputs {
        kernel - 1
    } else {
        n + kernel - outputs
    }
}

/// The lines of a zone.
fn range_of(zone: usize, kernel: usize, outputs: usize) -> Range<usize> {
    match zone {
        z if z < kernel - 1 => z..z + 1,
        z if z == kernel - 1 => z..outputs,
        z => z + outputs - kernel..z + outputs - kernel + 1,
    }
}

/// Distances between lines that are done at once.
const ROWS: usize = 3;

/// Writes the sums over places `at`, `step` elements apart, of the products of `c` elements of `x` and `width` of each of `ys`, to
/// `sums`: `[ys][c][width]`.
struct Outer<'a> {
    at: Range<usize>,
    step: usize,
    c: usize,
    x: &'a [f32],
    ys: &'a [&'a [f32]],
    width: usize,
    sums: &'a mut [f32],
}

impl WithSimd for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.c, self.ys.len()) {
            (_, 0) => (),
            (3, 3) => self.sums::<S, 3, 3>(simd),
            (c, _) => {
                for (ys, sums) in self.ys.chunks(1).zip(self.sums.chunks_exact_mut(c * self.width)) {
                    let one = Outer { at: self.at.clone(), ys, sums, ..self };
                    match c {
                        1 => one.sums::<S, 1, 1>(simd),
                        2 => one.sums::<S, 2, 1>(simd),
                        3 => one.sums::<S, 3, 1>(simd),
                        _ => one.sums::<S, 4, 1>(simd),
                    }
                }
            }
        }
    }
}

impl Outer<'_> {
    /// Of `C` elements and `D` of ys.
    #[inline(always)]
    fn sums<S: Simd, const C: usize, const D: usize>(self, simd: S) {
        for column in (0..self.width).step_by(S::F32_LANES) {
            let mut sums = [[simd.splat_f32s(0.0); C]; D];
            for at in self.at.clone() {
                let x = &self.x[at * self.step..][..C];
                let mut ys = [simd.splat_f32s(0.0); D];
                for (to, y) in ys.iter_mut().zip(self.ys) {
                    to.clone_from(&S::as_simd_f32s(&y[at * self.step + column..][..S::F32_LANES]).0[0]);
                }
                for k in 0..C {
                    let x = simd.splat_f32s(x[k]);
                    for d in 0..D {
                        sums[d][k] = simd.mul_add_f32s(x, ys[d], sums[d][k]);
                    }
                }
            }
            for (to, sum) in self.sums.chunks_exact_mut(self.width).zip(sums.as_flattened()) {
                S::as_mut_simd_f32s(&mut to[column..][..S::F32_LANES]).0[0] = *sum;
            }
        }
    }
}
