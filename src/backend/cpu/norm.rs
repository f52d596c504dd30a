//! Group normalisation of NHWC tensors and its gradients, with a relu behind it in the same passes where asked for.
//!
//! Each sample's channels fall into `groups` groups; a group is normalised to mean 0 and variance 1 over its channels
//! and all positions, then scaled and shifted by channel (Wu and He, *Group Normalization*, ECCV 2018). Per channel that
//! is `scale x + shift`; the input's cotangent is per channel `a gy + b x + d`.

use candle_core::Tensor;

use super::{Host, Real, by_dtype, overwritten, reduce, simd, tensor, threads};
use crate::{Error, Result};

/// How a group norm computes: its groups, the number added to variances, and whether a relu follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupNorm {
    /// Groups; they divide the channels.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether the output is `max(·, 0)` of the normalised values; the relu's derivative at 0 is 0.
    pub relu: bool,
}

/// `(y, statistics)`: `x` `[B, H, W, C]` normalised, with `weight` and `bias` `[C]`, and what [`group_vjp`] needs to know:
/// mean and inverse deviation of each group, `[B, groups, 2]`.
///
/// # Errors
/// [`Error::Run`] on shapes that do not fit or devices without a kernel.
pub fn group(x: &Tensor, weight: &Tensor, bias: &Tensor, norm: &GroupNorm) -> Result<(Tensor, Tensor)> {
    group_and(x, weight, bias, norm, None)
}

/// As [`group`] of a norm without a relu, `y` being the relu of the normalised values' sum with `shortcut`, a tensor like `x`. Its
/// vjp is [`relu_vjp`](super::activation::relu_vjp) and then [`group_vjp`].
///
/// # Errors
/// As [`group`].
pub fn group_add_relu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    norm: &GroupNorm,
    shortcut: &Tensor,
) -> Result<(Tensor, Tensor)> {
    if norm.relu || shortcut.dims() != x.dims() || shortcut.dtype() != x.dtype() {
        let what = if norm.relu { "a norm with a relu" } else { "a norm" };
        let [x, shortcut] = [x, shortcut].map(|t| format!("{:?} {:?}", t.dtype(), t.shape()));
        return Err(Error::Run(format!("{what} of {x} and a shortcut of {shortcut} behind it")));
    }
    group_and(x, weight, bias, norm, Some(&shortcut.contiguous()?))
}

