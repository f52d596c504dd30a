//! What computes: kernels for the processor ([`cpu`]), NVIDIA GPUs ([`cuda`]), and on either one a [`stage`], which is all that the
//! rest of the program knows of them.

pub mod cpu;
#[cfg_attr(not(feature = "cuda"), path = "cuda_off.rs")]
pub mod cuda;
pub mod slots;
pub mod stage;

use serde::{Deserialize, Serialize};

/// Number format of activations. Parameters and their gradients are 32-bit floats always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// The same, but factors of convolutions are rounded to 10 bits of mantissa (GPU only).
    Tf32,
    /// bfloat16, with sums in 32-bit floats (GPU only).
    Bf16,
}

/// How a stage is put on a GPU.
#[derive(Clone, Copy, Debug)]
pub struct GpuPlacement {
    /// The GPU's number among those the process sees.
    pub ordinal: usize,
    /// Number format.
    pub precision: Precision,
    /// Whether messages carry bfloat16.
    pub half_messages: bool,
    /// Whether passes are replayed as CUDA graphs.
    pub graphs: bool,
    /// Bytes of its memory that the stage is predicted to need.
    pub needed: u64,
    /// Modules that share it.
    pub modules_on_it: usize,
}

/// Rates of a GPU.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    /// Bytes a second, read and written, of copies within the GPU's memory that no cache holds.
    pub memory: f64,
    /// Operations a second (a multiply-add counts two) of products of 32-bit floats.
    pub f32: f64,
    /// The same with factors in TF32.
    pub tf32: f64,
    /// The same of bfloat16 with sums in 32-bit floats.
    pub bf16: f64,
    /// Bytes a second of copies from page-locked host memory to the GPU.
    pub to_device: f64,
    /// Bytes a second of copies from the GPU to page-locked host memory.
    pub to_host: f64,
}
