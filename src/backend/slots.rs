//! Where a message's values lie while it is filled or read, and when that is done.
//!
//! A link hands out slots; a stage copies values out of and into them. On a GPU copies run beside the host: what comes back
//! with them says when they are done, and only then may the slot be sent, or given back.

use super::cuda::{Event, Place};
use crate::Result;

/// A message that came, to be read.
#[derive(Clone, Copy)]
pub enum Slot<'a> {
    /// In host memory.
    Host(&'a [f32]),
    /// In the memory of the receiver's GPU.
    Device(&'a Place),
}

/// A message to be sent, to be filled.
pub enum SlotMut<'a> {
    /// In host memory.
    Host(&'a mut [f32]),
    /// In the memory of the receiver's GPU, or in what MPI sends from.
    Device(&'a Place),
}

/// When the values of a slot have been read, or written.
#[derive(Clone)]
pub enum Done {
    /// They have.
    Now,
    /// When the GPU comes to this event.
    At(Event),
}

impl Done {
    /// Whether they have.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched on the GPU before failed.
    pub fn is_done(&self) -> Result<bool> {
        match self {
            Done::Now => Ok(true),
            Done::At(event) => event.is_complete(),
        }
    }
}
