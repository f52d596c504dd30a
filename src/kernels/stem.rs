//! A network's first convolution with group norm, relu and max pool behind it, in one pass over lines that stay in a cache: the
//! convolution's output, many times its input, never is in memory, nor is its cotangent. 32-bit floats.
//!
//! A norm's input cotangent is `k0 g + k1 y + k2` by channel, for y the convolution's output and g the pool's cotangent. What y
//! adds to the weight's gradient, the sum over pixels of patches times y, is the weight times G, the sum of patches times
//! patches. G is small, and since neighbouring patches share most of their elements it costs a fraction of one product, so y is
//! not needed again.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::conv::Conv;
use super::few::{self, Padded, Steps};
use super::im2col::Shape;
use super::norm::{self, GroupNorm};
use super::norm_pool::{self, Kept, Piece};
use super::{Host, Window, host, overwritten, patches, pool, simd, tensor, threads};
use crate::Result;

/// The four layers, with their parameters.
pub struct Stem<'a> {
    /// The convolution's geometry.
    pub conv: &'a Conv,
    /// Its weight `[O, C, kH, kW]`.
    pub weight: &'a Tensor,
    /// Its bias `[O]`.
    pub bias: Option<&'a Tensor>,
    /// The norm, which has a relu.
    pub norm: &'a GroupNorm,
    /// The norm's weight and bias, `[O]`.
    pub affine: [&'a Tensor; 2],
    /// The pool.
    pub window: &'a Window,
}

/// The parameters' gradients.
pub struct Gradients {
    /// The convolution's weight's, added to what was given.
    pub weight: Tensor,
    /// The convolution's bias'.
    pub bias: Option<Tensor>,
    /// The norm's weight's and bias'.
    pub affine: [Tensor; 2],
}

/// Shapes of convolution and pool.
struct Shapes {
    conv: Shape,
    pool: Shape,
}

impl Shapes {
    /// One line of the pool's, over lines of the convolution's that a strip holds.
    fn strip(&self) -> Shape {
        let window = self.pool.window;
        Shape { b: 1, h: window.kernel[0], oh: 1, ..self.pool }
    }
}

