//! Convolutions of 3x3 kernels and stride 1 by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, CVPR 2016): a
//! quarter of the multiplications of the definition.
//!
//! The input's tiles of 6x6, overlapping by 2, become V = Bᵀ x B; weights U = G w Gᵀ; 36 matrix products M = V U, one for
//! each element of a tile, over channels; output tiles of 4x4 are y = Aᵀ M A. Gradients are the exact transposes of this:
//! with Z = A gy Aᵀ, the weights' is Gᵀ (Vᵀ Z) G, the input's is B (Z Uᵀ) Bᵀ, overlaps added. The points of the polynomial
//! behind it are 0, ±5/8, ±3/2 and infinity, exact in binary and kinder to rounding than the usual 0, ±1, ±2, infinity.
//!
//! Layouts: V `[tile][36][C]`, Z `[tile][36][O]`, U `[36][C][O]`, products `[36][tile][C or O]`.

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

const P: f64 = 0.625;
const Q: f64 = 1.5;

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
                || {
                    for first in (0..o).step_by(LANES) {
                        let mut w = [[[T::ZERO; LANES]; 3]; 3];
                        for l in 0..LANES {
                            let kernel = &weight[((first + l) * c + channel) * 9..][..9];
                            kernel.iter().enumerate().for_each(|(t, &v)| w[t / 3][t % 3][l] = v);
                        }
                        let rows: [[Lanes<T>; 3]; IN] = columns(&w, |v| k.g(v));
                        for (i, row) in rows.iter().enumerate() {
                            for (j, u) in k.g(row).iter().enumerate() {
                                out[(i * IN + j) * o + first..][..LANES].copy_from_slice(u);
                            }
                        }
                    }
                },
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

/// The input's cotangent, `B (Z Uᵀ) Bᵀ` with overlaps added.
pub(crate) fn input_gradient<T: Real>(s: &Shape, z: &[T], u: &[T], gx: &mut [T]) {
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
                gx.fill(T::ZERO);
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

/// Element (i, j) of transformed tiles: `step` elements from one to the next, channels side by side.
struct Plane<'a, T> {
    data: &'a [T],
    step: usize,
}

#[inline(always)]
fn load<T: Real>(from: &[T]) -> Lanes<T> {
    let mut to = [T::ZERO; LANES];
    to.copy_from_slice(&from[..LANES]);
    to
}

/// Applies a one-dimensional transform down every column. (Loops, not closures over arrays: the compiler keeps those
/// apart, out of the reach of wide vectors.)
#[inline(always)]
fn columns<T: Real, const N: usize, const M: usize, const W: usize>(
    m: &[[Lanes<T>; W]; N],
    f: impl Fn(&[Lanes<T>; N]) -> [Lanes<T>; M],
) -> [[Lanes<T>; W]; M] {
    let mut out = [[[T::ZERO; LANES]; W]; M];
    for x in 0..W {
        let mut column = [[T::ZERO; LANES]; N];
        for y in 0..N {
            column[y] = m[y][x];
        }
        let column = f(&column);
        for y in 0..M {
            out[y][x] = column[y];
        }
    }
    out
}

/// A transformed tile's elements.
#[inline(always)]
fn gathered<T: Real>(plane: &Plane<T>, first: usize) -> [[Lanes<T>; IN]; IN] {
    let mut tile = [[[T::ZERO; LANES]; IN]; IN];
    for (i, row) in tile.iter_mut().enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = load(&plane.data[(i * IN + j) * plane.step + first..]);
        }
    }
    tile
}

#[inline(always)]
fn input_tile<T: Real>(k: &Points<T>, x: &[T], [h, w, c]: [usize; 3], [top, left]: [isize; 2], v: &mut [T]) {
    let inside = |at: isize, size: usize| usize::try_from(at).ok().filter(|&at| at < size);
    for first in (0..c).step_by(LANES) {
        let mut d = [[[T::ZERO; LANES]; IN]; IN];
        for (i, row) in d.iter_mut().enumerate() {
            let Some(y) = inside(top + i as isize, h) else { continue };
            for (j, d) in row.iter_mut().enumerate() {
                if let Some(column) = inside(left + j as isize, w) {
                    *d = load(&x[(y * w + column) * c + first..]);
                }
            }
        }
        let rows: [[Lanes<T>; IN]; IN] = columns(&d, |v| k.bt(v));
        for (i, row) in rows.iter().enumerate() {
            for (j, value) in k.bt(row).iter().enumerate() {
                v[(i * IN + j) * c + first..][..LANES].copy_from_slice(value);
            }
        }
    }
}

