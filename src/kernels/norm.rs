//! Group normalisation of NHWC tensors and its gradients.
//!
//! Each sample's channels fall into `groups` groups; a group is normalised to mean 0 and variance 1 over its channels
//! and all positions, then scaled and shifted by channel (Wu and He, *Group Normalization*, ECCV 2018).

use candle_core::Tensor;

use super::{Host, Real, by_dtype, overwritten, reduce, simd, tensor, threads};
use crate::{Error, Result};

/// `(y, statistics)`: `x` `[B, H, W, C]` normalised, with `weight` and `bias` `[C]`, and what [`group_vjp`] needs to know:
/// mean and inverse deviation of each group, `[B, groups, 2]`.
///
/// # Errors
/// [`Error::Run`] on shapes that do not fit or devices without a kernel.
pub fn group(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let (b, h, w, c) = x.dims4()?;
    check(c, groups, weight)?;
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let (x, weight, bias) = (Host::of(&x)?, Host::of(weight)?, Host::of(bias)?);
        let (x, weight, bias) = (x.slice::<T>()?, weight.slice::<T>()?, bias.slice::<T>()?);
        let mut y = overwritten::<T>(x.len());
        let mut statistics = vec![T::ZERO; b * groups * 2];
        let sample = h * w * c;
        threads::chunks2(&mut y, sample, &mut statistics, groups * 2, |i, y, statistics| {
            let x = &x[i * sample..][..sample];
            group_statistics(x, c, epsilon, statistics);
            let (mut scale, mut shift) = (weight.to_vec(), bias.to_vec());
            for (k, (scale, shift)) in scale.iter_mut().zip(&mut shift).enumerate() {
                let of_group = &statistics[k / (c / groups) * 2..];
                *scale *= of_group[1];
                *shift -= of_group[0] * *scale;
            }
            simd::vectorized(|| affine(x, &scale, &shift, y));
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
    statistics: &Tensor,
    gy: &Tensor,
    groups: usize,
    need_input: bool,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let (b, h, w, c) = x.dims4()?;
    check(c, groups, weight)?;
    let (x, gy) = (x.contiguous()?, gy.contiguous()?);
    by_dtype!(x, T => {
        let (x, gy, weight, statistics) = (Host::of(&x)?, Host::of(&gy)?, Host::of(weight)?, Host::of(statistics)?);
        let (x, gy, weight, statistics) =
            (x.slice::<T>()?, gy.slice::<T>()?, weight.slice::<T>()?, statistics.slice::<T>()?);
        let sample = h * w * c;
        let mut gx = overwritten::<T>(if need_input { x.len() } else { 0 });
        let mut sums = vec![T::ZERO; b * 2 * c];
        let each = |i: usize, sums: &mut [T], gx: Option<&mut [T]>| {
            let (x, gy) = (&x[i * sample..][..sample], &gy[i * sample..][..sample]);
            let statistics = &statistics[i * groups * 2..][..groups * 2];
            group_sums(x, gy, statistics, sums);
            if let Some(gx) = gx {
                group_input(x, gy, weight, statistics, sums, gx);
            }
        };
        if need_input {
            threads::chunks2(&mut sums, 2 * c, &mut gx, sample, |i, sums, gx| each(i, sums, Some(gx)));
        } else {
            threads::chunks(&mut sums, 2 * c, || (), |(), i, sums| each(i, sums, None));
        }
        let total = reduce::column_sums(&sums, 2 * c);
        let gx = if need_input { Some(tensor(gx, (b, h, w, c))?) } else { None };
        Ok((gx, tensor(total[c..].to_vec(), c)?, tensor(total[..c].to_vec(), c)?))
    })
}

fn check(channels: usize, groups: usize, weight: &Tensor) -> Result<()> {
    if groups > 0 && channels.is_multiple_of(groups) && weight.elem_count() == channels {
        return Ok(());
    }
    Err(Error::Run(format!(
        "group normalisation of {channels} channels in {groups} groups with a weight of shape {:?}",
        weight.shape()
    )))
}

/// Mean and inverse deviation of each group of one sample, one pass each.
fn group_statistics<T: Real>(x: &[T], c: usize, epsilon: f64, statistics: &mut [T]) {
    let cg = c / (statistics.len() / 2);
    let n = T::of((x.len() / c * cg) as f64);
    let mut centre = vec![T::ZERO; c];
    let sums = reduce::column_sums(x, c);
    for ((s, sums), centre) in statistics.chunks_exact_mut(2).zip(sums.chunks(cg)).zip(centre.chunks_mut(cg)) {
        s[0] = sums.iter().copied().sum::<T>() / n;
        centre.fill(s[0]);
    }
    let squares = reduce::centred_squares(x, &centre);
    for (s, squares) in statistics.chunks_exact_mut(2).zip(squares.chunks(cg)) {
        s[1] = T::ONE / (squares.iter().copied().sum::<T>() / n + T::of(epsilon)).root();
    }
}

/// Per channel, the sums over positions of the cotangent and of cotangent times normalised input.
fn group_sums<T: Real>(x: &[T], gy: &[T], statistics: &[T], sums: &mut [T]) {
    let c = sums.len() / 2;
    let cg = c / (statistics.len() / 2);
    let centre: Vec<T> = statistics.chunks_exact(2).flat_map(|s| std::iter::repeat_n(s[0], cg)).collect();
    sums.copy_from_slice(&reduce::moments(x, gy, &centre));
    for (s, sums) in statistics.chunks_exact(2).zip(sums[c..].chunks_mut(cg)) {
        sums.iter_mut().for_each(|v| *v *= s[1]);
    }
}

/// One sample's input cotangent, which is per channel a gy + b x + d.
fn group_input<T: Real>(x: &[T], gy: &[T], weight: &[T], statistics: &[T], sums: &[T], gx: &mut [T]) {
    let c = weight.len();
    let cg = c / (statistics.len() / 2);
    let n = T::of((x.len() / c * cg) as f64);
    let (plain, times) = sums.split_at(c);
    let weighted = |v: &[T], g: usize| (g * cg..(g + 1) * cg).map(|k| weight[k] * v[k]).sum::<T>() / n;
    let mut coefficients = [Vec::with_capacity(c), Vec::with_capacity(c), Vec::with_capacity(c)];
    for (g, s) in statistics.chunks_exact(2).enumerate() {
        let (mean, inverse) = (s[0], s[1]);
        let (m1, m2) = (weighted(plain, g), weighted(times, g));
        for &w in &weight[g * cg..(g + 1) * cg] {
            coefficients[0].push(w * inverse);
            coefficients[1].push(-inverse * inverse * m2);
            coefficients[2].push(inverse * (inverse * m2 * mean - m1));
        }
    }
    simd::vectorized(|| combine(gy, x, &coefficients, gx));
}

/// `out = scale x + shift` by channel.
#[inline(always)]
pub(crate) fn affine<T: Real>(x: &[T], scale: &[T], shift: &[T], out: &mut [T]) {
    let c = scale.len();
    for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        for (((o, &v), &a), &b) in out.iter_mut().zip(x).zip(scale).zip(shift) {
            *o = v * a + b;
        }
    }
}

/// `out = k0 p + k1 q + k2` by channel.
#[inline(always)]
pub(crate) fn combine<T: Real>(p: &[T], q: &[T], k: &[Vec<T>; 3], out: &mut [T]) {
    let c = k[0].len();
    for ((out, p), q) in out.chunks_exact_mut(c).zip(p.chunks_exact(c)).zip(q.chunks_exact(c)) {
        let values = p.iter().zip(q).zip(k[0].iter().zip(&k[1]).zip(&k[2]));
        for (o, ((&p, &q), ((&k0, &k1), &k2))) in out.iter_mut().zip(values) {
            *o = k0 * p + k1 * q + k2;
        }
    }
}
