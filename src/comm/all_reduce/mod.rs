//! All-reduce: the mean of a module's gradients over its replicas, the same bits whatever the transport.
//!
//! R is factored into small numbers, R = s₁ · s₂ · …, and the replicas exchange level by level ([`levels`]). At the first, groups
//! of s₁ replicas cut their values into as many parts; each member sends the others their parts and sums what it gets for
//! its own, **in the order of members** (*reduce-scatter*). At the next, groups of s₂ of which each has the same part do that
//! with it, and so on, until a replica has the sum over all replicas of an R-th of the values. Then the levels are gone through
//! backwards, and each member sends its part's sum to the others (*all-gather*). So a replica sends and receives 2 (R − 1) / R
//! of the values, as in a ring, in two messages to each of Σ (s − 1) others, not of R − 1. A level of 11 or more (a
//! prime factor of R) is a ring: a part goes from member to member, each adding its own, until it is where it belongs.
//!
//! The order of every sum is a matter of R alone, not of who came first or where replicas are, so that threads and ranks agree
//! to the bit. Values are worked through in buckets, so that buffers stay small for large modules, the last one first: the last
//! layers' gradients are there before the first ones' ([`Buckets`]).

use std::ops::Range;

use super::{Endpoints, Header, Kind, Receiver, Sender};
use crate::Result;

mod group;

pub use group::{BUCKET, Group, Level, levels, messages};
use group::{LARGEST, part};

/// Words of a sum made at a time, in the nearest cache.
const BLOCK: usize = 2048;

/// Values in buckets that come and go one by one.
pub trait Buckets {
    /// How many values there are.
    fn words(&self) -> usize;

    /// Whether `bucket`'s have come.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what makes them failed.
    fn is_there(&self, bucket: &Range<usize>) -> Result<bool>;

    /// `bucket`'s, which have come.
    fn at(&mut self, bucket: &Range<usize>) -> &mut [f32];

    /// `bucket`'s are what they are to be.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be taken.
    fn done(&mut self, bucket: &Range<usize>) -> Result<()>;
}

/// Values that are there.
impl Buckets for &mut [f32] {
    fn words(&self) -> usize {
        self.len()
    }

    fn is_there(&self, _: &Range<usize>) -> Result<bool> {
        Ok(true)
    }

    fn at(&mut self, bucket: &Range<usize>) -> &mut [f32] {
        &mut self[bucket.clone()]
    }

    fn done(&mut self, _: &Range<usize>) -> Result<()> {
        Ok(())
    }
}

/// What goes on while an all-reduce waits: called again and again until it says that nothing is left.
pub type Beside<'a> = &'a mut dyn FnMut() -> Result<bool>;

/// One replica's part in it.
pub struct AllReduce {
    replicas: usize,
    levels: Vec<Members>,
}

/// A level's other members, as one of them deals with them.
struct Members {
    size: usize,
    own: usize,
    others: Others,
}

enum Others {
    /// To and from every other member; `None` at the own place.
    All(Vec<Option<Peer>>),
    /// To the next member, from the one before.
    Ring(Box<Peer>),
}

struct Peer {
    to: (u32, Sender),
    from: (u32, Receiver),
}

/// Which update a message is of.
#[derive(Clone, Copy)]
struct Stamp {
    batch: u64,
    step: u32,
}

impl AllReduce {
    /// Replica `replica`'s part, with its ends of the links of `group`.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if an end is not on this rank.
    pub fn new(endpoints: &mut Endpoints, group: &Group, replica: usize) -> Result<Self> {
        let mut members = Vec::new();
        for level in levels(group.replicas, group.words) {
            let own = level.member(replica);
            let mut peer = |to: usize, from: usize| {
                let (to, from) = (level.replica(replica, to), level.replica(replica, from));
                let (out, back) = (group.number(&level, replica, to), group.number(&level, from, replica));
                Ok(Peer { to: (out, endpoints.sender(out)?), from: (back, endpoints.receiver(back)?) })
            };
            let others = if level.ring {
                Others::Ring(Box::new(peer(level.next(own), (own + level.size - 1) % level.size)?))
            } else {
                let peers = (0..level.size).map(|other| (other != own).then(|| peer(other, other)).transpose());
                Others::All(peers.collect::<Result<_>>()?)
            };
            members.push(Members { size: level.size, own, others });
        }
        Ok(AllReduce { replicas: group.replicas, levels: members })
    }

    /// Replaces `values` by their mean over the replicas, which all call it with as many values. `batch` and `step` say
    /// in messages which update this is.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if a replica is gone or sends something else.
    pub fn mean(&mut self, mut values: &mut [f32], batch: u64, step: u32) -> Result<()> {
        self.mean_of(&mut values, &mut || Ok(true), batch, step)
    }

