//! Ranks' clocks on one: as ping-pong compared them, and as messages bear it out.

use std::collections::HashMap;

use crate::comm::clocks::ClockOffset;
use crate::metrics::Recording;
use crate::metrics::recording::Clocks;

use super::messages::Carried;

/// A rank's clock, to be read as rank 0's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    from: ClockOffset,
    /// Where it drifts to.
    to: Option<ClockOffset>,
    /// How wrong it is, at most, in nanoseconds.
    pub uncertainty: u64,
}

impl Clock {
    /// As compared at the run's launch, and at its end if that is known.
    fn new(launch: ClockOffset, end: Option<ClockOffset>) -> Self {
        let Some(end) = end else { return Clock { from: launch, to: None, uncertainty: launch.uncertainty } };
        let range = |clock: ClockOffset| {
            let (offset, uncertainty) = (i128::from(clock.offset), i128::from(clock.uncertainty));
            (offset - uncertainty, offset + uncertainty)
        };
        let (a, b) = (range(launch), range(end));
        let (least, most) = (a.0.max(b.0), a.1.min(b.1));
        if least > most {
            return Clock { from: launch, to: Some(end), uncertainty: launch.uncertainty.max(end.uncertainty) };
        }
        // No drift is to be seen, so both comparisons are of one offset.
        let from = ClockOffset { offset: (least + most).div_euclid(2) as i64, ..launch };
        Clock { from, to: None, uncertainty: (most - least + 1).div_euclid(2) as u64 }
    }

    /// Rank 0's time at `at`, in nanoseconds; between two comparisons a clock that drifts does so evenly.
    pub(super) fn first(&self, at: u64) -> i128 {
        let from = self.from;
        let drift = match self.to {
            Some(to) if to.at > from.at => {
                let part = (i128::from(at) - i128::from(from.at)) as f64 / (to.at - from.at) as f64;
                part * (i128::from(to.offset) - i128::from(from.offset)) as f64
            }
            _ => 0.0,
        };
        i128::from(at) + i128::from(from.offset) + drift.round() as i128
    }

    fn moved(self, by: i64, uncertainty: u64) -> Self {
        let moved = |clock: ClockOffset| ClockOffset { offset: clock.offset.saturating_add(by), ..clock };
        Clock { from: moved(self.from), to: self.to.map(moved), uncertainty }
    }
}

/// The clock of each part: by the comparison at the launch, and that at the end if it is known, so moved that no message was there
/// before it left. Where messages go both ways they say more than ping-pong did, if ranks had to share processors meanwhile or clocks
/// have drifted since. Messages that contradict each other leave clocks as they were compared.
pub(super) fn clocks(parts: &[Recording], at_end: Option<&Clocks>, messages: &[Carried]) -> Vec<Clock> {
    let compared = |part: &Recording| {
        let end = at_end.and_then(|clocks| clocks.clocks.get(part.rank)).copied();
        Clock::new(part.clock, end)
    };
    let of_part: Vec<Clock> = parts.iter().map(compared).collect();
    // Ranks that read one clock were compared once. Rank 0's is the first.
    let mut different = vec![ClockOffset::default()];
    let mut which = Vec::new();
    for part in parts {
        which.push(different.iter().position(|clock| *clock == part.clock).unwrap_or(different.len()));
        if which.last() == Some(&different.len()) {
            different.push(part.clock);
        }
    }
    let mut bounds = Bounds::new(different.len());
    for message in messages {
        let (from, to) = (message.from, message.to);
        let flight = of_part[to].first(message.received.at) - of_part[from].first(message.sent.at);
        bounds.at_most(which[from], which[to], flight);
    }
    let mut uncertain = vec![0; different.len()];
    which.iter().zip(&of_part).for_each(|(&clock, compared)| uncertain[clock] = compared.uncertainty);
    match bounds.moves(&uncertain) {
        Some(moves) => which.iter().zip(of_part).map(|(&n, clock)| clock.moved(moves[n].0, moves[n].1)).collect(),
        None => of_part,
    }
}

/// By how much clocks can be moved against each other, in nanoseconds: that of `a` ahead of that of `b` by at most so much.
struct Bounds {
    clocks: usize,
    /// By a and b.
    most: HashMap<(usize, usize), i128>,
}

/// Farther than ever.
const FAR: i128 = i128::MAX / 4;

impl Bounds {
    fn new(clocks: usize) -> Self {
        Bounds { clocks, most: HashMap::new() }
    }

    fn at_most(&mut self, a: usize, b: usize, most: i128) {
        if a != b {
            self.most.entry((a, b)).and_modify(|known| *known = most.min(*known)).or_insert(most);
        }
    }

