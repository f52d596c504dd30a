//! The two ends of a link between processes: rings of buffers, each with its own persistent request.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::link::Link;
use super::super::message::{Buffer, HEADER_WORDS, Header};
use super::Session;
use super::table::{Index, Slot};
use crate::Result;

/// A link's buffers on this side, used round and round.
struct Ring {
    session: Arc<Session>,
    link: Arc<Link>,
    /// Each with its request's place in the table.
    slots: Vec<(Index, Arc<Slot>)>,
    next: usize,
    sequence: u32,
}

impl Ring {
    /// The buffer whose turn it is.
    fn slot(&self) -> &Slot {
        &self.slots[self.next].1
    }

    /// Its contents; the caller has seen that it is ours.
    fn buffer(&mut self) -> &mut Buffer {
        debug_assert!(self.slot().is_mine());
        // SAFETY: the slot is MINE, so MPI does not touch it; `&mut self` makes this the only view of this end's.
        unsafe { &mut *self.slot().buffer.get() }
    }

    /// Is the next buffer ours?
    fn ready(&self) -> Result<bool> {
        self.link.breaker.check()?;
        if !self.slot().is_mine() {
            self.session.core.try_drive()?;
        }
        Ok(self.slot().is_mine())
    }

    /// Gives the buffer to MPI with `words` words, header included, and moves on.
    fn start(&mut self, words: usize) -> Result<()> {
        let core = &self.session.core;
        let started = core.lock().start(self.slots[self.next].0, words);
        started.inspect_err(|_| core.broken.store(true, Ordering::Relaxed))?;
        self.next = (self.next + 1) % self.slots.len();
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let panicking = std::thread::panicking();
        let core = &self.session.core;
        if panicking {
            core.broken.store(true, Ordering::Relaxed);
            self.link.breaker.trip("a worker of this process panicked");
        }
        let hurry = panicking || core.broken.load(Ordering::Relaxed) || self.link.breaker.check().is_err();
        self.slots.iter().for_each(|(index, _)| core.retire(*index, hurry));
    }
}

/// The sending end of a link to another process.
pub struct Sender {
    ring: Ring,
    last: Option<Header>,
}

impl Sender {
    pub(super) fn new(session: Arc<Session>, link: Arc<Link>, slots: Vec<(Index, Arc<Slot>)>) -> Self {
        Sender { ring: Ring { session, link, slots, next: 0, sequence: 0 }, last: None }
    }

    pub(in crate::comm) fn link(&self) -> &Link {
        &self.ring.link
    }

    pub(in crate::comm) fn slot(&mut self) -> Result<&mut [f32]> {
        let Ring { session, link, .. } = &self.ring;
        session.core.wait_for(self.ring.slot(), link, || link.send_timeout(self.last.as_ref()))?;
        Ok(self.ring.buffer().payload_mut())
    }

    pub(in crate::comm) fn ready(&self) -> Result<bool> {
        self.ring.ready()
    }

    pub(in crate::comm) fn start(&mut self, header: &Header) -> Result<()> {
        self.ring.link.check_outgoing(header)?;
        self.slot()?;
        let words = header.encode(self.ring.sequence);
        self.ring.buffer().set_header(words);
        self.ring.start(HEADER_WORDS + header.words as usize)?;
        self.last = Some(*header);
        // The thread may be in a long pause: a message that needs several rounds should not wait for it.
        if header.words >= LARGE
            && self.ring.session.core.resting.load(Ordering::Relaxed)
            && let Some(thread) = self.ring.session.core.progress.get()
        {
            thread.unpark();
        }
        Ok(())
    }

    pub(in crate::comm) fn flush(&mut self) -> Result<()> {
        let Ring { session, link, slots, .. } = &self.ring;
        for (_, slot) in slots {
            session.core.wait_for(slot, link, || link.send_timeout(self.last.as_ref()))?;
        }
        Ok(())
    }
}

/// Messages of this many words and more may need several rounds between the two sides.
const LARGE: u32 = 1024;

/// The receiving end of a link from another process.
pub struct Receiver {
    ring: Ring,
    held: Option<Header>,
}

impl Receiver {
    pub(super) fn new(session: Arc<Session>, link: Arc<Link>, slots: Vec<(Index, Arc<Slot>)>) -> Self {
        Receiver { ring: Ring { session, link, slots, next: 0, sequence: 0 }, held: None }
    }

    pub(in crate::comm) fn link(&self) -> &Link {
        &self.ring.link
    }

    pub(in crate::comm) fn hold(&mut self, expected: Option<&Header>) -> Result<(Header, &[f32])> {
        let header = match self.held {
            Some(header) => header,
            None => {
                let Ring { session, link, .. } = &self.ring;
                session.core.wait_for(self.ring.slot(), link, || link.receive_timeout(expected))?;
                let received = self.ring.slot().received.load(Ordering::Relaxed) as usize;
                let sequence = self.ring.sequence;
                let words = self.ring.buffer().header();
                let received = received.saturating_sub(HEADER_WORDS);
                *self.held.insert(self.ring.link.check_incoming(&words, sequence, Some(received))?)
            }
        };
        Ok((header, &self.ring.buffer().payload()[..header.words as usize]))
    }

    /// The held message's buffer as a whole.
    pub(in crate::comm) fn whole(&mut self) -> &[f32] {
        self.ring.buffer().payload()
    }

    pub(in crate::comm) fn ready(&self) -> Result<bool> {
        self.ring.ready()
    }

    pub(in crate::comm) fn release(&mut self) -> Result<()> {
        if self.held.take().is_none() {
            let link = &self.ring.link;
            return Err(link.error(link.to_rank, "released a message that is not held"));
        }
        self.ring.start(HEADER_WORDS + self.ring.link.spec.words)
    }
}

/// One end of a link whose messages are values alone, without headers, in memory outside of the link.
///
/// Both ends have `depth` places, used in turn. A sender fills the one that [`Values::wait`] names and starts it; a receiver
/// reads the one that it names and starts it again, which gives it back.
pub struct Values {
    ring: Ring,
    sending: bool,
}

impl Values {
    pub(super) fn new(session: Arc<Session>, link: Arc<Link>, slots: Vec<(Index, Arc<Slot>)>, sending: bool) -> Self {
        Values { ring: Ring { session, link, slots, next: 0, sequence: 0 }, sending }
    }

    /// Waits until the next place is free again, or filled; its number.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the other end is gone, the links were stopped, or the timeout passed.
    pub fn wait(&mut self) -> Result<usize> {
        let Ring { session, link, .. } = &self.ring;
        let late = || if self.sending { link.send_timeout(None) } else { link.receive_timeout(None) };
        session.core.wait_for(self.ring.slot(), link, late)?;
        let (arrived, due) = (self.ring.slot().received.load(Ordering::Relaxed) as usize, link.spec.words);
        if !self.sending && arrived != due {
            return Err(link.error(link.to_rank, format!("{arrived} words of values came, {due} were due")));
        }
        Ok(self.ring.next)
    }

    /// Sends the place, or has it filled anew.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when MPI refuses.
    pub fn start(&mut self) -> Result<()> {
        self.ring.start(self.ring.link.spec.words)
    }

    /// Waits until all that was sent has left.
    ///
    /// # Errors
    /// As [`Values::wait`].
    pub fn flush(&mut self) -> Result<()> {
        let Ring { session, link, slots, .. } = &self.ring;
        let mut sent = slots.iter().filter(|_| self.sending);
        sent.try_for_each(|(_, slot)| session.core.wait_for(slot, link, || link.send_timeout(None)))
    }
}
