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
