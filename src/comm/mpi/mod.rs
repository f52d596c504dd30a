//! Links between processes, through MPI's persistent requests.
//!
//! Each buffer of a link has one request, made at connect: a persistent send or receive. Receives are started at
//! connect and again on release, sends when a message is ready, both in ring order, which is the order MPI matches
//! them in. All of a rank's requests stand in one [`Table`], behind the rank's one lock. Whoever waits tests them
//! all at once ([`Table::drive`]; those of reports, of which rank 0 may have thousands, in turn), so a waiting worker also moves
//! its neighbours' messages, and when nobody waits a thread does it (see [`progress`]).

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ends::{ReceiverEnd, SenderEnd};
use super::link::{Link, Waited};
use super::message::HEADER_WORDS;
use super::{LinkSpec, Outside};
use crate::{Error, Result};

mod calls;
mod clocks;
mod endpoint;
mod progress;
mod raw;
mod shared;
mod table;
mod window;

use calls::{Comm, Place};
pub(super) use calls::{library, takes_gpu_memory};
pub use endpoint::{Receiver, Sender, Values};
pub(crate) use raw::{Baseline, Sums};
use shared::Shared;
pub use shared::{SharedReceiver, SharedSender};
use table::{Entry, Index, Slot, Table};

/// How long a dropped end waits for its messages still in flight before it leaves them behind.
const GRACE: Duration = Duration::from_secs(2);

/// What the threads of a rank share: its lock, and all that stands behind it.
pub(super) struct Core {
    table: Mutex<Table>,
    /// Workers polling at the moment: the progress thread leaves it to them.
    waiting: AtomicUsize,
    stop: AtomicBool,
    /// The progress thread is in a long pause.
    resting: AtomicBool,
    pub(super) place: Place,
    /// Workers of this rank that compute: each wants a core.
    workers: AtomicUsize,
    /// A worker panicked or a request failed: the job must be aborted, not finalised.
    broken: AtomicBool,
    progress: OnceLock<std::thread::Thread>,
    /// Called once in every thread before it lets MPI work.
    pub(super) prepare: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // A worker that panicked inside left the table whole: MPI's calls do not unwind.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread ready for what MPI may do in it.
    fn prepare_thread(&self) {
        if let Some(prepare) = self.prepare.get()
            && !PREPARED.replace(true)
        {
            prepare();
        }
    }

