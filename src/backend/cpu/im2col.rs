//! Patches of an NHWC tensor laid out as matrix rows, and the transpose of that.

use std::ops::Range;

use super::{Real, Window};

/// Shapes of one convolution: input `[b, h, w, c]`, output `[b, oh, ow, o]`, `g` groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub b: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub oh: usize,
    pub ow: usize,
    pub o: usize,
    pub g: usize,
    pub window: Window,
}

impl Shape {
    /// Input channels of a group.
    pub(crate) fn cg(&self) -> usize {
        self.c / self.g
    }

    /// Output channels of a group.
    pub(crate) fn og(&self) -> usize {
        self.o / self.g
    }

    /// Weights of one output channel: elements of a patch.
    pub(crate) fn patch(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1] * self.cg()
    }

    /// Output lines (rows of pixels) of the batch.
    pub(crate) fn lines(&self) -> usize {
        self.b * self.oh
    }

    /// How many lines to treat at once, so that their patches (`patch` elements each) fill about half a megabyte:
    /// they then stay in the second-level cache between being written and being multiplied.
    pub(crate) fn lines_at_once(&self, patch: usize) -> usize {
        let pixels = (131_072 / patch.max(1)).clamp(64, 1024);
        pixels.div_ceil(self.ow.max(1)).clamp(1, self.lines().max(1))
    }

    /// Input line under kernel row `ky` of output line `oy`, or None in the border.
    pub(crate) fn input_line(&self, oy: usize, ky: usize) -> Option<usize> {
        (oy * self.window.stride[0] + ky).checked_sub(self.window.padding[0]).filter(|&iy| iy < self.h)
    }

    /// Kernel columns `lo..hi` of output column `ox` that lie inside the input, and the input column under `lo`.
    pub(crate) fn input_columns(&self, ox: usize) -> (usize, usize, usize) {
        let (left, pad, kw) = (ox * self.window.stride[1], self.window.padding[1], self.window.kernel[1]);
        let lo = pad.saturating_sub(left).min(kw);
        let hi = (self.w + pad).saturating_sub(left).min(kw).max(lo);
        (lo, hi, if lo < hi { left + lo - pad } else { 0 })
    }
}

/// Writes the patches of group `group` under output lines `lines`, of kernel rows `rows` only, one patch a matrix row:
/// `columns[pixel][ky, kx, channel]`.
pub(crate) fn gather<T: Real>(
    s: &Shape,
    x: &[T],
    group: usize,
    lines: Range<usize>,
    rows: Range<usize>,
    columns: &mut [T],
) {
    let (cg, kw) = (s.cg(), s.window.kernel[1]);
    let (first, segment) = (group * cg, kw * cg);
    let patch = rows.len() * segment;
    for (line, out) in lines.zip(columns.chunks_mut(s.ow * patch)) {
        let (b, oy) = (line / s.oh, line % s.oh);
        for (k, ky) in rows.clone().enumerate() {
            let out = out[k * segment..].chunks_mut(patch).map(|p| &mut p[..segment]);
            let Some(iy) = s.input_line(oy, ky) else {
                out.for_each(|p| p.fill(T::ZERO));
                continue;
            };
            let input = &x[(b * s.h + iy) * s.w * s.c..][..s.w * s.c];
            for (ox, p) in out.enumerate() {
                let (lo, hi, ix) = s.input_columns(ox);
                p[..lo * cg].fill(T::ZERO);
                p[hi * cg..].fill(T::ZERO);
                let inside = &mut p[lo * cg..hi * cg];
                if s.g == 1 {
                    inside.copy_from_slice(&input[ix * cg..(ix + hi - lo) * cg]);
                } else {
                    let pixels = input[ix * s.c..].chunks(s.c);
                    inside.chunks_exact_mut(cg).zip(pixels).for_each(|(p, q)| p.copy_from_slice(&q[first..first + cg]));
                }
            }
        }
    }
}

/// The transpose of [`gather`] over all kernel rows: adds `columns` into `gx`, the gradient of **one sample**, whose
/// output lines are `lines` (0-based in the sample).
pub(crate) fn scatter<T: Real>(s: &Shape, gx: &mut [T], group: usize, lines: Range<usize>, columns: &[T]) {
    let (cg, [kh, kw]) = (s.cg(), s.window.kernel);
    let (first, segment, patch) = (group * cg, kw * cg, s.patch());
    for (oy, from) in lines.zip(columns.chunks(s.ow * patch)) {
        for ky in 0..kh {
            let Some(iy) = s.input_line(oy, ky) else { continue };
            let target = &mut gx[iy * s.w * s.c..][..s.w * s.c];
            for (ox, p) in from.chunks(patch).enumerate() {
                let (lo, hi, ix) = s.input_columns(ox);
                let inside = &p[ky * segment..][lo * cg..hi * cg];
                if s.g == 1 {
                    add(&mut target[ix * cg..(ix + hi - lo) * cg], inside);
                } else {
                    let pixels = target[ix * s.c..].chunks_mut(s.c);
                    inside.chunks_exact(cg).zip(pixels).for_each(|(p, q)| add(&mut q[first..first + cg], p));
                }
            }
        }
    }
}

/// `to += from`.
#[inline(always)]
pub(crate) fn add<T: Real>(to: &mut [T], from: &[T]) {
    to.iter_mut().zip(from).for_each(|(t, &f)| *t += f);
}
