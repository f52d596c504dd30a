//! What several test programs share; not every one needs all of it.
#![allow(dead_code)]

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod jobs;
pub mod mpirun;
pub mod runs;
pub mod tmpfs;
