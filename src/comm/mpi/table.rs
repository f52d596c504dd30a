//! The requests of a rank, each with its buffer: what is behind the rank's one lock.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::calls::{Comm, Completions, Request, Tested};
use crate::comm::Outside;
use crate::comm::link::Link;
use crate::comm::message::{Buffer, Kind};
use crate::{Error, Result};

/// A buffer of this side belongs to the worker.
const MINE: u8 = 0;
/// It is in MPI's hands.
const FLYING: u8 = 1;
/// Its request failed; it stays untouched.
const FAILED: u8 = 2;

/// One buffer, owned in turn by the worker's end and by MPI.
pub(super) struct Slot {
    pub(super) buffer: UnsafeCell<Buffer>,
    state: AtomicU8,
    /// Words that came, header included.
    pub(super) received: AtomicU32,
}

// SAFETY: `state` says who may touch the buffer; it changes hands with acquire and release ordering.
unsafe impl Sync for Slot {}

impl Slot {
    pub(super) fn new(buffer: Buffer) -> Slot {
        Slot { buffer: UnsafeCell::new(buffer), state: AtomicU8::new(MINE), received: AtomicU32::new(0) }
    }

    pub(super) fn is_mine(&self) -> bool {
        self.state.load(Ordering::Acquire) == MINE
    }
}

/// A request of the table, and what it serves.
pub(super) struct Entry {
    pub(super) slot: Arc<Slot>,
    /// The persistent request; the table's own place may hold a one-off send of a shorter message instead.
    pub(super) persistent: Request,
    pub(super) sending: bool,
    pub(super) comm: Comm,
    pub(super) link: Arc<Link>,
    pub(super) words: usize,
    /// Its end was dropped: outcomes no longer matter.
    pub(super) retired: bool,
    /// What the buffer is part of, where it is not the slot's own.
    pub(super) outside: Option<Outside>,
}

/// Where a request is in the table.
#[derive(Clone, Copy)]
pub(super) struct Index {
    list: usize,
    place: usize,
}

/// The list of reports' requests; 0 has all others.
const REPORTS: usize = 1;
/// How many of a list are tested at a time. Rank 0 has a report from every worker due, and a test of 16 384 requests took
/// 0.3 ms. Reports may come a little later; what the modules wait for may not.
const AT_ONCE: [usize; 2] = [usize::MAX, 512];

/// Requests that are tested in turn.
#[derive(Default)]
struct List {
    requests: Vec<Request>,
    entries: Vec<Option<Entry>>,
    /// Places without a request.
    free: Vec<usize>,
    next: usize,
}

impl List {
    /// Whose turn it is: up to `most`.
    fn turn(&mut self, most: usize) -> Range<usize> {
        let first = if self.next < self.requests.len() { self.next } else { 0 };
        self.next = first.saturating_add(most).min(self.requests.len());
        first..self.next
    }
}

/// All requests of this rank. Exists once, inside the rank's lock.
#[derive(Default)]
pub(super) struct Table {
    lists: [List; 2],
    completions: Completions,
    pub(super) comm: Option<Comm>,
    pub(super) sends_flying: usize,
    failure: Option<String>,
}

impl Table {
    /// Lets MPI work, and hands back the buffers of requests that completed. Returns how many did.
    pub(super) fn drive(&mut self) -> Result<usize> {
        if let Some(failure) = &self.failure {
            return Err(Error::Transport(failure.clone()));
        }
        let (mut completed, mut active) = (0, false);
        for (list, at_once) in AT_ONCE.into_iter().enumerate() {
            let turn = self.lists[list].turn(at_once);
            if turn.is_empty() {
                continue;
            }
            match self.completions.test_some(&mut self.lists[list].requests[turn.clone()])? {
                Tested::Completed(number) => {
                    active = true;
                    completed += number;
                    (0..number).for_each(|n| self.take(list, turn.start, n));
                }
                Tested::NoneActive => {}
            }
        }
        if !active {
            self.comm.map_or(Ok(()), Comm::progress)?;
        }
        match &self.failure {
            Some(failure) => Err(Error::Transport(failure.clone())),
            None => Ok(completed),
        }
    }

    /// Takes the `n`-th outcome of a test of list `list` from request `first` on.
    fn take(&mut self, list: usize, first: usize, n: usize) {
        let (place, outcome) = self.completions.outcome(n);
        let (list, place) = (&mut self.lists[list], first + place);
        let Some(entry) = &list.entries[place] else { return };
        list.requests[place] = entry.persistent;
        self.sends_flying -= usize::from(entry.sending);
        match outcome {
            Ok(words) => {
                entry.slot.received.store(words as u32, Ordering::Relaxed);
                entry.slot.state.store(MINE, Ordering::Release);
            }
            Err(_) if entry.retired => entry.slot.state.store(MINE, Ordering::Release),
            Err(text) => {
                entry.slot.state.store(FAILED, Ordering::Release);
                let rank = if entry.sending { entry.link.from_rank } else { entry.link.to_rank };
                self.failure = Some(entry.link.error(rank, text).to_string());
            }
        }
    }

    /// Adds a request with its buffer; returns its place.
    pub(super) fn add(&mut self, entry: Entry) -> Index {
        let list = if entry.link.spec.kind == Kind::Report { REPORTS } else { 0 };
        let (request, List { requests, entries, free, .. }) = (entry.persistent, &mut self.lists[list]);
        let place = free.pop().unwrap_or(entries.len());
        if place < entries.len() {
            (entries[place], requests[place]) = (Some(entry), request);
        } else {
            entries.push(Some(entry));
            requests.push(request);
            self.completions.reserve(requests.len().min(AT_ONCE[list]));
        }
        Index { list, place }
    }

    /// Gives a buffer to MPI: starts its receive, or the send of its first `words` words, header included.
    pub(super) fn start(&mut self, index: Index, words: usize) -> Result<()> {
        let List { requests, entries, .. } = &mut self.lists[index.list];
        let Some(entry) = &entries[index.place] else { return Ok(()) };
        debug_assert!(entry.slot.is_mine());
        // SAFETY: the buffer belongs to the calling end (MINE), lives as long as its entry, and is FLYING, so
        // untouched, from here until `drive` sees the request complete.
        unsafe {
            if words == entry.words {
                requests[index.place].start()?;
            } else {
                let (to, tag) = (entry.link.to_rank, entry.link.spec.id);
                debug_assert!(entry.outside.is_none(), "values are sent whole");
                let start = (*entry.slot.buffer.get()).start();
                requests[index.place] = entry.comm.send(start, words, to, tag)?;
            }
        }
        entry.slot.state.store(FLYING, Ordering::Release);
        self.sends_flying += usize::from(entry.sending);
        Ok(())
    }

    /// Marks a request whose end was dropped: its slot, whether it sends, and its link.
    pub(super) fn retire(&mut self, index: Index) -> Option<(Arc<Slot>, bool, Arc<Link>)> {
        let entry = self.lists[index.list].entries[index.place].as_mut()?;
        entry.retired = true;
        Some((entry.slot.clone(), entry.sending, entry.link.clone()))
    }

    /// Asks for an active receive to be given up.
    pub(super) fn cancel(&mut self, index: Index) -> Result<()> {
        self.lists[index.list].requests[index.place].cancel()
    }

    /// Frees a request whose buffer is ours again.
    pub(super) fn remove(&mut self, index: Index) -> Result<()> {
        let List { requests, entries, free, .. } = &mut self.lists[index.list];
        let Some(mut entry) = entries[index.place].take() else { return Ok(()) };
        requests[index.place] = Request::null();
        free.push(index.place);
        entry.persistent.free()
    }
}
