//! All-reduce: the mean of a module's gradients over its replicas, the same bits whatever the transport.
//!
//! The values are cut into R chunks, chunk c being replica c's. In a *reduce-scatter* every replica sends each other
//! one its chunk and sums what it gets for its own **in the order of replicas**; in the *all-gather* that follows it
//! sends its mean to the others. Each replica sends and receives 2 (R − 1) / R of the values, as a ring would, but
//! the order of the sum does not depend on who came first, so that threads and ranks agree to the bit.
//!
//! Values are worked through in buckets, so that buffers stay small for large modules.

use super::{Endpoints, Header, Kind, LinkSpec, Receiver, Sender};
use crate::Result;

/// Words of a bucket's chunk, at most: 1 MiB.
const CHUNK: usize = 1 << 18;
/// Buffers of a link: one bucket's chunk and its mean may be on their way at once.
const DEPTH: usize = 2;

/// One replica's part in it.
pub struct AllReduce {
    replica: usize,
    chunk: usize,
    /// To and from every other replica, by replica; `None` at its own place.
    peers: Vec<Option<Peer>>,
    sum: Vec<f32>,
}

struct Peer {
    to: (u32, Sender),
    from: (u32, Receiver),
}

/// The number of the link from replica `a` to replica `b` among R·(R − 1), in the order of [`AllReduce::links`].
fn place(replicas: usize, a: usize, b: usize) -> usize {
    a * (replicas - 1) + b - usize::from(b > a)
}

impl AllReduce {
    /// The links between the `workers` that are one module's replicas (in their order), numbered from `first`; each
    /// carries values of up to `words` in buckets. `name` is for errors.
    pub fn links(first: u32, name: &str, workers: &[usize], words: usize) -> Vec<LinkSpec> {
        let replicas = workers.len();
        let chunk = words.div_ceil(replicas).clamp(1, CHUNK);
        let mut links = Vec::new();
        for a in 0..replicas {
            for b in (0..replicas).filter(|&b| b != a) {
                links.push(LinkSpec {
                    id: first + place(replicas, a, b) as u32,
                    kind: Kind::Gradient,
                    from: workers[a],
                    to: workers[b],
                    words: chunk,
                    depth: DEPTH,
                    name: format!("gradients of {name}, replica {a} -> {b}"),
                });
            }
        }
        links
    }

    /// Replica `replica`'s part, with its ends of `links`.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if an end is not on this rank.
    pub fn new(endpoints: &mut Endpoints, links: &[LinkSpec], replica: usize) -> Result<Self> {
        // R (R − 1) links.
        let replicas = (1..).find(|r| r * (r - 1) >= links.len()).unwrap_or(1);
        let mut peers = Vec::new();
        for other in 0..replicas {
            peers.push(if other == replica {
                None
            } else {
                let (out, back) = (&links[place(replicas, replica, other)], &links[place(replicas, other, replica)]);
                let (to, from) = (endpoints.sender(out.id)?, endpoints.receiver(back.id)?);
                Some(Peer { to: (out.id, to), from: (back.id, from) })
            });
        }
        let chunk = links.first().map_or(1, |link| link.words);
        Ok(AllReduce { replica, chunk, peers, sum: Vec::with_capacity(chunk) })
    }

    /// Replaces `values` by their mean over the replicas, which all call it with as many values. `batch` and `step` say
    /// in messages which update this is.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a replica is gone or sends something else.
    pub fn mean(&mut self, values: &mut [f32], batch: u64, step: u32) -> Result<()> {
        let replicas = self.peers.len();
        for bucket in values.chunks_mut(self.chunk * replicas) {
            let chunk = bucket.len().div_ceil(replicas);
            let range = |r: usize| (r * chunk).min(bucket.len())..((r + 1) * chunk).min(bucket.len());
            let ranges: Vec<_> = (0..replicas).map(range).collect();
            for (other, peer) in self.peers.iter_mut().enumerate() {
                if let Some(peer) = peer {
                    peer.send(batch, step, &bucket[ranges[other].clone()])?;
                }
            }
            let own = ranges[self.replica].clone();
            self.sum.clear();
            self.sum.resize(own.len(), 0.0);
            for peer in &mut self.peers {
                match peer {
                    Some(peer) => peer.receive(batch, step, own.len(), |x| add(&mut self.sum, x))?,
                    None => add(&mut self.sum, &bucket[own.clone()]),
                }
            }
            let scale = 1.0 / replicas as f32;
            self.sum.iter_mut().for_each(|x| *x *= scale);
            for peer in self.peers.iter_mut().flatten() {
                peer.send(batch, step, &self.sum)?;
            }
            bucket[own].copy_from_slice(&self.sum);
            for (other, peer) in self.peers.iter_mut().enumerate() {
                if let Some(peer) = peer {
                    let range = ranges[other].clone();
                    peer.receive(batch, step, range.len(), |x| bucket[range].copy_from_slice(x))?;
                }
            }
        }
        Ok(())
    }
}

impl Peer {
    fn send(&mut self, batch: u64, step: u32, values: &[f32]) -> Result<()> {
        let shape = [values.len() as u32, 1, 1, 1];
        self.to.1.send(&Header::new(Kind::Gradient, self.to.0, batch, step, shape), values)
    }

    fn receive(&mut self, batch: u64, step: u32, words: usize, use_it: impl FnOnce(&[f32])) -> Result<()> {
        let due = Header::new(Kind::Gradient, self.from.0, batch, step, [words as u32, 1, 1, 1]);
        use_it(self.from.1.wait(&due)?);
        self.from.1.release()
    }
}

fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(s, x)| *s += x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{World, connect};
    use std::time::Duration;

    /// Every replica ends with the same bits: the sum in replica order, scaled. More values than one bucket takes,
    /// a number of values that R does not divide, and fewer values than replicas.
    #[test]
    fn replicas_agree_to_the_bit_on_the_ordered_mean() {
        for (replicas, words) in [(2, 5), (3, 2), (3, 1000), (4, 4 * CHUNK + 77)] {
            let workers: Vec<usize> = (0..replicas).collect();
            let links = AllReduce::links(0, "module 1", &workers, words);
            let mut endpoints = connect(&World::Alone, &vec![0; replicas], &links, Duration::from_secs(30)).unwrap();
            let value = |r: usize, n: usize| ((n * 7 + r * 13) as f32).sin() / 3.0;
            let results: Vec<Vec<f32>> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..replicas)
                    .map(|r| {
                        let mut part = AllReduce::new(&mut endpoints, &links, r).unwrap();
                        scope.spawn(move || {
                            let mut values: Vec<f32> = (0..words).map(|n| value(r, n)).collect();
                            for batch in 0..2 {
                                part.mean(&mut values, batch, 3).unwrap();
                            }
                            values
                        })
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let scale = 1.0 / replicas as f32;
            for n in 0..words {
                let once = (0..replicas).fold(0.0, |sum, r| sum + value(r, n)) * scale;
                let twice = (0..replicas).fold(0.0, |sum, _| sum + once) * scale;
                assert!(results.iter().all(|r| r[n].to_bits() == twice.to_bits()), "{replicas} replicas, value {n}");
            }
        }
    }
}
