//! What comes from outside, mutated from a corpus that the tests make: no panic, no hang, no allocation that the input has no room for,
//! and what is refused is bad input (exit code 2). Seconds as it is; `SIDEWAYS_FUZZ_SECONDS=600` goes on for so long with each kind.

#[path = "../common/mod.rs"]
mod common;
mod mutate;
mod shards;
mod texts;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Whose turn it is: what is noted is this process's, not a test's.
static TURN: Mutex<()> = Mutex::new(());

/// Notes the largest piece of memory that was asked for at once.
struct Largest(AtomicUsize);

#[global_allocator]
static LARGEST: Largest = Largest(AtomicUsize::new(0));

// SAFETY: all is the system's allocator's; sizes are noted, nothing else.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_max(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_max(layout.size(), Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.0.fetch_max(size, Relaxed);
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        unsafe { System.dealloc(ptr, layout) }
    }
}
