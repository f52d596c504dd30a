//! Links between ranks of a node through memory that both see, for replicas' gradients: a message is read where it was written.
//!
//! Between processes of a node MPI copies a message from buffer to buffer; a bucket of an all-reduce is in the cache, and those
//! copies are most of what it costs. Other links stay with MPI, which moves their messages while workers compute.
//!
//! Each buffer has a [`Front`], a word of which says whose it is, and then the values. The sender's rank has the buffers in its part
//! of a [`Window`]. Where the memory cannot be had, MPI carries the messages, and the log says so.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::LinkSpec;
use super::super::link::Link;
use super::super::message::{HEADER_WORDS, Header, Kind};
use super::Session;
use super::window::{PAGE, Window};
use crate::sys::files::free_space;
use crate::{Error, Result};

/// The buffer is the sender's, to be filled.
const FREE: u32 = 0;
/// It is the receiver's, to be read.
const FULL: u32 = 1;

/// Begins a buffer.
#[repr(C, align(64))]
struct Front {
    state: AtomicU32,
    /// The message's; in a cache line of its own, which nobody polls.
    header: Lines,
}

#[repr(C, align(64))]
struct Lines([u32; HEADER_WORDS]);

/// Bytes of a link's buffer, and before the values in it, which have pages of their own: what a GPU may copy is locked by the page.
fn buffer_bytes(spec: &LinkSpec) -> (usize, usize) {
    let unit = if spec.words == 0 { align_of::<Front>() } else { PAGE };
    let before = size_of::<Front>().next_multiple_of(unit);
    (before + (4 * spec.words).next_multiple_of(unit), before)
}

/// Where Linux keeps what processes share, in the MPI libraries that are known.
const SHARED_FILES: &str = "/dev/shm";

/// Links whose buffers are in a window.
pub(super) struct Shared {
    window: Arc<Window>,
    /// By a link's number: whose part of the window (its rank on the node), and at which byte of it.
    places: HashMap<u32, (usize, usize)>,
}

/// Is it switched off (`SIDEWAYS_SHARED=off`, to measure what it buys)?
fn disabled() -> bool {
    std::env::var("SIDEWAYS_SHARED").is_ok_and(|value| value == "off")
}

impl Shared {
    /// Buffers for those of `links` on which replicas' gradients go from one rank of this node to another; none if there are none.
    /// `rank_of` names a worker's rank. Collective over the ranks of a node.
    ///
    /// # Errors
    /// [`Error::Transport`] when MPI fails in what is not about shared memory.
    pub(super) fn make<'a>(
        session: &Session,
        links: impl Iterator<Item = &'a LinkSpec>,
        rank_of: &[usize],
    ) -> Result<Option<Shared>> {
        let node = &session.ranks_on_node;
        let is_here = |rank: usize| rank != session.rank && node.contains(&rank);
        let sent = |link: &&LinkSpec| rank_of[link.from] == session.rank && is_here(rank_of[link.to]);
        let mut bytes = 0usize;
        // What other ranks of the node have to know: how much there will be, how much there could be, and then where each link's is.
        let mut list = Vec::new();
        for link in links.filter(|link| link.kind == Kind::Gradient && !disabled()).filter(sent) {
            let (each, before) = buffer_bytes(link);
            bytes = bytes.next_multiple_of(before.max(align_of::<Front>()));
            list.extend([u64::from(link.id), bytes as u64]);
            bytes += link.depth * each;
        }
        let free = free_space(Path::new(SHARED_FILES)).unwrap_or(u64::MAX);
        let said = [&[bytes as u64, free][..], &list].concat();
        let said: Vec<Vec<u64>> =
            session.gather_on_node(bytemuck::cast_slice(&said))?.iter().map(|s| words(s)).collect();
        let (all, free) = (said.iter().map(|said| said[0]).sum::<u64>(), said[0][1]);
        if all == 0 {
            return Ok(None);
        }
        let made = if all + all / 4 > free {
            // A library that finds this out by itself may not tell all ranks.
            Err(Error::Transport(format!("{all} bytes are needed, {free} are free in {SHARED_FILES}")))
        } else {
            let _calls = session.core.lock();
            Window::allocate(session.node, bytes)
        };
        let why = made.as_ref().err().map(ToString::to_string);
        let outcomes = session.gather_on_node(why.as_deref().unwrap_or_default().as_bytes())?;
        let window = match (made, outcomes.iter().find(|outcome| !outcome.is_empty())) {
            (Ok(window), None) => window,
            (_, why) => {
                if session.core.place.rank == 0 {
                    let why = why.map(|why| String::from_utf8_lossy(why)).unwrap_or_default();
                    log::warn!(
                        "replicas' gradients go through MPI within this node, not through memory it shares, which is slower: {why}"
                    );
                }
                return Ok(None);
            }
        };
        // SAFETY: this rank's part, of so many bytes, which nobody else touches before all ranks have met in `connect`.
        unsafe { std::ptr::write_bytes(window.part(session.core.place.rank), 0, bytes) };
        let mut places = HashMap::new();
        for (rank, said) in said.iter().enumerate() {
            places.extend(said[2..].chunks_exact(2).map(|link| (link[0] as u32, (rank, link[1] as usize))));
        }
        Ok(Some(Shared { window: Arc::new(window), places }))
    }

    /// Whether `link`'s buffers are here.
    pub(super) fn has(&self, link: &LinkSpec) -> bool {
        self.places.contains_key(&link.id)
    }

    fn ring(&self, session: &Arc<Session>, link: &Arc<Link>) -> Result<Ring> {
        let Some(&(rank, offset)) = self.places.get(&link.spec.id) else {
            return Err(link.error(session.rank, "its buffers are not in memory that this node shares"));
        };
        // SAFETY: the sender's rank has laid out its part so.
        let first = unsafe { self.window.part(rank).add(offset) };
        Ok(Ring {
            session: session.clone(),
            link: link.clone(),
            _window: self.window.clone(),
            first,
            next: 0,
            sequence: 0,
        })
    }

    /// The sending end of a link that this has.
    pub(super) fn sender(&self, session: &Arc<Session>, link: &Arc<Link>) -> Result<SharedSender> {
        Ok(SharedSender { ring: self.ring(session, link)?, last: None })
    }

    /// The receiving end of a link that this has.
    pub(super) fn receiver(&self, session: &Arc<Session>, link: &Arc<Link>) -> Result<SharedReceiver> {
        Ok(SharedReceiver { ring: self.ring(session, link)?, held: None })
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytemuck::pod_collect_to_vec(bytes)
}

