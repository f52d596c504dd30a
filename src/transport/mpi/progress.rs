//! Who drives MPI, and how often: the back-off of a waiting worker and the thread that steps in when none waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Core;
use crate::{Error, Result};

/// Polls before a waiting worker starts to yield its core.
const SPINS: u32 = 100;
/// How long it yields before it starts to sleep between polls, where every rank of the node has a core...
const YIELD: Duration = Duration::from_millis(5);
/// ... and where ranks share cores: the ones that compute need them.
const YIELD_SHARED: Duration = Duration::from_micros(200);
/// How long it sleeps.
const NAP: Duration = Duration::from_micros(50);

/// The thread's interval while messages move.
const BUSY: Duration = Duration::from_micros(100);
/// The thread's interval while a worker waits, which polls far more often: it looks only whether that is still so. Waking
/// every 100 µs took a fifth of a link's bandwidth at 1 MiB from the waiting worker's core.
const ATTENDED: Duration = Duration::from_micros(500);
/// The longest it grows to while nothing moves.
const IDLE: Duration = Duration::from_millis(2);

/// The pauses between a waiting worker's polls: none, then a yield, then short sleeps.
pub(super) struct Backoff {
    start: Instant,
    polls: u32,
    patience: Duration,
}

/// How long a waiting worker yields on a node with `ranks` ranks.
pub(super) fn patience(ranks: usize) -> Duration {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if ranks <= cores { YIELD } else { YIELD_SHARED }
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
        if core.waiting.load(Ordering::Relaxed) > 0 {
            interval = ATTENDED;
        } else {
            let mut moved = false;
            if let Ok(mut table) = core.table.try_lock() {
                // A failure is kept in the table, and reported by the worker that next waits.
                moved = table.drive().is_ok_and(|completed| completed > 0) || table.sends_flying > 0;
            }
            interval = if moved { BUSY } else { (interval * 2).min(IDLE) };
        }
        core.resting.store(interval > ATTENDED, Ordering::Relaxed);
        std::thread::park_timeout(interval);
    }
}