    /// The same of `values` that come and go, while `beside` goes on.
    ///
    /// # Errors
    /// As [`AllReduce::mean`]; those of `values` and `beside`.
    pub fn mean_of(&mut self, values: &mut dyn Buckets, beside: Beside, batch: u64, step: u32) -> Result<()> {
        let (stamp, scale, length) = (Stamp { batch, step }, 1.0 / self.replicas as f32, values.words());
        let (Some((level, others)), true) = (self.levels.split_first_mut(), length > 0) else { return Ok(()) };
        let last = length.div_ceil(BUCKET) - 1;
        let bucket = |n: usize| n * BUCKET..((n + 1) * BUCKET).min(length);
        // A bucket's parts are sent before the one before it is through, and sums come meanwhile: fewer waits.
        level.send_parts(come(values, &bucket(last), beside)?, beside, stamp)?;
        for n in (0..=last).rev() {
            level.reduce(values.at(&bucket(n)), others.is_empty().then_some(scale), beside, stamp)?;
            if n > 0 {
                level.send_parts(come(values, &bucket(n - 1), beside)?, beside, stamp)?;
            }
            mean(others, level.own_part(values.at(&bucket(n))), scale, beside, stamp)?;
            if n < last {
                level.take_sums(values.at(&bucket(n + 1)), beside, stamp)?;
                values.done(&bucket(n + 1))?;
            }
            level.send_sum(values.at(&bucket(n)), beside, stamp)?;
        }
        level.take_sums(values.at(&bucket(0)), beside, stamp)?;
        values.done(&bucket(0))
    }
}

/// The values of `bucket`, once they have come.
fn come<'a>(values: &'a mut dyn Buckets, bucket: &Range<usize>, beside: Beside) -> Result<&'a mut [f32]> {
    while !values.is_there(bucket)? {
        beside()?;
        std::thread::yield_now();
    }
    Ok(values.at(bucket))
}

/// Lets `beside` go on until nothing is left of it, or `ready`: then whoever waits may do so in earnest.
fn unless(mut ready: impl FnMut() -> Result<bool>, beside: Beside) -> Result<()> {
    while !ready()? && !beside()? {
        std::thread::yield_now();
    }
    Ok(())
}

/// The sums over `levels` of `values`, times `scale`.
fn mean(levels: &mut [Members], values: &mut [f32], scale: f32, beside: Beside, stamp: Stamp) -> Result<()> {
    let Some((level, others)) = levels.split_first_mut() else { return Ok(()) };
    level.send_parts(values, beside, stamp)?;
    level.reduce(values, others.is_empty().then_some(scale), beside, stamp)?;
    mean(others, level.own_part(values), scale, beside, stamp)?;
    level.send_sum(values, beside, stamp)?;
    level.take_sums(values, beside, stamp)
}

