//! Convolutions of 3x3 kernels and stride 1 by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, CVPR 2016): a
//! quarter of the multiplications of the definition.
//!
//! The input's tiles of 6x6, overlapping by 2, become V = Bᵀ x B; weights U = G w Gᵀ; 36 matrix products M = V U, one for
//! each element of a tile, over channels; output tiles of 4x4 are y = Aᵀ M A. Gradients are the exact transposes of this:
//! with Z = A gy Aᵀ, the weights' is Gᵀ (Vᵀ Z) G, the input's is B (Z Uᵀ) Bᵀ, overlaps added. The matrices are in
//! `points`, what they do to a tile in `tile`.
//!
//! What it gains: with oneDNN 2.6.3 in its place `vgg8` trains at 0.55 and `resnet18` at 0.90 of the frames/s (medians of 9 and
//! 15 pairs of clips, by processor time, on one core of a 2-core AMD EPYC virtual machine: `taskset -c 0 target/release/sideways
//! bench train benches/pytorch/vgg8.toml --set model.modules=8 --set 'model.skip.spans=[2]'`, and `resnet18.toml`).
//!
//! Layouts: V `[tile][36][C]`, Z `[tile][36][O]`, U `[36][C][O]`, products `[36][tile][C or O]`.

mod points;
mod tile;

use points::Points;
use tile::{Plane, add_input_tile, cotangent_tile, input_tile, output_tile, weight_taps, weight_tile};

use super::im2col::Shape;
use super::matmul::{Matrix, multiply};
use super::{Real, overwritten, simd, threads};

/// Outputs of a tile, and inputs, each way.
const OUT: usize = 4;
const IN: usize = 6;
/// Elements of a transformed tile.
pub(crate) const TILE: usize = IN * IN;
/// Channels transformed at once.
const LANES: usize = 16;
/// Tiles whose products are held at once: bounds the scratch memory of large batches.
const GROUP: usize = 1024;
/// Input channels whose weights' gradients are transformed back at once, within the first-level cache.
const ROWS: usize = 16;

type Lanes<T> = [T; LANES];

/// Whether the algorithm applies to a convolution, and is worth it: enough tiles to outweigh weights four times as large.
pub(crate) fn suits(s: &Shape) -> bool {
    let window = s.window;
    let applies = window.kernel == [3, 3]
        && window.stride == [1, 1]
        && s.g == 1
        && s.c.is_multiple_of(LANES)
        && s.o.is_multiple_of(LANES)
        && window.padding.iter().all(|&p| p <= 2);
    let tiles = Tiles::of(s);
    let pixels = tiles.count(s.b) * OUT * OUT;
    applies && tiles.count(s.b) >= 32 && pixels * 2 <= s.b * s.oh * s.ow * 3
}

/// How a sample falls into tiles.
#[derive(Clone, Copy)]
struct Tiles {
    down: usize,
    across: usize,
}

impl Tiles {
    fn of(s: &Shape) -> Self {
        Tiles { down: s.oh.div_ceil(OUT), across: s.ow.div_ceil(OUT) }
    }

    fn sample(&self) -> usize {
        self.down * self.across
    }

    fn count(&self, samples: usize) -> usize {
        samples * self.sample()
    }

    /// Samples whose products are computed together.
    fn samples_at_once(&self) -> usize {
        (GROUP / self.sample().max(1)).max(1)
    }
}

/// Elements of V for a whole batch.
pub(crate) fn transformed_len(s: &Shape) -> usize {
    Tiles::of(s).count(s.b) * TILE * s.c
}

/// U `[36][C][O]` of a weight `[O, C, 3, 3]`.
pub(crate) fn transform_weight<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    let (c, o) = (s.c, s.o);
    let k = Points::<T>::new();
    // [C][36][O] first: each input channel's piece is written by one thread.
    let mut by_channel = overwritten(TILE * c * o);
    threads::chunks(
        &mut by_channel,
        TILE * o,
        || (),
        |(), channel, out| {
            simd::vectorized(
                #[inline(always)]
                || weight_tile(&k, weight, [c, o], channel, out),
            );
        },
    );
    let mut u = overwritten(TILE * c * o);
    threads::chunks(
        &mut u,
        c * o,
        || (),
        |(), tap, out| {
            for (channel, out) in out.chunks_exact_mut(o).enumerate() {
                out.copy_from_slice(&by_channel[(channel * TILE + tap) * o..][..o]);
            }
        },
    );
    u
}

