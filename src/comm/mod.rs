//! Moving messages between modules: one contract, in-process and MPI behind it.
//!
//! A *worker* is one module of one replica; it runs on its own thread. A *rank* is a process with one or more
//! workers. A *link* carries messages of one kind from one worker to another, in order, through a ring of
//! `depth` buffers made once. A rank lists the links that begin or end there before training starts, and
//! [`connect`] makes their ends. From then on nothing is allocated and there is no
//! collective operation: a tick is slots filled, messages started, messages waited for.
//!
//! ```text
//! sender:    slot() ─▶ fill in place ─▶ start_when(header, done)       (returns at once; flush() waits)
//! receiver:  wait_slot(expected) ─▶ read in place ─▶ release_when(done) (release posts the receive again)
//! ```
//!
//! A slot is in host memory, or in a GPU's: whoever fills it cannot tell which link it is. What a GPU copies is done later;
//! then `progress()`, on either end, starts the message or gives it back.
//!
//! Read in this order: [`message`] (what travels), `link` (what both ends know, and the [`Breaker`]), `ends`, `local`
//! (threads of one process), [`world`] (which ranks there are), `mpi` (between processes), [`exchange`] (from GPU to GPU), [`all_reduce`]
//! (replicas' gradients), [`task_pool`] (tasks for whoever is free); [`moments`] and [`clocks`] are for recordings of what came when. Only the files of `mpi/` name the MPI library.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crate::{Error, Result};

pub mod all_reduce;
pub mod clocks;
mod ends;
pub mod exchange;
pub mod launch;
mod link;
mod local;
pub mod message;
pub mod moments;
mod mpi;
pub mod task_pool;
pub mod world;

pub use ends::{Receiver, Sender};
pub use link::Breaker;
pub use message::{BatchId, HEADER_WORDS, Header, Kind, Orders};
pub(crate) use mpi::Baseline;
pub use mpi::Values;
pub use world::World;

use ends::{ReceiverEnd, SenderEnd};
use link::Link;

/// One directed link between two workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSpec {
    /// The link's number, unique in the list; the tag of its messages.
    pub id: u32,
    /// What it carries.
    pub kind: Kind,
    /// The worker that sends.
    pub from: usize,
    /// The worker that receives.
    pub to: usize,
    /// The largest payload, in 32-bit words. 0: the messages are headers only, which say that something was put elsewhere.
    pub words: usize,
    /// Buffers at each end, 1 or more: how many messages may be in flight. Within a process the two ends share
    /// one ring, so at least this many messages can be sent before one is released; between processes up to
    /// twice as many ([`LinkSpec::in_flight`]).
    pub depth: usize,
    /// For people: `module 2 -> 4 (skip)`.
    pub name: String,
}

impl LinkSpec {
    /// Places needed for what the messages of a link of headers speak of, used round and round, so that none is used again
    /// before its message was released: once [`Sender::slot`] has returned for message n, message n − `in_flight` is.
    ///
    /// Within a process the ends share `depth` buffers: while one is in the sender's hands, the others hold at most the
    /// newest `depth` − 1 messages. Between processes such links send synchronously: buffer n mod `depth` is free again when
    /// the receive of message n − `depth` has begun; that receive was posted when message n − 2 `depth` was released, or at
    /// the start. (A plain send of so short a message would end before the receiver knows of it, and bound nothing.)
    pub fn in_flight(&self, same_rank: bool) -> usize {
        if same_rank { self.depth } else { 2 * self.depth }
    }

    /// A buffer for messages of up to `words`. What a GPU may copy is in pages of its own.
    fn buffer(&self, words: usize) -> message::Buffer {
        message::Buffer::new(words, !matches!(self.kind, Kind::Report | Kind::Control))
    }

    /// A header for a message on this link (see [`Header::new`]).
    pub fn header(&self, batch: impl Into<BatchId>, step: u32, shape: [u32; 4]) -> Header {
        Header::new(self.kind, self.id, batch, step, shape)
    }
}

