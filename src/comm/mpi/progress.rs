//! Who drives MPI, and how often: the back-off of a waiting worker and the thread that steps in when none waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::message::Kind;
use super::Core;
use super::calls::{PROCESSOR_WORDS, Place, Processors};
use crate::sys::cpus::own_processors;
use crate::{Error, Result};

/// Polls before a waiting worker starts to yield its core.
const SPINS: u32 = 100;
/// How long it yields before it starts to sleep between polls, where every worker of the node has a core: longer than
/// 64 MiB take to come...
const YIELD: Duration = Duration::from_millis(50);
/// ... and where workers share cores: the ones that compute need them.
const YIELD_SHARED: Duration = Duration::from_micros(200);
/// How long it sleeps.
const NAP: Duration = Duration::from_micros(50);

/// The thread's interval while messages move.
const BUSY: Duration = Duration::from_micros(100);
/// The thread's interval while a worker waits, which polls far more often: it looks only whether that is still so. Waking
/// every 100 µs took a fifth of a link's bandwidth at 1 MiB from the waiting worker's core, every 500 µs a twentieth.
const ATTENDED: Duration = Duration::from_millis(1);
/// The longest that grows to: a worker that waits long leaves the thread in peace about as long.
const PATIENT: Duration = Duration::from_millis(8);
/// The longest it grows to while nothing moves.
const IDLE: Duration = Duration::from_millis(2);
/// An interval above this is worth cutting short for a large message.
const LONG: Duration = Duration::from_micros(500);

/// The pauses between a waiting worker's polls: none, then a yield, then short sleeps.
pub(super) struct Backoff {
    start: Instant,
    polls: u32,
    patience: Duration,
}

/// The processors this process may use. A launcher often binds each rank to a core of its own, so the node's ranks have
/// to put theirs together to know whether they share.
pub(super) fn processors() -> Processors {
    let mut set: Processors = [0; PROCESSOR_WORDS];
    own_processors().into_iter().filter(|n| n / 64 < PROCESSOR_WORDS).for_each(|n| set[n / 64] |= 1 << (n % 64));
    set
}

/// How long a worker yields while it waits for a message of `kind`, if each rank of its node has `workers`.
pub(super) fn patience(place: &Place, workers: usize, kind: Kind) -> Duration {
    // Reports come once a clip: whoever gathers them should not take a core meanwhile.
    if kind != Kind::Report && place.size * workers <= place.cores { YIELD } else { YIELD_SHARED }
}

impl Backoff {
    /// A wait that yields for `patience` before it sleeps.
    pub(super) fn new(patience: Duration) -> Self {
        Backoff { start: Instant::now(), polls: 0, patience }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn wait(&mut self) {
        self.polls = self.polls.saturating_add(1);
        if self.polls < SPINS {
            std::hint::spin_loop();
        } else if self.elapsed() < self.patience {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// Is the thread switched off (`SIDEWAYS_PROGRESS=off`, to measure what it buys)?
pub(super) fn disabled() -> bool {
    std::env::var("SIDEWAYS_PROGRESS").is_ok_and(|value| value == "off")
}

/// Starts the thread.
pub(super) fn spawn(core: Arc<Core>) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("sideways-mpi".into());
    thread.spawn(move || run(&core)).map_err(|error| Error::Transport(format!("cannot start the MPI thread: {error}")))
}

fn run(core: &Core) {
    let mut interval = IDLE;
    while !core.stop.load(Ordering::Relaxed) {
        core.prepare_thread();
        if core.waiting.load(Ordering::Relaxed) > 0 {
            interval = (interval * 2).clamp(ATTENDED, PATIENT);
            core.resting.store(false, Ordering::Relaxed);
        } else {
            let mut moved = false;
            if let Ok(mut table) = core.table.try_lock() {
                // A failure is kept in the table, and reported by the worker that next waits.
                moved = table.drive().is_ok_and(|completed| completed > 0) || table.sends_flying > 0;
            }
            interval = if moved { BUSY } else { (interval * 2).min(IDLE) };
            core.resting.store(interval > LONG, Ordering::Relaxed);
        }
        std::thread::park_timeout(interval);
    }
}
