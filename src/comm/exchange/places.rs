//! A link's places in GPU memory, as one of its ends uses them: in turn.

use crate::Result;
use crate::backend::cuda::Place;
use crate::backend::cuda::shared::Ring;
use crate::comm::Values;

/// The places of one end, and what moves their values where MPI does.
pub struct Places {
    // Dropped before the places: MPI may be at work on them.
    values: Option<Values>,
    places: Vec<Place>,
    /// Messages so far.
    count: usize,
}

impl Places {
    /// Those of `ring`.
    pub fn new(ring: &Ring, values: Option<Values>) -> Self {
        Places { values, places: ring.places(), count: 0 }
    }

    /// Waits for the next place: to be free where this end sends, to be filled where it receives.
    ///
    /// # Errors
    /// As [`Values::wait`].
    pub fn wait(&mut self) -> Result<&Place> {
        self.values.as_mut().map_or(Ok(0), Values::wait)?;
        Ok(&self.places[self.count % self.places.len()])
    }

    /// The place is filled, or has been read: goes on to the next.
    ///
    /// # Errors
    /// As [`Values::start`].
    pub fn start(&mut self) -> Result<()> {
        self.count += 1;
        self.values.as_mut().map_or(Ok(()), Values::start)
    }

    /// Waits until all values that MPI sends have left.
    ///
    /// # Errors
    /// As [`Values::flush`].
    pub fn flush(&mut self) -> Result<()> {
        self.values.as_mut().map_or(Ok(()), Values::flush)
    }
}