impl Stem<'_> {
    /// Whether this is the way to compute these layers for an input `x`: a convolution of stride 1 of few channels, and a pool whose
    /// windows lie side by side.
    pub fn suits(&self, x: &Tensor) -> bool {
        let f32s = [x, self.weight].iter().all(|t| t.dtype() == DType::F32 && t.device().is_cpu());
        f32s && self.norm.relu
            && self.shapes(x.dims()).is_ok_and(|shapes| {
                let s = &shapes.conv;
                let [kh, kw] = s.window.kernel;
                few::suits(s) && s.window.stride == [1, 1] && s.oh >= kh && s.ow >= kw && pool::tiles(&shapes.pool)
            })
    }

    fn shapes(&self, x: &[usize]) -> Result<Shapes> {
        let conv = self.conv.shape(x, self.weight.dims())?;
        norm::check(conv.o, self.norm.groups, self.affine[0])?;
        Ok(Shapes { conv, pool: pool::shape(self.window, &[conv.b, conv.oh, conv.ow, conv.o])? })
    }

    /// The output for `x` `[B, H, W, C]`, and what [`Stem::vjp`] needs of this call. The kept inputs are the norm's.
    ///
    /// # Errors
    /// [`Error::Run`](crate::Error::Run) on shapes that do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Kept)> {
        let shapes = self.shapes(x.dims())?;
        let (s, p, strip) = (&shapes.conv, &shapes.pool, shapes.strip());
        let (x, weight) = (x.contiguous()?, self.weight.contiguous()?);
        let (x, weight) = (Host::of(&x)?, Host::of(&weight)?);
        let (x, packed) = (x.slice::<f32>()?, patches::pack(s, weight.slice::<f32>()?));
        let bias = self.bias.map(Host::of).transpose()?;
        let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
        let affine = [Host::of(self.affine[0])?, Host::of(self.affine[1])?];
        let affine = [affine[0].slice::<f32>()?, affine[1].slice::<f32>()?];
        let (order, rows, line) = (norm_pool::order(affine[0]), p.window.kernel[0], s.ow * s.o);
        let scratch = || (Padded::new(s, few::piece(p.oh) * rows), overwritten::<f32>(rows * line));
        norm_pool::pieces(p, self.norm, affine, scratch, |(padded, y), piece: &mut Piece<f32>| {
            padded.fill(s, &x[piece.sample * s.h * s.w * s.c..][..s.h * s.w * s.c], piece.first * rows);
            for k in 0..piece.lines {
                for (row, y) in y.chunks_exact_mut(line).enumerate() {
                    few::line(s, padded, k * rows + row, &packed, bias, y);
                    piece.add_moments(y);
                }
                let (inputs, winners) = piece.line(p, k);
                simd::vectorized(
                    #[inline(always)]
                    || norm_pool::max_line(&strip, 0, y, &order, inputs, winners),
                );
            }
        })
    }

    /// The parameters' gradients from the output's cotangent `gy`, for the input `x` and what its forward call kept. `sum` is the
    /// convolution's weight's so far, which nobody else holds (it is changed in place).
    ///
    /// # Errors
    /// As [`Stem::forward`].
    pub fn vjp(&self, x: &Tensor, kept: &Kept, gy: &Tensor, sum: Option<Tensor>) -> Result<Gradients> {
        let shapes = self.shapes(x.dims())?;
        let (s, p, groups) = (&shapes.conv, &shapes.pool, self.norm.groups);
        let (x, gy, weight) = (x.contiguous()?, gy.contiguous()?, self.weight.contiguous()?);
        let sum = match sum {
            Some(sum) => sum,
            None => tensor(vec![0f32; weight.elem_count()], weight.dims())?,
        };
        let (x, gy, weight) = (Host::of(&x)?, Host::of(&gy)?, Host::of(&weight)?);
        let (x, gy, packed) = (x.slice::<f32>()?, gy.slice::<f32>()?, patches::pack(s, weight.slice::<f32>()?));
        let bias = self.bias.map(Host::of).transpose()?;
        let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
        let affine = [Host::of(self.affine[0])?, Host::of(self.affine[1])?];
        let [scale, shift] = [affine[0].slice::<f32>()?, affine[1].slice::<f32>()?];
        let (statistics, inputs, winners) =
            (Host::of(&kept.statistics)?, Host::of(&kept.inputs)?, Host::of(&kept.winners)?);
        let (statistics, inputs) = (statistics.slice::<f32>()?, inputs.slice::<f32>()?);
        let winners = winners.slice::<u8>()?;

        let mut moments = vec![0f64; s.b * PatchMoments::len(s)];
        threads::chunks(
            &mut moments,
            PatchMoments::len(s),
            || Padded::new(s, s.oh),
            |padded, b, moments| {
                padded.fill(s, &x[b * s.h * s.w * s.c..][..s.h * s.w * s.c], 0);
                patch_moments(s, padded, moments);
            },
        );
        let (lines, rows, width, size) = (few::piece(p.oh), p.window.kernel[0], s.ow * s.o, s.patch() * s.o);
        let [kh, kw] = p.window.kernel;
        let taps: Vec<usize> = (0..kh * kw).map(|tap| (tap / kw * p.w + tap % kw) * p.c).collect();
        let mut parts = vec![0f32; p.oh / lines * size];
        let (mut total, mut of_bias, mut of_norm) = (vec![0f64; size], vec![0f64; s.o], vec![0f32; 2 * s.o]);
        // Sample by sample: what the sums leave in the caches, the products find there.
        for (b, moments) in moments.chunks_exact(PatchMoments::len(s)).enumerate() {
            let of_sample = b * p.oh * p.ow * p.c..(b + 1) * p.oh * p.ow * p.c;
            let (inputs, gy, winners) = (&inputs[of_sample.clone()], &gy[of_sample.clone()], &winners[of_sample]);
            let statistics = &statistics[b * groups * 2..][..groups * 2];
            let affine = norm::scale_and_shift(scale, shift, statistics);
            let mut sums = vec![0f32; 2 * s.o];
            norm::parameter_sums(inputs, gy, statistics, &affine, &mut sums, norm_pool::through);
            let k = norm::coefficients(scale, statistics, &sums, s.oh * s.ow);

            // The part of the pool's cotangent.
            parts.fill(0.0);
            let scratch = || (Padded::new(s, lines * rows), overwritten::<f32>(rows * width));
            threads::chunks(&mut parts, size, scratch, |(padded, routed), i, part| {
                padded.fill(s, &x[b * s.h * s.w * s.c..][..s.h * s.w * s.c], i * lines * rows);
                for line in 0..lines {
                    let at = (i * lines + line) * p.ow * p.c..(i * lines + line + 1) * p.ow * p.c;
                    let (inputs, gy, winners) = (&inputs[at.clone()], &gy[at.clone()], &winners[at]);
                    let of = Cotangent { inputs, gy, winners, k0: &k[0], affine: &affine, taps: &taps };
                    simd::vectorized(
                        #[inline(always)]
                        || of.route(p, routed),
                    );
                    for (row, gy) in routed.chunks_exact(width).enumerate() {
                        few::add_line_gradient(s, padded, line * rows + row, gy, part);
                    }
                }
            });
            total.iter_mut().zip(few::sum_of(&parts, size)).for_each(|(total, part)| *total += f64::from(part));
            // Those of the convolution's output, and of a constant.
            let of_output = Output { s, k: [&k[1], &k[2]], packed: &packed, bias, moments };
            of_output.add_weight_gradient(&mut total);
            if bias.is_some() {
                of_output.add_bias_gradient(&k[0], &sums, &mut of_bias);
            }
            super::im2col::add(&mut of_norm, &sums);
        }
        let total: Vec<f32> = total.into_iter().map(|v| v as f32).collect();
        let gradient = patches::unpack(s, &total);
        host::update::<f32>(&sum, |sum| super::im2col::add(sum, &gradient))?;
        let of_bias = self.bias.map(|_| tensor(of_bias.into_iter().map(|v| v as f32).collect::<Vec<_>>(), s.o));
        Ok(Gradients {
            weight: sum,
            bias: of_bias.transpose()?,
            affine: [tensor(of_norm[s.o..].to_vec(), s.o)?, tensor(of_norm[..s.o].to_vec(), s.o)?],
        })
    }
}

