//! Which workers of a process compute, where there are more workers than processor cores.
//!
//! Left to the operating system, workers that share a core are switched every few milliseconds, and each finds the caches full
//! of another's tensors. Here a forward pass, or a backward pass, runs to its end on the core it was given, and that core then
//! goes to a waiting worker that computed there before, if there is one: some of what it needs is in that core's caches.
//! Otherwise the worker that has waited longest gets it, so no core is idle while anyone waits for one. Nobody waits for a
//! message while holding a core: a worker keeps it from one pass to the next only where nothing has to be waited for.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use crate::sys::cpus::keep_to;

/// The cores that the workers of one process share.
struct Cores {
    state: Mutex<State>,
    /// Of each worker: it has been given a core.
    given: Vec<Condvar>,
    /// The processor number of each core; empty where the operating system chooses.
    processors: Vec<usize>,
}

/// Cores are numbered from 0.
struct State {
    free: Vec<usize>,
    /// Workers that wait for a core, the first to come in front.
    waiting: VecDeque<usize>,
    /// Where each worker computed last.
    last: Vec<usize>,
    /// What each has been given and not yet noticed.
    given: Vec<Option<usize>>,
    /// The processor that each worker's thread is kept to.
    kept: Vec<Option<usize>>,
}

/// A worker's access to the cores, for its thread.
pub struct CoreUser {
    cores: Arc<Cores>,
    worker: usize,
    /// The core it holds.
    held: Weak<Held>,
}

/// A core, held until all guards of it are dropped.
#[must_use]
pub struct CoreGuard {
    _held: Arc<Held>,
}

struct Held {
    cores: Arc<Cores>,
    core: usize,
}

/// Shares as many cores as let `at_once` of `workers` compute. `own` are their processor numbers if each is for one worker
/// and nobody else's: then workers that have to share them are kept to the processor that they were given. Where the operating
/// system chooses among several, half as many again may compute: else one would idle while the next worker wakes up elsewhere.
pub fn share(workers: usize, at_once: usize, own: &[usize]) -> Vec<CoreUser> {
    let shared = workers > at_once;
    let (cores, processors) = match at_once {
        0 | 1 => (1, Vec::new()),
        _ if shared && own.len() == at_once => (at_once, own.to_vec()),
        _ => (at_once + at_once.div_ceil(2), Vec::new()),
    };
    let state = State {
        free: (0..cores).collect(),
        waiting: VecDeque::new(),
        // Neighbours, which exchange messages, begin side by side.
        last: (0..workers).map(|worker| worker * cores / workers).collect(),
        given: vec![None; workers],
        kept: vec![None; workers],
    };
    let given = (0..workers).map(|_| Condvar::new()).collect();
    let cores = Arc::new(Cores { state: Mutex::new(state), given, processors });
    (0..workers).map(|worker| CoreUser { cores: cores.clone(), worker, held: Weak::new() }).collect()
}

impl Cores {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CoreUser {
    /// Waits for a core, or goes on with the one that it holds.
    pub fn acquire(&mut self) -> CoreGuard {
        let _held = self.held.upgrade().unwrap_or_else(|| Arc::new(self.wait()));
        self.held = Arc::downgrade(&_held);
        CoreGuard { _held }
    }

    fn wait(&self) -> Held {
        let (cores, worker) = (&self.cores, self.worker);
        let mut state = cores.state();
        let last = state.last[worker];
        let free = state.free.iter().position(|&core| core == last).or(state.free.len().checked_sub(1));
        let core = match free {
            Some(at) => state.free.swap_remove(at),
            None => {
                state.waiting.push_back(worker);
                loop {
                    state = cores.given[worker].wait(state).unwrap_or_else(PoisonError::into_inner);
                    if let Some(core) = state.given[worker].take() {
                        break core;
                    }
                }
            }
        };
        state.last[worker] = core;
        let held = Held { cores: cores.clone(), core };
        if let Some(&processor) = cores.processors.get(core)
            && state.kept[worker].replace(processor) != Some(processor)
        {
            drop(state);
            keep_to(&[processor]);
        }
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.cores.state();
        let before = state.waiting.iter().position(|&worker| state.last[worker] == self.core);
        match state.waiting.remove(before.unwrap_or(0)) {
            Some(worker) => {
                state.given[worker] = Some(self.core);
                self.cores.given[worker].notify_one();
            }
            None => state.free.push(self.core),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::cpus::own_processors;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn no_more_compute_at_once_than_may_and_all_get_to() {
        let (now, most, all) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        // The operating system chooses among two, so three may.
        std::thread::scope(|scope| {
            for mut user in share(6, 2, &[]) {
                let (now, most, all) = (&now, &most, &all);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let core = user.acquire();
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, Ordering::SeqCst);
                        drop(core);
                        all.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.into_inner() <= 3);
        assert_eq!(all.into_inner(), 1200);
    }

    #[test]
    fn who_computed_on_a_processor_before_comes_first_there_and_otherwise_who_asked_first() {
        let users = share(4, 2, &[10, 11]);
        let all = users[0].cores.clone();
        // Workers 0 and 1 begin at core 0, 2 and 3 at core 1.
        let [zero, one] = [0, 1].map(|core| Held { cores: all.clone(), core });
        all.state().free.clear();
        let mut users: Vec<Option<CoreUser>> = users.into_iter().map(Some).collect();
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (waiting, worker) in [3, 1, 2].into_iter().enumerate() {
                let (mut user, tell) = (users[worker].take().unwrap(), tell.clone());
                // The core is held until the thread is joined.
                threads.push(scope.spawn(move || {
                    let core = user.acquire();
                    tell.send((worker, core._held.core)).unwrap();
                    core
                }));
                while all.state().waiting.len() <= waiting {
                    std::thread::yield_now();
                }
            }
            drop(zero);
            assert_eq!(told.recv().unwrap(), (1, 0), "3 asked first, but computed elsewhere");
            drop(one);
            assert_eq!(told.recv().unwrap(), (3, 1));
            drop(threads.remove(1).join().unwrap());
            assert_eq!(told.recv().unwrap(), (2, 0), "nobody who waits computed there");
        });
        let free = &mut all.state().free;
        free.sort_unstable();
        assert_eq!(*free, [0, 1]);
    }

    #[test]
    fn workers_that_share_processors_of_their_own_are_kept_to_them_while_they_compute() {
        let own = own_processors();
        std::thread::scope(|scope| {
            for mut user in share(own.len() + 2, own.len(), &own) {
                let own = &own;
                scope.spawn(move || {
                    for _ in 0..20 {
                        let core = user.acquire();
                        let here = own_processors();
                        let all = if own.len() > 1 { vec![own[core._held.core]] } else { own.clone() };
                        assert_eq!(here, all);
                    }
                });
            }
        });
        assert_eq!(own_processors(), own, "of this thread");
        // With enough of them nobody is.
        assert!(share(own.len(), own.len(), &own)[0].cores.processors.is_empty());
    }

    #[test]
    fn a_core_is_held_while_any_guard_is_there() {
        let mut users = share(2, 1, &[]);
        let core = users[0].acquire();
        let more = users[0].acquire();
        drop(core);
        assert!(users[0].cores.state().free.is_empty());
        drop(more);
        assert_eq!(users[0].cores.state().free, [0]);
        drop(users[1].acquire());
    }

    #[test]
    fn a_panic_gives_the_core_back() {
        let mut users = share(2, 1, &[]);
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _core = users[0].acquire();
            panic!("while computing");
        }));
        assert!(failed.is_err());
        drop(users[1].acquire());
    }
}
