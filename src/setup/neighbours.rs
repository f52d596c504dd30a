//! The ranks that share this rank's host.

use crate::Result;
use crate::comm::World;
use crate::sys::cpus::own_processors;
use crate::sys::host::hostname;

/// The ranks of this rank's host, itself among them.
pub struct Neighbours {
    /// How many.
    pub ranks: usize,
    /// Whether rank 0 is one of them.
    pub chief: bool,
    /// Whether each has processors of its own.
    pub apart: bool,
}

impl Neighbours {
    /// Those of this rank. Collective.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when MPI fails.
    pub fn of(world: &World) -> Result<Self> {
        let own = own_processors();
        let names = [hostname(), world.rank().to_string()];
        let mine = names.into_iter().chain(own.iter().map(usize::to_string)).collect::<Vec<_>>().join(" ");
        let places: Vec<Vec<String>> = world
            .gather_on_node(mine.as_bytes())?
            .iter()
            .map(|place| String::from_utf8_lossy(place).split(' ').map(String::from).collect())
            .collect();
        let host = &places[world.local_rank()][0];
        let here: Vec<&Vec<String>> = places.iter().filter(|place| &place[0] == host).collect();
        // As many different processors as all of them together count?
        let mut all: Vec<&String> = here.iter().flat_map(|place| &place[2..]).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        Ok(Neighbours { ranks: here.len(), chief: here.iter().any(|place| place[1] == "0"), apart: all.len() == count })
    }
}
