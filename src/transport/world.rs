//! Which ranks there are, and what they do together before and after training.

use crate::Result;

/// The ranks of this run: this process alone, or an MPI job.
pub enum World {
    /// One process, its workers are threads.
    Alone,
}

impl World {
    /// Finds out how this process was started and joins the other ranks, if there are any.
    pub fn join() -> Result<World> {
        Ok(World::Alone)
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        0
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        1
    }

    /// Makes one rank's error every rank's error.
    pub fn first_error<T>(&self, result: Result<T>) -> Result<T> {
        result
    }
}
