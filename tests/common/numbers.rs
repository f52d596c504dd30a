//! Random numbers, and comparisons that tell of everything that is not as expected.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use sideways::Result;

/// `n` numbers of a normal distribution: the same for the same seed.
pub fn normal<T>(n: usize, seed: u64) -> Vec<T>
where
    StandardNormal: Distribution<T>,
{
    StandardNormal.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(n).collect()
}

/// A tensor of such numbers in 32-bit floats.
pub fn random_f32(shape: &[usize], seed: u64) -> Result<Tensor> {
    Ok(Tensor::from_vec(normal::<f32>(shape.iter().product(), seed), shape, &Device::Cpu)?)
}

/// The same in 64-bit floats.
pub fn random_f64(shape: &[usize], seed: u64) -> Result<Tensor> {
    Ok(Tensor::from_vec(normal::<f64>(shape.iter().product(), seed), shape, &Device::Cpu)?)
}

/// A tensor's elements in order, in 64-bit floats.
pub fn flat(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Fails unless there are as many numbers on both sides, at least one, and each is within `tolerance` of the largest that is
/// expected (of 1 where all are smaller). What is no number is never near another.
#[track_caller]
pub fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    let scale = expected.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    close_each(what, found, expected, |_| tolerance * scale);
}

/// The same where each expected number says by itself how far off it may be.
#[track_caller]
pub fn close_each(what: &str, found: &[f64], expected: &[f64], allowed: impl Fn(f64) -> f64) {
    assert_eq!(found.len(), expected.len(), "{what}: not as many numbers");
    assert!(!found.is_empty(), "{what}: nothing to compare");
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= allowed(e), "{what}: element {i} is {f}, not {e} to {:e}", allowed(e));
    }
}
