//! How far other ranks' clocks are off rank 0's: found by ping-pong, outside of training.
//!
//! Rank 0 sends a word to a rank, which answers with its time: that was read between rank 0's two readings, and the half of what
//! lies between them is how wrong their middle can be as the moment of it, at most. Of many rounds the shortest counts (F. Cristian,
//! Probabilistic clock synchronization, 1989). Ranks that read the same clock, as those of a host do, are asked once.

use serde::{Deserialize, Serialize};

use super::World;
use crate::sys::clock::clock_name;
use crate::{Error, Result};

/// A rank's clock beside rank 0's, at one moment. All in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClockOffset {
    /// The moment, by the rank's own clock; 0 where both are the same clock.
    pub at: u64,
    /// What is to be added to its time to have rank 0's.
    pub offset: i64,
    /// How wrong that can be, at most.
    pub uncertainty: u64,
}

/// One round: rank 0's time before and after, and the other's time between, in nanoseconds.
pub(super) type Round = (u64, u64, u64);

impl ClockOffset {
    /// What the rounds tell: the shortest is the surest.
    pub(super) fn of(rounds: &[Round]) -> Self {
        let shortest = rounds.iter().min_by_key(|(before, after, _)| after.saturating_sub(*before));
        let Some(&(before, after, theirs)) = shortest else { return Self::default() };
        let length = after.saturating_sub(before);
        // Of two moments of clocks that may be years apart: differences modulo 2⁶⁴ are right.
        let offset = (before + length / 2).wrapping_sub(theirs) as i64;
        ClockOffset { at: theirs, offset, uncertainty: length.div_ceil(2) }
    }
}

impl World {
    /// All ranks' clocks, by rank. Collective.
    ///
    /// # Errors
    /// [`Error::Transport`] when MPI fails.
    pub fn clocks(&self) -> Result<Vec<ClockOffset>> {
        let World::Mpi(ranks) = self else { return Ok(vec![ClockOffset::default()]) };
        let names = self.gather(clock_name().as_bytes())?;
        let first = |name: &Vec<u8>| names.iter().position(|other| other == name).unwrap_or_default();
        let of_clock: Vec<usize> = names.iter().map(first).collect();
        // By rank, the first of each clock.
        let asked: Vec<usize> = (1..names.len()).filter(|&rank| of_clock[rank] == rank).collect();
        let rounds = ranks.session.compare_clocks(&asked)?;
        let own: Vec<ClockOffset> = rounds.iter().map(|rounds| ClockOffset::of(rounds)).collect();
        let failed = |e: serde_json::Error| Error::Transport(format!("telling other ranks of their clocks: {e}"));
        let told = self.gather(&serde_json::to_vec(&own).map_err(failed)?)?;
        let found: Vec<ClockOffset> = serde_json::from_slice(&told[0]).map_err(failed)?;
        let known = |&clock: &usize| asked.iter().position(|&rank| rank == clock).and_then(|n| found.get(n).copied());
        Ok(of_clock.iter().map(|clock| known(clock).unwrap_or_default()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_round_tells() {
        // The other clock is 1000 ns ahead; the answer of the first round came late.
        let rounds = [(100, 900, 1120), (1000, 1041, 2030), (2000, 2100, 3020)];
        assert_eq!(ClockOffset::of(&rounds), ClockOffset { at: 2030, offset: -1010, uncertainty: 21 });
        assert!((ClockOffset::of(&rounds).offset + 1000).unsigned_abs() <= 21);
        // Far behind.
        let found = ClockOffset::of(&[(5_000_000_000_000, 5_000_000_000_010, 3)]);
        assert_eq!(found, ClockOffset { at: 3, offset: 5_000_000_000_002, uncertainty: 5 });
        assert_eq!(World::Alone.clocks().unwrap(), [ClockOffset::default()]);
    }
}
