//! Sideways and Skip-Sideways training of video networks: one module a rank, no backward lock.

pub mod checkpoint;
pub mod cli;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod engine;
pub mod error;
pub mod files;
pub mod graph;
pub mod kernels;
pub mod machine;
pub mod metrics;
pub mod model;
pub mod network;
pub mod optim;
pub mod plan;
pub mod schedule;
pub mod transport;

pub use error::{Error, Result};
