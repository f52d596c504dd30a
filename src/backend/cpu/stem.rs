//! A network's first convolution with group norm, relu and max pool behind it, in one pass over lines that stay in a cache: the
//! convolution's output, many times its input, never is in memory, nor is its cotangent. 32-bit floats.
//!
//! The norm's statistics come of the input alone (`patch_moments`), so they are there before the first line is.
//!
//! A norm's input cotangent is `k0 g + k1 y + k2` by channel, for y the convolution's output and g the pool's cotangent through the
//! relu. Of these only g goes through the lines, for the sum P of patches times g. What y adds to the weight's gradient also comes
//! of the input alone; and what k1 and k2 need to know of g, the sum over pixels of y times g, is the weight times P.

use candle_core::{DType, Device, Tensor};

use super::conv::Conv;
use super::few::{self, Padded};
use super::im2col::{Shape, add};
use super::norm::{self, GroupNorm};
use super::patch_moments::{self, Parameters, PatchMoments};
use super::pooled_gradient::{NONE, PooledGradient};
use super::{Host, Window, host, overwritten, overwritten_bytes, patches, pool, simd, tensor, threads};
use crate::Result;

const LANES: usize = few::LANES;

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

/// What [`Stem::vjp`] needs of [`Stem::forward`].
pub struct Kept {
    /// Sums over each sample's patches, f64.
    pub moments: Tensor,
    /// Mean and inverse deviation of each group, `[B, groups, 2]`.
    pub statistics: Tensor,
    /// Which of its window's elements each maximum is, row-major, u8; 255 where the relu leaves nothing of it.
    pub winners: Tensor,
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
    /// Output lines of one piece of work.
    fn lines(&self) -> usize {
        few::piece(self.pool.oh)
    }

    /// Elements of the convolution's output under one output line.
    fn under_line(&self) -> usize {
        self.pool.window.kernel[0] * self.conv.ow * self.conv.o
    }

    /// Room for the input of a piece of work.
    fn padded(&self) -> Padded {
        Padded::new(&self.conv, self.lines() * self.pool.window.kernel[0])
    }