#[inline(always)]
fn output_tile<T: Real>(
    k: &Points<T>,
    m: &Plane<T>,
    bias: Option<&[T]>,
    [h, w, o]: [usize; 3],
    [top, left]: [usize; 2],
    y: &mut [T],
) {
    for first in (0..o).step_by(LANES) {
        let tile = gathered(m, first);
        let rows: [[Lanes<T>; IN]; OUT] = columns(&tile, |v| k.at(v));
        let bias = bias.map_or([T::ZERO; LANES], |b| load(&b[first..]));
        for (i, row) in rows.iter().enumerate().take(h - top) {
            for (j, value) in k.at(row).iter().enumerate().take(w - left) {
                let out = &mut y[((top + i) * w + left + j) * o + first..][..LANES];
                out.iter_mut().zip(value).zip(&bias).for_each(|((out, &v), &b)| *out = v + b);
            }
        }
    }
}

#[inline(always)]
fn cotangent_tile<T: Real>(k: &Points<T>, gy: &[T], [h, w, o]: [usize; 3], [top, left]: [usize; 2], z: &mut [T]) {
    for first in (0..o).step_by(LANES) {
        let mut g = [[[T::ZERO; LANES]; OUT]; OUT];
        for (i, row) in g.iter_mut().enumerate().take(h - top) {
            for (j, g) in row.iter_mut().enumerate().take(w - left) {
                *g = load(&gy[((top + i) * w + left + j) * o + first..]);
            }
        }
        let rows: [[Lanes<T>; OUT]; IN] = columns(&g, |v| k.a(v));
        for (i, row) in rows.iter().enumerate() {
            for (j, value) in k.a(row).iter().enumerate() {
                z[(i * IN + j) * o + first..][..LANES].copy_from_slice(value);
            }
        }
    }
}

#[inline(always)]
fn add_input_tile<T: Real>(k: &Points<T>, m: &Plane<T>, [h, w, c]: [usize; 3], [top, left]: [isize; 2], gx: &mut [T]) {
    let inside = |at: isize, size: usize| usize::try_from(at).ok().filter(|&at| at < size);
    for first in (0..c).step_by(LANES) {
        let tile = gathered(m, first);
        let rows: [[Lanes<T>; IN]; IN] = columns(&tile, |v| k.b(v));
        for (i, row) in rows.iter().enumerate() {
            let Some(y) = inside(top + i as isize, h) else { continue };
            for (j, value) in k.b(row).iter().enumerate() {
                if let Some(x) = inside(left + j as isize, w) {
                    let out = &mut gx[(y * w + x) * c + first..][..LANES];
                    out.iter_mut().zip(value).for_each(|(out, &v)| *out += v);
                }
            }
        }
    }
}

/// The nine elements of kernels at [`LANES`] outputs.
#[inline(always)]
fn weight_taps<T: Real>(k: &Points<T>, u: &Plane<T>, taps: &mut [Lanes<T>]) {
    let tile = gathered(u, 0);
    let rows: [[Lanes<T>; IN]; 3] = columns(&tile, |v| k.gt(v));
    for (row, taps) in rows.iter().zip(taps.chunks_exact_mut(3)) {
        taps.copy_from_slice(&k.gt(row));
    }
}

/// The points p and q and what is made of them; the one-dimensional transforms.
struct Points<T> {
    p: T,
    q: T,
    p2: T,
    q2: T,
    p3: T,
    q3: T,
    /// p² q², p² + q², p q², q p².
    pq: T,
    sum: T,
    pqq: T,
    qpp: T,
    /// 1 / p²q², and 1 over the products of differences at ±p and ±q.
    n0: T,
    np: T,
    nq: T,
}

impl<T: Real> Points<T> {
    fn new() -> Self {
        let (p2, q2) = (P * P, Q * Q);
        Points {
            p: T::of(P),
            q: T::of(Q),
            p2: T::of(p2),
            q2: T::of(q2),
            p3: T::of(P * p2),
            q3: T::of(Q * q2),
            pq: T::of(p2 * q2),
            sum: T::of(p2 + q2),
            pqq: T::of(P * q2),
            qpp: T::of(Q * p2),
            n0: T::of(1.0 / (p2 * q2)),
            np: T::of(1.0 / (2.0 * p2 * (p2 - q2))),
            nq: T::of(1.0 / (2.0 * q2 * (q2 - p2))),
        }
    }

