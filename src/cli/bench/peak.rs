//! What this machine can do at most: multiply-adds in registers, and streams through memory.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};

/// Rates of a number of threads together.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct Peak {
    /// Floating-point operations a second of fused multiply-adds of 32-bit floats that stay in registers (each counts two).
    #[serde(rename = "flops_per_second")]
    pub flops: f64,
    /// Bytes a second of a triad `a = b + s c` over arrays far larger than any cache (12 bytes an element, as STREAM counts:
    /// what a write reads first is not counted).
    #[serde(rename = "memory_bytes_per_second")]
    pub memory: f64,
    /// The same where each thread's arrays, 768 KiB together, stay in its caches.
    #[serde(rename = "cache_bytes_per_second")]
    pub cache: f64,
}

impl Peak {
    /// Measures with `threads` threads; takes about a second.
    pub(super) fn measure(threads: usize) -> Self {
        Peak {
            flops: together(threads, || multiply_adds(1 << 22)),
            memory: together(threads, || triad((64 << 20) / 4 / threads, 5)),
            cache: together(threads, || triad((256 << 10) / 4, 2000)),
        }
    }
}

/// The sum of what `threads` threads reach at the same time; the best of three tries.
fn together(threads: usize, work: impl Fn() -> f64 + Sync) -> f64 {
    let attempt = || {
        let barrier = Barrier::new(threads);
        std::thread::scope(|scope| {
            let body = || {
                barrier.wait();
                work()
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(body)).collect();
            running.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum::<f64>()
        })
    };
    (0..3).map(|_| attempt()).fold(0.0, f64::max)
}

/// Operations a second of `rounds` rounds of independent multiply-adds, enough of them to hide their latency.
fn multiply_adds(rounds: usize) -> f64 {
    struct Kernel(usize);
    impl WithSimd for Kernel {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f64 {
            let (x, y) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(1e-3)));
            let mut sums = [simd.splat_f32s(black_box(1.0)); 12];
            for _ in 0..self.0 {
                for sum in &mut sums {
                    *sum = simd.mul_add_f32s(*sum, x, y);
                }
            }
            black_box(sums.into_iter().fold(y, |all, sum| simd.add_f32s(all, sum)));
            (sums.len() * S::F32_LANES * 2) as f64
        }
    }
    let start = Instant::now();
    let a_round = Arch::new().dispatch(Kernel(rounds));
    a_round * rounds as f64 / start.elapsed().as_secs_f64()
}

/// Bytes a second of `repeat` triads over arrays of `n` elements, after one that is not counted.
fn triad(n: usize, repeat: usize) -> f64 {
    let (mut a, b, c) = (vec![0f32; n], vec![1f32; n], vec![2f32; n]);
    let arch = Arch::new();
    let mut pass = || {
        let s = black_box(3f32);
        arch.dispatch(
            #[inline(always)]
            || a.iter_mut().zip(&b).zip(&c).for_each(|((a, b), c)| *a = s.mul_add(*c, *b)),
        );
        black_box(&mut a);
    };
    pass();
    let start = Instant::now();
    (0..repeat).for_each(|_| pass());
    (12 * n * repeat) as f64 / start.elapsed().as_secs_f64()
}
