//! Who exchanges what with whom in an all-reduce: pure, computed alike by every rank, for one replica at a time.

use std::ops::Range;

use crate::comm::{Kind, LinkSpec};

/// Words worked through at a time: 1 MiB. All of a replica's messages of one such bucket, that come as well as that go, have
/// together less than four times as many words, with two buffers a link.
pub const BUCKET: usize = 1 << 18;
/// Buffers of a link: a part of a bucket and its sum may be on their way at once.
const DEPTH: usize = 2;
/// Up to this many replicas exchange with each other directly.
pub const LARGEST: usize = 7;

/// A round of exchanges, of which each replica takes part in one. R = 4 · 4 · 3 makes three: fours of neighbouring replicas,
/// fours of those 4 apart, threes of those 16 apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// How many replicas exchange, its *members*.
    pub size: usize,
    /// From one member to the next so many replicas.
    pub stride: usize,
    /// Whether members hear from the one before and tell the one behind; else each exchanges with every other.
    pub ring: bool,
    /// Values that members have in common, at most: a message has a `size`-th of them.
    pub words: usize,
    /// Its place among the links on which a replica sends.
    first: usize,
}

impl Level {
    /// Which member replica `replica` is.
    pub fn member(&self, replica: usize) -> usize {
        replica / self.stride % self.size
    }

    /// The replica that is member `member` where `replica` is one.
    pub fn replica(&self, replica: usize, member: usize) -> usize {
        replica - self.member(replica) * self.stride + member * self.stride
    }

    /// The member that a ring's member `member` tells.
    pub fn next(&self, member: usize) -> usize {
        (member + 1) % self.size
    }

    /// Links on which a member sends.
    fn sends(&self) -> usize {
        if self.ring { 1 } else { self.size - 1 }
    }
}

/// Member `member`'s part of `length` values that `size` members share.
pub fn part(length: usize, size: usize, member: usize) -> Range<usize> {
    let words = length.div_ceil(size);
    (member * words).min(length)..((member + 1) * words).min(length)
}

/// The levels of `replicas`, for values of up to `words`.
pub fn levels(replicas: usize, words: usize) -> Vec<Level> {
    let (mut left, mut words) = (replicas, words.min(BUCKET));
    let (mut stride, mut first) = (1, 0);
    let mut levels = Vec::new();
    // Neighbouring replicas, which may share a node, come first: they exchange most.
    for size in [4, 2].into_iter().chain(3..=replicas) {
        if size > LARGEST && size * size > left && left > 1 {
            // What is left is prime.
            levels.push(Level { size: left, stride, ring: left > LARGEST, words, first });
            break;
        }
        while left % size == 0 && left > 1 {
            let level = Level { size, stride, ring: size > LARGEST, words, first };
            (left, stride, words, first) = (left / size, stride * size, words.div_ceil(size), first + level.sends());
            levels.push(level);
        }
        if left == 1 {
            break;
        }
    }
    levels
}

/// Messages that a replica sends and takes in one mean of `words`, at most.
pub fn messages(replicas: usize, words: usize) -> usize {
    let a_bucket: usize = levels(replicas, words).iter().map(|level| 4 * (level.size - 1)).sum();
    a_bucket * words.div_ceil(BUCKET)
}

/// The replicas of one module, and the links between them.
pub struct Group<'a> {
    /// The number of their first link.
    pub first: u32,
    /// Whose gradients, for errors.
    pub name: String,
    /// R
    pub replicas: usize,
    /// Values of each, at most.
    pub words: usize,
    /// The worker that is a replica.
    pub worker: &'a dyn Fn(usize) -> usize,
}

