//! Sideways and Skip-Sideways training of video networks: one module a rank, no backward lock.

pub mod backend;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod data;
pub mod error;
pub mod method;
pub mod network;
pub mod nn;
pub mod pipeline;
pub mod plan;
pub mod setup;
pub mod sys;
pub mod trainer;

pub use error::{Error, Result};
