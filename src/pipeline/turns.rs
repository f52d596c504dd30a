//! Who computes when there are more workers in a process than processors for them.
//!
//! Left to the operating system, workers that share a core take turns every few milliseconds, and each finds the caches full
//! of another's tensors. Here a forward pass, or a vector–Jacobian product, runs to its end, and whose turn is next on a
//! processor computed there before, if there is such a one: some of what it needs is in that processor's caches. Otherwise who
//! asked first comes, so no processor is idle while anyone waits for one. Nobody waits for a message while it is its turn: a
//! turn goes on from one pass to the next only where nothing has to be waited for.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use crate::sys::cpus::keep_to;

/// Turns at computing for the workers of one process.
struct Turns {
    state: Mutex<State>,
    /// Of each worker: it has been given a place.
    given: Vec<Condvar>,
    /// The processor of each place; empty where the operating system chooses.
    processors: Vec<usize>,
}

/// Places are where workers compute, numbered from 0.
struct State {
    free: Vec<usize>,
    /// Workers that wait for a turn, the first to come in front.
    waiting: VecDeque<usize>,
    /// Where each worker computed last.
    last: Vec<usize>,
    /// What each has been given and not yet noticed.
    given: Vec<Option<usize>>,
    /// The processor that each worker's thread is kept to.
    kept: Vec<Option<usize>>,
}

/// A worker's part in the turns of its process, for its thread.
pub struct Seat {
    turns: Arc<Turns>,
    worker: usize,
    /// The turn it has.
    held: Weak<Held>,
}

/// A turn, until all that there are of it are dropped.
#[must_use]
pub struct Turn {
    _held: Arc<Held>,
}

struct Held {
    turns: Arc<Turns>,
    place: usize,
}

/// Seats for `workers` on as many processors as let `at_once` of them compute. `own` are their numbers if each is for one worker
/// and nobody else's: then workers that have to share them are kept to the processor that their turn is on. Where the operating
/// system chooses among several, half as many again may compute: else one would idle while the next in turn wakes up elsewhere.
pub fn seats(workers: usize, at_once: usize, own: &[usize]) -> Vec<Seat> {
    let shared = workers > at_once;
    let (places, processors) = match at_once {
        0 | 1 => (1, Vec::new()),
        _ if shared && own.len() == at_once => (at_once, own.to_vec()),
        _ => (at_once + at_once.div_ceil(2), Vec::new()),
    };
    let state = State {
        free: (0..places).collect(),
        waiting: VecDeque::new(),
        // Neighbours, which exchange messages, begin side by side.
        last: (0..workers).map(|worker| worker * places / workers).collect(),
        given: vec![None; workers],
        kept: vec![None; workers],
    };
    let given = (0..workers).map(|_| Condvar::new()).collect();
    let turns = Arc::new(Turns { state: Mutex::new(state), given, processors });
    (0..workers).map(|worker| Seat { turns: turns.clone(), worker, held: Weak::new() }).collect()
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Waits for a turn, or goes on with the one that it has.
    pub fn take(&mut self) -> Turn {
        let _held = self.held.upgrade().unwrap_or_else(|| Arc::new(self.wait()));
        self.held = Arc::downgrade(&_held);
        Turn { _held }
    }

    fn wait(&self) -> Held {
        let (turns, worker) = (&self.turns, self.worker);
        let mut state = turns.state();
        let last = state.last[worker];
        let free = state.free.iter().position(|&place| place == last).or(state.free.len().checked_sub(1));
        let place = match free {
            Some(at) => state.free.swap_remove(at),
            None => {
                state.waiting.push_back(worker);
                loop {
                    state = turns.given[worker].wait(state).unwrap_or_else(PoisonError::into_inner);
                    if let Some(place) = state.given[worker].take() {
                        break place;
                    }
                }
            }
        };
        state.last[worker] = place;
        let held = Held { turns: turns.clone(), place };
        if let Some(&processor) = turns.processors.get(place)
            && state.kept[worker].replace(processor) != Some(processor)
        {
            drop(state);
            keep_to(processor);
        }
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        let before = state.waiting.iter().position(|&worker| state.last[worker] == self.place);
        match state.waiting.remove(before.unwrap_or(0)) {
            Some(worker) => {
                state.given[worker] = Some(self.place);
                self.turns.given[worker].notify_one();
            }
            None => state.free.push(self.place),
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
    fn no_more_compute_at_once_than_may_and_all_get_their_turns() {
        let (now, most, all) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        // The operating system chooses among two, so three may.
        std::thread::scope(|scope| {
            for mut seat in seats(6, 2, &[]) {
                let (now, most, all) = (&now, &most, &all);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let turn = seat.take();
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
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
        let seats = seats(4, 2, &[10, 11]);
        let all = seats[0].turns.clone();
        // Workers 0 and 1 begin at place 0, 2 and 3 at place 1.
        let [zero, one] = [0, 1].map(|place| Held { turns: all.clone(), place });
        all.state().free.clear();
        let mut seats: Vec<Option<Seat>> = seats.into_iter().map(Some).collect();
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (waiting, worker) in [3, 1, 2].into_iter().enumerate() {
                let (mut seat, tell) = (seats[worker].take().unwrap(), tell.clone());
                // The turn lasts until the thread is joined.
                threads.push(scope.spawn(move || {
                    let turn = seat.take();
                    tell.send((worker, turn._held.place)).unwrap();
                    turn
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
            for mut seat in seats(own.len() + 2, own.len(), &own) {
                let own = &own;
                scope.spawn(move || {
                    for _ in 0..20 {
                        let turn = seat.take();
                        let here = own_processors();
                        let all = if own.len() > 1 { vec![own[turn._held.place]] } else { own.clone() };
                        assert_eq!(here, all);
                    }
                });
            }
        });
        assert_eq!(own_processors(), own, "of this thread");
        // With enough of them nobody is.
        assert!(seats(own.len(), own.len(), &own)[0].turns.processors.is_empty());
    }

    #[test]
    fn a_turn_goes_on_while_any_of_it_is_there() {
        let mut seats = seats(2, 1, &[]);
        let turn = seats[0].take();
        let more = seats[0].take();
        drop(turn);
        assert!(seats[0].turns.state().free.is_empty());
        drop(more);
        assert_eq!(seats[0].turns.state().free, [0]);
        drop(seats[1].take());
    }

    #[test]
    fn a_panic_gives_the_turn_back() {
        let mut seats = seats(2, 1, &[]);
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = seats[0].take();
            panic!("while computing");
        }));
        assert!(failed.is_err());
        drop(seats[1].take());
    }
}
