//! A network's first convolution with group norm, relu and max pool behind it, in one pass over lines that stay in a cache: the
//! convolution's output, many times its input, never is in memory, nor is its cotangent. 32-bit floats.
//!
//! A norm's input cotangent is `k0 g + k1 y + k2` by channel, for y the convolution's output and g the pool's cotangent. What y
//! adds to the weight's gradient, the sum over pixels of patches times y, is the weight times G, the sum of patches times
//! patches. G is small, and since neighbouring patches share most of their elements it costs a fraction of one product, so y is
//! not needed again.

use candle_core::{DType, Tensor};

use super::conv::Conv;
use super::few::{self, Padded, Steps};
use super::im2col::Shape;
use super::norm::{self, GroupNorm};
use super::norm_pool::{self, Kept, Piece};
use super::{Host, Window, host, overwritten, patches, pool, reduce, simd, tensor, threads};
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
                }
                piece.add_moments(y);
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

        let sums = norm_pool::parameter_sums(p, [scale, shift], statistics, inputs, gy);
        let samples: Vec<Sample> = (0..s.b)
            .map(|b| {
                let statistics = &statistics[b * groups * 2..][..groups * 2];
                let (scale_here, shift_here) = norm::scale_and_shift(scale, shift, statistics);
                let k = norm::coefficients(scale, statistics, &sums[b * 2 * s.o..][..2 * s.o], s.oh * s.ow);
                Sample { k, scale: scale_here, shift: shift_here }
            })
            .collect();

        // The part of the pool's cotangent.
        let (lines, rows, line, size) = (few::piece(p.oh), p.window.kernel[0], s.ow * s.o, s.patch() * s.o);
        let mut parts = vec![0f32; p.lines() / lines * size];
        let scratch =
            || (Padded::new(s, lines * rows), overwritten::<f32>(rows * line), overwritten::<f32>(p.ow * p.c));
        threads::chunks(&mut parts, size, scratch, |(padded, routed, g), i, part| {
            let (b, oy) = (i * lines / p.oh, i * lines % p.oh);
            padded.fill(s, &x[b * s.h * s.w * s.c..][..s.h * s.w * s.c], oy * rows);
            for k in 0..lines {
                let at = (i * lines + k) * p.ow * p.c..(i * lines + k + 1) * p.ow * p.c;
                let (inputs, gy, winners) = (&inputs[at.clone()], &gy[at.clone()], &winners[at]);
                simd::vectorized(
                    #[inline(always)]
                    || {
                        samples[b].through(inputs, gy, g);
                        route(p, g, winners, routed);
                    },
                );
                for (row, gy) in routed.chunks_exact(line).enumerate() {
                    few::add_line_gradient(s, padded, k * rows + row, gy, part);
                }
            }
        });
        // The parts of the convolution's output, and of a constant.
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
        let mut total: Vec<f64> = few::sum_of(&parts, size).into_iter().map(f64::from).collect();
        let pixels = (s.oh * s.ow) as f64;
        let mut of_bias: Vec<f64> = vec![0.0; s.o];
        for (b, (sample, moments)) in samples.iter().zip(moments.chunks_exact(PatchMoments::len(s))).enumerate() {
            let [k0, k1, k2] = &sample.k;
            let (sums_of_patches, products) = moments.split_at(s.patch());
            for (row, total) in total.chunks_exact_mut(s.o).enumerate() {
                // By channel, the sum over pixels of this element of the patch times the convolution's output.
                let mut with_output: Vec<f64> =
                    (0..s.o).map(|o| bias.map_or(0.0, |bias| f64::from(bias[o]) * sums_of_patches[row])).collect();
                for (weights, &product) in packed.chunks_exact(s.o).zip(&products[row * s.patch()..]) {
                    with_output.iter_mut().zip(weights).for_each(|(sum, &w)| *sum += f64::from(w) * product);
                }
                for (o, total) in total.iter_mut().enumerate() {
                    *total += f64::from(k1[o]) * with_output[o] + f64::from(k2[o]) * sums_of_patches[row];
                }
            }
            for (o, of_bias) in of_bias.iter_mut().enumerate() {
                let through = packed.iter().skip(o).step_by(s.o).zip(sums_of_patches);
                let output: f64 = through.map(|(&w, &sum)| f64::from(w) * sum).sum();
                let output = output + bias.map_or(0.0, |bias| f64::from(bias[o]) * pixels);
                let g = f64::from(sums[b * 2 * s.o + o]);
                *of_bias += f64::from(k0[o]) * g + f64::from(k1[o]) * output + f64::from(k2[o]) * pixels;
            }
        }
        let total: Vec<f32> = total.into_iter().map(|v| v as f32).collect();
        let gradient = patches::unpack(s, &total);
        host::update::<f32>(&sum, |sum| super::im2col::add(sum, &gradient))?;
        let of_norm = reduce::column_sums(&sums, 2 * s.o);
        let of_bias = self.bias.map(|_| tensor(of_bias.into_iter().map(|v| v as f32).collect::<Vec<_>>(), s.o));
        Ok(Gradients {
            weight: sum,
            bias: of_bias.transpose()?,
            affine: [tensor(of_norm[s.o..].to_vec(), s.o)?, tensor(of_norm[..s.o].to_vec(), s.o)?],
        })
    }
}

