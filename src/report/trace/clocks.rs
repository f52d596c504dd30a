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
    /// How wrong it is, in nanoseconds: at most, what it drifted since the launch aside where no end and no messages tell of that.
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
        // One offset fits both comparisons. It may still have drifted from anywhere in one's range to anywhere in the other's.
        let offset = (least + most).div_euclid(2);
        let uncertainty = (offset - a.0.min(b.0)).max(a.1.max(b.1) - offset);
        Clock { from: ClockOffset { offset: offset as i64, ..launch }, to: None, uncertainty: uncertainty as u64 }
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
        // Damaged files have clocks that drift by the age of the universe.
        i128::from(at) + i128::from(from.offset) + drift.clamp(-1e24, 1e24).round() as i128
    }

    /// What is added to its time at `at`, in nanoseconds.
    pub(super) fn offset(&self, at: u64) -> i128 {
        self.first(at) - i128::from(at)
    }

    fn moved(self, by: i64, uncertainty: u64) -> Self {
        let moved = |clock: ClockOffset| ClockOffset { offset: clock.offset.saturating_add(by), ..clock };
        Clock { from: moved(self.from), to: self.to.map(moved), uncertainty }
    }
}

/// The clock of each part: as compared at the launch, and at the end if that is known, and then moved so that no message arrives before
/// it left. Where messages go both ways they say more than ping-pong did, if ranks had to share processors meanwhile or clocks have
/// drifted since.
pub(super) fn clocks(parts: &[Recording], at_end: Option<&Clocks>, messages: &[Carried]) -> Vec<Clock> {
    let compared = |part: &Recording| {
        let end = at_end.and_then(|clocks| clocks.clocks.get(part.rank)).copied();
        Clock::new(part.clock, end)
    };
    let of_part: Vec<Clock> = parts.iter().map(compared).collect();
    // Ranks that read one clock were compared once. Rank 0's is the first.
    let (mut numbers, mut uncertain) = (HashMap::from([(ClockOffset::default(), 0)]), vec![0]);
    let mut number = |(part, compared): (&Recording, &Clock)| {
        *numbers.entry(part.clock).or_insert_with(|| {
            uncertain.push(compared.uncertainty);
            uncertain.len() - 1
        })
    };
    let which: Vec<usize> = parts.iter().zip(&of_part).map(&mut number).collect();
    let mut flights = Flights::default();
    for message in messages {
        let (from, to) = (message.from, message.to);
        let flight = of_part[to].first(message.received.at) - of_part[from].first(message.sent.at);
        flights.add(which[from], which[to], flight);
    }
    match flights.moves(&uncertain) {
        Some(moves) => which.iter().zip(of_part).map(|(&n, clock)| clock.moved(moves[n].0, moves[n].1)).collect(),
        None => {
            log::warn!(
                "the recorded messages contradict each other whatever the ranks' clocks are (a damaged file?): clocks are taken as \
                 ping-pong compared them"
            );
            of_part
        }
    }
}

/// The shortest time that a message took from one clock to another, by these clocks, in nanoseconds. What clocks are moved by is bound
/// by it: `move(from) - move(to) <= flight`.
#[derive(Debug, Default)]
struct Flights(HashMap<(usize, usize), i128>);

/// `move(a) - move(b) <= most`, in nanoseconds: a, b and that.
type Bound = (usize, usize, i128);

/// So often a bound is doubled, from a microsecond on, until it can be kept.
const DOUBLINGS: u32 = 40;

impl Flights {
    fn add(&mut self, from: usize, to: usize, flight: i128) {
        if from != to {
            self.0.entry((from, to)).and_modify(|known| *known = flight.min(*known)).or_insert(flight);
        }
    }

