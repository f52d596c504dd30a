//! Tiles through the transforms, [`LANES`] channels at once.

use super::points::Points;
use super::{IN, LANES, Lanes, OUT};
use crate::backend::cpu::Real;

/// Element (i, j) of transformed tiles: `step` elements from one to the next, channels side by side.
pub(super) struct Plane<'a, T> {
    pub(super) data: &'a [T],
    pub(super) step: usize,
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

/// U of the kernels of one input channel.
#[inline(always)]
pub(super) fn weight_tile<T: Real>(k: &Points<T>, weight: &[T], [c, o]: [usize; 2], channel: usize, u: &mut [T]) {
    for first in (0..o).step_by(LANES) {
        let mut w = [[[T::ZERO; LANES]; 3]; 3];
        for l in 0..LANES {
            let kernel = &weight[((first + l) * c + channel) * 9..][..9];
            kernel.iter().enumerate().for_each(|(t, &v)| w[t / 3][t % 3][l] = v);
        }
        let rows: [[Lanes<T>; 3]; IN] = columns(&w, |v| k.g(v));
        for (i, row) in rows.iter().enumerate() {
            for (j, value) in k.g(row).iter().enumerate() {
                u[(i * IN + j) * o + first..][..LANES].copy_from_slice(value);
            }
        }
    }
}

/// V of the tile of a sample `[H, W, C]` at `top` and `left`.
#[inline(always)]
pub(super) fn input_tile<T: Real>(k: &Points<T>, x: &[T], [h, w, c]: [usize; 3], [top, left]: [isize; 2], v: &mut [T]) {
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

/// The tile at `top` and `left` of an output `[H, W, O]`, from its products (+ bias).
#[inline(always)]
pub(super) fn output_tile<T: Real>(
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

/// Z of the tile of an output's cotangent `[H, W, O]` at `top` and `left`.
#[inline(always)]
pub(super) fn cotangent_tile<T: Real>(
    k: &Points<T>,
    gy: &[T],
    [h, w, o]: [usize; 3],
    [top, left]: [usize; 2],
    z: &mut [T],
) {
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

/// Adds the tile at `top` and `left` of an input's cotangent `[H, W, C]`, from its products.
#[inline(always)]
pub(super) fn add_input_tile<T: Real>(
    k: &Points<T>,
    m: &Plane<T>,
    [h, w, c]: [usize; 3],
    [top, left]: [isize; 2],
    gx: &mut [T],
) {
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
pub(super) fn weight_taps<T: Real>(k: &Points<T>, u: &Plane<T>, taps: &mut [Lanes<T>]) {
    let tile = gathered(u, 0);
    let rows: [[Lanes<T>; IN]; 3] = columns(&tile, |v| k.gt(v));
    for (row, taps) in rows.iter().zip(taps.chunks_exact_mut(3)) {
        taps.copy_from_slice(&k.gt(row));
    }
}
