//! Captures of graphs, and what must not come beside them.
//!
//! What waits for a whole context fails while any of its streams is captured, and ends that capture, whichever thread calls
//! (CUDA's programming guide, on what a capture prohibits). Workers of one process share the context, and one may be through
//! and give its GPU back while another still captures.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

// Guards no data, so that a panic elsewhere spoils nothing.
static CAPTURES: RwLock<()> = RwLock::new(());

/// To be held during a capture.
pub(super) fn capturing() -> RwLockReadGuard<'static, ()> {
    CAPTURES.read().unwrap_or_else(PoisonError::into_inner)
}

/// To be held during a call that waits for the whole context: waits for this process's captures, and keeps new ones waiting.
pub(super) fn alone() -> RwLockWriteGuard<'static, ()> {
    CAPTURES.write().unwrap_or_else(PoisonError::into_inner)
}
