//! Two-dimensional convolution of NHWC tensors and its gradients, by patches and matrix products.
//!
//! Input `[B, H, W, C]`, weight `[O, C/g, kH, kW]` (as PyTorch stores it), bias `[O]`, output `[B, H', W', O]`. A weight is
//! rearranged at each call: a pass over it, small beside the product. A 1x1 convolution of stride 1 is a product on the
//! tensor as it lies.

use candle_core::Tensor;

use super::im2col::{Shape, gather, scatter};
use super::matmul::{Matrix, multiply};
use super::{Host, Real, Window, by_dtype, reduce, tensor, threads};
use crate::{Error, Result};

/// A convolution's geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Kernel extent, stride and zero padding.
    pub window: Window,
    /// Groups the channels fall into; each output channel sees one group's inputs.
    pub groups: usize,
}

impl Conv {
    /// A 1x1 convolution: a product over channels.
    pub fn pointwise() -> Self {
        Conv { window: Window::square(1, 1, 0), groups: 1 }
    }

    fn shape(&self, x: &[usize], w: &[usize]) -> Result<Shape> {
        let (&[b, h, width, c], &[o, cg, kh, kw]) = (x, w) else {
            return Err(Error::Run(format!(
                "convolution of {x:?} (want [B, H, W, C]) with {w:?} (want [O, C/g, kH, kW])"
            )));
        };
        let g = self.groups;
        if g == 0 || c != cg * g || o % g != 0 || [kh, kw] != self.window.kernel {
            return Err(Error::Run(format!(
                "convolution of {x:?} with a weight {w:?} does not fit kernel {:?} and {g} groups",
                self.window.kernel
            )));
        }
        let [oh, ow] = self.window.output(h, width)?;
        Ok(Shape { b, h, w: width, c, oh, ow, o, g, window: self.window })
    }
}

/// `y = x * weight (+ bias)`.
///
/// # Errors
/// [`Error::Run`] on shapes that do not fit, element types other than f32 and f64, or devices without a kernel.
pub fn forward(conv: &Conv, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let s = conv.shape(x.dims(), weight.dims())?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    by_dtype!(x, T => {
        let (x, w) = (Host::of(&x)?, Host::of(&weight)?);
        let mut y = vec![T::ZERO; s.b * s.oh * s.ow * s.o];
        if let Some(bias) = bias {
            let bias = Host::of(bias)?;
            let bias = bias.slice::<T>()?;
            same(bias.len(), s.o, "bias")?;
            y.chunks_exact_mut(s.o).for_each(|pixel| pixel.copy_from_slice(bias));
        }
        forward_slices(&s, x.slice()?, &pack(&s, w.slice()?), &mut y, bias.is_some());
        tensor(y, (s.b, s.oh, s.ow, s.o))
    })
}

/// The cotangent of the input, of shape `x` (`[B, H, W, C]`), from the output's cotangent `gy`.
///
/// # Errors
/// As [`forward`].
pub fn input_gradient(conv: &Conv, x: &[usize], weight: &Tensor, gy: &Tensor) -> Result<Tensor> {
    let s = conv.shape(x, weight.dims())?;
    let (gy, weight) = (gy.contiguous()?, weight.contiguous()?);
    same(gy.elem_count(), s.b * s.oh * s.ow * s.o, "cotangent")?;
    let mirrored = mirrored(&s);
    by_dtype!(gy, T => {
        let (gy, w) = (Host::of(&gy)?, Host::of(&weight)?);
        let mut gx = vec![T::ZERO; s.b * s.h * s.w * s.c];
        match mirrored {
            Some(m) => forward_slices(&m, gy.slice()?, &pack_mirrored(&s, w.slice()?), &mut gx, false),
            None => scatter_slices(&s, gy.slice()?, &pack(&s, w.slice()?), &mut gx),
        }
        tensor(gx, (s.b, s.h, s.w, s.c))
    })
}

