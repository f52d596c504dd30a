//! Requests to stop, to write a checkpoint or to record, and how all workers agree on the batch after which they follow.
//!
//! A request may reach any rank. It travels in the headers of messages that are sent anyway: down with cotangents, and with
//! reports to rank 0, where module 1 of replica 0 works. That one decides, once a batch, at the last step that every module
//! has. Its decision travels up in the headers of that step's activations (to the other replicas' first modules on links of
//! their own, from one to the next four), so every worker knows before its batch ends what to do then. No collective, no extra
//! message in a tick.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::comm::{BatchId, Header, Kind, Orders, Receiver, Sender};
use crate::{Error, Result};

/// Files in the run folder that ask for something, and for what.
const FILES: [(&str, Orders); 3] =
    [("STOP", Orders::FINISH), ("CHECKPOINT", Orders::CHECKPOINT), ("TRACE", Orders::TRACE)];
/// Time between two looks for them.
const LOOK: Duration = Duration::from_secs(1);

/// What this process has been asked for: shared by its workers, the console and whoever handles signals.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<AtomicU32>);

impl Requests {
    /// Adds requests.
    pub fn raise(&self, orders: Orders) {
        self.0.fetch_or(orders.bits(), Ordering::Relaxed);
    }

    /// What was asked for so far.
    pub fn pending(&self) -> Orders {
        Orders::from_bits_truncate(self.0.load(Ordering::Relaxed))
    }

    /// Takes those of `which` that were asked for.
    fn take(&self, which: Orders) -> Orders {
        Orders::from_bits_truncate(self.0.fetch_and(!which.bits(), Ordering::Relaxed)) & which
    }
}

/// Looks for the files of a run folder by which people ask.
#[derive(Debug)]
pub struct Files {
    run: PathBuf,
    looked: Option<Instant>,
}

impl Files {
    /// Those in run folder `run`.
    pub fn new(run: &Path) -> Self {
        Files { run: run.to_path_buf(), looked: None }
    }

    /// What the files there ask for, at most once a second; they are removed.
    pub fn look(&mut self) -> Orders {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK) {
            return Orders::empty();
        }
        self.looked = Some(Instant::now());
        let mut asked = Orders::empty();
        for (name, orders) in FILES {
            let path = self.run.join(name);
            if path.exists() {
                match std::fs::remove_file(&path) {
                    Ok(()) => {
                        log::info!("{} found: {}", path.display(), describe(orders));
                        asked |= orders;
                    }
                    Err(e) => log::warn!("{} cannot be removed, so it is not followed: {e}", path.display()),
                }
            }
        }
        asked
    }
}

/// In words, what a decision means.
pub fn describe(decision: Orders) -> &'static str {
    match decision {
        _ if decision.contains(Orders::UNDO) => {
            "undoing this batch, and stopping with a checkpoint of what was before it"
        }
        _ if decision.contains(Orders::FINISH) => "ending after this batch with a checkpoint",
        _ if decision.contains(Orders::STOP) => "stopping after this batch with a checkpoint, to be resumed",
        _ if decision.contains(Orders::CHECKPOINT | Orders::TRACE) => {
            "writing a checkpoint after this batch, and recording the next ones"
        }
        _ if decision.contains(Orders::CHECKPOINT) => "writing a checkpoint after this batch",
        _ if decision.contains(Orders::TRACE) => "recording the batches after this one",
        _ => "nothing",
    }
}

/// A first module's part in deciding.
pub struct Decider {
    by: By,
    /// To other replicas' first modules, which hear it from this one.
    others: Vec<(u32, Sender)>,
}

/// How a first module knows what was decided.
pub enum By {
    /// It decides: replica 0's. People ask with these files.
    Files(Files),
    /// It is told.
    Link(Box<(u32, Receiver)>),
}

impl Decider {
    /// One that knows `by`, and passes on to `others`.
    pub fn new(by: By, others: Vec<(u32, Sender)>) -> Self {
        Decider { by, others }
    }

    /// Whether this one decides.
    pub fn is_chief(&self) -> bool {
        matches!(self.by, By::Files(_))
    }

    /// What to do after `batch`, decided or heard of, and passed on; `own` is what the chief adds to what was asked for.
    ///
    /// # Errors
    /// [`Error::Transport`] if another replica is gone.
    pub fn decide(&mut self, requests: &Requests, own: Orders, batch: BatchId, step: usize) -> Result<Orders> {
        let due = |id: u32| Header::new(Kind::Control, id, batch, step as u32, [1; 4]);
        let decision = match &mut self.by {
            By::Files(files) => {
                requests.raise(files.look());
                // A validation changes no parameters: what does not end the run can wait for its end.
                let which = if batch.is_training() { Orders::all() } else { Orders::ENDS };
                let decision = requests.take(which) | own;
                if !decision.is_empty() {
                    log::info!("{batch}: {}", describe(decision));
                }
                decision
            }
            By::Link(link) => {
                let (id, receiver) = &mut **link;
                let (decision, _) = receiver.wait_with_orders(&due(*id))?;
                receiver.release()?;
                decision
            }
        };
        for (id, sender) in &mut self.others {
            sender.send(&due(*id).stamped(0, decision), &[0.0])?;
        }
        Ok(decision)
    }

    /// Waits until everything sent has left.
    ///
    /// # Errors
    /// As [`Decider::decide`].
    pub fn flush(&mut self) -> Result<()> {
        self.others.iter_mut().try_for_each(|(_, sender)| sender.flush())
    }
}

/// What a run ends with whose data could not be read: `failure` says why, `batches` are done and in the checkpoint.
pub fn undone(failure: &str, batches: u64) -> Error {
    Error::Input(format!(
        "{failure}; the checkpoint step-{batches:08} has all that was trained before: once the data can be read, the same \
         command goes on"
    ))
}

/// What a run ends with that stopped early and can be resumed.
pub fn stopped(by: &str) -> Error {
    Error::Stopped(format!("stopped early by {by} with a checkpoint; the same command goes on"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_ask_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files::new(dir.path());
        assert_eq!(files.look(), Orders::empty());
        std::fs::write(dir.path().join("STOP"), "").unwrap();
        std::fs::write(dir.path().join("CHECKPOINT"), "").unwrap();
        assert_eq!(files.look(), Orders::empty(), "looked a moment ago");
        files.looked = None;
        assert_eq!(files.look(), Orders::FINISH | Orders::CHECKPOINT);
        files.looked = None;
        assert_eq!(files.look(), Orders::empty(), "the files are gone");
    }
}
