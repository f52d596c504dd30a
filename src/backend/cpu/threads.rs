//! Compute threads of the calling thread's kernels.
//!
//! A kernel cuts its work into pieces whose bounds depend on shapes alone. With one thread (the default) they run in
//! order on the caller; with more, a pool that belongs to the caller takes them. Pieces write to disjoint memory, so
//! the outcome is the same to the bit. Each worker of a pipeline sets its own number.

use std::cell::RefCell;
use std::rc::Rc;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

thread_local! {
    static POOL: RefCell<Option<Rc<ThreadPool>>> = const { RefCell::new(None) };
}

/// From now on, kernels called on this thread compute with `n` threads (0 counts as 1).
///
/// # Errors
/// [`Error::Run`] where the operating system refuses the threads.
pub fn set_threads(n: usize) -> Result<()> {
    let pool = match n {
        0 | 1 => None,
        n => {
            let name = |i| format!("kernel-{i}");
            let pool = ThreadPoolBuilder::new().num_threads(n).thread_name(name).build();
            Some(Rc::new(pool.map_err(|e| Error::Run(format!("starting {n} compute threads: {e}")))?))
        }
    };
    POOL.with(|slot| *slot.borrow_mut() = pool);
    Ok(())
}

/// Runs `f` with `n` compute threads, then returns to the number set before.
///
/// # Errors
/// As [`set_threads`].
pub fn with_threads<R>(n: usize, f: impl FnOnce() -> R) -> Result<R> {
    let before = POOL.with(|slot| slot.borrow().clone());
    set_threads(n)?;
    let result = f();
    POOL.with(|slot| *slot.borrow_mut() = before);
    Ok(result)
}

fn pool() -> Option<Rc<ThreadPool>> {
    POOL.with(|slot| slot.borrow().clone())
}

/// Calls `f(scratch, i, chunk)` for each `size`-element chunk `i` of `data`, the last one perhaps shorter. `scratch`
/// makes working memory, once a thread at least.
pub(crate) fn chunks<T: Send, S>(
    data: &mut [T],
    size: usize,
    scratch: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, usize, &mut [T]) + Sync,
) {
    if data.is_empty() {
        return;
    }
    match pool() {
        Some(pool) if data.len() > size => pool.install(|| {
            data.par_chunks_mut(size).enumerate().for_each_init(&scratch, |s, (i, chunk)| f(s, i, chunk));
        }),
        _ => {
            let mut s = scratch();
            data.chunks_mut(size).enumerate().for_each(|(i, chunk)| f(&mut s, i, chunk));
        }
    }
}

/// As [`chunks`] on two slices cut in step: chunk `i` of `a` (`size_a`) with that of `b`.
pub(crate) fn chunks2<T: Send, U: Send, S>(
    (a, size_a): (&mut [T], usize),
    (b, size_b): (&mut [U], usize),
    scratch: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, usize, &mut [T], &mut [U]) + Sync,
) {
    if a.is_empty() {
        return;
    }
    match pool() {
        Some(pool) if a.len() > size_a => pool.install(|| {
            let both = a.par_chunks_mut(size_a).zip(b.par_chunks_mut(size_b)).enumerate();
            both.for_each_init(&scratch, |s, (i, (x, y))| f(s, i, x, y));
        }),
        _ => {
            let mut s = scratch();
            a.chunks_mut(size_a).zip(b.chunks_mut(size_b)).enumerate().for_each(|(i, (x, y))| f(&mut s, i, x, y));
        }
    }
}

/// As [`chunks`] without working memory, on three slices cut in step.
pub(crate) fn chunks3<T: Send, U: Send, V: Send>(
    (a, size_a): (&mut [T], usize),
    (b, size_b): (&mut [U], usize),
    (c, size_c): (&mut [V], usize),
    f: impl Fn(usize, &mut [T], &mut [U], &mut [V]) + Sync,
) {
    if a.is_empty() {
        return;
    }
    match pool() {
        Some(pool) if a.len() > size_a => pool.install(|| {
            let all = a.par_chunks_mut(size_a).zip(b.par_chunks_mut(size_b)).zip(c.par_chunks_mut(size_c));
            all.enumerate().for_each(|(i, ((x, y), z))| f(i, x, y, z));
        }),
        _ => {
            let all = a.chunks_mut(size_a).zip(b.chunks_mut(size_b)).zip(c.chunks_mut(size_c));
            all.enumerate().for_each(|(i, ((x, y), z))| f(i, x, y, z));
        }
    }
}
