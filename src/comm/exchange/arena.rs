//! The memory into which other modules' GPUs put their messages: one allocation a rank, opened by every rank that sends to it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::settle::announcing;
use crate::Result;
use crate::backend::cuda::shared::{HANDLE, Port, Ring, Shared, aligned};
use crate::comm::{LinkSpec, World};

/// Rings of all links that touch this rank, its own memory and that of the ranks it sends to.
#[derive(Default)]
pub struct Arena {
    /// The links it is for, all ranks'.
    links: HashSet<u32>,
    rings: HashMap<u32, Ring>,
    opened: Vec<Arc<Shared>>,
    own: Option<Arc<Shared>>,
    exported: bool,
}

/// Memory that could not be had, or not be opened.
pub struct Failure {
    /// The rank that wanted to open it; `None`: it does not exist.
    from: Option<usize>,
    /// The rank whose memory it is.
    to: usize,
    /// Why.
    pub text: String,
}

impl Failure {
    /// Whether rank `from` cannot send to rank `to` because of it.
    pub fn is_of(&self, from: usize, to: usize) -> bool {
        self.to == to && self.from.is_none_or(|rank| rank == from)
    }
}

/// Where a link's ring is in the memory of the rank that receives.
struct Place {
    link: u32,
    from: usize,
    offset: usize,
    stride: usize,
    places: usize,
}

/// The rings in rank `to`'s memory, and its size: every rank works out the same.
fn layout(placement: &[usize], links: &[LinkSpec], to: usize) -> (Vec<Place>, usize) {
    let (mut all, mut end) = (Vec::new(), 0);
    for link in links.iter().filter(|link| placement[link.to] == to) {
        let from = placement[link.from];
        let (stride, places) = (aligned(4 * link.words), announcing(link, from == to).in_flight(from == to));
        all.push(Place { link: link.id, from, offset: end, stride, places });
        end += places * stride;
    }
    (all, end)
}

impl Arena {
    /// Makes this rank's memory for the messages of `links`, the same list on all ranks, and opens the others'. Collective.
    /// What does not work is given back too, the same on all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if MPI fails.
    pub fn open(world: &World, port: &Port, placement: &[usize], links: &[LinkSpec]) -> Result<(Arena, Vec<Failure>)> {
        let mut arena = Arena::default();
        arena.links = links.iter().map(|link| link.id).collect();
        let (mine, bytes) = layout(placement, links, world.rank());
        arena.exported = mine.iter().any(|place| place.from != world.rank());
        let made = if bytes == 0 { Ok(None) } else { port.allocate(bytes, arena.exported).map(Some) };
        let handle =
            made.as_ref().map(|own| own.as_ref().filter(|_| arena.exported).map(|own| own.handle()).transpose());
        let said = match &handle {
            Err(e) => e.to_string().into_bytes(),
            Ok(Err(e)) => e.to_string().into_bytes(),
            Ok(Ok(None)) => Vec::new(),
            Ok(Ok(Some(handle))) => [&[0][..], &handle[..]].concat(),
        };
        let all = world.gather(&said)?;
        let mut failures = Vec::new();
        for (to, said) in all.iter().enumerate() {
            if said.first().is_some_and(|&byte| byte != 0) {
                let text = format!("rank {to}: {}", String::from_utf8_lossy(said));
                failures.push(Failure { from: None, to, text });
            }
        }
        if let Ok(Some(own)) = made {
            arena.keep(&own, mine.iter());
            arena.own = Some(own);
        }
        let mut refused = String::new();
        for (to, said) in all.iter().enumerate().filter(|(to, _)| *to != world.rank()) {
            let (places, bytes) = layout(placement, links, to);
            let mut from_here = places.iter().filter(|place| place.from == world.rank()).peekable();
            let handle = said.strip_prefix(&[0]).and_then(|handle| <&[u8; HANDLE]>::try_from(handle).ok());
            let (Some(handle), Some(_)) = (handle, from_here.peek()) else { continue };
            match port.import(handle, bytes) {
                Ok(memory) => {
                    arena.keep(&memory, from_here);
                    arena.opened.push(memory);
                }
                Err(e) => refused += &format!("{to}\t{}\n", e.to_string().replace('\n', " ")),
            }
        }
        for (from, said) in world.gather(refused.as_bytes())?.iter().enumerate() {
            for line in String::from_utf8_lossy(said).lines() {
                if let Some((to, text)) = line.split_once('\t') {
                    let text = format!("rank {from} cannot write into rank {to}'s GPU memory: {text}");
                    failures.push(Failure { from: Some(from), to: to.parse().unwrap_or(0), text });
                }
            }
        }
        Ok((arena, failures))
    }

    fn keep<'a>(&mut self, memory: &Arc<Shared>, places: impl Iterator<Item = &'a Place>) {
        for &Place { link, offset, stride, places, .. } in places {
            self.rings.insert(link, Ring { memory: memory.clone(), offset, stride, places });
        }
    }

    /// Whether it is for link `id`, wherever its ends are.
    pub fn has(&self, id: u32) -> bool {
        self.links.contains(&id)
    }

    /// Link `id`'s ring, if one of its ends is here.
    pub fn ring(&self, id: u32) -> Option<&Ring> {
        self.rings.get(&id)
    }

    /// Closes what was opened, and frees what is this rank's when all ranks have closed it. No copy may be under way.
    /// Collective.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a rank is gone.
    pub fn close(mut self, world: &World) -> Result<()> {
        self.rings.clear();
        self.opened.clear();
        world.gather(&[])?;
        self.own = None;
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Not closed: another rank may have this memory open, which must not be freed then. The process is about to end.
        if let Some(own) = self.own.take().filter(|_| self.exported) {
            std::mem::forget(own);
        }
    }
}
