//! Modules on NVIDIA GPUs (`--features cuda`).
//!
//! A module's arrays are made once; a tick only launches kernels into the compute stream, and copies messages on streams of
//! their own beside it. Convolutions are cuDNN's in NHWC, everything else our own kernels, compiled by NVRTC for the GPU at
//! hand. Nothing of CUDA is needed to build: the libraries are loaded when a GPU is asked for.
//!
//! Read in this order: [`gpu`] (context, streams, memory), [`host_memory`] (what it copies from and to), [`shared`] (memory that
//! other processes write into), `kernels` and [`ops`] (one function a kernel), `dnn` and `product` (convolutions), [`param`],
//! `layers`, [`module`] (a module and its graphs), `capture` (what must not come beside a graph's making), [`optim`]; [`peak`],
//! [`wait`] (for benchmarks).

mod capture;
mod dnn;
pub mod gpu;
pub mod host_memory;
mod kernels;
mod layers;
mod libraries;
pub mod module;
pub mod ops;
pub mod optim;
pub mod param;
pub mod peak;
mod product;
pub mod shared;
pub mod wait;

pub use gpu::{Array, Element, Gpu, device_count};
pub use libraries::check;
