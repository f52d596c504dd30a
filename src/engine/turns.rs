//! Who computes when there are more workers in a process than processors for them.
//!
//! Left to the operating system, workers that share a core take turns every few milliseconds, and each finds the caches full
//! of another's tensors. Here a forward pass, or a vector–Jacobian product, runs to its end; who asked first is next. Nobody
//! waits for a message while it is its turn.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

/// Turns at computing for the workers of one process.
pub struct Turns {
    state: Mutex<State>,
    given: Condvar,
}

struct State {
    free: usize,
    /// Tickets of those who wait, the first to come in front.
    waiting: VecDeque<u64>,
    next: u64,
}

/// A turn, until it is dropped.
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// Turns for workers on as many processors as let `at_once` of them compute. Where that is more than one, half as many again
    /// may: else a processor would idle while the next in turn wakes up.
    pub fn for_processors(at_once: usize) -> Self {
        Self::new(if at_once > 1 { at_once + at_once.div_ceil(2) } else { 1 })
    }

    /// Turns for `at_once` workers at a time.
    pub fn new(at_once: usize) -> Self {
        let state = State { free: at_once.max(1), waiting: VecDeque::new(), next: 0 };
        Turns { state: Mutex::new(state), given: Condvar::new() }
    }

    /// Waits for a turn.
    pub fn take(&self) -> Turn<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = state.next;
        state.next += 1;
        state.waiting.push_back(ticket);
        while state.free == 0 || state.waiting.front() != Some(&ticket) {
            state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.pop_front();
        state.free -= 1;
        if state.free > 0 && !state.waiting.is_empty() {
            self.given.notify_all();
        }
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free += 1;
        if !state.waiting.is_empty() {
            self.0.given.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn no_more_compute_at_once_than_may_and_all_get_their_turns() {
        let turns = Turns::new(2);
        let (now, most, all) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let turn = turns.take();
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                        all.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!((most.into_inner(), all.into_inner()), (2, 1200));
    }

    #[test]
    fn a_panic_gives_the_turn_back() {
        let turns = Turns::new(1);
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take();
            panic!("while computing");
        }));
        assert!(failed.is_err());
        drop(turns.take());
    }
}
