//! How activations and cotangents get from one module's GPU to another's: settled edge by edge when a run starts, by all ranks
//! together.
//!
//! Staged, a message's values travel in the link's buffers in host memory. As peers, the receiver owns a ring of places in its
//! GPU's memory; the sender's GPU copies the values into the next one, and when the copy is complete a message of a header
//! alone says so over the same link. The receiver gives the link's buffer back when its GPU has read the place, and
//! [`LinkSpec::in_flight`] is the number of places with which none is overwritten before that. With an MPI library that works
//! on GPU memory, both ends have a ring of places; MPI moves the values from one to the other as messages of their own, and
//! headers travel as between peers.

#[cfg(feature = "cuda")]
mod arena;
#[cfg(feature = "cuda")]
mod carried;
#[cfg(feature = "cuda")]
mod trial;

use std::time::Duration;

use crate::Result;
#[cfg(feature = "cuda")]
use crate::comm::connect_outside;
use crate::comm::{Endpoints, LinkSpec, World, connect};
use crate::setup::Setup;
use crate::setup::site::Site;
#[cfg(feature = "cuda")]
pub use on::{Edge, Settled, settle};

/// A run's links as they will be, and the memory behind them.
pub struct Exchange {
    /// What [`crate::comm::connect`] takes.
    pub links: Vec<LinkSpec>,
    #[cfg(feature = "cuda")]
    settled: Option<Settled>,
}

impl Exchange {
    /// Settles it for a run. Collective.
    ///
    /// # Errors
    /// [`crate::Error::Input`], on all ranks, where what `run.exchange` names does not work; [`crate::Error::Run`] if CUDA
    /// fails.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only GPUs need the other ranks"))]
    pub fn of_run(setup: &Setup, world: &World, site: Site) -> Result<Self> {
        let links = setup.wiring.links.clone();
        match site {
            Site::Cpu => Ok(Exchange {
                links,
                #[cfg(feature = "cuda")]
                settled: None,
            }),
            #[cfg(feature = "cuda")]
            Site::Gpu { ordinal, .. } => {
                let wiring = &setup.wiring;
                let pairs = wiring.activations.iter().flatten().zip(wiring.cotangents.iter().flatten());
                let edges: Vec<Edge> = pairs.map(|(&there, &back)| Edge { there, back }).collect();
                let timeout = Duration::from_secs(setup.config.run.timeout);
                let (choice, placement) = (setup.config.run.exchange, setup.grid.placement());
                let settled = settle(world, &placement, &links, &edges, choice, ordinal, timeout)?;
                Ok(Exchange { links: settled.links(&links, &placement), settled: Some(settled) })
            }
        }
    }