/// V `[tile][36][C]` of `x`, all of it.
pub(crate) fn transform_input<T: Real>(s: &Shape, x: &[T], v: &mut [T]) {
    let (tiles, k) = (Tiles::of(s), Points::<T>::new());
    let [pad_y, pad_x] = s.window.padding;
    threads::chunks(
        v,
        tiles.across * TILE * s.c,
        || (),
        |(), row, v| {
            let x = &x[row / tiles.down * s.h * s.w * s.c..][..s.h * s.w * s.c];
            let top = (row % tiles.down * OUT) as isize - pad_y as isize;
            for (tx, v) in v.chunks_exact_mut(TILE * s.c).enumerate() {
                let left = (tx * OUT) as isize - pad_x as isize;
                simd::vectorized(
                    #[inline(always)]
                    || input_tile(&k, x, [s.h, s.w, s.c], [top, left], v),
                );
            }
        },
    );
}

/// `y = Aᵀ (V U) A` (+ bias).
pub(crate) fn forward<T: Real>(s: &Shape, v: &[T], u: &[T], bias: Option<&[T]>, y: &mut [T]) {
    let (tiles, k) = (Tiles::of(s), Points::<T>::new());
    let at_once = tiles.samples_at_once();
    let mut products = overwritten(TILE * tiles.count(at_once.min(s.b)) * s.o);
    for (group, y) in y.chunks_mut(at_once * s.oh * s.ow * s.o).enumerate() {
        let count = tiles.count(y.len() / (s.oh * s.ow * s.o));
        let v = &v[group * tiles.count(at_once) * TILE * s.c..][..count * TILE * s.c];
        let products = &mut products[..TILE * count * s.o];
        threads::chunks(
            products,
            count * s.o,
            || (),
            |(), tap, m| {
                let v = Matrix::new(&v[tap * s.c..], TILE * s.c);
                multiply([count, s.o, s.c], m, s.o, v, Matrix::new(&u[tap * s.c * s.o..], s.o), false);
            },
        );
        let products = &*products;
        threads::chunks(
            y,
            s.oh * s.ow * s.o,
            || (),
            |(), sample, y| {
                for tile in 0..tiles.sample() {
                    let m = Plane { data: &products[(sample * tiles.sample() + tile) * s.o..], step: count * s.o };
                    let at = [tile / tiles.across * OUT, tile % tiles.across * OUT];
                    simd::vectorized(
                        #[inline(always)]
                        || output_tile(&k, &m, bias, [s.oh, s.ow, s.o], at, y),
                    );
                }
            },
        );
    }
}

/// Z `[tile][36][O]` of the output's cotangent, all of it.
pub(crate) fn transform_cotangent<T: Real>(s: &Shape, gy: &[T], z: &mut [T]) {
    let (tiles, k) = (Tiles::of(s), Points::<T>::new());
    threads::chunks(
        z,
        tiles.across * TILE * s.o,
        || (),
        |(), row, z| {
            let gy = &gy[row / tiles.down * s.oh * s.ow * s.o..][..s.oh * s.ow * s.o];
            for (tx, z) in z.chunks_exact_mut(TILE * s.o).enumerate() {
                let at = [row % tiles.down * OUT, tx * OUT];
                simd::vectorized(
                    #[inline(always)]
                    || cotangent_tile(&k, gy, [s.oh, s.ow, s.o], at, z),
                );
            }
        },
    );
}

