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
use crate::backend::slots::Slot;

mod buckets;
mod group;

pub use buckets::Buckets;
use group::part;
pub use group::{BUCKET, Group, LARGEST, Level, levels, messages};

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
    /// Whether there is one peer alone, the member behind, that is sent to, and the one before, that is heard from; else every other
    /// member is one, in their order.
    ring: bool,
    peers: Vec<Peer>,
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
            let (size, own, ring) = (level.size, level.member(replica), level.ring);
            let mut peer = |to: usize, from: usize| {
                let (to, from) = (level.replica(replica, to), level.replica(replica, from));
                let (out, back) = (group.number(&level, replica, to), group.number(&level, from, replica));
                Ok(Peer { to: (out, endpoints.sender(out)?), from: (back, endpoints.receiver(back)?) })
            };
            let peers = match ring {
                true => vec![peer(level.next(own), (own + size - 1) % size)?],
                false => (0..size).filter(|&m| m != own).map(|m| peer(m, m)).collect::<Result<_>>()?,
            };
            members.push(Members { size, own, ring, peers });
        }
        Ok(AllReduce { replicas: group.replicas, levels: members })
    }

    /// The links to and from other members.
    fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.levels.iter().flat_map(|level| &level.peers)
    }

    /// Whether a message is put into another GPU's memory: then values have to be in a GPU's.
    pub fn is_between_gpus(&self) -> bool {
        self.peers().any(|peer| !peer.to.1.is_in_host_memory() || !peer.from.1.is_in_host_memory())
    }

    /// How many messages are being written or read at once, at most.
    pub fn at_once(&self) -> usize {
        2 * self.peers().count()
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
        if self.levels.is_empty() || values.words() == 0 {
            return Ok(());
        }
        let (stamp, scale) = (Stamp { batch, step }, 1.0 / self.replicas as f32);
        Mean { levels: &mut self.levels, values, beside, stamp, scale }.make()
    }
}

/// An all-reduce under way. Levels are meant by their numbers, values by where they are among all.
struct Mean<'a> {
    levels: &'a mut [Members],
    values: &'a mut dyn Buckets,
    beside: Beside<'a>,
    stamp: Stamp,
    /// Of the sum over all replicas.
    scale: f32,
}