/// What the convolution's output, and a constant, add to one sample's gradients: `k1 y + k2` in place of the cotangent.
struct Output<'a> {
    s: &'a Shape,
    k: [&'a [f32]; 2],
    packed: &'a [f32],
    bias: Option<&'a [f32]>,
    moments: &'a [f64],
}

impl Output<'_> {
    /// Adds the weight's, packed, to `total`.
    fn add_weight_gradient(&self, total: &mut [f64]) {
        let (s, [k1, k2]) = (self.s, self.k);
        let (sums, products) = self.moments.split_at(s.patch());
        for ((total, &sum), products) in total.chunks_exact_mut(s.o).zip(sums).zip(products.chunks_exact(s.patch())) {
            // By channel, the sum over pixels of this element of the patch times the convolution's output.
            let mut with_output: Vec<f64> = match self.bias {
                Some(bias) => bias.iter().map(|&bias| f64::from(bias) * sum).collect(),
                None => vec![0.0; s.o],
            };
            for (weights, &product) in self.packed.chunks_exact(s.o).zip(products) {
                with_output.iter_mut().zip(weights).for_each(|(sum, &w)| *sum += f64::from(w) * product);
            }
            for (((total, with_output), &k1), &k2) in total.iter_mut().zip(with_output).zip(k1).zip(k2) {
                *total += f64::from(k1) * with_output + f64::from(k2) * sum;
            }
        }
    }

    /// Adds the bias', with that of the pool's cotangent, whose sums by channel are `sums` and which comes times `k0`.
    fn add_bias_gradient(&self, k0: &[f32], sums: &[f32], total: &mut [f64]) {
        let (s, [k1, k2], pixels) = (self.s, self.k, (self.s.oh * self.s.ow) as f64);
        for (o, total) in total.iter_mut().enumerate() {
            let through = self.packed.iter().skip(o).step_by(s.o).zip(self.moments);
            let output: f64 = through.map(|(&w, &sum)| f64::from(w) * sum).sum();
            let output = output + self.bias.map_or(0.0, |bias| f64::from(bias[o]) * pixels);
            *total += f64::from(k0[o] * sums[o]) + f64::from(k1[o]) * output + f64::from(k2[o]) * pixels;
        }
    }
}

/// A line of the pool's output cotangent, with what its forward pass kept.
struct Cotangent<'a> {
    inputs: &'a [f32],
    gy: &'a [f32],
    winners: &'a [u8],
    k0: &'a [f32],
    /// The norm is `scale y + shift`.
    affine: &'a (Vec<f32>, Vec<f32>),
    /// Where a window's elements lie behind its first.
    taps: &'a [usize],
}

