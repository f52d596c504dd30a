//! Settles edge by edge how messages get from one module's GPU to another's, by all ranks together.

use std::collections::HashMap;
use std::time::Duration;

use super::arena::Arena;
use super::carried::Carried;
use super::{Edge, Exchange, Gpus, trial};
use crate::backend::cuda::shared::{Port, Ring};
use crate::comm::{Kind, LinkSpec, Outside, World};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// What was settled.
#[derive(Default)]
pub struct Settled {
    arena: Arena,
    carried: Carried,
}

impl Settled {
    /// `links` as they are to be connected: those whose values go from GPU to GPU carry headers only.
    pub fn links(&self, links: &[LinkSpec], placement: &[usize]) -> Vec<LinkSpec> {
        let as_settled = |link: &LinkSpec| match self.arena.has(link.id) || self.carried.values.contains_key(&link.id) {
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

    /// As [`super::Shared::close`].
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

/// Settles how messages of the edges of `gpus` travel between workers placed as `placement` says. Collective: but for the
/// GPU's number, `gpus` is the same on all ranks.
///
/// # Errors
/// [`Error::Input`], on all ranks, where what `choice` names does not work; [`Error::Run`] if CUDA fails otherwise;
/// [`Error::Transport`] if a test's message is not there after `timeout`.
pub fn settle(
    world: &World,
    placement: &[usize],
    &Gpus { ordinal, exchange: choice, edges, links, numbers }: &Gpus,
    timeout: Duration,
) -> Result<Settled> {
    if choice == Exchange::Staged || edges.is_empty() {
        return Ok(Settled::default());
    }
    let port = world.first_error(Port::open(ordinal))?;
    let hosts = world.gather(hostname().as_bytes())?;
    let by_number: HashMap<u32, &LinkSpec> = links.iter().map(|link| (link.id, link)).collect();
    let link = |id: u32| by_number.get(&id).copied();
    let ranks = |edge: &Edge| link(edge.there).map_or((0, 0), |l| (placement[l.from], placement[l.to]));
    let name = |edge: &Edge| link(edge.there).map_or("", |l| l.name.as_str());
    let of = |edges: &[Edge]| -> Vec<LinkSpec> {
        edges.iter().flat_map(|e| [Some(e.there), e.back].into_iter().flatten()).filter_map(link).cloned().collect()
    };

    let (mut peers, mut others) = (Vec::new(), Vec::new());
    let mut between = Vec::new();
    let by_mpi = mpi_works(world, choice)?;
    for edge in edges {
        let (a, b) = ranks(edge);
        // Between nodes gradients go by way of host memory, in any case.
        if hosts[a] != hosts[b] && link(edge.there).is_some_and(|link| link.kind == Kind::Gradient) {
            continue;
        }
        let apart = if choice == Exchange::CudaAware { a != b } else { hosts[a] != hosts[b] };
        if apart && by_mpi {
            between.push(*edge);
            continue;
        }
        match hosts[a] == hosts[b] {
            true => peers.push(*edge),
            false => others.push((*edge, format!("ranks {a} and {b} are on different nodes"))),
        }
    }
    let carry = |edges: &[Edge]| world.first_error(Carried::open(&port, placement, world.rank(), &of(edges), numbers));
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
            Ok(times) if choice == Exchange::Auto && times.staged < times.peer => {
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
        if choice != Exchange::Auto {
            let named = if choice == Exchange::Peer { "peer" } else { "cuda-aware" };
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
fn mpi_works(world: &World, choice: Exchange) -> Result<bool> {
    if choice == Exchange::Peer {
        return Ok(false);
    }
    let all = world.gather(&[u8::from(world.takes_gpu_memory())])?;
    let without = all.iter().position(|said| said[..] != [1]);
    if choice == Exchange::Auto {
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