// No waiting in a circle. All replicas do the same things in the same order, and what one waits for the other has sent at an earlier
// place of it; so whoever is behind waits for no message. Nor for a buffer, of two a link: between two members there go parts 0,
// parts 1, sum 0, parts 2, sum 1, ..., and before it sends one each has given back what came before the last (parts n before it
// sends parts n + 1, sum n - 1 before sum n). In a ring, a member that waits for a buffer has two messages with the next one, which
// therefore is behind it. And what goes on beside never waits. Where a GPU writes and reads messages, what it does waits for no
// other GPU, and whoever waits here sends and gives back what it has done meanwhile.
impl Mean<'_> {
    fn make(&mut self) -> Result<()> {
        let length = self.values.words();
        let last = length.div_ceil(BUCKET) - 1;
        let bucket = |n: usize| n * BUCKET..((n + 1) * BUCKET).min(length);
        // A bucket's parts are sent before the one before it is through, and sums come meanwhile: fewer waits.
        self.come(&bucket(last))?;
        self.send_parts(0, bucket(last))?;
        for n in (0..=last).rev() {
            self.reduce(0, bucket(n))?;
            if n > 0 {
                self.come(&bucket(n - 1))?;
                self.send_parts(0, bucket(n - 1))?;
            }
            self.levels_from(1, self.levels[0].own_part(&bucket(n)))?;
            if n < last {
                self.take_sums(0, bucket(n + 1))?;
                self.values.done(&bucket(n + 1))?;
            }
            self.send_sum(0, bucket(n))?;
        }
        self.take_sums(0, bucket(0))?;
        self.values.done(&bucket(0))?;
        while !self.progress()? {
            (self.beside)()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Makes `words`, which the members of level `k` share, the sums over it and those behind.
    fn levels_from(&mut self, k: usize, words: Range<usize>) -> Result<()> {
        if k == self.levels.len() {
            return Ok(());
        }
        self.send_parts(k, words.clone())?;
        self.reduce(k, words.clone())?;
        self.levels_from(k + 1, self.levels[k].own_part(&words))?;
        self.send_sum(k, words.clone())?;
        self.take_sums(k, words)
    }

    /// Waits for the values of `bucket`.
    fn come(&mut self, bucket: &Range<usize>) -> Result<()> {
        while !self.values.is_there(bucket)? {
            self.progress()?;
            (self.beside)()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Sends the others their parts of `words`. (In a ring they are sent when they are due.)
    fn send_parts(&mut self, k: usize, words: Range<usize>) -> Result<()> {
        if self.levels[k].ring {
            return Ok(());
        }
        (0..self.levels[k].peers.len()).try_for_each(|p| self.send(k, p, self.levels[k].part_of(p, &words)))
    }

    /// Makes the own part of `words` the sum of all members', times the scale at the last level.
    fn reduce(&mut self, k: usize, words: Range<usize>) -> Result<()> {
        let Members { size, own, ring, ref peers } = self.levels[k];
        let scale = if k + 1 == self.levels.len() { self.scale } else { 1.0 };
        if ring {
            for hop in 1..size {
                let (there, here) = ((own + size - hop) % size, (own + 2 * size - hop - 1) % size);
                self.send(k, 0, within(&words, size, there))?;
                let here = within(&words, size, here);
                self.arrived(k, 0)?;
                let scale = if hop == size - 1 { scale } else { 1.0 };
                let from = &mut self.levels[k].peers[0].from;
                let so_far = from.take(here.len(), self.stamp)?;
                let done = self.values.sum(here, &[Some(so_far), None], scale)?;
                from.1.release_when(done)?;
            }
            return Ok(());
        }
        (0..peers.len()).try_for_each(|p| self.arrived(k, p))?;
        let mine = within(&words, size, own);
        let mut terms = [None; LARGEST];
        for (p, peer) in self.levels[k].peers.iter_mut().enumerate() {
            terms[p + usize::from(p >= own)] = Some(peer.from.take(mine.len(), self.stamp)?);
        }
        let done = self.values.sum(mine, &terms[..size], scale)?;
        self.levels[k].peers.iter_mut().try_for_each(|peer| peer.from.1.release_when(done.clone()))
    }

    /// Sends the others the own part of `words`.
    fn send_sum(&mut self, k: usize, words: Range<usize>) -> Result<()> {
        if self.levels[k].ring {
            return Ok(());
        }
        (0..self.levels[k].peers.len()).try_for_each(|p| self.send(k, p, self.levels[k].own_part(&words)))
    }

    /// Makes every other part of `words` that member's.
    fn take_sums(&mut self, k: usize, words: Range<usize>) -> Result<()> {
        let Members { size, own, ring, ref peers } = self.levels[k];
        if ring {
            for hop in 0..size - 1 {
                let (there, here) = ((own + size - hop) % size, (own + 2 * size - hop - 1) % size);
                self.send(k, 0, within(&words, size, there))?;
                self.receive(k, 0, within(&words, size, here))?;
            }
            return Ok(());
        }
        (0..peers.len()).try_for_each(|p| self.receive(k, p, self.levels[k].part_of(p, &words)))
    }

    fn send(&mut self, k: usize, p: usize, words: Range<usize>) -> Result<()> {
        self.until(|levels| {
            let sender = &mut levels[k].peers[p].to.1;
            Ok(sender.progress()? && sender.ready()?)
        })?;
        let (link, sender) = &mut self.levels[k].peers[p].to;
        let header = self.stamp.header(*link, words.len());
        let done = self.values.write(words, sender.slot()?)?;
        sender.start_part_when(&header, done)
    }

    fn receive(&mut self, k: usize, p: usize, words: Range<usize>) -> Result<()> {
        self.arrived(k, p)?;
        let from = &mut self.levels[k].peers[p].from;
        let message = from.take(words.len(), self.stamp)?;
        let done = self.values.read(words, message)?;
        from.1.release_when(done)
    }

    /// Waits for a message, until it is there or may be waited for in earnest.
    fn arrived(&mut self, k: usize, p: usize) -> Result<()> {
        self.until(|levels| {
            let receiver = &mut levels[k].peers[p].from.1;
            Ok(receiver.progress()? && receiver.ready()?)
        })
    }

    /// Lets messages go on, and what goes on beside, until nothing is left of either, or `ready`: then whoever waits may do so in
    /// earnest.
    fn until(&mut self, mut ready: impl FnMut(&mut [Members]) -> Result<bool>) -> Result<()> {
        while !ready(self.levels)? {
            // Both, in any case.
            let (through, nothing) = (self.progress()?, (self.beside)()?);
            if through && nothing {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Sends what has been written meanwhile, and gives back what has been read; whether nothing is left.
    fn progress(&mut self) -> Result<bool> {
        let mut through = true;
        for peer in self.levels.iter_mut().flat_map(|level| &mut level.peers) {
            through &= peer.to.1.progress()?;
            through &= peer.from.1.progress()?;
        }
        Ok(through)
    }
}

impl Members {
    /// The own part of `words`.
    fn own_part(&self, words: &Range<usize>) -> Range<usize> {
        within(words, self.size, self.own)
    }

    /// Peer `p`'s, where every other member is one.
    fn part_of(&self, p: usize, words: &Range<usize>) -> Range<usize> {
        within(words, self.size, p + usize::from(p >= self.own))
    }
}

/// Member `member`'s part of `words` that `size` members share.
fn within(words: &Range<usize>, size: usize, member: usize) -> Range<usize> {
    let part = part(words.len(), size, member);
    words.start + part.start..words.start + part.end
}

impl Stamp {
    fn header(self, link: u32, words: usize) -> Header {
        Header::new(Kind::Gradient, link, self.batch, self.step, [words as u32, 1, 1, 1])
    }
}

/// A link's receiving end, with its number.
trait Take {
    /// The message that is due, of `words`.
    fn take(&mut self, words: usize, stamp: Stamp) -> Result<Slot<'_>>;
}

impl Take for (u32, Receiver) {
    fn take(&mut self, words: usize, stamp: Stamp) -> Result<Slot<'_>> {
        self.1.wait_part(&stamp.header(self.0, words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::slots::{Done, SlotMut};
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

        fn write(&mut self, words: Range<usize>, to: SlotMut<'_>) -> Result<Done> {
            self.values.as_mut_slice().write(words, to)
        }

        fn sum(&mut self, words: Range<usize>, terms: &[Option<Slot<'_>>], scale: f32) -> Result<Done> {
            self.values.as_mut_slice().sum(words, terms, scale)
        }

        fn read(&mut self, words: Range<usize>, from: Slot<'_>) -> Result<Done> {
            self.values.as_mut_slice().read(words, from)
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