impl Cotangent<'_> {
    /// `k0 g` at its windows' winners, zeros elsewhere: the lines under it.
    #[inline(always)]
    fn route(&self, p: &Shape, routed: &mut [f32]) {
        const LANES: usize = few::LANES;
        let ([_, kw], c) = (p.window.kernel, p.c);
        for ox in 0..p.ow {
            for first in (0..c).step_by(LANES) {
                let at = ox * c + first..ox * c + first + LANES;
                let (x, gy, winners) = (&self.inputs[at.clone()], &self.gy[at.clone()], &self.winners[at]);
                let of_channel = first..first + LANES;
                let (scale, shift) = (&self.affine.0[of_channel.clone()], &self.affine.1[of_channel.clone()]);
                let k0 = &self.k0[of_channel];
                // Copies of a known length, which stay in registers.
                let (mut g, mut winner) = ([0f32; LANES], [0u32; LANES]);
                for n in 0..LANES {
                    let through = k0[n] * gy[n];
                    g[n] = if x[n] * scale[n] + shift[n] > 0.0 { through } else { 0.0 };
                    winner[n] = u32::from(winners[n]);
                }
                let routed = &mut routed[ox * kw * c + first..];
                for (tap, &at) in (0u32..).zip(self.taps) {
                    let mut here = [0f32; LANES];
                    for n in 0..LANES {
                        here[n] = if winner[n] == tap { g[n] } else { 0.0 };
                    }
                    routed[at..][..LANES].copy_from_slice(&here);
                }
            }
        }
    }
}

/// Sums over a sample's patches: of the patches, `[K]`, then of their products with themselves, `[K][K]`.
struct PatchMoments;

impl PatchMoments {
    fn len(s: &Shape) -> usize {
        s.patch() * (s.patch() + 1)
    }
}

/// Writes the sums over the patches of the sample that `padded` holds, of stride 1, to `moments`.
///
/// An element of one patch is another element of the next one, so products depend, but for what lies at the borders, on the
/// distance alone. Lines and columns are summed in zones: single ones at both ends, and those between, which belong to every element
/// of the kernel. Element ky of a column of the kernel meets zones `ky..ky + kh`.
fn patch_moments(s: &Shape, padded: &Padded, moments: &mut [f64]) {
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
        let mut column = padded.from(line).chunks_exact(c);
        for z in 0..zones[1] {
            let mut sums = [0f32; 4];
            for pixel in column.by_ref().take(range_of(z, kw, s.ow).len()) {
                sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum += x);
            }
            let to = plain[(zone * zones[1] + z) * c..][..c].iter_mut();
            to.zip(sums).for_each(|(to, sum)| *to += f64::from(sum));
        }
    }
    let mut sums = vec![0f32; cell];
    let mut sum = |to: &mut [f64], at: Range<usize>, x: Steps, y: Steps| {
        sums.fill(0.0);
        few::add_outer(at, c, x, y, width, &mut sums);
        to.iter_mut().zip(&sums).for_each(|(to, &sum)| *to += f64::from(sum));
    };
    let between = kw - 1..s.ow;
    for distance in 0..kh {
        for line in 0..lines - distance {
            let (x, y) = (padded.from(line), padded.reaching_before(line + distance, before));
            let to = (zone_of(line, kh, s.oh) * kh + distance) * plane + (kw - 1) * cell;
            let of_pixels = |data| Steps { data, step: c };
            sum(&mut products[to..][..cell], between.clone(), of_pixels(x), of_pixels(y));
        }
        // Single columns go down the lines.
        for z in (0..zones[1]).filter(|&z| z != kw - 1) {
            let column = range_of(z, kw, s.ow).start * c;
            for zone in 0..zones[0] {
                let lines = range_of(zone, kh, s.oh);
                let lines = lines.start..lines.end.min(lines.start.max(s.oh + kh - 1 - distance));
                let of_lines = |data| Steps { data, step: padded.length() };
                let (x, y) = (&padded.from(0)[column..], &padded.reaching_before(distance, before)[column..]);
                let to = (zone * kh + distance) * plane + z * cell;
                sum(&mut products[to..][..cell], lines, of_lines(x), of_lines(y));
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
            of_products[k * s.patch() + other] = product;
            of_products[other * s.patch() + k] = product;
        }
    }
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
