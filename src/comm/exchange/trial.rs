//! A test of each edge: values there, and back, each way of exchange, checked and timed.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arena::Arena;
use super::carried::Carried;
use crate::backend::cuda::shared::{Port, Ring, Shared};
use crate::comm::{Endpoints, Kind, LinkSpec, Receiver, Sender, Values, World, connect_outside};
use crate::{Error, Result};

/// Messages of a test: the first two warm up, and the first one is checked.
const ROUNDS: usize = 6;

/// An edge's links.
pub struct Pair<'a> {
    /// Activations.
    pub there: &'a LinkSpec,
    /// Cotangents.
    pub back: Option<&'a LinkSpec>,
}

/// Seconds from the sender's values to the receiver's GPU and an answer, there and back together; the least of some.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// By way of host memory.
    pub staged: f64,
    /// From GPU to GPU.
    pub peer: f64,
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.0} us from GPU to GPU and {:.0} us by way of host memory in a test",
            1e6 * self.peer,
            1e6 * self.staged
        )
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Staged,
    Peer,
}

/// What the ends of one direction of an edge that are on this rank work with.
struct Direction<'a> {
    port: &'a Port,
    link: &'a LinkSpec,
    ring: Option<&'a Ring>,
    /// Values to send, and where staged ones arrive.
    memory: &'a [Arc<Shared>; 2],
    /// The test's link and the one on which answers come.
    specs: [&'a LinkSpec; 2],
}

/// Tests all edges, both ends of their rings open; each edge's times or what went wrong, the same on all ranks.
/// Collective.
///
/// # Errors
/// [`Error::Transport`] if a message is not there after `timeout`.
pub fn run(
    world: &World,
    port: &Port,
    placement: &[usize],
    edges: &[Pair],
    (arena, carried): (&Arena, &Carried),
    timeout: Duration,
) -> Result<Vec<std::result::Result<Times, String>>> {
    if edges.is_empty() {
        return Ok(Vec::new());
    }
    let mut specs = Vec::new();
    for (e, edge) in edges.iter().enumerate() {
        let (from, to, name) = (edge.there.from, edge.there.to, format!("test of {}", edge.there.name));
        let (kind, words) = (Kind::Activation, edge.there.words);
        specs.push(LinkSpec { id: 2 * e as u32, kind, from, to, words, depth: 2, name: name.clone() });
        let (kind, words) = (Kind::Cotangent, edge.back.map_or(0, |back| back.words));
        specs.push(LinkSpec { id: 2 * e as u32 + 1, kind, from: to, to: from, words, depth: 2, name });
    }
    let words = specs.iter().map(|spec| spec.words).max().unwrap_or(0);
    let memory = || port.allocate(4 * words, false);
    let memory = world.first_error(memory().and_then(|source| Ok([source, memory()?])))?;
    // Links that carry values have the same place behind the others as here.
    let first = carried.values.values().map(|link| link.id).min().unwrap_or(0);
    let number = |link: &LinkSpec| link.id - first + 2 * edges.len() as u32;
    let mut values: Vec<LinkSpec> =
        carried.values.values().map(|link| LinkSpec { id: number(link), ..link.clone() }).collect();
    values.sort_by_key(|link| link.id);
    let all = [&specs[..], &values[..]].concat();
    let mut ends = connect_outside(world, placement, &all, timeout, &carried.outside(number))?;
    let mut found = String::new();
    for (e, edge) in edges.iter().enumerate() {
        let ids = [2 * e, 2 * e + 1];
        let [mut there, mut back] = ids.map(|id| Ends::take(&mut ends, id as u32));
        for (link, turned) in [(Some(edge.there), false), (edge.back, true)] {
            let Some(link) = link else { continue };
            let pair = if turned { [&specs[ids[1]], &specs[ids[0]]] } else { [&specs[ids[0]], &specs[ids[1]]] };
            let (out, answers) = if turned { (&mut back, &mut there) } else { (&mut there, &mut back) };
            let ring = arena.ring(link.id).or_else(|| carried.rings.get(&link.id));
            let mut values = carried.values.get(&link.id).and_then(|link| ends.values(number(link)));
            let direction = Direction { port, link, ring, memory: &memory, specs: pair };
            for way in [Way::Staged, Way::Peer] {
                let (seconds, trouble) = direction.measure(way, out, answers, &mut values)?;
                if let Some(trouble) = trouble {
                    found += &format!("{e}\tx\t{}\n", trouble.replace('\n', " "));
                }
                if let Some(seconds) = seconds {
                    found += &format!("{e}\t{}\t{seconds}\n", if way == Way::Peer { 'p' } else { 's' });
                }
            }
        }
        // Before the buffers go: whatever lies at their addresses next would be taken for locked.
        port.unpin();
    }
    drop(ends);
    let mut outcomes = vec![Ok(Times::default()); edges.len()];
    for said in world.gather(found.as_bytes())? {
        for line in String::from_utf8_lossy(&said).lines() {
            let mut parts = line.splitn(3, '\t');
            let (Some(e), Some(what), Some(value)) = (parts.next(), parts.next(), parts.next()) else { continue };
            let Some(outcome) = e.parse().ok().and_then(|e: usize| outcomes.get_mut(e)) else { continue };
            let seconds = value.parse().unwrap_or(0.0);
            match (what, outcome) {
                ("x", outcome) => *outcome = Err(value.to_string()),
                ("s", Ok(times)) => times.staged += seconds,
                ("p", Ok(times)) => times.peer += seconds,
                _ => {}
            }
        }
    }
    Ok(outcomes)
}

