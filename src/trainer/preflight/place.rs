//! What each rank finds where it runs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::backend::cuda;
use crate::comm::World;
use crate::sys::cpus::{own_processors, parallelism};
use crate::sys::files::free_space;
use crate::sys::host::{hostname, nvidia_gpus, program_hash};
use crate::sys::memory::memory;
use crate::{Error, Result};

/// What one rank finds where it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Its host.
    pub host: String,
    /// The processors it may run on, by number.
    pub processors: Vec<usize>,
    /// Processors' worth of time that a container leaves it, which may be less.
    pub parallelism: usize,
    /// Bytes of memory that may still be taken there.
    pub available: u64,
    /// Bytes it may take at most, of the host or of the control group that it is in.
    pub limit: u64,
    /// Free bytes of `/dev/shm`, through which ranks of a host exchange messages; `None` without it.
    pub shared: Option<u64>,
    /// NVIDIA GPUs of the host.
    pub gpus: usize,
    /// Of these, how many the program can use; and if none, why.
    pub usable: usize,
    /// Why none can be used.
    pub unusable: String,
    /// xxh3-64 of the program's file.
    pub program: u64,
}

impl Place {
    /// Asks the system.
    pub fn here() -> Self {
        let (available, limit) = memory();
        let (usable, unusable) = cuda::usable();
        Place {
            host: hostname(),
            processors: own_processors(),
            parallelism: parallelism(),
            available,
            limit,
            shared: free_space(Path::new("/dev/shm")),
            gpus: nvidia_gpus(),
            usable,
            unusable,
            program: program_hash(),
        }
    }
}

/// Every rank's place, on rank 0; nothing elsewhere. Collective.
///
/// # Errors
/// [`Error::Transport`] when MPI fails.
pub fn places(world: &World) -> Result<Vec<Place>> {
    let mine = serde_json::to_vec(&Place::here()).map_err(|e| Error::Run(e.to_string()))?;
    let parse =
        |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(|e| Error::Transport(format!("a rank's place: {e}")));
    world.gather_at_first(&mine)?.into_iter().map(parse).collect()
}
