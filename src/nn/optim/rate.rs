//! Learning-rate schedules: pure functions of the place in a run.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate changes over a run. The unit is one batch; all begin with a linear warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum LrSchedule {
    /// The same throughout.
    Constant {
        /// Batches of the warm-up.
        #[serde(default)]
        warmup: u64,
    },
    /// Multiplied by `gamma` after each `every` batches.
    Step {
        /// Batches of the warm-up.
        #[serde(default)]
        warmup: u64,
        /// Batches between drops.
        every: u64,
        /// Factor of a drop.
        #[serde(default = "tenth")]
        gamma: f64,
    },
    /// Half a cosine from 1 after the warm-up down to `floor` at the run's end.
    Cosine {
        /// Batches of the warm-up.
        #[serde(default)]
        warmup: u64,
        /// Factor at the end.
        #[serde(default)]
        floor: f64,
    },
}

fn tenth() -> f64 {
    0.1
}

impl Default for LrSchedule {
    fn default() -> Self {
        LrSchedule::Constant { warmup: 0 }
    }
}

impl LrSchedule {
    /// What the learning rate is multiplied by at batch `batch` (from 0) of `total`. In the warm-up (batch + 1) / warmup.
    pub fn factor(&self, batch: u64, total: u64) -> f64 {
        let (LrSchedule::Constant { warmup } | LrSchedule::Step { warmup, .. } | LrSchedule::Cosine { warmup, .. }) =
            *self;
        if batch < warmup {
            return (batch + 1) as f64 / warmup as f64;
        }
        match *self {
            LrSchedule::Constant { .. } => 1.0,
            LrSchedule::Step { every, gamma, .. } => gamma.powf((batch / every.max(1)) as f64),
            LrSchedule::Cosine { floor, .. } => {
                let span = total.saturating_sub(warmup).max(1) as f64;
                let progress = ((batch - warmup) as f64 / span).min(1.0);
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        }
    }

    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`Error::Input`] that names the setting and its range.
    pub fn validate(&self) -> Result<()> {
        match *self {
            LrSchedule::Step { every: 0, .. } => Err(Error::input("lr_schedule: every should be at least 1")),
            LrSchedule::Step { gamma: v, .. } | LrSchedule::Cosine { floor: v, .. } if !(0.0..=1.0).contains(&v) => {
                Err(Error::input(format!("lr_schedule: gamma and floor should be from 0 to 1, not {v}")))
            }
            _ => Ok(()),
        }
    }
}