impl Group<'_> {
    /// How many links a replica sends on, of `replicas`: so many numbers a replica has.
    pub fn numbers(replicas: usize) -> usize {
        levels(replicas, 1).iter().map(Level::sends).sum()
    }

    /// The links on which replica `replica` sends or receives.
    pub fn links(&self, replica: usize) -> Vec<LinkSpec> {
        let mut links = Vec::new();
        for level in levels(self.replicas, self.words) {
            let own = level.member(replica);
            for other in 0..level.size {
                for (from, to) in [(own, other), (other, own)] {
                    if from != to && (!level.ring || to == level.next(from)) {
                        links.push(self.link(&level, level.replica(replica, from), level.replica(replica, to)));
                    }
                }
            }
        }
        links
    }

    /// The links that replica `r` sends on, each with the one back; of two replicas that exchange with each other, only as the first
    /// one's.
    pub fn pairs(&self, r: usize) -> Vec<(LinkSpec, Option<LinkSpec>)> {
        let mut pairs = Vec::new();
        for level in levels(self.replicas, self.words) {
            let own = level.member(r);
            let link = |from: usize, to: usize| self.link(&level, level.replica(r, from), level.replica(r, to));
            match level.ring {
                true => pairs.push((link(own, level.next(own)), None)),
                false => pairs.extend((own + 1..level.size).map(|other| (link(own, other), Some(link(other, own))))),
            }
        }
        pairs
    }

    /// The number of the link from replica `from` to replica `to` at `level`.
    pub(super) fn number(&self, level: &Level, from: usize, to: usize) -> u32 {
        let (own, other) = (level.member(from), level.member(to));
        let place = if level.ring { 0 } else { other - usize::from(other > own) };
        self.first + (from * Self::numbers(self.replicas) + level.first + place) as u32
    }

    fn link(&self, level: &Level, from: usize, to: usize) -> LinkSpec {
        LinkSpec {
            id: self.number(level, from, to),
            kind: Kind::Gradient,
            from: (self.worker)(from),
            to: (self.worker)(to),
            words: level.words.div_ceil(level.size).max(1),
            depth: DEPTH,
            name: format!("gradients of {}, replica {from} -> {to}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashMap};

    fn group(replicas: usize, worker: &dyn Fn(usize) -> usize) -> Group<'_> {
        Group { first: 100, name: "module 1".into(), replicas, words: 1 << 24, worker }
    }

    #[test]
    fn replicas_are_factored_into_levels() {
        let sizes = |replicas| -> Vec<usize> { levels(replicas, 1).iter().map(|level| level.size).collect() };
        assert!(sizes(1).is_empty());
        assert_eq!([sizes(2), sizes(3), sizes(4), sizes(7)], [vec![2], vec![3], vec![4], vec![7]]);
        assert_eq!([sizes(6), sizes(8), sizes(256)], [vec![2, 3], vec![4, 2], vec![4; 4]]);
        assert_eq!(
            [sizes(11), sizes(44), sizes(121), sizes(2 * 13 * 13)],
            [vec![11], vec![4, 11], vec![11, 11], vec![2, 13, 13]]
        );
        for replicas in 1..300 {
            let levels = levels(replicas, 1);
            assert_eq!(levels.iter().map(|level| level.size).product::<usize>(), replicas);
            assert!(levels.iter().all(|level| level.ring == (level.size > LARGEST)), "{levels:?}");
        }
    }

    /// Both ends of a link list it alike, and numbers are those of one link each.
    #[test]
    fn both_ends_know_a_link() {
        for replicas in [2, 3, 6, 8, 22, 44, 49] {
            let worker = |r| 5 * r + 2;
            let group = group(replicas, &worker);
            let mut seen: BTreeMap<u32, Vec<LinkSpec>> = BTreeMap::new();
            for r in 0..replicas {
                for link in group.links(r) {
                    assert!(link.from == worker(r) || link.to == worker(r));
                    seen.entry(link.id).or_default().push(link);
                }
            }
            assert!(seen.values().all(|ends| ends.len() == 2 && ends[0] == ends[1]), "{seen:?}");
            assert_eq!(seen.len(), replicas * Group::numbers(replicas));
            assert_eq!(seen.keys().last(), Some(&(100 + seen.len() as u32 - 1)));
        }
    }

    /// Pairs are all links, each once.
    #[test]
    fn every_link_is_in_one_pair() {
        for replicas in [1, 2, 3, 8, 22, 44] {
            let worker = |r| r;
            let group = group(replicas, &worker);
            let mut paired: Vec<LinkSpec> = (0..replicas)
                .flat_map(|r| group.pairs(r))
                .flat_map(|(there, back)| {
                    assert!(back.iter().all(|back| (back.from, back.to) == (there.to, there.from)));
                    [Some(there), back].into_iter().flatten()
                })
                .collect();
            paired.sort_by_key(|link| link.id);
            let mut all: Vec<LinkSpec> = (0..replicas).flat_map(|r| group.links(r)).collect();
            all.sort_by_key(|link| link.id);
            all.dedup();
            assert_eq!(paired, all, "{replicas} replicas");
        }
    }

    /// Whatever R, a replica has few links, and buffers for fewer than four buckets: two of what it sends, two of what it gets.
    #[test]
    fn a_replica_s_buffers_do_not_grow_with_replicas() {
        let words: HashMap<usize, usize> = [2, 8, 64, 256, 257, 1024, 4096]
            .map(|replicas| {
                let links = group(replicas, &|r| r).links(0);
                assert!(links.len() <= 40, "{replicas} replicas: {} links", links.len());
                (replicas, links.iter().map(|link| link.depth * link.words).sum())
            })
            .into();
        assert!(words.values().all(|&words| words <= 4 * BUCKET + 200), "{words:?}");
        assert_eq!(words[&2], 2 * BUCKET);
    }
}
