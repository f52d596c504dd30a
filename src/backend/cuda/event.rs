//! Moments of a GPU's streams: whether they have come, and when.

use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::gpu::{Gpu, failed};
use crate::Result;

/// A moment that may not have come yet.
#[derive(Clone)]
pub struct Event(Arc<CudaEvent>);

impl Event {
    /// That at which `event` was last recorded.
    pub(super) fn new(event: &Arc<CudaEvent>) -> Self {
        Event(event.clone())
    }

    /// Whether it has come.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched before it failed.
    pub fn is_complete(&self) -> Result<bool> {
        self.0.try_is_complete().map_err(|e| failed("asking for a copy", &e))
    }
}

/// A moment in the compute stream that tells the time.
pub struct Clock(CudaEvent);

impl Clock {
    /// The moment behind all that was launched so far.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the driver refuses.
    pub(super) fn now(gpu: &Gpu) -> Result<Self> {
        let clock = Clock::new(gpu)?;
        clock.record(gpu)?;
        Ok(clock)
    }

    /// A clock that is yet to be recorded.
    ///
    /// # Errors
    /// As [`Clock::now`].
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        gpu.clock().map(Clock)
    }

    /// Sets it to the moment behind all that was launched so far.
    ///
    /// # Errors
    /// As [`Clock::now`].
    pub(super) fn record(&self, gpu: &Gpu) -> Result<()> {
        self.0.record(&gpu.compute).map_err(|e| failed("recording a clock", &e))
    }

    /// Seconds to a later moment. Waits until the GPU is there.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched before failed.
    pub fn until(&self, later: &Clock) -> Result<f64> {
        let ms = self.0.elapsed_ms(&later.0).map_err(|e| failed("reading a clock", &e))?;
        Ok(f64::from(ms) * 1e-3)
    }
}
