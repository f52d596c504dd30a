//! When a stage's passes were at work on the GPU, by events around them in the compute stream.

use std::time::{Duration, Instant};

use super::event::Clock;
use super::gpu::{Gpu, failed};
use crate::Result;
use crate::backend::stage::{DevicePass, Work};

/// Passes of a stage, noted while that is asked for.
#[derive(Default)]
pub struct Passes(Option<Noted>);

struct Noted {
    /// A moment by both clocks.
    host: Instant,
    device: Clock,
    /// Pairs of clocks for passes to come.
    free: Vec<[Clock; 2]>,
    /// What was launched, and when.
    launched: Vec<(Work, Instant, [Clock; 2])>,
    /// Whether the last of them is being launched.
    open: bool,
    /// Those there was no room for.
    dropped: usize,
}

impl Passes {
    /// Notes up to `room` passes from now on.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the driver refuses so many events, or what was launched before failed.
    pub fn note(&mut self, gpu: &Gpu, room: usize) -> Result<()> {
        let free = (0..room).map(|_| Ok([Clock::new(gpu)?, Clock::new(gpu)?])).collect::<Result<Vec<_>>>()?;
        let wait = || gpu.compute.synchronize().map_err(|e| failed("waiting for the GPU", &e));
        wait()?;
        let before = Instant::now();
        let device = Clock::now(gpu)?;
        wait()?;
        let host = before + before.elapsed() / 2;
        self.0 = Some(Noted { host, device, free, launched: Vec::with_capacity(room), open: false, dropped: 0 });
        Ok(())
    }

    /// `work` is launched next.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the driver refuses.
    pub fn begin(&mut self, gpu: &Gpu, work: Work) -> Result<()> {
        let Some(noted) = &mut self.0 else { return Ok(()) };
        let Some(clocks) = noted.free.pop() else {
            noted.dropped += 1;
            return Ok(());
        };
        clocks[0].record(gpu)?;
        noted.launched.push((work, Instant::now(), clocks));
        noted.open = true;
        Ok(())
    }

    /// It has been launched.
    ///
    /// # Errors
    /// As [`Passes::begin`].
    pub fn end(&mut self, gpu: &Gpu) -> Result<()> {
        let Some(noted) = &mut self.0 else { return Ok(()) };
        match (std::mem::take(&mut noted.open), noted.launched.last()) {
            (true, Some((.., [_, end]))) => end.record(gpu),
            _ => Ok(()),
        }
    }

    /// What was noted, by the host's clock. Waits until the GPU is through with it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if it failed.
    pub fn take(&mut self) -> Result<Vec<DevicePass>> {
        let Some(noted) = self.0.take() else { return Ok(Vec::new()) };
        if noted.dropped > 0 {
            log::warn!("{} passes of the GPU are not in the trace: record fewer batches", noted.dropped);
        }
        let (mut last, mut at) = (&noted.device, 0.0);
        let mut passes = Vec::with_capacity(noted.launched.len());
        // From one to the next: the driver tells times as 32-bit floats.
        let mut until = |clock| {
            at += last.until(clock)?;
            last = clock;
            Ok::<_, crate::Error>(noted.host + Duration::from_secs_f64(f64::max(at, 0.0)))
        };
        for (work, launched, [begin, end]) in &noted.launched {
            passes.push(DevicePass { work: *work, launched: *launched, begin: until(begin)?, end: until(end)? });
        }
        Ok(passes)
    }
}