/// Adds the input's cotangent, `B (Z Uᵀ) Bᵀ` with overlaps added, to `gx`; if `fresh`, what `gx` holds counts as 0.
pub(crate) fn add_input_gradient<T: Real>(s: &Shape, z: &[T], u: &[T], gx: &mut [T], fresh: bool) {
    let (tiles, k) = (Tiles::of(s), Points::<T>::new());
    let [pad_y, pad_x] = s.window.padding;
    let at_once = tiles.samples_at_once();
    let mut products = overwritten(TILE * tiles.count(at_once.min(s.b)) * s.c);
    for (group, gx) in gx.chunks_mut(at_once * s.h * s.w * s.c).enumerate() {
        let count = tiles.count(gx.len() / (s.h * s.w * s.c));
        let z = &z[group * tiles.count(at_once) * TILE * s.o..][..count * TILE * s.o];
        let products = &mut products[..TILE * count * s.c];
        threads::chunks(
            products,
            count * s.c,
            || (),
            |(), tap, m| {
                let z = Matrix::new(&z[tap * s.o..], TILE * s.o);
                let u = Matrix::new(&u[tap * s.c * s.o..], s.o).transposed();
                multiply([count, s.c, s.o], m, s.c, z, u, false);
            },
        );
        let products = &*products;
        threads::chunks(
            gx,
            s.h * s.w * s.c,
            || (),
            |(), sample, gx| {
                if fresh {
                    gx.fill(T::ZERO);
                }
                for tile in 0..tiles.sample() {
                    let m = Plane { data: &products[(sample * tiles.sample() + tile) * s.c..], step: count * s.c };
                    let top = (tile / tiles.across * OUT) as isize - pad_y as isize;
                    let left = (tile % tiles.across * OUT) as isize - pad_x as isize;
                    simd::vectorized(
                        #[inline(always)]
                        || add_input_tile(&k, &m, [s.h, s.w, s.c], [top, left], gx),
                    );
                }
            },
        );
    }
}

/// Output channels whose weights' gradients are held in transformed form at once: few, to bound memory and so that
/// threads find blocks to share; many enough for the products.
fn columns_at_once(s: &Shape) -> usize {
    (s.o / 2 / LANES * LANES).min(32_768 / s.c / LANES * LANES).clamp(2 * LANES, 8 * LANES)
}

/// Adds the weight's gradient, `Gᵀ (Vᵀ Z) G`, to `sum` `[O, C, 3, 3]`.
pub(crate) fn add_weight_gradient<T: Real>(s: &Shape, v: &[T], z: &[T], sum: &mut [T]) {
    let (c, o, k) = (s.c, s.o, Points::<T>::new());
    let (count, width_at_once) = (Tiles::of(s).count(s.b), columns_at_once(s));
    let scratch = || (overwritten(TILE * c * width_at_once), vec![[T::ZERO; LANES]; ROWS * 9]);
    threads::chunks(sum, width_at_once * c * 9, scratch, |(du, taps), block, sum| {
        let width = sum.len() / (9 * c);
        let du = &mut du[..TILE * c * width];
        for (tap, du) in du.chunks_exact_mut(c * width).enumerate() {
            let v = Matrix::new(&v[tap * c..], TILE * c).transposed();
            let z = Matrix::new(&z[tap * o + block * width_at_once..], TILE * o);
            multiply([c, width, count], du, width, v, z, false);
        }
        for (lane, sum) in sum.chunks_exact_mut(LANES * c * 9).enumerate() {
            for first in (0..c).step_by(ROWS) {
                let rows = ROWS.min(c - first);
                simd::vectorized(
                    #[inline(always)]
                    || {
                        for (row, taps) in taps.chunks_exact_mut(9).enumerate().take(rows) {
                            let at = (first + row) * width + lane * LANES;
                            weight_taps(&k, &Plane { data: &du[at..], step: c * width }, taps);
                        }
                        for (l, sum) in sum.chunks_exact_mut(c * 9).enumerate() {
                            let sum = &mut sum[first * 9..][..rows * 9];
                            sum.iter_mut().zip(&*taps).for_each(|(sum, tap)| *sum += tap[l]);
                        }
                    },
                );
            }
        }
    });
}
