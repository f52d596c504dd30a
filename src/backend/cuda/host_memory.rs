//! Host memory that the GPU copies from and to by itself: locked into RAM, so that copies run beside computation.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use cudarc::driver::{CudaContext, sys};

use super::capture;
use super::gpu::{Gpu, failed};
use crate::Result;

/// A piece of host memory that was to be locked.
pub(super) struct Pinned {
    start: usize,
    end: usize,
    /// Whether it was, by this worker: a buffer between two workers of one process may be the other's.
    own: bool,
}

impl Pinned {
    /// Undoes it.
    ///
    /// # Safety
    /// No copy from or to the memory is under way.
    pub(super) unsafe fn undo(&self) {
        if self.own {
            // SAFETY: registered by `Gpu::pin`; the rest is the caller's promise.
            let _ = unsafe { sys::cuMemHostUnregister(self.start as *mut _) };
        }
    }
}

impl Gpu {
    /// Undoes [`Gpu::pin`], for memory that ends before the GPU does. Waits for all work first.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if work before failed.
    pub fn unpin(&self, memory: &[f32]) -> Result<()> {
        let _alone = capture::alone();
        self.context.synchronize().map_err(|e| failed("waiting for the GPU", &e))?;
        let start = memory.as_ptr() as usize;
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(k) = pinned.iter().position(|piece| piece.start == start) {
            // SAFETY: everything was waited for.
            unsafe { pinned.swap_remove(k).undo() };
        }
        Ok(())
    }

    /// Locks a piece of host memory, on pages of its own, into RAM, so that copies from and to it run beside computation; once a
    /// piece. It must outlive this, or be given to [`Gpu::unpin`]: a copy to other memory at its address would go astray. Where the driver
    /// refuses, copies still work, and are slower.
    pub fn pin(&self, memory: &[f32]) {
        let (start, bytes) = (memory.as_ptr() as usize, std::mem::size_of_val(memory));
        let end = start + bytes;
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if pinned.iter().any(|piece| piece.start <= start && end <= piece.end) {
            return;
        }
        // SAFETY: the memory exists; registering changes none of it, and it is undone when this is dropped.
        let refused = unsafe { sys::cuMemHostRegister_v2(start as *mut _, bytes, 0) }.result().err();
        if let Some(e) = refused {
            log::debug!("{bytes} bytes of host memory could not be locked: {e}");
        }
        // Not to be tried again either way.
        pinned.push(Pinned { start, end, own: refused.is_none() });
    }

    /// Locked host memory of zeros. Not for use in a tick.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the driver refuses.
    pub fn locked(&self, words: usize) -> Result<Locked> {
        let bytes = words.max(1) * 4;
        // SAFETY: no flags; it is freed when dropped.
        let pointer = unsafe { cudarc::driver::result::malloc_host(bytes, 0) };
        let pointer = pointer.map_err(|e| failed("locking host memory", &e))?;
        // SAFETY: as long as allocated.
        unsafe { pointer.cast::<u8>().write_bytes(0, bytes) };
        Ok(Locked { pointer: pointer.cast(), words, context: self.context.clone() })
    }
}

/// Locked host memory through which frames go: a copy from or to ordinary memory would be waited for.
pub struct Locked {
    pointer: *mut f32,
    words: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the memory belongs to whoever owns this, on whichever thread.
unsafe impl Send for Locked {}

impl Locked {
    /// How many words it has.
    pub fn length(&self) -> usize {
        self.words
    }

    /// Part of it, while others may be copied to.
    ///
    /// # Panics
    /// If it ends before.
    pub fn part(&mut self, words: Range<usize>) -> &mut [f32] {
        assert!(words.start <= words.end && words.end <= self.words, "{words:?} of {} words", self.words);
        // SAFETY: within what was allocated and zeroed; this borrow is the only one. Copies of these words are the owner's to wait
        // for.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(words.start), words.end - words.start) }
    }

    /// The whole of it.
    pub fn words(&mut self) -> &mut [f32] {
        // SAFETY: allocated with this many words, and zeroed; this borrow is the only one. Copies under way are the owner's to
        // wait for.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.words) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        let _alone = capture::alone();
        // SAFETY: allocated by `Gpu::locked`; freeing waits for copies under way.
        let _ = unsafe { cudarc::driver::result::free_host(self.pointer.cast()) };
    }
}
