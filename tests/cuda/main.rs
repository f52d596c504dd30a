//! The GPU: its operators, training, messages and benchmarks; without a GPU on the emulator of CUDA's libraries.

mod bench;
#[path = "../common/mod.rs"]
mod common;
mod everywhere;
mod exchange;
mod ops;
mod replicas;
mod trace;
mod training;
