//! Links inside one process: a bounded ring of buffers that change hands, nothing copied on the way.
//!
//! A buffer is free, being filled by the sender, queued, or held by the receiver; it is moved from one owner
//! to the next, so there is no shared memory to get wrong. `depth` buffers exist, made at connect.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::link::{Link, Waited};
use super::message::{Buffer, Header};
use crate::{Error, Result};

/// Longest time until a waiting end notices that the process's links were stopped.
const GLANCE: Duration = Duration::from_millis(20);

struct Ring {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: Vec<Buffer>,
    queue: VecDeque<Buffer>,
    sender_gone: bool,
    receiver_gone: bool,
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is a set of moves that cannot be left half done, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `take` yields something, the links are stopped, or the link's timeout has passed.
    fn wait<T>(
        &self,
        link: &Link,
        late: impl Fn() -> Error,
        mut take: impl FnMut(&mut State) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut waited = Waited::new();
        let mut state = self.lock();
        loop {
            link.breaker.check()?;
            if let Some(value) = take(&mut state)? {
                return Ok(value);
            }
            let left = link.timeout.saturating_sub(waited.look());
            if left.is_zero() {
                return Err(late());
            }
            state = self.changed.wait_timeout(state, left.min(GLANCE)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Makes a link's two ends and its buffers.
pub(super) fn pair(link: &Arc<Link>) -> (Sender, Receiver) {
    let depth = link.spec.depth;
    let ring = Arc::new(Ring {
        state: Mutex::new(State {
            free: (0..depth).map(|_| link.spec.buffer(link.spec.words)).collect(),
            queue: VecDeque::with_capacity(depth),
            sender_gone: false,
            receiver_gone: false,
        }),
        changed: Condvar::new(),
    });
    let sender = Sender { ring: ring.clone(), link: link.clone(), filling: None, last: None, sequence: 0 };
    (sender, Receiver { ring, link: link.clone(), held: None, sequence: 0 })
}

/// The sending end of a link within one process.
pub struct Sender {
    ring: Arc<Ring>,
    link: Arc<Link>,
    filling: Option<Buffer>,
    last: Option<Header>,
    sequence: u32,
}

impl Sender {
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn slot(&mut self) -> Result<&mut [f32]> {
        let buffer = match self.filling.take() {
            Some(buffer) => buffer,
            None => {
                let (link, last) = (&self.link, &self.last);
                self.ring.wait(
                    link,
                    || link.send_timeout(last.as_ref()),
                    |state| {
                        if state.receiver_gone {
                            let text = format!("worker {} ended and takes no more messages", link.spec.to);
                            return Err(link.error(link.from_rank, text));
                        }
                        Ok(state.free.pop())
                    },
                )?
            }
        };
        Ok(self.filling.insert(buffer).payload_mut())
    }

    pub(super) fn ready(&self) -> Result<bool> {
        self.link.breaker.check()?;
        Ok(self.filling.is_some() || !self.ring.lock().free.is_empty())
    }

    pub(super) fn start(&mut self, header: &Header) -> Result<()> {
        self.link.check_outgoing(header)?;
        self.slot()?;
        let Some(mut buffer) = self.filling.take() else { return Ok(()) };
        buffer.set_header(header.encode(self.sequence));
        self.ring.lock().queue.push_back(buffer);
        self.ring.changed.notify_all();
        self.sequence = self.sequence.wrapping_add(1);
        self.last = Some(*header);
        Ok(())
    }

    /// A queued message stays readable whatever becomes of the sender, so nothing is left to wait for.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.link.breaker.check()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.link.breaker.trip(format!("worker {} panicked", self.link.spec.from));
        }
        self.ring.lock().sender_gone = true;
        self.ring.changed.notify_all();
    }
}

/// The receiving end of a link within one process.
pub struct Receiver {
    ring: Arc<Ring>,
    link: Arc<Link>,
    held: Option<(Header, Buffer)>,
    sequence: u32,
}

impl Receiver {
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Waits for the oldest unreleased message; `expected` is for the error text.
    pub(super) fn hold(&mut self, expected: Option<&Header>) -> Result<(Header, &[f32])> {
        let (header, buffer) = match self.held.take() {
            Some(held) => held,
            None => {
                let link = &self.link;
                let buffer = self.ring.wait(
                    link,
                    || link.receive_timeout(expected),
                    |state| {
                        let buffer = state.queue.pop_front();
                        if buffer.is_none() && state.sender_gone {
                            let what = expected.map_or_else(|| link.spec.kind.to_string(), |header| header.to_string());
                            let text = format!("worker {} ended without sending {what}", link.spec.from);
                            return Err(link.error(link.to_rank, text));
                        }
                        Ok(buffer)
                    },
                )?;
                (link.check_incoming(&buffer.header(), self.sequence, None)?, buffer)
            }
        };
        let (header, buffer) = self.held.insert((header, buffer));
        Ok((*header, &buffer.payload()[..header.words as usize]))
    }

    /// The held message's buffer as a whole.
    pub(super) fn whole(&mut self) -> &[f32] {
        self.held.as_ref().map_or(&[], |(_, buffer)| buffer.payload())
    }

    pub(super) fn ready(&self) -> Result<bool> {
        self.link.breaker.check()?;
        Ok(self.held.is_some() || !self.ring.lock().queue.is_empty())
    }

    pub(super) fn release(&mut self) -> Result<()> {
        let Some((_, buffer)) = self.held.take() else {
            return Err(self.link.error(self.link.to_rank, "released a message that is not held"));
        };
        self.sequence = self.sequence.wrapping_add(1);
        self.ring.lock().free.push(buffer);
        self.ring.changed.notify_all();
        Ok(())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.link.breaker.trip(format!("worker {} panicked", self.link.spec.to));
        }
        self.ring.lock().receiver_gone = true;
        self.ring.changed.notify_all();
    }
}
