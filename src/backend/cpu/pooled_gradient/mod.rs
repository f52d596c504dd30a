//! The weight's gradient of a convolution of few channels with a max pool behind it, from the pool's cotangent, a line at a time.
//!
//! A window hands its cotangent to one of its elements, so the convolution's cotangent is zeros for the most part. With windows
//! of at most four elements it is not made: of the four pixels that a weight meets under a window, the winner's is picked by channel,
//! which is one permutation for a whole vector.

use super::few::{self, Padded};
use super::im2col::Shape;
use super::{overwritten, pool, simd};

#[cfg(target_arch = "x86_64")]
mod permuted;

const LANES: usize = few::LANES;

/// No element of a window.
pub(crate) const NONE: u8 = u8::MAX;

/// Working memory of one of two ways.
pub(crate) enum PooledGradient {
    /// Input pixels are permuted to where the winners are.
    #[cfg(target_arch = "x86_64")]
    Permuted(permuted::Permuted),
    /// The cotangent is scattered: the convolution's under an output line, and [`pool::taps`].
    Scattered(Vec<f32>, Vec<usize>),
}

impl PooledGradient {
    /// For a convolution `s` of stride 1 that [`few::suits`], and a pool `p` that [tiles](pool::tiles) its output.
    pub(crate) fn new(s: &Shape, p: &Shape) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(permuted) = permuted::Permuted::new(s, p, simd::arch()) {
            return Self::Permuted(permuted);
        }
        Self::scattered(s, p)
    }

    fn scattered(s: &Shape, p: &Shape) -> Self {
        Self::Scattered(overwritten(p.window.kernel[0] * s.ow * s.o), pool::taps(p))
    }

    /// Adds what line `k` of the pool's output of those whose input `padded` holds gives to the weight's gradient (packed), and to
    /// the sums by channel of the convolution's cotangent. `gy` is the output's cotangent, `winners` the elements of their windows that
    /// have it, or [`NONE`], both from the line on; the next line will be next.
    pub(crate) fn add_line(
        &mut self,
        (s, p): (&Shape, &Shape),
        (padded, k): (&Padded, usize),
        (gy, winners): (&[f32], &[u8]),
        (part, sums): (&mut [f32], &mut [f32]),
    ) {
        let length = p.ow * p.c;
        let line = (&gy[..length], &winners[..length]);
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Permuted(permuted) => {
                permuted.load((s, p), (padded, k), line, sums);
                permuted.add(s, (&gy[length..], &winners[length..]), part);
            }
            Self::Scattered(g, taps) => {
                simd::vectorized(
                    #[inline(always)]
                    || scatter(p, line, taps, g, sums),
                );
                for (row, g) in g.chunks_exact(s.ow * s.o).enumerate() {
                    few::add_line_gradient(s, padded, k * p.window.kernel[0] + row, g, part);
                }
            }
        }
    }
}

/// A line `gy` of the output's cotangent at its windows' winners, zeros elsewhere: the lines under it, `g`. Adds its sums by
/// channel.
#[inline(always)]
fn scatter(p: &Shape, (gy, winners): (&[f32], &[u8]), taps: &[usize], g: &mut [f32], sums: &mut [f32]) {
    let ([_, kw], c) = (p.window.kernel, p.c);
    for ox in 0..p.ow {
        for first in (0..c).step_by(LANES) {
            let at = ox * c + first..ox * c + first + LANES;
            let (through, winner) = routed(&gy[at.clone()], &winners[at]);
            sums[first..][..LANES].iter_mut().zip(through).for_each(|(sum, v)| *sum += v);
            let g = &mut g[ox * kw * c + first..];
            for (tap, &at) in (0u32..).zip(taps) {
                let mut here = [0f32; LANES];
                for n in 0..LANES {
                    here[n] = if winner[n] == tap { through[n] } else { 0.0 };
                }
                g[at..][..LANES].copy_from_slice(&here);
            }
        }
    }
}

