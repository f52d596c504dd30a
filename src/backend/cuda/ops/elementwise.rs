//! Element by element: activations, sums, dropout, types; and the guard against what is not finite.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{Array, BLOCK, BUSY, Element, Gpu, arguments, each, launch, launch_into, pack, require, require_scratch};
use crate::{Error, Result};

/// `y = max(x, 0)`; `y` may be `x`. What is not a number stays one.
///
/// # Errors
/// [`Error::Run`] if sizes differ or the launch fails.
pub fn relu(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    map(gpu, "relu", x, y)
}

/// The input's cotangent of [`relu`] from its output: `gx = gy` where `y > 0`, else 0; `gx` may be `gy` or `y`.
///
/// # Errors
/// As [`relu`].
pub fn relu_vjp(gpu: &Gpu, y: &Array, gy: &Array, gx: &Array) -> Result<()> {
    zip(gpu, "relu_vjp", y, gy, gx)
}

/// The exact Gaussian error linear unit; `y` may be `x`.
///
/// # Errors
/// As [`relu`].
pub fn gelu(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    map(gpu, "gelu", x, y)
}

/// The input's cotangent of [`gelu`] from its input; `gx` may be `gy` or `x`.
///
/// # Errors
/// As [`relu`].
pub fn gelu_vjp(gpu: &Gpu, x: &Array, gy: &Array, gx: &Array) -> Result<()> {
    zip(gpu, "gelu_vjp", x, gy, gx)
}

/// `y = a + b`; `y` may be `a` or `b`.
///
/// # Errors
/// As [`relu`].
pub fn add(gpu: &Gpu, a: &Array, b: &Array, y: &Array) -> Result<()> {
    sum(gpu, a, b, y, false)
}

/// `y += x`.
///
/// # Errors
/// As [`relu`].
pub fn add_to(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    sum(gpu, y, x, y, false)
}

/// `y = relu(a + b)`; `y` may be `a` or `b`.
///
/// # Errors
/// As [`relu`].
pub fn add_relu(gpu: &Gpu, a: &Array, b: &Array, y: &Array) -> Result<()> {
    sum(gpu, a, b, y, true)
}

/// So many terms [`sum_in_order`] adds up at most, as many as replicas that exchange gradients with each other directly.
pub(in crate::backend::cuda) const SUMMANDS: usize = 7;

/// `n` words at address `sum` are the sum of those at each of `terms`, in that order beginning with 0, times `scale`, all 32-bit floats;
/// `sum` may be one of the terms. Launched into `stream`.
///
/// # Errors
/// [`Error::Run`] if there are more than seven terms, or the launch fails.
pub fn sum_in_order(gpu: &Gpu, stream: &Arc<CudaStream>, sum: u64, terms: &[u64], scale: f32, n: usize) -> Result<()> {
    if terms.len() > SUMMANDS {
        return Err(Error::Run(format!("{} terms of a sum of up to {SUMMANDS}", terms.len())));
    }
    let [a, b, c, d, e, f, g] = std::array::from_fn(|k| terms.get(k).copied().unwrap_or(0));
    let arguments = arguments![sum, a, b, c, d, e, f, g, terms.len() as i32, scale, n as u64];
    launch_into(gpu, stream, "sum_in_order", Element::F32, each(n, 1), arguments)
}

/// Inverted dropout with the mask of [`crate::backend::cpu::activation::dropout`] for the key in word `index` of `keys`, an
/// array of 64-bit words in device memory (see [`set_words`]); `y` may be `x`. The same call on a cotangent is the vjp.
///
/// # Errors
/// As [`relu`]; where `keys` has no such word; where `rate` is not from 0 to below 1.
pub fn dropout(gpu: &Gpu, x: &Array, y: &Array, rate: f64, keys: &Array, index: usize) -> Result<()> {
    require("dropout's output", y, x.len(), x.element())?;
    if keys.bytes() < 8 * (index + 1) || !(0.0..1.0).contains(&rate) {
        let bytes = keys.bytes();
        return Err(Error::Run(format!("dropout at rate {rate} with key {index} of an array of {bytes} bytes")));
    }
    let threshold = (rate * (1u64 << 53) as f64) as u64;
    let (n, key, scale) = (x.len() as u64, keys.pointer() + 8 * index as u64, (1.0 / (1.0 - rate)) as f32);
    launch(gpu, "dropout", x.element(), each(x.len(), pack(x.element())), arguments![x, y, n, key, threshold, scale])
}

