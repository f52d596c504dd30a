//! Element by element: activations, sums, dropout, and their cotangents.

use candle_core::{Tensor, WithDType};

use super::{Host, Real, by_dtype, overwritten, simd, tensor, threads};
use crate::{Error, Result};

/// Elements a thread takes at once.
const PIECE: usize = 1 << 15;

/// `max(x, 0)`. A value that is not a number stays one, so that it is noticed.
///
/// # Errors
/// [`Error::Run`] on devices without a kernel.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    by_dtype!(x, T => map::<T>(x, #[inline(always)] |v| if v < T::ZERO { T::ZERO } else { v }))
}

/// `relu(a + b)` of two tensors of one shape, in one pass.
///
/// # Errors
/// As [`relu`].
pub fn add_relu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    by_dtype!(a, T => zip::<T>(a, b, #[inline(always)] |a, b| {
        let v = a + b;
        if v < T::ZERO { T::ZERO } else { v }
    }))
}

/// Whether every element is a finite number.
///
/// # Errors
/// As [`relu`].
pub fn all_finite(x: &Tensor) -> Result<bool> {
    let x = x.contiguous()?;
    by_dtype!(x, T => {
        let x = Host::of(&x)?;
        // 0 times a finite number is 0; the sum of a piece is not 0 as soon as one element is none.
        let zeros = |piece: &[T]| simd::vectorized(#[inline(always)] || {
            let mut sums = [T::ZERO; 16];
            for values in piece.chunks(16) {
                sums.iter_mut().zip(values).for_each(|(sum, &v)| *sum += v * T::ZERO);
            }
            sums.iter().all(|&sum| sum == T::ZERO)
        });
        Ok(x.slice::<T>()?.chunks(PIECE).all(zeros))
    })
}

/// `a + b` of two tensors of one shape.
///
/// # Errors
/// As [`relu`].
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    by_dtype!(a, T => zip::<T>(a, b, #[inline(always)] |a, b| a + b))
}

/// The input's cotangent of [`relu`] from its output: `gy` where `y > 0`, else 0. So the derivative at 0 is 0.
///
/// # Errors
/// As [`relu`].
pub fn relu_vjp(y: &Tensor, gy: &Tensor) -> Result<Tensor> {
    by_dtype!(y, T => zip::<T>(y, gy, #[inline(always)] |y, g| if y > T::ZERO { g } else { T::ZERO }))
}

/// The exact Gaussian error linear unit, `x Phi(x)` (Hendrycks and Gimpel, 2016).
///
/// # Errors
/// As [`relu`].
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    by_dtype!(x, T => map::<T>(x, #[inline(always)] |v| v * normal_cdf(v)))
}

/// The input's cotangent of [`gelu`] from its input.
///
/// # Errors
/// As [`relu`].
pub fn gelu_vjp(x: &Tensor, gy: &Tensor) -> Result<Tensor> {
    by_dtype!(x, T => {
        let scale = T::of((2.0 * std::f64::consts::PI).sqrt().recip());
        let half = T::of(-0.5);
        zip::<T>(x, gy, #[inline(always)] move |v, g| g * (normal_cdf(v) + v * scale * (half * v * v).exponential()))
    })
}

/// Inverted dropout: each element is zeroed with probability `rate`, the others scaled by 1/(1 - rate). Which ones is a
/// pure function of `key` and the element's place, so the same call on a cotangent is the vjp.
///
/// # Errors
/// As [`relu`].
pub fn dropout(x: &Tensor, rate: f64, key: u64) -> Result<Tensor> {
    // 53 bits: exact as f64, so that the comparison below has no rounding.
    let threshold = (rate * (1u64 << 53) as f64) as u64;
    by_dtype!(x, T => {
        let scale = T::of(1.0 / (1.0 - rate));
        let x = x.contiguous()?;
        let input = Host::of(&x)?;
        let input = input.slice::<T>()?;
        let mut y = overwritten::<T>(input.len());
        threads::chunks(&mut y, PIECE, || (), |(), i, y| {
            let place = (i * PIECE) as u64;
            for (k, (y, &v)) in y.iter_mut().zip(&input[i * PIECE..]).enumerate() {
                let keep = mix(key, place.wrapping_add(k as u64)) >> 11 >= threshold;
                *y = if keep { v * scale } else { T::ZERO };
            }
        });
        tensor(y, x.dims())
    })
}

/// SplitMix64 (Steele, Lea and Flood, 2014) at place `i` of the sequence that starts at `key`.
fn mix(key: u64, i: u64) -> u64 {
    let z = key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn normal_cdf<T: Real>(v: T) -> T {
    let half = T::of(0.5);
    half * (T::ONE + (v * T::of(std::f64::consts::FRAC_1_SQRT_2)).error_function())
}

fn map<T: Real>(x: &Tensor, f: impl Fn(T) -> T + Sync) -> Result<Tensor> {
    let x = x.contiguous()?;
    let input = Host::of(&x)?;
    let input = input.slice::<T>()?;
    let mut y = overwritten::<T>(input.len());
    threads::chunks(
        &mut y,
        PIECE,
        || (),
        |(), i, y| {
            simd::vectorized(
                #[inline(always)]
                || y.iter_mut().zip(&input[i * PIECE..]).for_each(|(y, &x)| *y = f(x)),
            );
        },
    );
    tensor(y, x.dims())
}

fn zip<T: Real>(a: &Tensor, b: &Tensor, f: impl Fn(T, T) -> T + Sync) -> Result<Tensor> {
    if a.dims() != b.dims() || b.dtype() != <T as WithDType>::DTYPE {
        return Err(Error::Run(format!(
            "two tensors should match: {:?} of {:?} and {:?} of {:?}",
            a.dims(),
            a.dtype(),
            b.dims(),
            b.dtype()
        )));
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (p, q) = (Host::of(&a)?, Host::of(&b)?);
    let (p, q) = (p.slice::<T>()?, q.slice::<T>()?);
    let mut y = overwritten::<T>(p.len());
    threads::chunks(
        &mut y,
        PIECE,
        || (),
        |(), i, y| {
            let inputs = p[i * PIECE..].iter().zip(&q[i * PIECE..]);
            simd::vectorized(
                #[inline(always)]
                || y.iter_mut().zip(inputs).for_each(|(y, (&p, &q))| *y = f(p, q)),
            );
        },
    );
    tensor(y, a.dims())
}
