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
    /// Record these batches for `sideways trace`, such as `"100..103"`; absent: none, unless a file `TRACE` in the run folder asks
    /// for some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<Batches>,
    /// Whether a checkpoint that cannot be written ends the run.
    pub on_checkpoint_error: OnCheckpointError,
    /// Whether a loss, a cotangent or a gradient that is not finite ends the run.
    pub on_nonfinite: OnNonfinite,
    /// Whether TensorBoard's event files are written into the run folder too.
    pub tensorboard: bool,
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
            trace: None,
            on_checkpoint_error: OnCheckpointError::default(),
            on_nonfinite: OnNonfinite::default(),
            tensorboard: false,
        }
    }
}

/// Some batches in a row: from when `first` are done until `end` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct Batches {
    /// Batches done before.
    pub first: u64,
    /// Batches done then; more than `first`.
    pub end: u64,
}

impl std::str::FromStr for Batches {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once("..").map(|(first, end)| (first.trim().parse(), end.trim().parse()));
        match numbers {
            Some((Ok(first), Ok(end))) if first < end => Ok(Batches { first, end }),
            Some((Ok(first), Ok(end))) => {
                Err(format!("{first}..{end} are no batches: the second number is to be larger than the first"))
            }
            _ => Err(format!(
                "expected \"FIRST..END\", such as \"100..103\": from when 100 batches are done until 103 are; found \"{text}\""
            )),
        }
    }
}

impl std::fmt::Display for Batches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

/// As a configuration has them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected \"FIRST..END\", such as \"100..103\"")]
enum Written {
    Text(String),
}

impl TryFrom<Written> for Batches {
    type Error = String;

    fn try_from(Written::Text(text): Written) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Batches> for String {
    fn from(batches: Batches) -> Self {
        batches.to_string()
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