// No waiting in a circle. All replicas do the same things in the same order, and what one waits for the other has sent at an earlier
// place of it; so whoever is behind waits for no message. Nor for a buffer, of two a link: between two members there go parts 0,
// parts 1, sum 0, parts 2, sum 1, ..., and before it sends one each has given back what came before the last (parts n before it
// sends parts n + 1, sum n - 1 before sum n). In a ring, a member that waits for a buffer has two messages with the next one, which
// therefore is behind it. And what goes on beside never waits.
impl Members {
    fn own_part<'a>(&self, values: &'a mut [f32]) -> &'a mut [f32] {
        let own = part(values.len(), self.size, self.own);
        &mut values[own]
    }

    /// Sends the others their parts of `values`. (In a ring they are sent when they are due.)
    fn send_parts(&mut self, values: &[f32], beside: Beside, stamp: Stamp) -> Result<()> {
        let Others::All(peers) = &mut self.others else { return Ok(()) };
        for (member, peer) in peers.iter_mut().enumerate() {
            if let Some(peer) = peer {
                peer.send(&values[part(values.len(), self.size, member)], beside, stamp)?;
            }
        }
        Ok(())
    }

    /// Makes the own part of `values` the sum of all members', times `scale` at the last level.
    fn reduce(&mut self, values: &mut [f32], scale: Option<f32>, beside: Beside, stamp: Stamp) -> Result<()> {
        let (size, own, length) = (self.size, self.own, values.len());
        let part = |member: usize| part(length, size, member);
        match &mut self.others {
            Others::All(peers) => {
                let values = &mut values[part(own)];
                let mut terms: [&[f32]; LARGEST] = [&[]; LARGEST];
                for (term, peer) in terms.iter_mut().zip(peers.iter_mut()) {
                    if let Some(peer) = peer {
                        *term = peer.wait(values.len(), beside, stamp)?;
                    }
                }
                sum(values, &terms[..size], own, scale.unwrap_or(1.0));
                peers.iter_mut().flatten().try_for_each(|peer| peer.from.1.release())
            }
            Others::Ring(peer) => {
                for hop in 1..size {
                    let (there, here) = (part((own + size - hop) % size), part((own + 2 * size - hop - 1) % size));
                    peer.send(&values[there], beside, stamp)?;
                    let scale = scale.filter(|_| hop == size - 1).unwrap_or(1.0);
                    let values = &mut values[here];
                    let so_far = peer.wait(values.len(), beside, stamp)?;
                    values.iter_mut().zip(so_far).for_each(|(x, sum)| *x = (*x + sum) * scale);
                    peer.from.1.release()?;
                }
                Ok(())
            }
        }
    }

    /// Sends the others the own part of `values`.
    fn send_sum(&mut self, values: &[f32], beside: Beside, stamp: Stamp) -> Result<()> {
        let Others::All(peers) = &mut self.others else { return Ok(()) };
        let own = &values[part(values.len(), self.size, self.own)];
        peers.iter_mut().flatten().try_for_each(|peer| peer.send(own, beside, stamp))
    }

    /// Makes every other part of `values` that member's.
    fn take_sums(&mut self, values: &mut [f32], beside: Beside, stamp: Stamp) -> Result<()> {
        let (size, own, length) = (self.size, self.own, values.len());
        let part = |member: usize| part(length, size, member);
        match &mut self.others {
            Others::All(peers) => {
                for (member, peer) in peers.iter_mut().enumerate() {
                    if let Some(peer) = peer {
                        peer.receive(&mut values[part(member)], beside, stamp)?;
                    }
                }
            }
            Others::Ring(peer) => {
                for hop in 0..size - 1 {
                    let (there, here) = (part((own + size - hop) % size), part((own + 2 * size - hop - 1) % size));
                    peer.send(&values[there], beside, stamp)?;
                    peer.receive(&mut values[here], beside, stamp)?;
                }
            }
        }
        Ok(())
    }
}

impl Peer {
    fn send(&mut self, values: &[f32], beside: Beside, stamp: Stamp) -> Result<()> {
        let shape = [values.len() as u32, 1, 1, 1];
        unless(|| self.to.1.ready(), beside)?;
        self.to.1.send(&Header::new(Kind::Gradient, self.to.0, stamp.batch, stamp.step, shape), values)
    }

    fn wait(&mut self, words: usize, beside: Beside, stamp: Stamp) -> Result<&[f32]> {
        let shape = [words as u32, 1, 1, 1];
        unless(|| self.from.1.ready(), beside)?;
        self.from.1.wait(&Header::new(Kind::Gradient, self.from.0, stamp.batch, stamp.step, shape))
    }

    fn receive(&mut self, values: &mut [f32], beside: Beside, stamp: Stamp) -> Result<()> {
        values.copy_from_slice(self.wait(values.len(), beside, stamp)?);
        self.from.1.release()
    }
}