/// Writes up to four 64-bit words from word `first` of `array` on. They are arguments of a kernel: nothing is copied from
/// host memory, and nothing waits. Not for a graph, which would keep the values.
///
/// # Errors
/// [`Error::Run`] if the array is too short, there are more than four words, or the launch fails.
pub fn set_words(gpu: &Gpu, array: &Array, first: usize, words: &[u64]) -> Result<()> {
    if words.len() > 4 || array.bytes() < 8 * (first + words.len()) {
        let (n, bytes) = (words.len(), array.bytes());
        return Err(Error::Run(format!("setting {n} words from word {first} on of an array of {bytes} bytes")));
    }
    let word = |i: usize| words.get(i).copied().unwrap_or(0);
    let (to, n) = (array.pointer() + 8 * first as u64, words.len() as i32);
    launch(gpu, "set_words", Element::F32, [1, 1, 1], arguments![to, n, word(0), word(1), word(2), word(3)])
}

/// `y = x` for `x` of 32-bit floats and `y` of either type, rounded to nearest even.
///
/// # Errors
/// As [`relu`].
pub fn from_f32(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    require("what is cast", x, y.len(), Element::F32)?;
    match y.element() {
        Element::F32 => gpu.copy(x, y),
        to => launch(gpu, "narrow", to, each(x.len(), pack(to)), arguments![x, y, x.len() as u64]),
    }
}

/// `y = x` for `x` of either type and `y` of 32-bit floats.
///
/// # Errors
/// As [`relu`].
pub fn to_f32(gpu: &Gpu, x: &Array, y: &Array) -> Result<()> {
    require("what is cast to", y, x.len(), Element::F32)?;
    match x.element() {
        Element::F32 => gpu.copy(x, y),
        from => launch(gpu, "widen", from, each(x.len(), pack(from)), arguments![x, y, x.len() as u64]),
    }
}

/// Clips of `x`, of 32-bit floats, mixed: clip n of `y`, of either type, is `weight` of clip n and the rest of clip `partners[n]` (i32).
///
/// # Errors
/// As [`relu`].
pub fn mix(gpu: &Gpu, x: &Array, partners: &Array, weight: f32, y: &Array) -> Result<()> {
    require("what is mixed", x, y.len(), Element::F32)?;
    let (clip, n) = ((x.len() / partners.len().max(1)) as u64, x.len() as u64);
    launch(gpu, "mix_clips", y.element(), each(x.len(), pack(y.element())), arguments![x, partners, y, clip, n, weight])
}

/// `x = value` everywhere.
///
/// # Errors
/// [`Error::Run`] if the launch fails.
pub fn fill(gpu: &Gpu, x: &Array, value: f32) -> Result<()> {
    let grid = each(x.len(), pack(x.element()));
    launch(gpu, "fill", x.element(), grid, arguments![x, x.len() as u64, value])
}

/// Where any element of `x` is not a finite number: adds 1 to the first float of `flag`, and with `clear` sets all of `x`
/// to 0.
///
/// # Errors
/// [`Error::Run`] if an array is too short or a launch fails.
pub fn guard(gpu: &Gpu, x: &Array, flag: &Array, scratch: &Array, clear: bool) -> Result<()> {
    require_scratch("the guard's flag", flag, 1)?;
    require_scratch("the guard", scratch, guard_scratch(x.len()))?;
    let (n, element) = (x.len() as u64, x.element());
    let looked = guard_scratch(x.len());
    launch(gpu, "guard_look", element, [looked, 1, 1], arguments![x, n, scratch])?;
    let grid = [if clear { looked } else { 1 }, 1, 1];
    launch(gpu, "guard_act", element, grid, arguments![x, n, scratch, looked as i32, flag, clear])
}

/// Floats of scratch that [`guard`] needs for an array of so many elements.
pub fn guard_scratch(elements: usize) -> usize {
    elements.div_ceil(BLOCK * 8).clamp(1, BUSY)
}

fn map(gpu: &Gpu, name: &'static str, x: &Array, y: &Array) -> Result<()> {
    require(name, y, x.len(), x.element())?;
    launch(gpu, name, x.element(), each(x.len(), pack(x.element())), arguments![x, y, x.len() as u64])
}

fn zip(gpu: &Gpu, name: &'static str, a: &Array, b: &Array, y: &Array) -> Result<()> {
    require(name, b, a.len(), a.element())?;
    require(name, y, a.len(), a.element())?;
    launch(gpu, name, a.element(), each(a.len(), pack(a.element())), arguments![a, b, y, a.len() as u64])
}

fn sum(gpu: &Gpu, a: &Array, b: &Array, y: &Array, relu: bool) -> Result<()> {
    require("the second summand", b, a.len(), a.element())?;
    require("a sum", y, a.len(), a.element())?;
    let grid = each(a.len(), pack(a.element()));
    launch(gpu, "add", a.element(), grid, arguments![a, b, y, a.len() as u64, relu])
}