    /// What each clock is to be moved by, and how wrong that can be: the middle of what is possible, and the half of it. `uncertain` says
    /// how wrong each can be beside the first, of which nothing is to be moved. Where messages say otherwise that is doubled until they
    /// do not, for those clocks alone. `None` for what no clocks can be.
    fn moves(&self, uncertain: &[u64]) -> Option<Vec<(i64, u64)>> {
        let wider = |n: u32, nanoseconds: u64| match n {
            0 => i128::from(nanoseconds),
            _ => i128::from(nanoseconds.max(1000)) << (n - 1),
        };
        let flights =
            |slack: i128| -> Vec<Bound> { self.0.iter().map(|(&(a, b), &most)| (a, b, most + slack)).collect() };
        let possible = |bounds: &[Bound]| shortest(vec![0; uncertain.len()], bounds).is_some();
        // Messages of clocks that drift meanwhile may contradict each other.
        let slack = (0..DOUBLINGS).map(|n| wider(n, 0)).find(|&slack| possible(&flights(slack)))?;
        let mut bounds = flights(slack);
        // The surest first, lest they yield to others.
        let mut order: Vec<usize> = (1..uncertain.len()).collect();
        order.sort_by_key(|&clock| uncertain[clock]);
        for clock in order {
            let known = bounds.len();
            (0..DOUBLINGS).find(|&n| {
                let most = wider(n, uncertain[clock]);
                bounds.truncate(known);
                bounds.extend([(clock, 0, most), (0, clock, most)]);
                possible(&bounds)
            })?;
        }
        let mut from_first = vec![FAR; uncertain.len()];
        from_first[0] = 0;
        let down = shortest(from_first.clone(), &bounds)?;
        bounds.iter_mut().for_each(|bound| (bound.0, bound.1) = (bound.1, bound.0));
        let up = shortest(from_first, &bounds)?;
        // All down is possible, and all up, so their middle is; rounded in one direction everywhere, it stays so.
        let middle = |(down, up): (&i128, &i128)| {
            let uncertainty = (up + down + 1).div_euclid(2) + slack;
            Some(((up - down).div_euclid(2).try_into().ok()?, uncertainty.try_into().ok()?))
        };
        down.iter().zip(&up).map(middle).collect()
    }
}

/// Farther than any clock.
const FAR: i128 = 1 << 120;