    /// What each clock is to be moved by, and how wrong that can be: the middle of what is possible, and the half of it. `uncertain` says
    /// how wrong each may be beside the first; where it cannot be that little, as little more as is possible, by factors of two.
    fn moves(&self, uncertain: &[u64]) -> Option<Vec<(i64, u64)>> {
        (0..40).find_map(|doubled| {
            let mut bounds: Vec<_> = self.most.iter().map(|(&(a, b), &most)| (a, b, most)).collect();
            for (n, &uncertainty) in uncertain.iter().enumerate().skip(1) {
                let most = match doubled {
                    0 => i128::from(uncertainty),
                    // From a microsecond on.
                    _ => i128::from(uncertainty.max(1000)) << doubled,
                };
                bounds.extend([(n, 0, most), (0, n, most)]);
            }
            let least = shortest(self.clocks, &bounds)?;
            let turned: Vec<_> = bounds.iter().map(|&(a, b, most)| (b, a, most)).collect();
            let most = shortest(self.clocks, &turned)?;
            // Both are possible, so their middle is; rounded down everywhere, it stays so.
            let middle = |(&below, &above): (&i128, &i128)| {
                let moved = (above - below).div_euclid(2).try_into().ok()?;
                Some((moved, (above + below + 1).div_euclid(2).try_into().ok()?))
            };
            least.iter().zip(&most).map(middle).collect()
        })
    }
}

/// The lengths of the shortest ways from the first to each by `steps` of (from, to, length) (R. Bellman, On a routing problem, 1958);
/// `None` where a round trip is shorter than nothing.
fn shortest(number: usize, steps: &[(usize, usize, i128)]) -> Option<Vec<i128>> {
    let mut lengths = vec![FAR; number];
    lengths[0] = 0;
    for _ in 0..number {
        let mut shorter = false;
        for &(from, to, length) in steps {
            let way = lengths[from].saturating_add(length).min(FAR);
            shorter |= way < lengths[to];
            lengths[to] = lengths[to].min(way);
        }
        if !shorter {
            return Some(lengths);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_drift_are_read_as_the_first_ranks() {
        // A clock 1 s behind at the launch that loses 1 ms in 100 s.
        let launch = ClockOffset { at: 1_000, offset: 1_000_000_000, uncertainty: 20 };
        let end = ClockOffset { at: 100_000_001_000, offset: 1_001_000_000, uncertainty: 30 };
        let clock = Clock::new(launch, Some(end));
        assert_eq!(clock.first(1_000), 1_000_001_000);
        assert_eq!(clock.first(50_000_001_000), 51_000_501_000);
        assert_eq!(clock.first(100_000_001_000), 101_001_001_000);
        assert_eq!(clock.uncertainty, 30);
        let clock = Clock::new(launch, None);
        assert_eq!((clock.first(50_000_001_000), clock.uncertainty), (51_000_001_000, 20));
        // Comparisons of 500 ± 40 and 560 ± 50 that are of one offset: 510 to 540.
        let (launch, end) = (
            ClockOffset { at: 7, offset: 500, uncertainty: 40 },
            ClockOffset { at: 9000, offset: 560, uncertainty: 50 },
        );
        let clock = Clock::new(launch, Some(end));
        assert_eq!((clock.first(7), clock.first(9000), clock.uncertainty), (532, 9525, 15));
        // The same clock.
        let same = Clock::new(ClockOffset::default(), Some(ClockOffset::default()));
        assert_eq!((same.first(u64::MAX), same.uncertainty), (u64::MAX.into(), 0));
    }

    /// What clocks 1, 2, … are moved by, and how wrong that can be, as these flights bound it.
    fn moves(flights: &[(usize, usize, i128)], uncertain: &[u64]) -> Option<Vec<(i64, u64)>> {
        let mut bounds = Bounds::new(uncertain.len() + 1);
        flights.iter().for_each(|&(from, to, flight)| bounds.at_most(from, to, flight));
        let all = bounds.moves(&[&[0], uncertain].concat())?;
        assert_eq!(all[0], (0, 0));
        Some(all[1..].to_vec())
    }

    #[test]
    fn messages_bound_clocks() {
        // Nothing is known of the clock but what ping-pong says, or no more.
        assert_eq!(moves(&[], &[50]), Some(vec![(0, 50)]));
        assert_eq!(moves(&[(0, 1, 60), (1, 0, 70)], &[50]), Some(vec![(0, 50)]));
        // It is read at least 30 early: from 30 to 50.
        assert_eq!(moves(&[(0, 1, -30), (0, 1, 100)], &[50]), Some(vec![(40, 10)]));
        // And from 30 to 35.
        assert_eq!(moves(&[(0, 1, -30), (1, 0, 35)], &[50]), Some(vec![(32, 3)]));
        // By way of another clock: 2 is at most 5 ahead of 1, and that at least 20 behind.
        let expected = Some(vec![(-35, 15), (-33, 18)]);
        assert_eq!(moves(&[(1, 0, -20), (2, 1, 5), (1, 2, 1)], &[50, 1000]), expected);
        // Two clocks of one host and those of another host have nothing to say of themselves.
        assert_eq!(moves(&[(1, 1, -5)], &[50]), Some(vec![(0, 50)]));
    }

    #[test]
    fn clocks_that_went_elsewhere_since_are_moved_as_far_as_is_needed() {
        // 100 µs early, by messages that take some 10 µs, where ping-pong had said at most 50 ns.
        assert_eq!(moves(&[(0, 1, -90_000), (1, 0, 110_000)], &[50]), Some(vec![(100_000, 10_000)]));
        // Messages of one way: between 90 µs and the first power of two that allows it.
        assert_eq!(moves(&[(0, 1, -90_000)], &[50]), Some(vec![(109_000, 19_000)]));
        // A message and its answer that took less than nothing, whatever the clocks.
        assert_eq!(moves(&[(0, 1, -90), (1, 0, 80)], &[500]), None);
    }
}