fn group_and(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    norm: &GroupNorm,
    shortcut: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (b, h, w, c) = x.dims4()?;
    let groups = norm.groups;
    check(c, groups, weight)?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let (x, weight, bias) = (Host::of(&x)?, Host::of(weight)?, Host::of(bias)?);
        let (x, weight, bias) = (x.slice::<T>()?, weight.slice::<T>()?, bias.slice::<T>()?);
        let shortcut = shortcut.map(Host::of).transpose()?;
        let shortcut = shortcut.as_ref().map(|s| s.slice::<T>()).transpose()?;
        let mut y = overwritten::<T>(x.len());
        let mut statistics = vec![T::ZERO; b * groups * 2];
        let sample = h * w * c;
        threads::chunks2((&mut y, sample), (&mut statistics, groups * 2), || (), |(), i, y, statistics| {
            let x = &x[i * sample..][..sample];
            group_statistics(x, c, norm.epsilon, statistics);
            let (scale, shift) = scale_and_shift(weight, bias, statistics);
            if let Some(shortcut) = shortcut {
                let shortcut = &shortcut[i * sample..][..sample];
                simd::vectorized(#[inline(always)] || affine_add_relu(x, &scale, &shift, shortcut, y));
            } else if norm.relu {
                simd::vectorized(#[inline(always)] || affine(x, &scale, &shift, y, #[inline(always)] |v| if v < T::ZERO { T::ZERO } else { v }));
            } else {
                simd::vectorized(#[inline(always)] || affine(x, &scale, &shift, y, #[inline(always)] |v| v));
            }
        });
        Ok((tensor(y, (b, h, w, c))?, tensor(statistics, (b, groups, 2))?))
    })
}

/// `(gx, gweight, gbias)` from the output's cotangent; `gx` only where `need_input`.
///
/// # Errors
/// As [`group`].
pub fn group_vjp(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    statistics: &Tensor,
    gy: &Tensor,
    norm: &GroupNorm,
    need_input: bool,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let (b, h, w, c) = x.dims4()?;
    let groups = norm.groups;
    check(c, groups, weight)?;
    let (x, gy) = (x.contiguous()?, gy.contiguous()?);
    by_dtype!(x, T => {
        let (x, gy, statistics) = (Host::of(&x)?, Host::of(&gy)?, Host::of(statistics)?);
        let (weight, bias) = (Host::of(weight)?, Host::of(bias)?);
        let (x, gy, statistics) = (x.slice::<T>()?, gy.slice::<T>()?, statistics.slice::<T>()?);
        let (weight, bias) = (weight.slice::<T>()?, bias.slice::<T>()?);
        let sample = h * w * c;
        let mut gx = overwritten::<T>(if need_input { x.len() } else { 0 });
        let mut sums = vec![T::ZERO; b * 2 * c];
        let each = |i: usize, sums: &mut [T], gx: Option<&mut [T]>| {
            let of = Sample {
                x: &x[i * sample..][..sample],
                gy: &gy[i * sample..][..sample],
                statistics: &statistics[i * groups * 2..][..groups * 2],
            };
            if norm.relu {
                group_sample(&of, [weight, bias], sums, gx, #[inline(always)] |y, g| if y > T::ZERO { g } else { T::ZERO });
            } else {
                group_sample(&of, [weight, bias], sums, gx, #[inline(always)] |_, g| g);
            }
        };
        if need_input {
            threads::chunks2((&mut sums, 2 * c), (&mut gx, sample), || (), |(), i, sums, gx| each(i, sums, Some(gx)));
        } else {
            threads::chunks(&mut sums, 2 * c, || (), |(), i, sums| each(i, sums, None));
        }
        let total = reduce::column_sums(&sums, 2 * c);
        let gx = if need_input { Some(tensor(gx, (b, h, w, c))?) } else { None };
        Ok((gx, tensor(total[c..].to_vec(), c)?, tensor(total[..c].to_vec(), c)?))
    })
}

pub(crate) fn check(channels: usize, groups: usize, weight: &Tensor) -> Result<()> {
    if groups > 0 && channels.is_multiple_of(groups) && weight.elem_count() == channels {
        return Ok(());
    }
    Err(Error::Run(format!(
        "group normalisation of {channels} channels in {groups} groups with a weight of shape {:?}",
        weight.shape()
    )))
}

/// Mean and inverse deviation of each group of one sample, in one pass: sums of differences from the first pixel, which
/// is near enough to the mean to lose nothing where the difference of two large sums would.
pub(crate) fn group_statistics<T: Real>(x: &[T], c: usize, epsilon: f64, statistics: &mut [T]) {
    let cg = c / (statistics.len() / 2);
    let n = T::of((x.len() / c * cg) as f64);
    let centre: Vec<T> = x[..c].chunks(cg).flat_map(|g| std::iter::repeat_n(g[0], cg)).collect();
    let sums = reduce::shifted_moments(x, &centre);
    let (plain, squares) = sums.split_at(c);
    for (g, s) in statistics.chunks_exact_mut(2).enumerate() {
        let of_group = g * cg..(g + 1) * cg;
        let shift = plain[of_group.clone()].iter().copied().sum::<T>() / n;
        let square = squares[of_group].iter().copied().sum::<T>() / n;
        s[0] = centre[g * cg] + shift;
        s[1] = T::ONE / (square - shift * shift + T::of(epsilon)).root();
    }
}

/// What is known of some pixels of a sample, by channel: a value near their mean, the sums of the differences from it and of
/// their squares, `[3][C]`; and how many pixels.
pub(crate) type Moments<'a, T> = (&'a [T], usize);

/// Mean and inverse deviation of each group of a sample that `parts` make up.
pub(crate) fn statistics_of_parts<'a, T: Real>(
    parts: impl Iterator<Item = Moments<'a, T>> + Clone,
    epsilon: f64,
    statistics: &mut [T],
) {
    let groups = statistics.len() / 2;
    for (g, s) in statistics.chunks_exact_mut(2).enumerate() {
        // Count, mean and sum of squared differences from it, of one part's channel.
        let each = parts.clone().flat_map(|(sums, pixels)| {
            let c = sums.len() / 3;
            (g * c / groups..(g + 1) * c / groups).map(move |k| {
                let [centre, plain, squares] = [sums[k], sums[c + k], sums[2 * c + k]].map(|v| v.to_f64());
                let n = pixels as f64;
                (n, centre + plain / n, squares - plain * plain / n)
            })
        });
        let (n, sum) = each.clone().fold((0.0, 0.0), |(n, sum), (m, mean, _)| (n + m, sum + m * mean));
        let mean = sum / n;
        let square: f64 = each.map(|(m, of_part, square)| square + m * (of_part - mean) * (of_part - mean)).sum();
        s[0] = T::of(mean);
        s[1] = T::of(1.0 / (square / n + epsilon).sqrt());
    }
}

/// Normalisation as one multiplication and one addition a channel.
pub(crate) fn scale_and_shift<T: Real>(weight: &[T], bias: &[T], statistics: &[T]) -> (Vec<T>, Vec<T>) {
    let cg = weight.len() / (statistics.len() / 2);
    let (mut scale, mut shift) = (weight.to_vec(), bias.to_vec());
    for (k, (scale, shift)) in scale.iter_mut().zip(&mut shift).enumerate() {
        let of_group = &statistics[k / cg * 2..];
        *scale *= of_group[1];
        *shift -= of_group[0] * *scale;
    }
    (scale, shift)
}

/// One sample's input, output cotangent and statistics.
struct Sample<'a, T> {
    x: &'a [T],
    gy: &'a [T],
    statistics: &'a [T],
}