/// A place in memory that is not a link's own, such as a GPU's, from or to which MPI moves a message's values directly.
#[derive(Clone)]
pub struct Outside {
    /// Where it starts; the MPI library must be able to work on it ([`World::takes_gpu_memory`]).
    pub address: u64,
    /// What it is part of, kept until MPI is done with it.
    pub part_of: Arc<dyn std::any::Any + Send + Sync>,
}

/// The ends of links that belong to this rank's workers, to be handed out to them.
pub struct Endpoints {
    values: HashMap<u32, Values>,
    senders: HashMap<u32, Sender>,
    receivers: HashMap<u32, Receiver>,
    breaker: Breaker,
}

impl Endpoints {
    /// Takes the sending end of link `id`.
    ///
    /// # Errors
    /// [`Error::Transport`] if its worker is not on this rank, or it was taken before.
    pub fn sender(&mut self, id: u32) -> Result<Sender> {
        take(&mut self.senders, id)
    }

    /// Takes the receiving end of link `id`.
    ///
    /// # Errors
    /// As [`Endpoints::sender`].
    pub fn receiver(&mut self, id: u32) -> Result<Receiver> {
        take(&mut self.receivers, id)
    }

    /// Takes this rank's end of link `id`, whose values MPI moves between places outside, if there is one.
    pub fn values(&mut self, id: u32) -> Option<Values> {
        take(&mut self.values, id).ok()
    }

    /// The switch that stops all these links; a worker that fails trips it.
    pub fn breaker(&self) -> Breaker {
        self.breaker.clone()
    }
}

fn take<T>(ends: &mut HashMap<u32, T>, id: u32) -> Result<T> {
    ends.remove(&id).ok_or_else(|| Error::Transport(format!("link {id} does not end here")))
}

/// Makes the ends of all links that touch this rank; every rank calls it once, with a list in which these are. Others may be
/// in it too, and are not looked at.
///
/// `rank_of_worker[w]` is the rank that runs worker w. Links between workers of one rank stay inside the
/// process, the others go through MPI, with their receives posted when this returns. `timeout` bounds every
/// later wait; make it several times the longest time a neighbour may take for a step, compilation of kernels
/// and first reads of a file system included.
///
/// # Errors
/// [`Error::Input`] for a list that cannot work, or a link that is not the same in the lists of its two ends; [`Error::Transport`]
/// when MPI refuses.
pub fn connect(world: &World, rank_of_worker: &[usize], links: &[LinkSpec], timeout: Duration) -> Result<Endpoints> {
    connect_outside(world, rank_of_worker, links, timeout, &HashMap::new())
}

/// As [`connect`], where some links between ranks carry values alone, in places outside: `depth` of each such link's end on
/// this rank.
///
/// # Errors
/// As [`connect`].
pub(crate) fn connect_outside(
    world: &World,
    rank_of_worker: &[usize],
    links: &[LinkSpec],
    timeout: Duration,
    outside: &HashMap<u32, Vec<Outside>>,
) -> Result<Endpoints> {
    world.first_error(check(world, rank_of_worker, links, timeout))?;
    // Each link counts at its beginning, and the other way at its end: all ranks' sums are 0 together if both know the same.
    let mut sum = 0u64;
    for link in links {
        let (from, to, here) = (rank_of_worker[link.from], rank_of_worker[link.to], world.rank());
        if (from == here) != (to == here) {
            let hash = xxhash_rust::xxh3::xxh3_64(format!("{link:?} {from} {to} {timeout:?}").as_bytes());
            sum = if from == here { sum.wrapping_add(hash) } else { sum.wrapping_sub(hash) };
        }
    }
    world.balance(sum, "the list of links between modules")?;
    // Doubles as a barrier: when it returns, every rank's receives are posted.
    world.first_error(open(world, rank_of_worker, links, timeout, outside))
}

