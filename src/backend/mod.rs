//! What computes: kernels for the processor ([`cpu`]), and for NVIDIA GPUs ([`cuda`]).

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