/// The ends of a link that are on this rank.
struct Ends {
    sender: Option<Sender>,
    receiver: Option<Receiver>,
}

impl Ends {
    fn take(ends: &mut Endpoints, id: u32) -> Self {
        Ends { sender: ends.sender(id).ok(), receiver: ends.receiver(id).ok() }
    }
}

impl Direction<'_> {
    /// The seconds of the fastest message, known to the sender, and what went wrong. One rank may have both ends: whatever it
    /// waits for, it has started before.
    fn measure(
        &self,
        way: Way,
        out: &mut Ends,
        answers: &mut Ends,
        values: &mut Option<Values>,
    ) -> Result<(Option<f64>, Option<String>)> {
        let mut values = values.as_mut().filter(|_| way == Way::Peer);
        let (mut best, mut trouble) = (None, None);
        for round in 0..ROUNDS {
            let [header, answer] = self.specs.map(|spec| spec.header(0, round as u32, [0, 1, 1, 1]));
            let header = if way == Way::Staged { header.carrying(self.link.words as u32) } else { header };
            let mut start = Instant::now();
            if let Some(sender) = &mut out.sender {
                if let Some(values) = &mut values {
                    values.wait()?;
                }
                start = self.send(way, sender, round, &mut trouble)?;
                if let Some(values) = &mut values {
                    values.start()?;
                }
                sender.start(&header)?;
            }
            if let Some(receiver) = &mut out.receiver {
                let received = receiver.wait(&header)?;
                if let Some(values) = &mut values {
                    values.wait()?;
                }
                self.arrive(way, received, round, &mut trouble)?;
                if let Some(values) = &mut values {
                    values.start()?;
                }
                receiver.release()?;
                let sender = answers.sender.as_mut().ok_or_else(|| Error::Run("no way back".into()))?;
                sender.start(&answer)?;
            }
            if let (Some(_), Some(receiver)) = (&out.sender, &mut answers.receiver) {
                receiver.wait(&answer)?;
                let seconds = start.elapsed().as_secs_f64();
                receiver.release()?;
                if round > 1 {
                    best = Some(best.map_or(seconds, |best: f64| best.min(seconds)));
                }
            }
        }
        Ok((best, trouble))
    }

    /// Puts the values where the message finds them; when that was begun.
    fn send(&self, way: Way, sender: &mut Sender, round: usize, trouble: &mut Option<String>) -> Result<Instant> {
        let (source, words) = (self.memory[0].pointer(), self.link.words);
        // SAFETY: as long as the link's messages; everything is waited for.
        unsafe { self.port.write(source, &self.values(round)) }?;
        let slot = sender.host_slot()?;
        let start = match (way, self.ring) {
            (Way::Peer, Some(ring)) => {
                let start = Instant::now();
                // SAFETY: a place of the ring, free since the slot was (see `LinkSpec::in_flight`).
                let copied = unsafe { self.port.copy(source, ring.place(round), 4 * words) };
                // The receiver is told all the same: it waits for a message.
                *trouble = trouble.take().or(copied.err().map(|e| e.to_string()));
                start
            }
            _ => {
                let slot = &mut slot[..words];
                self.port.pin(slot);
                let start = Instant::now();
                // SAFETY: as above.
                unsafe { self.port.read(source, slot) }?;
                start
            }
        };
        Ok(start)
    }

    /// Brings the values to the GPU, and in the first round looks at them.
    fn arrive(&self, way: Way, received: &[f32], round: usize, trouble: &mut Option<String>) -> Result<()> {
        let at = match (way, self.ring) {
            (Way::Peer, Some(ring)) => ring.place(round),
            _ => {
                let landing = self.memory[1].pointer();
                self.port.pin(received);
                // SAFETY: as long as the largest message; waited for.
                unsafe { self.port.write(landing, received) }?;
                landing
            }
        };
        if round == 0 {
            let mut values = vec![0.0; self.link.words];
            // SAFETY: as long as the link's messages; waited for.
            unsafe { self.port.read(at, &mut values) }?;
            if values != self.values(round) {
                let way = if way == Way::Peer { "from GPU to GPU" } else { "by way of host memory" };
                *trouble = Some(format!("what a test sent {way} arrived as something else"));
            }
        }
        Ok(())
    }

    /// What a round sends: other values on other links and in other rounds.
    fn values(&self, round: usize) -> Vec<f32> {
        let mut state = self.link.id.wrapping_mul(ROUNDS as u32).wrapping_add(round as u32 + 1);
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32
        };
        (0..self.link.words).map(next).collect()
    }
}
