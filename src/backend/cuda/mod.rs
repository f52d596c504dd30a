//! Modules on NVIDIA GPUs (`--features cuda`).
//!
//! A module's arrays are made once; a tick only launches kernels into the compute stream, and copies messages on streams of
//! their own beside it. Convolutions are cuDNN's in NHWC, everything else our own kernels, compiled by NVRTC for the GPU at
//! hand. Nothing of CUDA is needed to build: the libraries are loaded when a GPU is asked for.
//!
//! Read in this order: [`gpu`] (context, streams, memory), [`host_memory`] (what it copies from and to), [`shared`] (memory that
//! other processes write into), `kernels` and [`ops`] (one function a kernel), `dnn` and `product` (convolutions), [`param`],
//! `layers`, [`module`] (a module and its passes), `graphs` (passes captured and replayed), `parts` (a backward pass cut up), `capture` (what must not come beside a graph's making), [`optim`], `stage`, [`flat`] (gradients averaged over replicas), `passes` (when it was at work); [`peak`],
//! [`probe`], [`timed`] (for benchmarks). What callers use of all this, `cuda_off.rs` stands in for in a program without CUDA.

mod capture;
mod dnn;
mod event;
pub mod flat;
pub mod gpu;
mod graphs;
pub mod host_memory;
mod kernels;
mod layers;
mod libraries;
pub mod module;
pub mod ops;
pub mod optim;
pub mod param;
mod parts;
mod passes;
pub mod peak;
pub mod probe;
mod product;
pub mod shared;
mod stage;
pub mod timed;

pub use event::{Clock, Event};
pub use flat::Flat;
pub use gpu::{Array, Element, Gpu, describe, device_count};
pub use host_memory::Locked;
pub use libraries::check;
pub use peak::peaks;
pub use probe::Probe;
pub use shared::Place;

use super::stage::{CpuStage, Stage};
use super::{GpuPlacement, stage::StageSpec};
use crate::Result;

/// Moves a stage of the host to a GPU.
///
/// # Errors
/// [`crate::Error::Input`] if the GPU is too small for it; [`crate::Error::Run`] if CUDA fails.
pub fn stage(host: CpuStage, placement: &GpuPlacement) -> Result<Box<dyn Stage>> {
    Ok(Box::new(stage::CudaStage::new(host, placement)?))
}

/// A stage on GPU number `ordinal` whose passes wait for `seconds` each, its messages copied as a module's are; `alone` in its
/// process or not.
///
/// # Errors
/// As [`Gpu::open`].
pub fn timed_stage(spec: StageSpec, ordinal: usize, seconds: f64, alone: bool) -> Result<Box<dyn Stage>> {
    Ok(Box::new(timed::CudaTimedStage::new(spec, ordinal, seconds, alone)?))
}

/// The GPUs that the program could use here, or why it cannot use any.
pub fn usable() -> (usize, String) {
    match device_count() {
        Ok(0) => (0, "the driver shows this process none".into()),
        Ok(count) => (count, String::new()),
        Err(e) => (0, e.to_string()),
    }
}