/// The gradient of the weight, of shape `weight`, from the input and the output's cotangent.
///
/// # Errors
/// As [`forward`].
pub fn weight_gradient(conv: &Conv, x: &Tensor, weight: &[usize], gy: &Tensor) -> Result<Tensor> {
    let s = conv.shape(x.dims(), weight)?;
    let (x, gy) = (x.contiguous()?, gy.contiguous()?);
    same(gy.elem_count(), s.b * s.oh * s.ow * s.o, "cotangent")?;
    by_dtype!(x, T => {
        let (x, gy) = (Host::of(&x)?, Host::of(&gy)?);
        let mut packed = vec![T::ZERO; s.o * s.patch()];
        for (group, out) in packed.chunks_mut(s.patch() * s.og()).enumerate() {
            weight_slices(&s, group, x.slice()?, gy.slice()?, out);
        }
        tensor(unpack(&s, &packed), weight)
    })
}

/// The gradient of the bias `[O]`: the cotangent `gy` `[.., O]` summed over all but channels.
///
/// # Errors
/// As [`forward`].
pub fn bias_gradient(gy: &Tensor) -> Result<Tensor> {
    let gy = gy.contiguous()?;
    let channels = gy.dims().last().copied().unwrap_or(1).max(1);
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        tensor(reduce::column_sums::<T>(gy.slice()?, channels), channels)
    })
}

fn same(found: usize, expected: usize, what: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Run(format!("a convolution's {what} has {found} elements where its shapes give {expected}")))
}

/// The convolution that carries cotangents back where the stride is 1: the same kernel mirrored, over `gy`.
fn mirrored(s: &Shape) -> Option<Shape> {
    let Window { kernel: [kh, kw], stride, padding: [ph, pw] } = s.window;
    let padding = [(kh - 1).checked_sub(ph)?, (kw - 1).checked_sub(pw)?];
    (stride == [1, 1]).then_some(Shape {
        h: s.oh,
        w: s.ow,
        c: s.o,
        oh: s.h,
        ow: s.w,
        o: s.c,
        window: Window { kernel: [kh, kw], stride, padding },
        ..*s
    })
}

/// Writes the convolution of `x` with packed weights (`[g][ky, kx, c][o]`) to `y`, or adds it there.
fn forward_slices<T: Real>(s: &Shape, x: &[T], packed: &[T], y: &mut [T], accumulate: bool) {
    let (patch, cg, og) = (s.patch(), s.cg(), s.og());
    let pointwise = s.window.is_pointwise();
    let lines = s.lines_at_once(if pointwise { cg } else { patch });
    let scratch = || vec![T::ZERO; if pointwise { 0 } else { lines * s.ow * patch }];
    threads::chunks(y, lines * s.ow * s.o, scratch, |columns, i, y| {
        let pixels = y.len() / s.o;
        let first = i * lines;
        for (group, weight) in packed.chunks(patch * og).enumerate() {
            let a = if pointwise {
                Matrix::new(&x[first * s.ow * s.c + group * cg..], s.c)
            } else {
                let columns = &mut columns[..pixels * patch];
                gather(s, x, group, first..first + pixels / s.ow, 0..s.window.kernel[0], columns);
                Matrix::new(columns, patch)
            };
            multiply([pixels, og, patch], &mut y[group * og..], s.o, a, Matrix::new(weight, og), accumulate);
        }
    });
}

