//! `[run]`: where and on what a run computes, what it writes, and what it does when something fails.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::backend::Precision;
use crate::comm::exchange::Exchange;

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The run folder: resolved configuration, metrics, log, checkpoints.
    pub dir: PathBuf,
    /// Where modules compute.
    pub device: DeviceChoice,
    /// Number format.
    pub precision: Precision,
    /// Whether a GPU's passes are replayed as CUDA graphs.
    pub graphs: bool,
    /// How messages get from GPU to GPU.
    pub exchange: Exchange,
    /// Number format of messages.
    pub wire: Wire,
    /// Compute threads a module (CPU).
    pub threads: usize,
    /// Batches between checkpoints; one is also written at the start and at the end.
    pub checkpoint_every: u64,
    /// Checkpoints kept, the newest ones (the start's is always kept).
    pub keep: usize,
    /// Seconds without an awaited message after which a rank gives up.
    pub timeout: u64,
    /// Whether a checkpoint that cannot be written ends the run.
    pub on_checkpoint_error: OnCheckpointError,
    /// Whether a loss, a cotangent or a gradient that is not finite ends the run.
    pub on_nonfinite: OnNonfinite,
}

impl RunConfig {
    /// Whether messages carry bfloat16.
    pub fn halves_messages(&self) -> bool {
        self.wire == Wire::Bf16 || self.wire == Wire::Auto && self.precision == Precision::Bf16
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            dir: PathBuf::from("runs/run"),
            device: DeviceChoice::default(),
            precision: Precision::default(),
            graphs: true,
            exchange: Exchange::default(),
            wire: Wire::default(),
            threads: 1,
            checkpoint_every: 100,
            keep: 2,
            timeout: 300,
            on_checkpoint_error: OnCheckpointError::default(),
            on_nonfinite: OnNonfinite::default(),
        }
    }
}

/// Where modules compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best this build and machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU a rank.
    Cuda,
}

/// Number format of activations and cotangents in messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As activations are: bfloat16 with `precision = "bf16"`, which loses nothing, else 32-bit floats.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16: half the bytes; values are rounded to 8 bits of mantissa, wherever modules run (GPU only).
    Bf16,
}

/// What to do when a checkpoint cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCheckpointError {
    /// End the run with the error; the last good checkpoint is kept.
    #[default]
    Stop,
    /// Report it, and try again when the next is due; lines of `metrics.jsonl` wait as well. At the run's end it is an error
    /// all the same.
    Continue,
}

/// What to do about a loss, a cotangent or a gradient that is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNonfinite {
    /// End the run with an error that names rank, module, batch, step and tick.
    #[default]
    Stop,
    /// Leave it out (zeros in its place; an update is not made), and count it in the metrics.
    Skip,
}
