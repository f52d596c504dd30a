//! Memory for activations: blocks are made once and used again.
//!
//! What it gains, by processor time on one core of a 2-core AMD EPYC virtual machine, oneDNN 2.6.3 (`taskset -c 0
//! target/release/sideways bench train benches/pytorch/vgg8.toml --set model.modules=8 --set 'model.skip.spans=[2]'`, and
//! `resnet18.toml`; each pair of runs at the same time on the same core): with glibc's allocator `vgg8` trains at 0.85 and
//! `resnet18` at 0.96 of the frames/s, and the peak memory is 78 and 13 MiB higher (of 489 and 272). With the crate `mimalloc`
//! 0.1.52, told to keep what is freed (`MIMALLOC_PURGE_DELAY=-1`), they are as fast (0.99 and 1.02) and need 76 and 98 MiB more.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks from this size on are kept for reuse, up to the next one.
const SMALLEST: usize = 1 << 16;
const LARGEST: usize = 1 << 29;
/// Eight sizes from one power of two to the next.
const CLASSES: usize = (LARGEST.ilog2() - SMALLEST.ilog2()) as usize * 8 + 1;
/// A page of memory that needs one entry in the processor's table instead of 512.
const HUGE_PAGE: usize = 2 << 20;

/// The program's allocator: blocks of 64 KiB to 512 MiB, once freed, serve the next request of their size instead of going
/// back to the operating system. Every tick frees and allocates tensors of the same sizes; from the system they would come
/// as fresh pages to be faulted in and cleared each time. Smaller blocks, and larger, are the system allocator's.
///
/// Set it with `#[global_allocator]`; nothing depends on that but speed.
pub struct Recycling {
    free: [Mutex<Free>; CLASSES],
    fresh: AtomicU64,
}

/// A list of free blocks, each beginning with the address of the next.
struct Free(*mut u8);

// SAFETY: the pointers are to blocks that nobody else knows of; the mutex orders their use.
unsafe impl Send for Free {}

impl Default for Recycling {
    fn default() -> Self {
        Self::new()
    }
}

impl Recycling {
    /// Nothing is kept yet.
    pub const fn new() -> Self {
        Recycling { free: [const { Mutex::new(Free(null_mut())) }; CLASSES], fresh: AtomicU64::new(0) }
    }

    /// Blocks of at least 64 KiB that were asked of the system so far. It stands still once a computation has all it needs.
    pub fn fresh(&self) -> u64 {
        self.fresh.load(Ordering::Relaxed)
    }

    /// The list for a layout and the size of its blocks, if such blocks are kept.
    fn class(layout: Layout) -> Option<(usize, Layout)> {
        let size = layout.size();
        if !(SMALLEST..=LARGEST).contains(&size) || layout.align() > 4096 {
            return None;
        }
        let octave = (size - 1).ilog2().max(SMALLEST.ilog2());
        let step = 1usize << (octave - 3);
        let steps = size.saturating_sub(1 << octave).div_ceil(step);
        let class = (octave - SMALLEST.ilog2()) as usize * 8 + steps;
        let block = (1 << octave) + steps * step;
        let align = if block >= HUGE_PAGE { HUGE_PAGE } else { 4096 };
        Layout::from_size_align(block, align).ok().map(|layout| (class, layout))
    }

    fn reuse(&self, class: usize) -> Option<*mut u8> {
        let mut free = self.free[class].lock().ok()?;
        let block = free.0;
        if block.is_null() {
            return None;
        }
        // SAFETY: a block on the list begins with the address of the next.
        free.0 = unsafe { block.cast::<*mut u8>().read() };
        Some(block)
    }

    fn fresh_block(&self, layout: Layout) -> *mut u8 {
        self.fresh.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the size is not zero.
        let block = unsafe { System.alloc(layout) };
        #[cfg(target_os = "linux")]
        if !block.is_null() && layout.align() == HUGE_PAGE {
            // SAFETY: a hint about memory that is ours; a refusal changes nothing.
            unsafe { libc::madvise(block.cast(), layout.size() / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
        }
        block
    }
}

// SAFETY: a block on a list is at least as large and aligned as its class's layout, belongs to nobody, and is taken off the
// list under its lock; the class is a function of the layout, so a block returns to the list it came from.
unsafe impl GlobalAlloc for Recycling {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match Self::class(layout) {
            Some((class, block)) => self.reuse(class).unwrap_or_else(|| self.fresh_block(block)),
            // SAFETY: as the caller promises.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if Self::class(layout).is_none() {
            // SAFETY: as the caller promises.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: as the caller promises; the block has at least the layout's size.
        unsafe {
            let block = self.alloc(layout);
            if !block.is_null() {
                block.write_bytes(0, layout.size());
            }
            block
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Some((class, block)) = Self::class(layout) else {
            // SAFETY: as the caller promises; such a block came from the system.
            return unsafe { System.dealloc(pointer, layout) };
        };
        match self.free[class].lock() {
            Ok(mut free) => {
                // SAFETY: the block is ours now and larger than an address.
                unsafe { pointer.cast::<*mut u8>().write(free.0) };
                free.0 = pointer;
            }
            // SAFETY: it came from the system with this layout.
            Err(_) => unsafe { System.dealloc(pointer, block) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_used_again_and_hold_what_they_are_asked_for() {
        let heap = Recycling::new();
        for size in [SMALLEST, SMALLEST + 1, 100_000, 131_072, 131_073, 3 << 20, (3 << 20) + 8, LARGEST] {
            let layout = Layout::from_size_align(size, 64).unwrap();
            let (_, block) = Recycling::class(layout).unwrap();
            assert!(block.size() >= size && block.size() <= size + size / 8 + 1, "{size}: {block:?}");
            // SAFETY: the layout is the one asked for, the block is given back once, the pages written are inside.
            unsafe {
                let before = heap.fresh();
                let first = heap.alloc(layout);
                assert!(!first.is_null() && (first as usize).is_multiple_of(4096));
                first.add(size - 1).write(7);
                heap.dealloc(first, layout);
                let again = heap.alloc_zeroed(layout);
                assert_eq!((again, heap.fresh() - before, again.add(size - 1).read()), (first, 1, 0));
                let other = heap.alloc(layout);
                assert!(other != again && heap.fresh() - before == 2);
                heap.dealloc(other, layout);
                heap.dealloc(again, layout);
            }
        }
        assert!(Recycling::class(Layout::from_size_align(SMALLEST - 1, 8).unwrap()).is_none());
        assert!(Recycling::class(Layout::from_size_align(LARGEST + 1, 8).unwrap()).is_none());
    }

    #[test]
    fn every_class_has_one_size() {
        let mut sizes = std::collections::BTreeMap::new();
        for size in (SMALLEST..(4 << 20)).step_by(1000) {
            let (class, block) = Recycling::class(Layout::from_size_align(size, 8).unwrap()).unwrap();
            assert_eq!(*sizes.entry(class).or_insert(block.size()), block.size());
        }
    }
}
