//! What both ends of a link know about it, and the switch that stops all of a process's links at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::LinkSpec;
use super::message::{HEADER_WORDS, Header};
use crate::{Error, Result};

/// Stops every link of this process: whoever waits, or sends, gets an error with the reason.
///
/// A worker that fails trips it, so that its neighbours end too instead of waiting for ever. A worker
/// that panics trips it by dropping its ends of the links.
#[derive(Clone, Default)]
pub struct Breaker(Arc<Tripped>);

#[derive(Default)]
struct Tripped {
    yes: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Breaker {
    /// Stops all links. The first reason given is the one reported.
    pub fn trip(&self, reason: impl Into<String>) {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.into());
        self.0.yes.store(true, Ordering::Release);
    }

    /// Why the links were stopped, if they were.
    pub fn reason(&self) -> Option<String> {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An error if the links were stopped.
    pub fn check(&self) -> Result<()> {
        if !self.0.yes.load(Ordering::Acquire) {
            return Ok(());
        }
        let reason = self.reason().unwrap_or_default();
        Err(Error::Transport(format!("stopped because another worker of this process failed: {reason}")))
    }
}

/// A link as both its ends see it: the specification, where the ends are, and how errors name it.
pub(super) struct Link {
    pub(super) spec: LinkSpec,
    pub(super) from_rank: usize,
    pub(super) to_rank: usize,
    pub(super) timeout: Duration,
    pub(super) breaker: Breaker,
}

impl Link {
    /// `link 7 "module 2 -> 4 (skip)", worker 1 on rank 0 to worker 3 on rank 1`.
    pub(super) fn describe(&self) -> String {
        let LinkSpec { id, name, from, to, .. } = &self.spec;
        format!(
            "link {id} \"{name}\", worker {from} on rank {} to worker {to} on rank {}",
            self.from_rank, self.to_rank
        )
    }

    /// A transport error that names this link and the rank that reports it.
    pub(super) fn error(&self, rank: usize, text: impl std::fmt::Display) -> Error {
        Error::Transport(format!("rank {rank}, {}: {text}", self.describe()))
    }

    /// The error of a receiver whose message did not come in time; `expected` is what it waited for.
    pub(super) fn receive_timeout(&self, expected: Option<&Header>) -> Error {
        let seconds = self.timeout.as_secs_f64();
        let what = expected.map_or_else(|| format!("{}", self.spec.kind), |header| header.to_string());
        self.error(
            self.to_rank,
            format!(
                "waited {seconds:.1} s for {what} and nothing came; is rank {} alive, is the timeout long enough?",
                self.from_rank
            ),
        )
    }

    /// The error of a sender whose oldest message was not taken in time; `last` is what it sent last.
    pub(super) fn send_timeout(&self, last: Option<&Header>) -> Error {
        let seconds = self.timeout.as_secs_f64();
        let what = last.map_or_else(String::new, |header| format!(" after sending {header}"));
        self.error(
            self.from_rank,
            format!(
                "waited {seconds:.1} s for a free buffer (depth {}){what}: worker {} takes no messages",
                self.spec.depth, self.spec.to
            ),
        )
    }

    /// Refuses a header that does not belong on this link, before it is sent.
    pub(super) fn check_outgoing(&self, header: &Header) -> Result<()> {
        let LinkSpec { id, kind, words, .. } = &self.spec;
        if header.link != *id || header.kind != *kind {
            return Err(
                self.error(self.from_rank, format!("{header} was given to a link of {kind} messages on link {id}"))
            );
        }
        if header.words as usize > *words {
            return Err(self.error(self.from_rank, format!("{header} is larger than the link's {words} words")));
        }
        Ok(())
    }

    /// Reads a header that has arrived as message number `sequence` of this link.
    ///
    /// `received` is the payload length the transport saw, where it knows it.
    pub(super) fn check_incoming(
        &self,
        words: &[u32; HEADER_WORDS],
        sequence: u32,
        received: Option<usize>,
    ) -> Result<Header> {
        let (header, number) = Header::decode(words).map_err(|error| self.error(self.to_rank, error))?;
        if number != sequence {
            return Err(self.error(self.to_rank, format!("{header} is message {number}, expected message {sequence}")));
        }
        if header.words as usize > self.spec.words {
            return Err(
                self.error(self.to_rank, format!("{header} is larger than the link's {} words", self.spec.words))
            );
        }
        if let Some(received) = received.filter(|received| *received != header.words as usize) {
            return Err(self.error(self.to_rank, format!("{header} came with {received} words")));
        }
        Ok(header)
    }

    /// Compares a message that came with the one that was due.
    pub(super) fn verify(&self, got: &Header, expected: &Header) -> Result<()> {
        got.verify(expected).map_err(|text| self.error(self.to_rank, text))
    }
}

/// How long an end has waited: time in which the process did not run, suspended with its job, does not count.
pub(super) struct Waited {
    counted: Duration,
    last: Instant,
}

/// Who waits looks several times a second. A longer gap than this is the process's own.
const GAP: Duration = Duration::from_secs(10);

impl Waited {
    pub(super) fn new() -> Self {
        Waited { counted: Duration::ZERO, last: Instant::now() }
    }

    /// The time counted up to now.
    pub(super) fn look(&mut self) -> Duration {
        self.look_at(Instant::now())
    }

    fn look_at(&mut self, now: Instant) -> Duration {
        self.counted += now.saturating_duration_since(self.last).min(GAP);
        self.last = now;
        self.counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_process_has_not_waited() {
        let mut waited = Waited::new();
        let at = |seconds: u64| waited.last + Duration::from_secs(seconds);
        let times = [1, 2, 1000, 1001, 1001].map(at);
        let counted: Vec<u64> = times.map(|now| waited.look_at(now).as_secs()).into();
        assert_eq!(counted, [1, 2, 12, 13, 13]);
    }
}
