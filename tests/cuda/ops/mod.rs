//! The GPU's operators against the CPU's kernels, for both types of activations, on shapes that fill no block evenly.
//!
//! The reference computes in 64-bit floats from the very inputs of the GPU (rounded to bfloat16 where they are). Tolerances:
//! 2e-5 of the largest value of a result for float arithmetic, and for results in bfloat16 half a unit in the last place
//! of each value beside it.

mod bias;
mod elementwise;
mod loss;
mod norm;
mod optimizer;
mod pool;
mod refusals;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use sideways::Result;
use sideways::backend::cuda::{Array, Element, Gpu, ops};

use crate::common::numbers::{close_each, flat, normal};

/// Of norms.
const EPSILON: f64 = 1e-5;
/// `[B, H, W, C]`: odd everywhere; channels for vectors of 4 and of 8; many rows; more channels than a block's columns.
const SHAPES: [[usize; 4]; 8] = [
    [2, 5, 7, 3],
    [3, 9, 4, 8],
    [1, 33, 17, 64],
    [2, 3, 5, 20],
    [4, 40, 41, 8],
    [2, 6, 5, 296],
    [3, 4, 5, 64],
    [2, 3, 3, 512],
];

fn random(n: usize, seed: u64) -> Vec<f32> {
    normal(n, seed)
}

/// The GPU with one type of activations.
struct On {
    gpu: Arc<Gpu>,
    element: Element,
}

impl On {
    /// Runs `test` for both types.
    fn each(test: impl Fn(&On) -> Result<()>) -> Result<()> {
        let gpu = Gpu::open(0, false).expect("these tests need a GPU, or the emulator (tests/cuda-emulator/README.md)");
        gpu.bind()?;
        for element in [Element::F32, Element::Bf16] {
            test(&On { gpu: gpu.clone(), element })?;
        }
        Ok(())
    }

    /// Random values that activations can have.
    fn random(&self, n: usize, seed: u64) -> Vec<f32> {
        self.rounded(random(n, seed))
    }

    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        if self.element == Element::Bf16 {
            values.iter_mut().for_each(|v| *v = bf16(*v));
        }
        values
    }

    fn up(&self, values: &[f32]) -> Result<Array> {
        let (wide, array) = (self.gpu.upload(values)?, self.empty(values.len())?);
        ops::from_f32(&self.gpu, &wide, &array)?;
        self.gpu.synchronize()?;
        Ok(array)
    }

    /// An array whose every element is to be written.
    fn empty(&self, n: usize) -> Result<Array> {
        let array = self.gpu.array(n, self.element)?;
        ops::fill(&self.gpu, &array, f32::NAN)?;
        Ok(array)
    }

    fn floats(&self, n: usize) -> Result<Array> {
        let array = self.gpu.array(n.max(1), Element::F32)?;
        ops::fill(&self.gpu, &array, f32::NAN)?;
        Ok(array)
    }

    fn down(&self, array: &Array) -> Result<Vec<f32>> {
        let wide = self.gpu.array(array.len(), Element::F32)?;
        ops::to_f32(&self.gpu, array, &wide)?;
        self.gpu.download(&wide)
    }

    /// Fails where the activations in `array` are not `expected`.
    #[track_caller]
    fn same(&self, what: &str, array: &Array, expected: &Tensor) {
        let found = self.down(array).expect("activations");
        close(&format!("{what} ({:?})", self.element), &found, expected, self.element);
    }

    /// The same for sums in floats.
    #[track_caller]
    fn sums(&self, what: &str, array: &Array, expected: &Tensor) {
        let found = self.gpu.download(array).expect("floats");
        close(&format!("{what} ({:?})", self.element), &found, expected, Element::F32);
    }
}

fn bf16(v: f32) -> f32 {
    let bits = v.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

fn tensor(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
    Ok(Tensor::from_vec(wide, shape, &Device::Cpu)?)
}

fn list(t: &Tensor) -> Vec<f64> {
    flat(t).expect("values")
}

#[track_caller]
fn close(what: &str, found: &[f32], expected: &Tensor, element: Element) {
    let expected = list(expected);
    let found: Vec<f64> = found.iter().map(|&v| f64::from(v)).collect();
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let last_place = |e: f64| if element == Element::Bf16 { e.abs() / 256.0 } else { 0.0 };
    close_each(what, &found, &expected, |e| 2e-5 * largest + last_place(e));
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Labels as the GPU has them.
fn integers(gpu: &Gpu, values: &[i32]) -> Result<Array> {
    gpu.upload(&values.iter().map(|&v| f32::from_bits(v as u32)).collect::<Vec<_>>())
}