/// Adds the input's cotangent to `gx` by way of the patches' cotangents: any stride.
fn scatter_slices<T: Real>(s: &Shape, gy: &[T], packed: &[T], gx: &mut [T]) {
    let (patch, og) = (s.patch(), s.og());
    let lines = s.lines_at_once(patch).min(s.oh);
    let sample = s.oh * s.ow * s.o;
    threads::chunks(
        gx,
        s.h * s.w * s.c,
        || vec![T::ZERO; lines * s.ow * patch],
        |columns, b, gx| {
            for first in (0..s.oh).step_by(lines) {
                let last = (first + lines).min(s.oh);
                let pixels = (last - first) * s.ow;
                for (group, weight) in packed.chunks(patch * og).enumerate() {
                    let columns = &mut columns[..pixels * patch];
                    let a = Matrix::new(&gy[b * sample + first * s.ow * s.o + group * og..], s.o);
                    multiply([pixels, patch, og], columns, patch, a, Matrix::new(weight, og).transposed(), false);
                    scatter(s, gx, group, first..last, columns);
                }
            }
        },
    );
}

/// One group's weight gradient, packed (`[ky, kx, c][o]`). Pieces of it, each one kernel row (or for 1x1 kernels a block
/// of channels), are summed over the batch independently: threads share nothing, and the order of sums is fixed.
fn weight_slices<T: Real>(s: &Shape, group: usize, x: &[T], gy: &[T], out: &mut [T]) {
    let (cg, og) = (s.cg(), s.og());
    let pointwise = s.window.is_pointwise();
    let piece = if pointwise { cg.div_ceil(4).max(64).min(cg) } else { s.window.kernel[1] * cg };
    let lines = s.lines_at_once(piece);
    let scratch = || vec![T::ZERO; if pointwise { 0 } else { lines * s.ow * piece }];
    threads::chunks(out, piece * og, scratch, |columns, i, out| {
        let rows = out.len() / og;
        for first in (0..s.lines()).step_by(lines) {
            let last = (first + lines).min(s.lines());
            let pixels = (last - first) * s.ow;
            let a = if pointwise {
                Matrix::new(&x[first * s.ow * s.c + group * cg + i * piece..], s.c)
            } else {
                let columns = &mut columns[..pixels * piece];
                gather(s, x, group, first..last, i..i + 1, columns);
                Matrix::new(columns, piece)
            };
            let b = Matrix::new(&gy[first * s.ow * s.o + group * og..], s.o);
            multiply([rows, og, pixels], out, og, a.transposed(), b, first > 0);
        }
    });
}

/// `[O, C/g, kH, kW]` as `[g][kH, kW, C/g][O/g]`.
fn pack<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut packed = vec![T::ZERO; weight.len()];
    for (o, from) in weight.chunks_exact(cg * taps).enumerate() {
        let to = &mut packed[(o / og) * taps * cg * og + o % og..];
        for (c, from) in from.chunks_exact(taps).enumerate() {
            from.iter().enumerate().for_each(|(tap, &v)| to[(tap * cg + c) * og] = v);
        }
    }
    packed
}

/// The inverse of [`pack`].
fn unpack<T: Real>(s: &Shape, packed: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut weight = vec![T::ZERO; packed.len()];
    for (o, to) in weight.chunks_exact_mut(cg * taps).enumerate() {
        let from = &packed[(o / og) * taps * cg * og + o % og..];
        for (c, to) in to.chunks_exact_mut(taps).enumerate() {
            to.iter_mut().enumerate().for_each(|(tap, v)| *v = from[(tap * cg + c) * og]);
        }
    }
    weight
}

/// `[O, C/g, kH, kW]` as `[g][kH, kW mirrored, O/g][C/g]`: the weights of the [`mirrored`] convolution.
fn pack_mirrored<T: Real>(s: &Shape, weight: &[T]) -> Vec<T> {
    let (cg, og, taps) = (s.cg(), s.og(), s.patch() / s.cg());
    let mut packed = vec![T::ZERO; weight.len()];
    for (o, from) in weight.chunks_exact(cg * taps).enumerate() {
        let to = &mut packed[(o / og) * taps * cg * og..][..taps * cg * og];
        for (c, from) in from.chunks_exact(taps).enumerate() {
            from.iter().enumerate().for_each(|(tap, &v)| to[((taps - 1 - tap) * og + o % og) * cg + c] = v);
        }
    }
    packed
}
