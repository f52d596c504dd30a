//! How activations and cotangents get from one module's GPU to another's, and gradients from one replica's to another's on the same
//! node: settled edge by edge when a run starts, by all ranks together.
//!
//! Staged, a message's values travel in the link's buffers in host memory. As peers, the receiver owns a ring of places in its
//! GPU's memory; the sender's GPU copies the values into the next one, and when the copy is complete a message of a header
//! alone says so over the same link. The receiver gives the link's buffer back when its GPU has read the place, and
//! [`LinkSpec::in_flight`] is the number of places with which none is overwritten before that. With an MPI library that works
//! on GPU memory, both ends have a ring of places; MPI moves the values from one to the other as messages of their own, and
//! headers travel as between peers. Whoever uses the ends cannot tell which of these it is.

#[cfg(feature = "cuda")]
mod arena;
#[cfg(feature = "cuda")]
mod carried;
#[cfg_attr(not(feature = "cuda"), path = "no_places.rs")]
mod places;
#[cfg(feature = "cuda")]
mod settle;
#[cfg(feature = "cuda")]
mod trial;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(super) use places::Places;
#[cfg(feature = "cuda")]
use settle::{Settled, settle};

use super::{Endpoints, LinkSpec, World, connect};
use crate::Result;

/// How messages get from one module's GPU to another's, or one replica's to another's. The results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exchange {
    /// On each edge the fastest that works, by a test when the run starts.
    #[default]
    Auto,
    /// By way of host memory: works everywhere.
    Staged,
    /// Copied by the GPU into the receiver's memory: between modules of one process, and of processes of one node whose GPUs
    /// have peer access.
    Peer,
    /// By an MPI library that works on GPU memory, between processes; as peers within one.
    CudaAware,
}

/// The two links between two modules: activations there, and where any is used cotangents back. Or between two replicas of one, whose
/// gradients go both ways, or there alone.
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    /// Activations, or gradients.
    pub there: u32,
    /// Cotangents, or gradients.
    pub back: Option<u32>,
}

/// What links need to know of GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Gpus<'a> {
    /// The number of this rank's GPU, among those its process sees.
    pub ordinal: usize,
    /// How messages between GPUs are to travel.
    pub exchange: Exchange,
    /// Which links join modules on GPUs: all ranks' edges.
    pub edges: &'a [Edge],
    /// Those links, all ranks'.
    pub links: &'a [LinkSpec],
    /// All links' numbers are below.
    pub numbers: u32,
}

/// GPU memory behind a run's links.
pub struct Shared {
    #[cfg(feature = "cuda")]
    settled: Settled,
}

impl Shared {
    /// Gives the memory back, when all workers of this rank are done with their ends. Collective; a run that failed drops this
    /// instead.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a rank is gone.
    pub fn close(self, world: &World) -> Result<()> {
        #[cfg(feature = "cuda")]
        self.settled.close(world)?;
        let _ = world;
        Ok(())
    }
}

/// As [`connect`], between modules on GPUs where `gpus` says so. Collective: what `gpus` says is the same on all ranks.
///
/// # Errors
/// As [`connect`]; [`crate::Error::Input`], on all ranks, where the exchange that is asked for does not work.
#[cfg(feature = "cuda")]
pub fn connect_gpus(
    world: &World,
    placement: &[usize],
    links: &[LinkSpec],
    timeout: Duration,
    gpus: Option<Gpus>,
) -> Result<(Endpoints, Shared)> {
    let Some(gpus) = gpus else {
        return Ok((connect(world, placement, links, timeout)?, Shared { settled: Settled::default() }));
    };
    let settled = settle(world, placement, &gpus, timeout)?;
    let connected = settled.links(links, placement);
    let mut ends = super::connect_outside(world, placement, &connected, timeout, &settled.outside())?;
    for link in links {
        let Some(ring) = settled.ring(link.id) else { continue };
        // Where MPI moves the values, between ranks, one of the two ends is here.
        let mut values = settled.values(link.id).and_then(|id| ends.values(id));
        if let Some(sender) = ends.senders.get_mut(&link.id) {
            sender.places = Some(Places::new(ring, values.take()));
        }
        if let Some(receiver) = ends.receivers.get_mut(&link.id) {
            receiver.places = Some(Places::new(ring, values.take()));
        }
    }
    Ok((ends, Shared { settled }))
}

/// As [`connect`]: without CUDA there are no GPUs.
///
/// # Errors
/// As [`connect`].
#[cfg(not(feature = "cuda"))]
pub fn connect_gpus(
    world: &World,
    placement: &[usize],
    links: &[LinkSpec],
    timeout: Duration,
    _: Option<Gpus>,
) -> Result<(Endpoints, Shared)> {
    Ok((connect(world, placement, links, timeout)?, Shared {}))
}
