//! Gradients of windows of at most four elements, on processors that permute vectors within 128 bits.

use std::array::from_fn;

use pulp::x86::{Arch, V3, V4};
use pulp::{NullaryFnOnce, Simd, cast};

use super::super::few::Padded;
use super::super::im2col::Shape;
use super::super::{overwritten, simd};
use super::{LANES, routed};

/// Elements of a window at most, as many as lie in 128 bits.
const FOUR: usize = 4;

/// Vectors whose lanes each pick one of four elements.
trait Permute: Simd {
    /// In each lane the element of `four` of the number in the lowest two bits of `which`.
    fn permute(self, four: &[f32; FOUR], which: Self::u32s) -> Self::f32s;
}

impl Permute for V4 {
    #[inline(always)]
    fn permute(self, four: &[f32; FOUR], which: Self::u32s) -> Self::f32s {
        let four = self.avx512f._mm512_broadcast_f32x4(cast(*four));
        cast(self.avx512f._mm512_permutevar_ps(four, cast(which)))
    }
}

impl Permute for V3 {
    #[inline(always)]
    fn permute(self, four: &[f32; FOUR], which: Self::u32s) -> Self::f32s {
        let four = self.avx._mm256_broadcast_ps(&cast(*four));
        cast(self.avx._mm256_permutevar_ps(four, cast(which)))
    }
}

/// What the gradient under a line of the pool's output needs.
pub(crate) struct Permuted {
    arch: Arch,
    /// `[kernel line][element of the input line]`: the input elements that a weight meets there, one for each of the window's elements.
    pixels: Vec<[f32; FOUR]>,
    /// Elements of an input line.
    length: usize,
    /// Elements from a window to the next.
    step: usize,
    /// `[window][channel]`: the cotangent where the relu lets it through, and which element of the window has it.
    through: Vec<f32>,
    winners: Vec<u32>,
}

impl Permuted {
    /// If `arch` has such vectors and windows are not too large.
    pub(crate) fn new(s: &Shape, p: &Shape, arch: Arch) -> Option<Self> {
        let [kh, kw] = p.window.kernel;
        if kh * kw > FOUR || !matches!(arch, Arch::V3(_) | Arch::V4(_)) {
            return None;
        }
        let step = kw * s.c;
        let length = (p.ow - 1) * step + s.window.kernel[1] * s.c;
        Some(Permuted {
            arch,
            pixels: vec![[0.0; FOUR]; s.window.kernel[0] * length],
            length,
            step,
            through: overwritten(p.ow * p.c),
            winners: vec![0; p.ow * p.c],
        })
    }

    /// Loads line `k`: its cotangent, winners, and input lines. Adds the cotangent's sums by channel to `sums`.
    pub(crate) fn load(
        &mut self,
        (s, p): (&Shape, &Shape),
        (padded, k): (&Padded, usize),
        (gy, winners): (&[f32], &[u8]),
        sums: &mut [f32],
    ) {
        let [kh, kw] = p.window.kernel;
        for (ky, pixels) in self.pixels.chunks_exact_mut(self.length).enumerate() {
            // NONE's two lowest bits pick the fourth, times the 0 that is let through.
            let x: [&[f32]; FOUR] = from_fn(|tap| {
                let tap = if tap < kh * kw { tap } else { 0 };
                &padded.from(k * kh + ky + tap / kw)[tap % kw * s.c..][..self.length]
            });
            simd::vectorized(
                #[inline(always)]
                || {
                    let x = x[0].iter().zip(x[1]).zip(x[2].iter().zip(x[3]));
                    for (pixel, ((a, b), (c, d))) in pixels.iter_mut().zip(x) {
                        *pixel = [*a, *b, *c, *d];
                    }
                },
            );
        }
        let (to, which) = (self.through.chunks_exact_mut(p.c), self.winners.chunks_exact_mut(p.c));
        let lines = gy.chunks_exact(p.c).zip(winners.chunks_exact(p.c)).zip(to.zip(which));
        simd::vectorized(
            #[inline(always)]
            || {
                for ((gy, winners), (to, which)) in lines {
                    for at in (0..p.c).step_by(LANES) {
                        let (through, winner) = routed(&gy[at..][..LANES], &winners[at..][..LANES]);
                        to[at..][..LANES].copy_from_slice(&through);
                        which[at..][..LANES].copy_from_slice(&winner);
                        sums[at..][..LANES].iter_mut().zip(through).for_each(|(sum, v)| *sum += v);
                    }
                }
            },
        );
    }