/// What one sample's cotangents are made of, by channel.
struct Sample {
    /// The norm's input cotangent is `k0 g + k1 y + k2`.
    k: [Vec<f32>; 3],
    /// The norm is `scale y + shift`.
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Sample {
    /// `k0 g` behind the relu, where the pool's maxima come from `inputs`.
    #[inline(always)]
    fn through(&self, inputs: &[f32], gy: &[f32], g: &mut [f32]) {
        let c = self.scale.len();
        let (k0, scale, shift) = (&self.k[0][..c], &self.scale[..c], &self.shift[..c]);
        for ((g, gy), x) in g.chunks_exact_mut(c).zip(gy.chunks_exact(c)).zip(inputs.chunks_exact(c)) {
            for n in 0..c {
                g[n] = if x[n] * scale[n] + shift[n] > 0.0 { k0[n] * gy[n] } else { 0.0 };
            }
        }
    }
}

/// A pooled line's cotangent at its windows' winners, zeros elsewhere: the lines under it.
#[inline(always)]
fn route(p: &Shape, g: &[f32], winners: &[u8], routed: &mut [f32]) {
    let ([kh, kw], c) = (p.window.kernel, p.c);
    for (ox, (g, winners)) in g.chunks_exact(c).zip(winners.chunks_exact(c)).enumerate() {
        for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
            let (routed, tap) = (&mut routed[(ky * p.w + ox * kw + kx) * c..][..c], (ky * kw + kx) as u8);
            routed.iter_mut().zip(g).zip(winners).for_each(|((to, &g), &k)| *to = if k == tap { g } else { 0.0 });
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
    let (lines, columns) = (s.oh + kh - 1, s.ow + kw - 1);
    let width = ((2 * kw - 1) * c).next_multiple_of(few::LANES);
    let (zones, before) = ([2 * kh - 1, 2 * kw - 1], (kw - 1) * c);
    let (cell, plane) = (c * width, zones[1] * c * width);
    // [zone of lines][distance of lines][zone of columns][channel][distance of columns, channel], and without distances.
    let mut products = vec![0f64; zones[0] * kh * plane];
    let mut plain = vec![0f64; zones[0] * zones[1] * c];
    let mut sums = vec![0f32; cell];
    for line in 0..lines {
        let zone = zone_of(line, kh, s.oh);
        for column in 0..columns {
            let to = &mut plain[(zone * zones[1] + zone_of(column, kw, s.ow)) * c..][..c];
            to.iter_mut().zip(&padded.from(line)[column * c..]).for_each(|(to, &x)| *to += f64::from(x));
        }
        for distance in 0..kh.min(lines - line) {
            let x = Steps { data: padded.from(line), step: c };
            let y = Steps { data: padded.from_before(line + distance, before), step: c };
            for z in 0..zones[1] {
                let at = match z {
                    z if z < kw - 1 => z..z + 1,
                    z if z == kw - 1 => z..s.ow,
                    z => z + s.ow - kw..z + s.ow - kw + 1,
                };
                sums.fill(0.0);
                few::add_outer(at, c, x, y, width, &mut sums);
                let to = &mut products[(zone * kh + distance) * plane + z * cell..][..cell];
                to.iter_mut().zip(&sums).for_each(|(to, &sum)| *to += f64::from(sum));
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