    /// Lets MPI work unless another thread is at it; `None` then.
    fn try_drive(&self) -> Result<Option<usize>> {
        self.prepare_thread();
        let mut table = match self.table.try_lock() {
            Ok(table) => table,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        table.drive().map(Some).inspect_err(|_| self.broken.store(true, Ordering::Relaxed))
    }

    /// How long a worker that waits for this link yields before it sleeps.
    fn patience(&self, link: &Link) -> Duration {
        progress::patience(&self.place, self.workers.load(Ordering::Relaxed), link.spec.kind)
    }

    /// Polls until `slot` is ours; `late` is the error when the link's timeout has passed.
    fn wait_for(&self, slot: &Slot, link: &Link, late: impl Fn() -> Error) -> Result<()> {
        self.wait_until(|| slot.is_mine(), link, late)
    }

    /// The same until something else is `ready`.
    fn wait_until(&self, ready: impl Fn() -> bool, link: &Link, late: impl Fn() -> Error) -> Result<()> {
        if ready() {
            return link.breaker.check();
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut pause = progress::Backoff::new(self.patience(link));
        let mut waited = Waited::new();
        let outcome = loop {
            if let Err(error) = link.breaker.check().and_then(|()| self.try_drive().map(|_| ())) {
                break Err(error);
            }
            if ready() {
                break Ok(());
            }
            if waited.look() >= link.timeout {
                break Err(late());
            }
            pause.wait();
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        outcome
    }

    /// Gives back the request at `index` when its end is dropped. A message that is still in flight is waited for
    /// (a send) or given up (a receive), for a short while; failing that its buffer stays until the end.
    fn retire(&self, index: Index, hurry: bool) {
        let start = Instant::now();
        let mut table = self.lock();
        let Some((slot, sending, link)) = table.retire(index) else { return };
        if !slot.is_mine() && !sending && table.cancel(index).is_err() {
            return;
        }
        while !slot.is_mine() {
            let grace = if hurry { Duration::ZERO } else { GRACE };
            if table.drive().is_err() || start.elapsed() > grace {
                log::debug!("{}: a message was still in flight when its end was dropped", link.describe());
                return;
            }
            drop(table);
            std::thread::yield_now();
            table = self.lock();
        }
        if let Err(error) = table.remove(index) {
            log::debug!("{}: {error}", link.describe());
        }
    }
}

/// MPI, initialised. Dropped last, it finalises MPI, or aborts the job if this rank failed.
pub(super) struct Session {
    pub(super) core: Arc<Core>,
    comm: Comm,
    /// The ranks of this one's node.
    node: Comm,
    /// Which they are, in the order of their numbers on the node.
    ranks_on_node: Vec<usize>,
    pub(super) rank: usize,
    pub(super) size: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Session {
    /// Initialises MPI and looks around. Collective.
    pub(super) fn start() -> Result<Session> {
        calls::initialise()?;
        let comm = Comm::duplicate_world()?;
        let (rank, size) = comm.rank_and_size()?;
        let (node, place) = comm.place_on_node(&progress::processors())?;
        let ranks = node.gather(&(rank as u64).to_le_bytes(), false)?;
        let ranks_on_node = ranks.iter().map(|rank| bytemuck::pod_read_unaligned::<u64>(rank) as usize).collect();
        log::debug!("rank {rank} of {size}, {place:?} on its node: {}", library());
        let core = Core {
            table: Mutex::default(),
            waiting: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            resting: AtomicBool::new(true),
            place,
            workers: AtomicUsize::new(1),
            broken: AtomicBool::new(false),
            progress: OnceLock::new(),
            prepare: OnceLock::new(),
        };
        Ok(Session { core: Arc::new(core), comm, node, ranks_on_node, rank, size, thread: Mutex::new(None) })
    }

    /// Every rank's bytes, in rank order; on rank 0 alone if it is `at_first`, else on all. Collective.
    pub(super) fn gather(&self, bytes: &[u8], at_first: bool) -> Result<Vec<Vec<u8>>> {
        let _calls = self.core.lock();
        self.comm.meet()?;
        self.comm.gather(bytes, at_first)
    }

    /// Those of this node's ranks, in their order. Collective.
    pub(super) fn gather_on_node(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let _calls = self.core.lock();
        self.node.meet()?;
        self.node.gather(bytes, false)
    }

    /// Takes the whole job down, whatever state MPI is in.
    pub(super) fn abort(&self, code: i32) -> ! {
        let watchdog = move || {
            std::thread::sleep(Duration::from_secs(5));
            // SAFETY: ends the process without running anything that might hang.
            unsafe { libc::_exit(code) }
        };
        let _ = std::thread::Builder::new().name("sideways-abort".into()).spawn(watchdog);
        let start = Instant::now();
        let calls = loop {
            match self.core.table.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if start.elapsed() > Duration::from_secs(1) => break None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        calls::abort(code);
        drop(calls);
        // Without the libraries' destructors: workers may still use what those would free.
        signal_hook::low_level::exit(code);
    }

    /// Checks what only MPI knows about a list of links.
    pub(super) fn check_tags(&self, links: &[LinkSpec]) -> Result<()> {
        let largest = {
            let _calls = self.core.lock();
            self.comm.largest_tag()?
        };
        match links.iter().find(|link| link.id > largest) {
            Some(link) => Err(Error::input(format!(
                "link {} \"{}\": its number is above this MPI library's largest tag {largest}",
                link.id, link.name
            ))),
            None => Ok(()),
        }
    }

    /// A communicator for `links`, between `workers` workers of this rank and others, and the memory that those on one node share;
    /// `rank_of` names a worker's rank. Collective, and never freed: a run makes one or two.
    pub(super) fn open<'a>(
        self: &Arc<Self>,
        workers: usize,
        links: impl Iterator<Item = &'a LinkSpec>,
        rank_of: &[usize],
    ) -> Result<Opening> {
        self.core.workers.store(workers, Ordering::Relaxed);
        // The progress thread may be at work for links of before.
        let mut table = self.core.lock();
        let comm = Comm::duplicate_world()?;
        table.comm = Some(comm);
        drop(table);
        Ok(Opening { session: self.clone(), comm, shared: Shared::make(self, links, rank_of)? })
    }

    /// Starts the thread that drives MPI while workers compute, if it does not run yet.
    pub(super) fn start_progress(&self) -> Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() && !progress::disabled() {
            let handle = progress::spawn(self.core.clone())?;
            let _ = self.core.progress.set(handle.thread().clone());
            *thread = Some(handle);
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::thread::panicking() || self.core.broken.load(Ordering::Relaxed) {
            self.abort(1);
        }
        self.core.stop.store(true, Ordering::Relaxed);
        if let Some(handle) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            handle.thread().unpark();
            let _ = handle.join();
        }
        if let Err(error) = calls::finalise() {
            log::warn!("{error}");
        }
    }
}

/// Makes the ends of one set of links.
pub(super) struct Opening {
    session: Arc<Session>,
    comm: Comm,
    /// The buffers of links within the node.
    shared: Option<Shared>,
}

impl Opening {
    /// The sending end of a link to another rank.
    pub(super) fn sender(&self, link: &Arc<Link>) -> Result<SenderEnd> {
        if let Some(shared) = self.shared.as_ref().filter(|shared| shared.has(&link.spec)) {
            return shared.sender(&self.session, link).map(SenderEnd::Shared);
        }
        Ok(SenderEnd::Mpi(Sender::new(self.session.clone(), link.clone(), self.ring(link, true, None)?)))
    }

    /// The receiving end of a link from another rank; its receives are posted.
    pub(super) fn receiver(&self, link: &Arc<Link>) -> Result<ReceiverEnd> {
        if let Some(shared) = self.shared.as_ref().filter(|shared| shared.has(&link.spec)) {
            return shared.receiver(&self.session, link).map(ReceiverEnd::Shared);
        }
        let ring = self.ring(link, false, None)?;
        let mut table = self.session.core.lock();
        for (index, _) in &ring {
            table.start(*index, HEADER_WORDS + link.spec.words)?;
        }
        drop(table);
        Ok(ReceiverEnd::Mpi(Receiver::new(self.session.clone(), link.clone(), ring)))
    }

    /// One end of a link whose messages are values alone, in `outside`; its receives are posted.
    pub(super) fn values(&self, link: &Arc<Link>, sending: bool, outside: &[Outside]) -> Result<Values> {
        if outside.len() != link.spec.depth {
            let text = format!("{} places for a depth of {}", outside.len(), link.spec.depth);
            return Err(link.error(self.session.rank, text));
        }
        let ring = self.ring(link, sending, Some(outside))?;
        if !sending {
            let mut table = self.session.core.lock();
            ring.iter().try_for_each(|(index, _)| table.start(*index, link.spec.words))?;
        }
        Ok(Values::new(self.session.clone(), link.clone(), ring, sending))
    }

    /// A link's buffers on this side, each with its request.
    fn ring(&self, link: &Arc<Link>, sending: bool, outside: Option<&[Outside]>) -> Result<Vec<(Index, Arc<Slot>)>> {
        let words = link.spec.words + if outside.is_some() { 0 } else { HEADER_WORDS };
        let mut table = self.session.core.lock();
        let mut ring = Vec::with_capacity(link.spec.depth);
        for place in 0..link.spec.depth {
            let outside = outside.map(|places| places[place].clone());
            let slot = Arc::new(Slot::new(link.spec.buffer(if outside.is_some() { 0 } else { link.spec.words })));
            // SAFETY: the entry keeps the slot, so its memory, or what is outside, until the request is freed; see
            // `Table::start`.
            let persistent = unsafe {
                let own = (*slot.buffer.get()).start();
                let start = outside.as_ref().map_or(own, |outside| outside.address as *mut u32);
                match sending {
                    // Headers alone are sent synchronously: see `LinkSpec::in_flight`.
                    true => self.comm.send_init(start, words, link.to_rank, link.spec.id, link.spec.words == 0),
                    false => self.comm.receive_init(start, words, link.from_rank, link.spec.id),
                }
            }?;
            let (comm, link) = (self.comm, link.clone());
            let (slot_, retired) = (slot.clone(), false);
            let entry = Entry { slot: slot_, persistent, sending, comm, link, words, retired, outside };
            ring.push((table.add(entry), slot));
        }
        Ok(ring)
    }
}