/// What windows hand through of `gy`, and to which elements.
#[inline(always)]
fn routed(gy: &[f32], winners: &[u8]) -> ([f32; LANES], [u32; LANES]) {
    // Copies of a known length, which stay in registers.
    let (mut through, mut winner) = ([0f32; LANES], [0u32; LANES]);
    through.copy_from_slice(gy);
    for n in 0..LANES {
        winner[n] = u32::from(winners[n]);
        through[n] = if winner[n] == u32::from(NONE) { 0.0 } else { through[n] };
    }
    (through, winner)
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;
    use rand_distr::{Distribution, Uniform};

    use super::super::Window;
    use super::*;

    /// Numbers between -1 and 1.
    fn random(count: usize, seed: u64) -> Vec<f32> {
        let between = Uniform::new(-1.0, 1.0).expect("bounds in order");
        between.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(count).collect()
    }

    /// Every way there is on this machine, by name.
    fn ways(s: &Shape, p: &Shape) -> Vec<(&'static str, PooledGradient)> {
        #[allow(unused_mut)]
        let mut ways = vec![("scattered", PooledGradient::scattered(s, p))];
        #[cfg(target_arch = "x86_64")]
        {
            use pulp::x86::{Arch, V3, V4};
            let archs = [("AVX2", V3::try_new().map(Arch::V3)), ("AVX-512", V4::try_new().map(Arch::V4))];
            for (name, arch) in archs {
                let permuted = arch.and_then(|arch| permuted::Permuted::new(s, p, arch));
                assert_eq!(permuted.is_some(), arch.is_some() && p.window.kernel.iter().product::<usize>() <= 4);
                ways.extend(permuted.map(|permuted| (name, PooledGradient::Permuted(permuted))));
            }
        }
        ways
    }

    /// Every way against the definition, in f64.
    #[test]
    fn a_window_hands_its_cotangent_to_one_element() {
        for (side, c, o, kernel, padding, window) in [
            ([12, 14], 3, 64, 3, 1, [2, 2]),
            ([10, 12], 1, 48, 5, 2, [2, 2]),
            ([9, 13], 2, 16, 2, 0, [1, 3]),
            ([8, 7], 4, 80, 1, 0, [4, 1]),
            ([7, 9], 4, 32, 4, 3, [1, 1]),
            ([12, 12], 3, 16, 3, 1, [3, 2]),
        ] {
            let [h, w] = side;
            let [oh, ow] = side.map(|n| n + 2 * padding + 1 - kernel);
            let s = Shape { b: 1, h, w, c, oh, ow, o, g: 1, window: Window::square(kernel, 1, padding) };
            let over = Window { kernel: window, stride: window, padding: [0; 2] };
            let p = pool::shape(&over, &[1, oh, ow, o]).expect("a shape");
            let (x, gy) = (random(h * w * c, 1), random(p.oh * p.ow * o, 2));
            let elements = window[0] * window[1];
            let winner = |v: f32| {
                if v < -0.7 { NONE } else { ((v + 0.7) / 1.7 * elements as f32).min(elements as f32 - 1.0) as u8 }
            };
            let winners: Vec<u8> = random(gy.len(), 3).into_iter().map(winner).collect();

            let (mut part, mut sums) = (vec![0f64; s.patch() * o], vec![0f64; o]);
            for (n, (&g, &winner)) in gy.iter().zip(&winners).enumerate().filter(|&(_, (_, &w))| w != NONE) {
                let (oy, ox, channel, winner) = (n / o / p.ow, n / o % p.ow, n % o, usize::from(winner));
                let [y, x0] = [oy * window[0] + winner / window[1], ox * window[1] + winner % window[1]];
                sums[channel] += f64::from(g);
                for tap in 0..s.patch() {
                    let [ky, kx, k] = [tap / c / kernel, tap / c % kernel, tap % c];
                    let inside = |n: usize, side: usize| n.checked_sub(padding).filter(|&n| n < side);
                    if let (Some(iy), Some(ix)) = (inside(y + ky, h), inside(x0 + kx, w)) {
                        part[tap * o + channel] += f64::from(g) * f64::from(x[(iy * w + ix) * c + k]);
                    }
                }
            }
            let mut padded = Padded::new(&s, p.oh * window[0]);
            padded.fill(&s, &x, 0);
            for (name, mut way) in ways(&s, &p) {
                // They are added to.
                let (mut found, mut of_channels) = (vec![1f32; part.len()], vec![2f32; o]);
                for k in 0..p.oh {
                    let at = k * p.ow * o..;
                    let line = (&gy[at.clone()], &winners[at]);
                    way.add_line((&s, &p), (&padded, k), line, (&mut found, &mut of_channels));
                }
                let all = found.iter().zip(part.iter().map(|v| v + 1.0));
                for (found, expected) in all.chain(of_channels.iter().zip(sums.iter().map(|v| v + 2.0))) {
                    let wrong = (f64::from(*found) - expected).abs();
                    assert!(wrong < 1e-4, "{name}, {s:?}, windows {window:?}: {found} for {expected}");
                }
            }
        }
    }
}