/// A link's buffers, used round and round by both ends.
struct Ring {
    session: Arc<Session>,
    link: Arc<Link>,
    _window: Arc<Window>,
    first: *mut u8,
    next: usize,
    sequence: u32,
}

// SAFETY: the addresses are valid in every thread of the process; a buffer's state says whose it is.
unsafe impl Send for Ring {}

impl Ring {
    fn front(&self) -> *mut Front {
        // SAFETY: within the link's `depth` buffers.
        unsafe { self.first.add(self.next * buffer_bytes(&self.link.spec).0).cast() }
    }

    /// Whether the buffer whose turn it is is in `state`.
    fn is(&self, state: u32) -> bool {
        // SAFETY: the window lives as long as MPI; the other process too touches the state as an atomic word only.
        unsafe { (*self.front()).state.load(Ordering::Acquire) == state }
    }

    fn ready(&self, state: u32) -> Result<bool> {
        self.link.breaker.check()?;
        if !self.is(state) {
            self.session.core.try_drive()?;
        }
        Ok(self.is(state))
    }

    /// Its values; the caller has seen that it is this end's.
    fn payload(&mut self) -> &mut [f32] {
        // SAFETY: in the window, aligned, and this end's until it hands the buffer over; `&mut self` makes it the only view here.
        unsafe {
            let values = self.front().cast::<u8>().add(buffer_bytes(&self.link.spec).1);
            std::slice::from_raw_parts_mut(values.cast(), self.link.spec.words)
        }
    }

    /// Its message's header; as [`Ring::payload`].
    fn header(&mut self) -> &mut [u32; HEADER_WORDS] {
        // SAFETY: as there.
        unsafe { &mut (*self.front()).header.0 }
    }

    /// Hands the buffer over to the other end and moves on.
    fn hand_over(&mut self, state: u32) {
        // SAFETY: as in `is`.
        unsafe { (*self.front()).state.store(state, Ordering::Release) };
        self.next = (self.next + 1) % self.link.spec.depth;
        self.sequence = self.sequence.wrapping_add(1);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.session.core.broken.store(true, Ordering::Relaxed);
            self.link.breaker.trip("a worker of this process panicked");
        }
    }
}

/// The sending end of a link to another rank of the node.
pub struct SharedSender {
    ring: Ring,
    last: Option<Header>,
}

impl SharedSender {
    pub(in crate::comm) fn link(&self) -> &Link {
        &self.ring.link
    }

    pub(in crate::comm) fn slot(&mut self) -> Result<&mut [f32]> {
        let (ring, last) = (&self.ring, self.last.as_ref());
        ring.session.core.wait_until(|| ring.is(FREE), &ring.link, || ring.link.send_timeout(last))?;
        Ok(self.ring.payload())
    }

    pub(in crate::comm) fn ready(&self) -> Result<bool> {
        self.ring.ready(FREE)
    }

    pub(in crate::comm) fn start(&mut self, header: &Header) -> Result<()> {
        self.ring.link.check_outgoing(header)?;
        self.slot()?;
        *self.ring.header() = header.encode(self.ring.sequence);
        self.ring.hand_over(FULL);
        self.last = Some(*header);
        Ok(())
    }

    /// The receiver reads what was sent whatever becomes of the sender.
    pub(in crate::comm) fn flush(&mut self) -> Result<()> {
        self.ring.link.breaker.check()
    }
}

/// The receiving end of a link from another rank of the node.
pub struct SharedReceiver {
    ring: Ring,
    held: Option<Header>,
}

impl SharedReceiver {
    pub(in crate::comm) fn link(&self) -> &Link {
        &self.ring.link
    }

    pub(in crate::comm) fn hold(&mut self, expected: Option<&Header>) -> Result<(Header, &[f32])> {
        let header = match self.held {
            Some(header) => header,
            None => {
                let ring = &self.ring;
                ring.session.core.wait_until(|| ring.is(FULL), &ring.link, || ring.link.receive_timeout(expected))?;
                let (words, sequence) = (*self.ring.header(), self.ring.sequence);
                *self.held.insert(self.ring.link.check_incoming(&words, sequence, None)?)
            }
        };
        Ok((header, &self.ring.payload()[..header.words as usize]))
    }

    /// The held message's buffer as a whole.
    pub(in crate::comm) fn whole(&mut self) -> &[f32] {
        self.ring.payload()
    }

    pub(in crate::comm) fn ready(&self) -> Result<bool> {
        self.ring.ready(FULL)
    }

    pub(in crate::comm) fn release(&mut self) -> Result<()> {
        if self.held.take().is_none() {
            let link = &self.ring.link;
            return Err(link.error(link.to_rank, "released a message that is not held"));
        }
        self.ring.hand_over(FREE);
        Ok(())
    }
}
