//! Places in GPU memory, in a program without CUDA: there are none.

use crate::Result;
use crate::backend::cuda::Place;

/// Never made.
pub enum Places {}

impl Places {
    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn wait(&mut self) -> Result<&Place> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// As [`Places::wait`].
    pub fn start(&mut self) -> Result<()> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// As [`Places::wait`].
    pub fn flush(&mut self) -> Result<()> {
        match *self {}
    }
}