/// One sample's sums for the parameters' gradients (cotangent, then cotangent times normalised input, per channel) and
/// its input cotangent. `through(y, g)` carries a cotangent through what follows the norm, whose value there is y.
fn group_sample<T: Real>(
    of: &Sample<T>,
    [weight, bias]: [&[T]; 2],
    sums: &mut [T],
    gx: Option<&mut [T]>,
    through: impl Fn(T, T) -> T + Copy + Sync,
) {
    let affine = scale_and_shift(weight, bias, of.statistics);
    parameter_sums(of.x, of.gy, of.statistics, &affine, sums, through);
    let Some(gx) = gx else { return };
    let [k0, k1, k2] = coefficients(weight, of.statistics, sums, of.x.len() / weight.len());
    simd::vectorized(
        #[inline(always)]
        || combine(of.gy, of.x, [&k0, &k1, &k2, &affine.0, &affine.1], gx, through),
    );
}

/// One sample's sums over rows of `x` and `gy`: the cotangent behind the norm, then that times the normalised input.
pub(crate) fn parameter_sums<T: Real>(
    x: &[T],
    gy: &[T],
    statistics: &[T],
    (scale, shift): &(Vec<T>, Vec<T>),
    sums: &mut [T],
    through: impl Fn(T, T) -> T + Copy + Sync,
) {
    let c = scale.len();
    let cg = c / (statistics.len() / 2);
    let centre: Vec<T> = statistics.chunks_exact(2).flat_map(|s| std::iter::repeat_n(s[0], cg)).collect();
    sums.copy_from_slice(&reduce::moments(x, gy, [&centre, scale, shift], through));
    for (s, times) in statistics.chunks_exact(2).zip(sums[c..].chunks_mut(cg)) {
        times.iter_mut().for_each(|v| *v *= s[1]);
    }
}

/// By channel, what the input's cotangent is made of, from a sample's [`parameter_sums`]: `k0 g + k1 x + k2`.
pub(crate) fn coefficients<T: Real>(weight: &[T], statistics: &[T], sums: &[T], pixels: usize) -> [Vec<T>; 3] {
    let c = weight.len();
    let cg = c / (statistics.len() / 2);
    let (plain, times) = sums.split_at(c);
    let n = T::of((pixels * cg) as f64);
    let weighted = |v: &[T], g: usize| (g * cg..(g + 1) * cg).map(|k| weight[k] * v[k]).sum::<T>() / n;
    let mut k = [Vec::with_capacity(c), Vec::with_capacity(c), Vec::with_capacity(c)];
    for (g, s) in statistics.chunks_exact(2).enumerate() {
        let (mean, inverse) = (s[0], s[1]);
        let (m1, m2) = (weighted(plain, g), weighted(times, g));
        for &w in &weight[g * cg..(g + 1) * cg] {
            k[0].push(w * inverse);
            k[1].push(-inverse * inverse * m2);
            k[2].push(inverse * (inverse * m2 * mean - m1));
        }
    }
    k
}

/// `out = f(scale x + shift)` by channel.
#[inline(always)]
pub(crate) fn affine<T: Real>(x: &[T], scale: &[T], shift: &[T], out: &mut [T], f: impl Fn(T) -> T) {
    let c = scale.len();
    for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        for (((o, &v), &a), &b) in out.iter_mut().zip(x).zip(scale).zip(shift) {
            *o = f(v * a + b);
        }
    }
}

/// `out = max(scale x + shift + added, 0)`, scale and shift by channel.
#[inline(always)]
fn affine_add_relu<T: Real>(x: &[T], scale: &[T], shift: &[T], added: &[T], out: &mut [T]) {
    let c = scale.len();
    for ((out, x), added) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(added.chunks_exact(c)) {
        let by_channel = scale.iter().zip(shift);
        for (((o, &v), &added), (&a, &b)) in out.iter_mut().zip(x).zip(added).zip(by_channel) {
            let v = v * a + b + added;
            *o = if v < T::ZERO { T::ZERO } else { v };
        }
    }
}

/// `out = k0 through(scale x + shift, gy) + k1 x + k2` by channel; `k` and the norm's scale and shift in `by_channel`.
#[inline(always)]
pub(crate) fn combine<T: Real>(gy: &[T], x: &[T], by_channel: [&[T]; 5], out: &mut [T], through: impl Fn(T, T) -> T) {
    let [k0, k1, k2, scale, shift] = by_channel;
    let c = k0.len();
    // Of one length that is known here: the loop below has no bounds to check, and becomes vectors.
    let (k1, k2, scale, shift) = (&k1[..c], &k2[..c], &scale[..c], &shift[..c]);
    for ((out, gy), x) in out.chunks_exact_mut(c).zip(gy.chunks_exact(c)).zip(x.chunks_exact(c)) {
        for n in 0..c {
            out[n] = k0[n] * through(x[n] * scale[n] + shift[n], gy[n]) + k1[n] * x[n] + k2[n];
        }
    }
}