/// Replaces `values`, which are term `own`, by the sum of all terms in their order, beginning with 0, times `scale`.
fn sum(values: &mut [f32], terms: &[&[f32]], own: usize, scale: f32) {
    if let [a, b] = terms {
        // Two terms may change places, and the sum is the same.
        let other = if own == 0 { b } else { a };
        return values.iter_mut().zip(*other).for_each(|(x, y)| *x = (*x + y + 0.0) * scale);
    }
    let mut block = [0.0; BLOCK];
    for (n, values) in values.chunks_mut(BLOCK).enumerate() {
        let sum = &mut block[..values.len()];
        sum.fill(0.0);
        for (member, term) in terms.iter().enumerate() {
            let term = if member == own { &*values } else { &term[n * BLOCK..][..values.len()] };
            sum.iter_mut().zip(term).for_each(|(sum, x)| *sum += x);
        }
        values.iter_mut().zip(sum).for_each(|(x, sum)| *x = *sum * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{World, connect};
    use std::cell::Cell;
    use std::time::Duration;

    fn value(r: usize, n: usize) -> f32 {
        ((n * 7 + r * 13) as f32).sin() / 3.0
    }

    /// Every replica's part, in this process.
    fn parts(replicas: usize, words: usize) -> Vec<AllReduce> {
        let group = Group { first: 0, name: "module 1".into(), replicas, words, worker: &|r| r };
        let mut links: Vec<_> = (0..replicas).flat_map(|r| group.links(r)).collect();
        links.sort_by_key(|link| link.id);
        links.dedup();
        let mut ends = connect(&World::Alone, &vec![0; replicas], &links, Duration::from_secs(30)).unwrap();
        (0..replicas).map(|r| AllReduce::new(&mut ends, &group, r).unwrap()).collect()
    }

    /// Every replica's values after two all-reduces.
    fn twice(replicas: usize, words: usize) -> Vec<Vec<f32>> {
        let parts = parts(replicas, words);
        std::thread::scope(|scope| {
            let work = |(r, mut part): (usize, AllReduce)| {
                scope.spawn(move || {
                    let mut values: Vec<f32> = (0..words).map(|n| value(r, n)).collect();
                    for batch in 0..2 {
                        part.mean(&mut values, batch, 3).unwrap();
                    }
                    values
                })
            };
            let threads: Vec<_> = parts.into_iter().enumerate().map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Every replica ends with the same bits, those of a plain mean in f64 to rounding: for levels of all kinds, fewer values
    /// than replicas, numbers of values that R does not divide, and more than one bucket.
    #[test]
    fn replicas_agree_to_the_bit_on_the_mean() {
        let sizes = |replicas: usize| match replicas {
            1..=9 => vec![1, 5, 1000, BUCKET + 77],
            _ => vec![5, 1000],
        };
        for replicas in (1..=9).chain([11, 12, 16, 22, 26]) {
            for words in sizes(replicas) {
                let results = twice(replicas, words);
                for n in 0..words {
                    let mean = (0..replicas).map(|r| f64::from(value(r, n))).sum::<f64>() / replicas as f64;
                    let got = results[0][n];
                    assert!((f64::from(got) - mean).abs() < 3e-7, "{replicas} replicas, value {n}: {got}, not {mean}");
                    assert!(results.iter().all(|r| r[n].to_bits() == got.to_bits()), "{replicas} replicas, value {n}");
                }
            }
        }
    }

    /// Values that come when they have been asked for some times, the last ones first, and what is told of them.
    struct Late {
        values: Vec<f32>,
        asked: Cell<usize>,
        done: Vec<Range<usize>>,
    }

    impl Buckets for Late {
        fn words(&self) -> usize {
            self.values.len()
        }

        fn is_there(&self, bucket: &Range<usize>) -> Result<bool> {
            self.asked.set(self.asked.get() + 1);
            Ok(self.asked.get() > 3 * (self.words() - bucket.start) / BUCKET)
        }

        fn at(&mut self, bucket: &Range<usize>) -> &mut [f32] {
            &mut self.values[bucket.clone()]
        }

        fn done(&mut self, bucket: &Range<usize>) -> Result<()> {
            self.done.push(bucket.clone());
            Ok(())
        }
    }

    /// The mean of values that come late, bucket by bucket, has the bits of those that are there; each bucket is done once, the last
    /// one first, and something else goes on meanwhile.
    #[test]
    fn buckets_may_come_one_by_one() {
        let (replicas, words) = (3, 3 * BUCKET + 77);
        let parts = parts(replicas, words);
        let values = |r: usize| -> Vec<f32> { (0..words).map(|n| value(r, n)).collect() };
        let results: Vec<(Late, usize)> = std::thread::scope(|scope| {
            let work = |(r, mut part): (usize, AllReduce)| {
                scope.spawn(move || {
                    let mut late = Late { values: values(r), asked: Cell::new(0), done: Vec::new() };
                    let mut beside = 0;
                    let mut count = || {
                        beside += 1;
                        // Something is left for a while.
                        Ok(beside > 20)
                    };
                    part.mean_of(&mut late, &mut count, 0, 0).unwrap();
                    (late, beside)
                })
            };
            let threads: Vec<_> = parts.into_iter().enumerate().map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let scale = 1.0 / replicas as f32;
        for (late, beside) in &results {
            assert!(*beside >= 3, "{beside}");
            let starts: Vec<usize> = late.done.iter().map(|bucket| bucket.start).collect();
            assert_eq!(starts, [3 * BUCKET, 2 * BUCKET, BUCKET, 0]);
            assert_eq!(late.done.iter().map(|bucket| bucket.len()).sum::<usize>(), words);
            for n in (0..words).step_by(1009) {
                let mean = (0..replicas).fold(0.0, |sum, r| sum + value(r, n)) * scale;
                assert_eq!(late.values[n].to_bits(), mean.to_bits(), "value {n}");
            }
        }
    }

    /// With up to seven replicas at one level the sum is in their order.
    #[test]
    fn few_replicas_are_summed_in_their_order() {
        for replicas in [2, 3, 4, 5, 7] {
            let results = twice(replicas, 100);
            let scale = 1.0 / replicas as f32;
            for (n, got) in results[0].iter().enumerate() {
                let once = (0..replicas).fold(0.0, |sum, r| sum + value(r, n)) * scale;
                let twice = (0..replicas).fold(0.0, |sum, _| sum + once) * scale;
                assert_eq!(got.to_bits(), twice.to_bits(), "{replicas} replicas, value {n}");
            }
        }
    }
}