/// Makes this rank's ends of the links.
fn open(
    world: &World,
    rank_of_worker: &[usize],
    links: &[LinkSpec],
    timeout: Duration,
    outside: &HashMap<u32, Vec<Outside>>,
) -> Result<Endpoints> {
    let opening = match world {
        World::Mpi(ranks) if ranks.session.size > 1 => {
            let at_work = links.iter().filter(|l| l.kind != Kind::Report).flat_map(|l| [l.from, l.to]);
            let here: HashSet<usize> = at_work.filter(|&w| rank_of_worker[w] == world.rank()).collect();
            let inside = links.iter().filter(|link| !outside.contains_key(&link.id));
            Some(ranks.session.open(here.len(), inside, rank_of_worker)?)
        }
        _ => None,
    };
    let breaker = Breaker::default();
    let (senders, receivers, values) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut endpoints = Endpoints { values, senders, receivers, breaker: breaker.clone() };
    let here = world.rank();
    for spec in links {
        let (from_rank, to_rank) = (rank_of_worker[spec.from], rank_of_worker[spec.to]);
        let link = Arc::new(Link { spec: spec.clone(), from_rank, to_rank, timeout, breaker: breaker.clone() });
        match &opening {
            _ if from_rank == to_rank && from_rank == here => {
                let (sender, receiver) = local::pair(&link);
                endpoints.senders.insert(spec.id, Sender::new(SenderEnd::Local(sender)));
                endpoints.receivers.insert(spec.id, Receiver::new(ReceiverEnd::Local(receiver)));
            }
            Some(opening) if outside.contains_key(&spec.id) => {
                endpoints.values.insert(spec.id, opening.values(&link, from_rank == here, &outside[&spec.id])?);
            }
            Some(opening) if from_rank == here => {
                endpoints.senders.insert(spec.id, Sender::new(opening.sender(&link)?));
            }
            Some(opening) if to_rank == here => {
                endpoints.receivers.insert(spec.id, Receiver::new(opening.receiver(&link)?));
            }
            _ => {}
        }
    }
    if let World::Mpi(ranks) = world
        && opening.is_some()
    {
        ranks.session.start_progress()?;
    }
    Ok(endpoints)
}

/// Refuses a list of links that cannot work.
fn check(world: &World, rank_of_worker: &[usize], links: &[LinkSpec], timeout: Duration) -> Result<()> {
    if timeout.is_zero() {
        return Err(Error::input("the links' timeout is 0 s: nothing could ever arrive in time"));
    }
    if let Some((worker, rank)) = rank_of_worker.iter().enumerate().find(|(_, rank)| **rank >= world.size()) {
        let size = world.size();
        return Err(Error::input(format!(
            "worker {worker} is placed on rank {rank}, but there are only {size} ranks (0 to {})",
            size - 1
        )));
    }
    let mut ids = HashMap::new();
    for link in links {
        let LinkSpec { id, from, to, words, depth, name, .. } = link;
        let fail = |text: String| Err(Error::input(format!("link {id} \"{name}\": {text}")));
        if let Some(other) = ids.insert(*id, name) {
            return fail(format!("its number is also that of \"{other}\""));
        }
        if let Some(worker) = [from, to].into_iter().find(|worker| **worker >= rank_of_worker.len()) {
            return fail(format!("worker {worker} does not exist: there are {}", rank_of_worker.len()));
        }
        if *depth == 0 {
            return fail("its depth is 0: it needs at least one buffer".into());
        }
        // MPI counts in a C int; header and payload travel as 32-bit words.
        if words.saturating_add(HEADER_WORDS) > i32::MAX as usize {
            return fail(format!(
                "{words} words ({} GiB) are more than one message can carry ({} words): use a smaller batch or more modules",
                words >> 28,
                i32::MAX as usize - HEADER_WORDS
            ));
        }
    }
    match world {
        World::Mpi(ranks) => ranks.session.check_tags(links),
        World::Alone => Ok(()),
    }
}