    /// Sample `b` of the input.
    fn sample<'a>(&self, x: &'a [f32], b: usize) -> &'a [f32] {
        let size = self.conv.h * self.conv.w * self.conv.c;
        &x[b * size..(b + 1) * size]
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
                let pool = &shapes.pool;
                let elements: usize = pool.window.kernel.iter().product();
                let plain = few::suits(s) && s.window.stride == [1, 1] && s.oh >= kh && s.ow >= kw;
                plain && pool::tiles(pool) && elements <= usize::from(NONE)
            })
    }

    fn shapes(&self, x: &[usize]) -> Result<Shapes> {
        let conv = self.conv.shape(x, self.weight.dims())?;
        norm::check(conv.o, self.norm.groups, self.affine[0])?;
        Ok(Shapes { conv, pool: pool::shape(self.window, &[conv.b, conv.oh, conv.ow, conv.o])? })
    }

    /// The output for `x` `[B, H, W, C]`, and what [`Stem::vjp`] needs of this call.
    ///
    /// # Errors
    /// [`Error::Run`](crate::Error::Run) on shapes that do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Kept)> {
        let shapes = self.shapes(x.dims())?;
        let (s, p, groups) = (&shapes.conv, &shapes.pool, self.norm.groups);
        let (x, weight) = (x.contiguous()?, self.weight.contiguous()?);
        let (x, weight) = (Host::of(&x)?, Host::of(&weight)?);
        let (x, packed) = (x.slice::<f32>()?, patches::pack(s, weight.slice::<f32>()?));
        let bias = self.bias.map(Host::of).transpose()?;
        let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
        let affine = [Host::of(self.affine[0])?, Host::of(self.affine[1])?];
        let [scale, shift] = [affine[0].slice::<f32>()?, affine[1].slice::<f32>()?];

        let size = PatchMoments::len(s);
        let mut moments = vec![0f64; s.b * size];
        threads::chunks(
            &mut moments,
            size,
            || Padded::new(s, s.oh),
            |padded, b, moments| {
                padded.fill(s, shapes.sample(x, b), 0);
                patch_moments::write(s, padded, moments);
            },
        );
        let mut statistics = vec![0f32; s.b * groups * 2];
        for (statistics, moments) in statistics.chunks_exact_mut(groups * 2).zip(moments.chunks_exact(size)) {
            self.statistics(&PatchMoments::of(s, moments), (&packed, bias), statistics);
        }
        let affine = statistics.chunks_exact(groups * 2).map(|s| norm::scale_and_shift(scale, shift, s));
        let (affine, taps): (Vec<_>, _) = (affine.collect(), pool::taps(p));

        let elements = p.b * p.oh * p.ow * p.c;
        let (mut output, mut winners) = (overwritten::<f32>(elements), overwritten_bytes(elements));
        let (lines, line) = (shapes.lines(), p.ow * p.c);
        threads::chunks2(
            (&mut output, lines * line),
            (&mut winners, lines * line),
            || (shapes.padded(), overwritten(shapes.under_line())),
            |(padded, y): &mut (_, Vec<f32>), i, output, winners| {
                let (b, first) = (i * lines / p.oh, i * lines % p.oh);
                let rows = p.window.kernel[0];
                padded.fill(s, shapes.sample(x, b), first * rows);
                for (k, (output, winners)) in
                    output.chunks_exact_mut(line).zip(winners.chunks_exact_mut(line)).enumerate()
                {
                    for (row, y) in y.chunks_exact_mut(s.ow * s.o).enumerate() {
                        few::line(s, padded, k * rows + row, &packed, bias, y);
                    }
                    simd::vectorized(
                        #[inline(always)]
                        || max_line(p, y, &affine[b], &taps, output, winners),
                    );
                }
            },
        );
        let dims = (p.b, p.oh, p.ow, p.c);
        let kept = Kept {
            moments: tensor(moments, (s.b, size))?,
            statistics: tensor(statistics, (s.b, groups, 2))?,
            winners: Tensor::from_vec(winners, dims, &Device::Cpu)?,
        };
        Ok((tensor(output, dims)?, kept))
    }

    /// Mean and inverse deviation of each group of a sample's output.
    fn statistics(&self, moments: &PatchMoments, parameters: Parameters, statistics: &mut [f32]) {
        let (sums, squares) = (moments.output_sums(parameters), moments.output_squares(parameters.0));
        let (pixels, of_group) = (moments.pixels(), sums.len() / self.norm.groups);
        let channels = sums.chunks_exact(of_group).zip(squares.chunks_exact(of_group));
        for (statistics, (sums, squares)) in statistics.chunks_exact_mut(2).zip(channels) {
            let n = pixels * of_group as f64;
            let mean = sums.iter().sum::<f64>() / n;
            let between = sums.iter().map(|sum| pixels * (sum / pixels - mean).powi(2));
            let square: f64 = between.zip(squares).map(|(between, within)| between + within).sum();
            // Rounding must not make it negative; what is no number stays so.
            let variance = if square < 0.0 { 0.0 } else { square / n };
            statistics[0] = mean as f32;
            statistics[1] = (1.0 / (variance + self.norm.epsilon).sqrt()) as f32;
        }
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
        let (x, gy, weight, scale) = (Host::of(&x)?, Host::of(&gy)?, Host::of(&weight)?, Host::of(self.affine[0])?);
        let (x, gy, packed) = (x.slice::<f32>()?, gy.slice::<f32>()?, patches::pack(s, weight.slice::<f32>()?));
        let (bias, scale) = (self.bias.map(Host::of).transpose()?, scale.slice::<f32>()?);
        let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
        let parameters = (&*packed, bias);
        let (moments, statistics, winners) =
            (Host::of(&kept.moments)?, Host::of(&kept.statistics)?, Host::of(&kept.winners)?);
        let (moments, statistics) = (moments.slice::<f64>()?, statistics.slice::<f32>()?);
        let winners = winners.slice::<u8>()?;

        // Of each piece of work, patches times g, and then g, summed.
        let (lines, line, rows) = (shapes.lines(), p.ow * p.c, p.window.kernel[0]);
        let (product, size) = (s.patch() * s.o, (s.patch() + 1) * s.o);
        let mut parts = vec![0f32; p.b * p.oh / lines * size];
        threads::chunks(
            &mut parts,
            size,
            || (shapes.padded(), PooledGradient::new(s, p)),
            |(padded, gradient), i, part| {
                let (b, first) = (i * lines / p.oh, i * lines % p.oh);
                padded.fill(s, shapes.sample(x, b), first * rows);
                let (part, sums) = part.split_at_mut(product);
                for k in 0..lines {
                    let at = (i * lines + k) * line..;
                    gradient.add_line((s, p), (padded, k), (&gy[at.clone()], &winners[at]), (part, sums));
                }
            },
        );

        let (mut total, mut of_bias, mut of_norm) = (vec![0f64; product], vec![0f64; s.o], vec![0f32; 2 * s.o]);
        for (b, parts) in parts.chunks_exact(p.oh / lines * size).enumerate() {
            let moments = PatchMoments::of(s, &moments[b * PatchMoments::len(s)..][..PatchMoments::len(s)]);
            let statistics = &statistics[b * groups * 2..][..groups * 2];
            let mut routed = vec![0f64; size];
            for part in parts.chunks_exact(size) {
                routed.iter_mut().zip(part).for_each(|(sum, &v)| *sum += f64::from(v));
            }
            let (routed, plain) = routed.split_at(product);
            let sums = norm_sums((routed, plain), parameters, statistics);
            let [k0, k1, k2] = norm::coefficients(scale, statistics, &sums, s.oh * s.ow);
            for (total, routed) in total.chunks_exact_mut(s.o).zip(routed.chunks_exact(s.o)) {
                total.iter_mut().zip(routed).zip(&k0).for_each(|((total, v), &k0)| *total += f64::from(k0) * v);
            }
            moments.add_weight_gradient(parameters, [&k1, &k2], &mut total);
            if bias.is_some() {
                let pixels = moments.pixels();
                for (o, (total, output)) in of_bias.iter_mut().zip(moments.output_sums(parameters)).enumerate() {
                    *total += f64::from(k0[o]) * plain[o] + f64::from(k1[o]) * output + f64::from(k2[o]) * pixels;
                }
            }
            add(&mut of_norm, &sums);
        }
        let total: Vec<f32> = total.into_iter().map(|v| v as f32).collect();
        let gradient = patches::unpack(s, &total);
        host::update::<f32>(&sum, |sum| add(sum, &gradient))?;
        let of_bias = self.bias.map(|_| tensor(of_bias.into_iter().map(|v| v as f32).collect::<Vec<_>>(), s.o));
        Ok(Gradients {
            weight: sum,
            bias: of_bias.transpose()?,
            affine: [tensor(of_norm[s.o..].to_vec(), s.o)?, tensor(of_norm[..s.o].to_vec(), s.o)?],
        })
    }
}