    /// Adds the line's part of the weight's gradient; prefetches the line that will be next.
    pub(crate) fn add(&self, s: &Shape, next: (&[f32], &[u8]), part: &mut [f32]) {
        let of = self;
        match self.arch {
            Arch::V4(simd) => simd.vectorize(Sums::<V4, 2> { of, simd, s, next, part }),
            Arch::V3(simd) => simd.vectorize(Sums::<V3, 1> { of, simd, s, next, part }),
            // `new` admits no other.
            _ => (),
        }
    }
}

/// [`Permuted::add`] with vectors of `S`, up to `V` at a time.
struct Sums<'a, S, const V: usize> {
    of: &'a Permuted,
    simd: S,
    s: &'a Shape,
    next: (&'a [f32], &'a [u8]),
    part: &'a mut [f32],
}

// Not a closure: its attribute to be inlined would be lost in `vectorize`, and each instruction a call.
impl<S: Permute, const V: usize> NullaryFnOnce for Sums<'_, S, V> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let mut channel = 0;
        while channel < self.s.o {
            channel += match (self.s.o - channel) / S::F32_LANES {
                vectors if vectors >= V => self.channels::<V>(channel),
                _ => self.channels::<1>(channel),
            };
        }
    }
}

impl<S: Permute, const V: usize> Sums<'_, S, V> {
    /// `W` vectors of channels; returns how many channels these are.
    #[inline(always)]
    fn channels<const W: usize>(&mut self, channel: usize) -> usize {
        let elements = self.s.window.kernel[1] * self.s.c;
        for line in 0..self.s.window.kernel[0] {
            let mut at = 0;
            while at < elements {
                at += match elements - at {
                    // Nine are the row of a 3x3 kernel over three colours.
                    9.. => self.elements::<9, W>((line, at), channel),
                    3.. => self.elements::<3, W>((line, at), channel),
                    _ => self.elements::<1, W>((line, at), channel),
                };
            }
        }
        W * S::F32_LANES
    }

    /// Prefetches channels of window `k` of the next line, of which nothing would be there yet when it is wanted.
    #[inline(always)]
    fn prefetch(&self, k: usize, channel: usize, vectors: usize) {
        let (gy, winners) = self.next;
        let at = k * self.s.o + channel;
        (0..vectors).filter_map(|v| gy.get(at + v * S::F32_LANES..)).for_each(simd::prefetch);
        winners.get(at..).into_iter().for_each(simd::prefetch);
    }

    /// Of `R` elements of a line of the kernel, from `at` on, and `W` vectors of channels; returns `R`.
    #[inline(always)]
    fn elements<const R: usize, const W: usize>(&mut self, (line, at): (usize, usize), channel: usize) -> usize {
        let (simd, o, width) = (self.simd, self.s.o, W * S::F32_LANES);
        let Permuted { length, step, .. } = *self.of;
        let pixels = &self.of.pixels[line * length + at..];
        let mut sums = [[simd.splat_f32s(0.0); W]; R];
        let windows = self.of.through.chunks_exact(o).zip(self.of.winners.chunks_exact(o));
        for (k, (through, winners)) in windows.enumerate() {
            if (line, at) == (0, 0) {
                self.prefetch(k, channel, W);
            }
            let pixels = &pixels[k * step..][..R];
            let (mut g, mut which) = ([simd.splat_f32s(0.0); W], [simd.splat_u32s(0); W]);
            g.copy_from_slice(S::as_simd_f32s(&through[channel..][..width]).0);
            which.copy_from_slice(S::as_simd_u32s(&winners[channel..][..width]).0);
            for r in 0..R {
                for w in 0..W {
                    sums[r][w] = simd.mul_add_f32s(simd.permute(&pixels[r], which[w]), g[w], sums[r][w]);
                }
            }
        }
        let first = line * self.s.window.kernel[1] * self.s.c + at;
        for (r, sums) in (first..).zip(&sums) {
            let to = S::as_mut_simd_f32s(&mut self.part[r * o + channel..][..width]).0;
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to = simd.add_f32s(*to, *sum));
        }
        R
    }
}
