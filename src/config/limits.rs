//! How large the numbers of a configuration may be. Beyond is nothing that any machine computes; sums and products of what is allowed
//! stay within their types.

use super::{Config, UpdateEvery};
use crate::{Error, Result};

/// What a key may be.
struct Limit {
    key: &'static str,
    value: u64,
    least: u64,
    most: u64,
}

fn limit(key: &'static str, value: usize, most: u64) -> Limit {
    Limit { key, value: value as u64, least: 1, most }
}

fn long(key: &'static str, value: u64, least: u64, most: u64) -> Limit {
    Limit { key, value, least, most }
}

impl Config {
    /// Checks every whole number.
    pub(super) fn validate_numbers(&self) -> Result<()> {
        let (data, model, train, run) = (&self.data, &self.model, &self.train, &self.run);
        let steps = match train.update_every {
            UpdateEvery::Steps(steps) => steps.max(1),
            UpdateEvery::Named(_) => 1,
        };
        let limits = [
            limit("data.frames", data.frames, 1 << 20),
            limit("data.stride", data.stride, 1 << 31),
            limit("data.batch", data.batch, 1 << 20),
            limit("data.crop", data.crop.unwrap_or(1), 1 << 13),
            limit("data.decode_threads", data.decode_threads, 1 << 8),
            limit("data.prefetch", data.prefetch, 1 << 16),
            limit("model.horizon", model.horizon, 1 << 16),
            limit("model.classes", model.classes.unwrap_or(1), 1 << 20),
            limit("model.modules", model.modules.unwrap_or(1), 1 << 12),
            limit("train.replicas", train.replicas, 1 << 16),
            limit("train.scale_lr", train.scale_lr.unwrap_or(1), 1 << 40),
            long("train.epochs", train.epochs, 1, MOST_BATCHES),
            long("train.batches", train.batches.unwrap_or(1), 1, MOST_BATCHES),
            long("train.update_every", steps, 1, u64::MAX),
            limit("run.threads", run.threads, 1 << 10),
            limit("run.keep", run.keep, 1 << 32),
            long("run.checkpoint_every", run.checkpoint_every, 1, u64::MAX),
            // Some thirty years.
            long("run.timeout", run.timeout, 1, 1_000_000_000),
        ];
        for Limit { key, value, least, most } in limits {
            if value < least {
                return Err(Error::input(format!("{key} = {value}: it must be at least {least}")));
            }
            if value > most {
                return Err(Error::input(format!("{key} = {value}: it must be at most {most}")));
            }
        }
        Ok(())
    }

    /// Means and deviations are of values u8/255.
    pub(super) fn validate_scale(&self) -> Result<()> {
        let (mean, std) = (self.data.mean, self.data.std);
        let refused = |why: &str| Err(Error::input(format!("data.mean = {mean:?}, data.std = {std:?}: {why}")));
        if std.iter().any(|s| !s.is_finite() || *s <= 0.0) || mean.iter().any(|m| !m.is_finite()) {
            return refused("means must be finite and deviations positive");
        }
        if mean.iter().any(|m| *m > 1.0) || std.iter().any(|s| *s > 1.0) {
            return refused(
                "they are of pixel values divided by 255, which lie between 0 and 1; values on the scale of 0 to 255 have to be \
                 divided by 255",
            );
        }
        if mean.iter().any(|m| *m < 0.0) {
            return refused("they are of pixel values divided by 255, which lie between 0 and 1: a mean is no less");
        }
        Ok(())
    }
}

/// Batches of a run, at most: numbers of ticks stay within 64 bits.
pub(crate) const MOST_BATCHES: u64 = 1 << 40;