    /// Makes this rank's ends of the links, as [`crate::comm::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(&self, world: &World, placement: &[usize], timeout: Duration) -> Result<Endpoints> {
        #[cfg(feature = "cuda")]
        if let Some(settled) = &self.settled {
            return connect_outside(world, placement, &self.links, timeout, &settled.outside());
        }
        connect(world, placement, &self.links, timeout)
    }

    /// The places of link `id`'s messages in GPU memory; `None` where they are staged.
    #[cfg(feature = "cuda")]
    pub fn ring(&self, id: u32) -> Option<&crate::backend::cuda::shared::Ring> {
        self.settled.as_ref().and_then(|settled| settled.ring(id))
    }

    /// Takes what moves link `id`'s values, where MPI does.
    #[cfg(feature = "cuda")]
    pub fn values(&self, id: u32, endpoints: &mut Endpoints) -> Option<crate::comm::Values> {
        self.settled.as_ref().and_then(|settled| settled.values(id)).and_then(|id| endpoints.values(id))
    }

    /// Gives the memory back, when all workers of this rank are done. Collective; a run that failed drops this instead.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a rank is gone.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only GPUs share memory"))]
    pub fn close(self, world: &World) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(settled) = self.settled {
            settled.close(world)?;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod on {
    //! With GPUs.

    use std::collections::HashMap;
    use std::time::Duration;

    use super::arena::Arena;
    use super::carried::Carried;
    use super::trial;
    use crate::backend::cuda::shared::{Port, Ring};
    use crate::comm::{LinkSpec, Outside, World};
    use crate::config::Exchange as Choice;
    use crate::sys::host::hostname;
    use crate::{Error, Result};

    /// The two links between two modules: activations there, and where any is used cotangents back.
    #[derive(Clone, Copy, Debug)]
    pub struct Edge {
        /// Activations.
        pub there: u32,
        /// Cotangents.
        pub back: Option<u32>,
    }

    impl Edge {
        fn ids(self) -> impl Iterator<Item = u32> {
            std::iter::once(self.there).chain(self.back)
        }
    }

    /// What was settled.
    #[derive(Default)]
    pub struct Settled {
        arena: Arena,
        carried: Carried,
    }

    impl Settled {
        /// `links` as they are to be connected: those between peers carry headers only.
        pub fn links(&self, links: &[LinkSpec], placement: &[usize]) -> Vec<LinkSpec> {
            let as_settled =
                |link: &LinkSpec| match self.arena.has(link.id) || self.carried.values.contains_key(&link.id) {
                    true => announcing(link, placement[link.from] == placement[link.to]),
                    false => link.clone(),
                };
            let mut values: Vec<LinkSpec> = self.carried.values.values().cloned().collect();
            values.sort_by_key(|link| link.id);
            links.iter().map(as_settled).chain(values).collect()
        }

        /// The places of link `id`'s messages.
        pub fn ring(&self, id: u32) -> Option<&Ring> {
            self.arena.ring(id).or_else(|| self.carried.rings.get(&id))
        }

        /// The link that carries the values of link `id`.
        pub fn values(&self, id: u32) -> Option<u32> {
            self.carried.values.get(&id).map(|link| link.id)
        }

        /// This rank's places for the links that carry values.
        pub fn outside(&self) -> HashMap<u32, Vec<Outside>> {
            self.carried.outside(|link| link.id)
        }

        /// As [`super::Exchange::close`].
        ///
        /// # Errors
        /// As there.
        pub fn close(self, world: &World) -> Result<()> {
            self.arena.close(world)
        }
    }

    /// The link whose messages say that values were put into the receiver's memory. A message is held until its values are
    /// read, not only until they are copied out: within a process one more place makes up for that.
    pub fn announcing(link: &LinkSpec, same_rank: bool) -> LinkSpec {
        LinkSpec { words: 0, depth: link.depth + usize::from(same_rank), ..link.clone() }
    }

    /// Settles how messages of `edges`, some of `links`, travel between workers placed as `placement` says, this rank's on
    /// GPU number `ordinal`. Collective: `choice` and lists are the same on all ranks.
    ///
    /// # Errors
    /// [`Error::Input`], on all ranks, where what `choice` names does not work; [`Error::Run`] if CUDA fails otherwise;
    /// [`Error::Transport`] if a test's message is not there after `timeout`.
    pub fn settle(
        world: &World,
        placement: &[usize],
        links: &[LinkSpec],
        edges: &[Edge],
        choice: Choice,
        ordinal: usize,
        timeout: Duration,
    ) -> Result<Settled> {
        if choice == Choice::Staged || edges.is_empty() {
            return Ok(Settled::default());
        }
        let port = world.first_error(Port::open(ordinal))?;
        let hosts = world.gather(hostname().as_bytes())?;
        let link = |id: u32| links.iter().find(|link| link.id == id);
        let ranks = |edge: &Edge| link(edge.there).map_or((0, 0), |l| (placement[l.from], placement[l.to]));
        let name = |edge: &Edge| link(edge.there).map_or("", |l| l.name.as_str());
        let of = |edges: &[Edge]| -> Vec<LinkSpec> {
            edges.iter().flat_map(|e| e.ids()).filter_map(link).cloned().collect()
        };

        let (mut peers, mut others) = (Vec::new(), Vec::new());
        let mut between = Vec::new();
        let by_mpi = mpi_works(world, choice)?;
        for edge in edges {
            let (a, b) = ranks(edge);
            let apart = if choice == Choice::CudaAware { a != b } else { hosts[a] != hosts[b] };
            if apart && by_mpi {
                between.push(*edge);
                continue;
            }
            match hosts[a] == hosts[b] {
                true => peers.push(*edge),
                false => others.push((*edge, format!("ranks {a} and {b} are on different nodes"))),
            }
        }
        let first = links.iter().map(|link| link.id + 1).max().unwrap_or(0);
        let carry =
            |edges: &[Edge]| world.first_error(Carried::open(&port, placement, world.rank(), &of(edges), first));
        if !between.is_empty() {
            world.prepare_threads(port.binding());
        }
        let mut carried = carry(&between)?;
        let (mut arena, failures) = Arena::open(world, &port, placement, &of(&peers))?;
        peers.retain(|edge| {
            let (a, b) = ranks(edge);
            let both = [(a, b), (b, a)].into_iter().take(1 + usize::from(edge.back.is_some()));
            let trouble = both.filter_map(|(from, to)| failures.iter().find(|f| f.is_of(from, to))).next();
            others.extend(trouble.map(|failure| (*edge, failure.text.clone())));
            trouble.is_none()
        });
        let peers_only = peers.len();
        peers.extend(&between);
        let pairs: Vec<trial::Pair> = peers
            .iter()
            .filter_map(|edge| Some(trial::Pair { there: link(edge.there)?, back: edge.back.and_then(link) }))
            .collect();
        let outcomes = trial::run(world, &port, placement, &pairs, (&arena, &carried), timeout)?;
        let (mut chosen, mut by_mpi) = (Vec::new(), Vec::new());
        for (place, (edge, outcome)) in peers.iter().zip(outcomes).enumerate() {
            match outcome {
                Err(text) => others.push((*edge, text)),
                Ok(times) if choice == Choice::Auto && times.staged < times.peer => {
                    others.push((*edge, times.to_string()));
                }
                Ok(times) if place >= peers_only => {
                    by_mpi.push(*edge);
                    say(world, &format!("{}: by MPI, from GPU to GPU ({times})", name(edge)))
                }
                Ok(times) => {
                    chosen.push(*edge);
                    say(world, &format!("{}: from GPU to GPU ({times})", name(edge)));
                }
            }
        }
        for (edge, why) in &others {
            if choice != Choice::Auto {
                let named = if choice == Choice::Peer { "peer" } else { "cuda-aware" };
                let text = format!("run.exchange = \"{named}\" does not work on {}: {why}; use \"auto\"", name(edge));
                return world.first_error(Err(Error::input(text)));
            }
            say(world, &format!("{}: by way of host memory ({why})", name(edge)));
        }
        if !others.is_empty() {
            // What is not used is given back.
            arena.close(world)?;
            let failures;
            (arena, failures) = Arena::open(world, &port, placement, &of(&chosen))?;
            let refused = failures.first().map_or(Ok(()), |failure| Err(Error::Run(failure.text.clone())));
            world.first_error(refused)?;
        }
        if by_mpi.len() < between.len() {
            carried = carry(&by_mpi)?;
        }
        Ok(Settled { arena, carried })
    }

    /// Whether MPI may be given GPU memory: where `auto` or `cuda-aware` asks for it and the library says on every rank that it
    /// works on that. A name is refused where it does not.
    fn mpi_works(world: &World, choice: Choice) -> Result<bool> {
        if choice == Choice::Peer {
            return Ok(false);
        }
        let all = world.gather(&[u8::from(world.takes_gpu_memory())])?;
        let without = all.iter().position(|said| said[..] != [1]);
        if choice == Choice::Auto {
            return Ok(without.is_none());
        }
        world.first_error(without.map_or(Ok(true), |rank| {
            Err(Error::input(format!(
                "run.exchange = \"cuda-aware\": the MPI library ({}) of rank {rank} does not say that it works on GPU memory. \
                 Use one that is built for CUDA (with Open MPI, `ompi_info` says so), set SIDEWAYS_MPI_CUDA=1 where another \
                 library can, or use \"auto\"",
                world.mpi_library().unwrap_or_default()
            )))
        }))
    }

    fn say(world: &World, text: &str) {
        if world.rank() == 0 {
            log::info!("{text}");
        }
    }
}
