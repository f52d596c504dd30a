//! A training run from its start to its end: checks, resuming, checkpoints, what rank 0 gathers.

pub mod console;
pub mod limits;
pub mod preflight;
pub mod run;
pub mod run_range;
pub mod state;