    /// Bᵀ d.
    #[inline(always)]
    fn bt(&self, d: &[Lanes<T>; IN]) -> [Lanes<T>; IN] {
        let mut r = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (d[4][l] - self.q2 * d[2][l], d[3][l] - self.q2 * d[1][l]);
            let (even_q, odd_q) = (d[4][l] - self.p2 * d[2][l], d[3][l] - self.p2 * d[1][l]);
            r[0][l] = self.pq * d[0][l] - self.sum * d[2][l] + d[4][l];
            r[1][l] = even_p + self.p * odd_p;
            r[2][l] = even_p - self.p * odd_p;
            r[3][l] = even_q + self.q * odd_q;
            r[4][l] = even_q - self.q * odd_q;
            r[5][l] = self.pq * d[1][l] - self.sum * d[3][l] + d[5][l];
        }
        r
    }

    /// B r.
    #[inline(always)]
    fn b(&self, r: &[Lanes<T>; IN]) -> [Lanes<T>; IN] {
        let mut d = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (sum_p, difference_p) = (r[1][l] + r[2][l], r[1][l] - r[2][l]);
            let (sum_q, difference_q) = (r[3][l] + r[4][l], r[3][l] - r[4][l]);
            d[0][l] = self.pq * r[0][l];
            d[1][l] = self.pq * r[5][l] - self.pqq * difference_p - self.qpp * difference_q;
            d[2][l] = -(self.sum * r[0][l]) - self.q2 * sum_p - self.p2 * sum_q;
            d[3][l] = self.p * difference_p + self.q * difference_q - self.sum * r[5][l];
            d[4][l] = r[0][l] + sum_p + sum_q;
            d[5][l] = r[5][l];
        }
        d
    }

    /// Aᵀ m.
    #[inline(always)]
    fn at(&self, m: &[Lanes<T>; IN]) -> [Lanes<T>; OUT] {
        let mut y = [[T::ZERO; LANES]; OUT];
        for l in 0..LANES {
            let (sum_p, difference_p) = (m[1][l] + m[2][l], m[1][l] - m[2][l]);
            let (sum_q, difference_q) = (m[3][l] + m[4][l], m[3][l] - m[4][l]);
            y[0][l] = m[0][l] + sum_p + sum_q;
            y[1][l] = self.p * difference_p + self.q * difference_q;
            y[2][l] = self.p2 * sum_p + self.q2 * sum_q;
            y[3][l] = self.p3 * difference_p + self.q3 * difference_q + m[5][l];
        }
        y
    }

    /// A g.
    #[inline(always)]
    fn a(&self, g: &[Lanes<T>; OUT]) -> [Lanes<T>; IN] {
        let mut z = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (g[0][l] + self.p2 * g[2][l], self.p * g[1][l] + self.p3 * g[3][l]);
            let (even_q, odd_q) = (g[0][l] + self.q2 * g[2][l], self.q * g[1][l] + self.q3 * g[3][l]);
            z[0][l] = g[0][l];
            z[1][l] = even_p + odd_p;
            z[2][l] = even_p - odd_p;
            z[3][l] = even_q + odd_q;
            z[4][l] = even_q - odd_q;
            z[5][l] = g[3][l];
        }
        z
    }

    /// G w.
    #[inline(always)]
    fn g(&self, w: &[Lanes<T>; 3]) -> [Lanes<T>; IN] {
        let mut u = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (w[0][l] + self.p2 * w[2][l], self.p * w[1][l]);
            let (even_q, odd_q) = (w[0][l] + self.q2 * w[2][l], self.q * w[1][l]);
            u[0][l] = self.n0 * w[0][l];
            u[1][l] = self.np * (even_p + odd_p);
            u[2][l] = self.np * (even_p - odd_p);
            u[3][l] = self.nq * (even_q + odd_q);
            u[4][l] = self.nq * (even_q - odd_q);
            u[5][l] = w[2][l];
        }
        u
    }

    /// Gᵀ u.
    #[inline(always)]
    fn gt(&self, u: &[Lanes<T>; IN]) -> [Lanes<T>; 3] {
        let mut w = [[T::ZERO; LANES]; 3];
        for l in 0..LANES {
            let (sum_p, difference_p) = (self.np * (u[1][l] + u[2][l]), self.np * (u[1][l] - u[2][l]));
            let (sum_q, difference_q) = (self.nq * (u[3][l] + u[4][l]), self.nq * (u[3][l] - u[4][l]));
            w[0][l] = self.n0 * u[0][l] + sum_p + sum_q;
            w[1][l] = self.p * difference_p + self.q * difference_q;
            w[2][l] = self.p2 * sum_p + self.q2 * sum_q + u[5][l];
        }
        w
    }
}
