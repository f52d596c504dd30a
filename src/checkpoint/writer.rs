//! Checkpoints off the compute path: a worker hands its module over and goes on.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use candle_core::Tensor;

use crate::checkpoint;
use crate::config::OnCheckpointError;
use crate::{Error, Result};

/// A module after a batch: how many batches were done, and its tensors, which nobody changes any more.
type Job = (u64, Vec<(String, Tensor)>);

/// Writes one worker's module on a thread of its own. One checkpoint is written at a time; the next waits.
pub struct Writer {
    jobs: SyncSender<Job>,
    done: Receiver<(u64, Result<()>)>,
    policy: OnCheckpointError,
    under_way: u64,
    written: Option<u64>,
}

impl Writer {
    /// A writer of module `module` into the folder `dir` of a run's checkpoints, of which that of `written` batches is there.
    ///
    /// # Errors
    /// [`Error::Run`] if the operating system refuses a thread.
    pub fn new(dir: PathBuf, module: usize, policy: OnCheckpointError, written: Option<u64>) -> Result<Self> {
        let (jobs, todo) = sync_channel::<Job>(1);
        let (report, done) = sync_channel(4);
        let body = move || {
            for (batches, tensors) in todo {
                let result = checkpoint::write_module(&dir, batches, module, tensors);
                if report.send((batches, result)).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name(format!("writer-{module}"))
            .spawn(body)
            .map_err(|e| Error::Run(format!("starting the checkpoint thread of module {module}: {e}")))?;
        Ok(Writer { jobs, done, policy, under_way: 0, written })
    }

    /// Begins to write; waits first for a checkpoint that is still being written.
    ///
    /// # Errors
    /// That of an earlier write, unless the policy is to go on.
    pub fn begin(&mut self, batches: u64, tensors: Vec<(String, Tensor)>) -> Result<()> {
        self.wait()?;
        self.jobs.send((batches, tensors)).map_err(|_| gone())?;
        self.under_way += 1;
        Ok(())
    }

    /// The newest checkpoint (batches done) that this worker's part of is on disk; never waits.
    ///
    /// # Errors
    /// As [`Writer::begin`].
    pub fn written(&mut self) -> Result<Option<u64>> {
        while let Ok((batches, result)) = self.done.try_recv() {
            self.note(batches, result)?;
        }
        Ok(self.written)
    }

    /// As [`Writer::written`] once nothing is under way.
    ///
    /// # Errors
    /// As [`Writer::begin`].
    pub fn wait(&mut self) -> Result<Option<u64>> {
        while self.under_way > 0 {
            let (batches, result) = self.done.recv().map_err(|_| gone())?;
            self.note(batches, result)?;
        }
        Ok(self.written)
    }

    fn note(&mut self, batches: u64, result: Result<()>) -> Result<()> {
        self.under_way -= 1;
        match (result, self.policy) {
            (Ok(()), _) => self.written = Some(batches),
            (Err(e), OnCheckpointError::Continue) => {
                log::error!("checkpoint {batches} could not be written, the run goes on without it: {e}");
            }
            (Err(e), OnCheckpointError::Stop) => return Err(e),
        }
        Ok(())
    }
}

fn gone() -> Error {
    Error::Run("the checkpoint thread is gone (a bug)".into())
}