/// One sample's sums by channel, as [`norm::parameter_sums`] has them, of g and of g times the normalised output, from the sums
/// over pixels of patches times g (packed) and of g.
fn norm_sums((routed, plain): (&[f64], &[f64]), (packed, bias): Parameters, statistics: &[f32]) -> Vec<f32> {
    let (o, of_group) = (plain.len(), plain.len() / (statistics.len() / 2));
    let mut with_output: Vec<f64> = match bias {
        Some(bias) => bias.iter().zip(plain).map(|(&bias, sum)| f64::from(bias) * sum).collect(),
        None => vec![0.0; o],
    };
    for (weights, routed) in packed.chunks_exact(o).zip(routed.chunks_exact(o)) {
        with_output.iter_mut().zip(weights).zip(routed).for_each(|((sum, &w), v)| *sum += f64::from(w) * v);
    }
    let normalised = with_output.iter().zip(plain).enumerate().map(|(k, (sum, plain))| {
        let [mean, inverse] = [0, 1].map(|n| f64::from(statistics[k / of_group * 2 + n]));
        inverse * (sum - mean * plain)
    });
    plain.iter().copied().chain(normalised).map(|v| v as f32).collect()
}

/// An output line and its winners, from the convolution's lines under it.
#[inline(always)]
fn max_line(
    p: &Shape,
    y: &[f32],
    (scale, shift): &(Vec<f32>, Vec<f32>),
    taps: &[usize],
    output: &mut [f32],
    winners: &mut [u8],
) {
    let ([_, kw], c) = (p.window.kernel, p.c);
    for ox in 0..p.ow {
        for first in (0..c).step_by(LANES) {
            // Copies of a known length, which stay in registers.
            let (mut a, mut b) = ([0f32; LANES], [0f32; LANES]);
            a.copy_from_slice(&scale[first..][..LANES]);
            b.copy_from_slice(&shift[first..][..LANES]);
            let y = &y[ox * kw * c + first..];
            let (mut best, mut winner) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
            for (tap, &at) in (0u32..).zip(taps) {
                let y = &y[at..][..LANES];
                for n in 0..LANES {
                    let v = y[n] * a[n] + b[n];
                    // What is no number wins, so that it is noticed: all are none then, as the norm's statistics are.
                    #[allow(clippy::neg_cmp_op_on_partial_ord)]
                    let wins = !(v <= best[n]);
                    best[n] = if wins { v } else { best[n] };
                    winner[n] = if wins { tap } else { winner[n] };
                }
            }
            let at = ox * c + first..ox * c + first + LANES;
            output[at.clone()].iter_mut().zip(best).for_each(|(to, v)| *to = if v < 0.0 { 0.0 } else { v });
            for n in 0..LANES {
                winner[n] = if best[n] > 0.0 { winner[n] } else { u32::from(NONE) };
            }
            winners[at].iter_mut().zip(winner).for_each(|(to, tap)| *to = tap as u8);
        }
    }
}