/// The shortest ways to each, of `lengths` at first, by steps of (from, to, length) (R. Bellman, On a routing problem, 1958); `None`
/// where a round trip is shorter than nothing.
fn shortest(mut lengths: Vec<i128>, steps: &[Bound]) -> Option<Vec<i128>> {
    for _ in 0..=lengths.len() {
        let mut shorter = false;
        for &(from, to, length) in steps {
            let way = lengths[from] + length;
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
    use crate::comm::Kind;
    use crate::metrics::recording::Message;
    use crate::report::trace::messages::carried;

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
        // 500 ± 40 and 560 ± 50 can be of one offset, 510 to 540: its middle is at most 85 off, where it was 610 at the end.
        let (launch, end) = (
            ClockOffset { at: 7, offset: 500, uncertainty: 40 },
            ClockOffset { at: 9000, offset: 560, uncertainty: 50 },
        );
        let clock = Clock::new(launch, Some(end));
        assert_eq!((clock.offset(7), clock.offset(9000), clock.uncertainty), (525, 525, 85));
        // The same clock.
        let same = Clock::new(ClockOffset::default(), Some(ClockOffset::default()));
        assert_eq!((same.first(u64::MAX), same.uncertainty), (u64::MAX.into(), 0));
    }

    /// What clocks 1, 2, … are moved by, and how wrong that can be, as these flights bound it.
    fn moves(flights: &[(usize, usize, i128)], uncertain: &[u64]) -> Option<Vec<(i64, u64)>> {
        let mut all = Flights::default();
        flights.iter().for_each(|&(from, to, flight)| all.add(from, to, flight));
        let moves = all.moves(&[&[0], uncertain].concat())?;
        assert_eq!(moves[0].0, 0);
        Some(moves[1..].to_vec())
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
        // Messages between ranks of one clock say nothing of it.
        assert_eq!(moves(&[(1, 1, -5)], &[50]), Some(vec![(0, 50)]));
    }

    #[test]
    fn clocks_that_went_elsewhere_are_moved_as_far_as_is_needed_and_no_others() {
        // 100 µs early, by messages that take some 10 µs, where ping-pong had said at most 50 ns.
        assert_eq!(moves(&[(0, 1, -90_000), (1, 0, 110_000)], &[50]), Some(vec![(100_000, 10_000)]));
        // Messages of one way: between 90 µs and the first power of two that allows it.
        assert_eq!(moves(&[(0, 1, -90_000)], &[50]), Some(vec![(109_000, 19_000)]));
        // Another clock stays where it would be without.
        let (right, wrong) = ([(0, 2, 3_000_000), (2, 0, 5_000)], [(0, 1, -999_000), (1, 0, 1_001_000)]);
        let all = moves(&[&right[..], &wrong[..]].concat(), &[50, 10_000]).unwrap();
        assert_eq!(all, [(1_000_000, 1_000), (-2_500, 7_500)]);
        assert_eq!(moves(&[(0, 1, 3_000_000), (1, 0, 5_000)], &[10_000]), Some(vec![(-2_500, 7_500)]));
    }

    #[test]
    fn messages_that_contradict_each_other_make_clocks_less_sure() {
        // A message and its answer took 10 µs less than nothing: 8 µs more for each leave 82 to 88.
        let all = moves(&[(0, 1, -90_000), (1, 0, 80_000)], &[50_000]).unwrap();
        assert_eq!(all, [(85_000, 3_000 + 8_000)]);
        // No clocks are like that.
        assert_eq!(moves(&[(0, 1, -1 << 80)], &[500]), None);
    }

    #[test]
    fn recordings_are_put_where_messages_allow() {
        // Ranks 1 and 2 read one clock, which is 1 s ahead; ping-pong found 400 µs less, give or take 500.
        let ahead: i64 = 1_000_000_000;
        let clock = ClockOffset { at: 5, offset: -ahead + 400_000, uncertainty: 500_000 };
        let message = |link, sent, at: i64| Message {
            kind: Kind::Activation,
            link,
            sent,
            at: at as u64,
            batch: 0,
            validation: 0,
            step: 0,
            bytes: 4,
        };
        let part = |rank: usize, clock, messages| Recording {
            launch: 0,
            module: rank + 1,
            replica: 0,
            grid: [3, 1],
            rank,
            host: String::new(),
            clock,
            slices: Vec::new(),
            device: Vec::new(),
            messages,
            dropped: 0,
        };
        // Each takes 10 µs: 0 to 1, 1 to 2, 2 to 0.
        let (own, other) = (2_000_000, 2_000_000 + ahead);
        let parts = [
            part(0, ClockOffset::default(), vec![message(1, true, own), message(3, false, own + 50_000)]),
            part(1, clock, vec![message(1, false, other + 10_000), message(2, true, other + 20_000)]),
            part(2, clock, vec![message(2, false, other + 30_000), message(3, true, other + 40_000)]),
        ];
        let messages = carried(&parts);
        assert_eq!(messages.len(), 3);
        let compared = clocks(&parts, None, &[]);
        assert_eq!(compared[1].offset(7), -i128::from(ahead) + 400_000);
        let found = clocks(&parts, None, &messages);
        assert_eq!((found[0].first(own as u64), found[0].uncertainty), (i128::from(own), 0));
        for clock in &found[1..] {
            assert_eq!((clock.offset(other as u64), clock.uncertainty), (-i128::from(ahead), 10_000));
        }
        // At the end it was 400 µs more: the true offset is in the middle, and as sure.
        let end = ClockOffset { at: 9_000_000_000, offset: -ahead - 400_000, uncertainty: 500_000 };
        let end = Clocks { launch: 0, clocks: vec![ClockOffset::default(), end, end] };
        let found = clocks(&parts, Some(&end), &messages);
        assert_eq!((found[2].offset(other as u64), found[2].uncertainty), (-i128::from(ahead), 10_000));
    }
}
