//! Ping-pong with the time in it.

use std::time::{Duration, Instant};

use super::super::clocks::Round;
use super::Session;
use super::calls::Request;
use crate::Result;
use crate::sys::clock::nanoseconds;

/// Words of a message: a time.
const WORDS: usize = 2;
/// In place of rank 0's time: that was all.
const ENOUGH: u64 = 0;
/// Rounds with a rank, at least.
const ROUNDS: usize = 100;
/// Where none of these was shorter, further rounds are tried: ranks may share a processor.
const SHORT: u64 = 20_000;
/// How long, with all ranks together.
const PATIENCE: Duration = Duration::from_secs(1);

impl Session {
    /// Asks the ranks `asked`, one after another, for their time again and again: the rounds of each, on rank 0. Every rank
    /// calls it with the same ranks, of which rank 0 is none. The rank's lock is held meanwhile.
    pub(in crate::comm) fn compare_clocks(&self, asked: &[usize]) -> Result<Vec<Vec<Round>>> {
        let _calls = self.core.lock();
        let now = || nanoseconds(Instant::now());
        if self.rank > 0 {
            while asked.contains(&self.rank) && self.receive_time(0)? != ENOUGH {
                self.send_time(now(), 0)?;
            }
            return Ok(Vec::new());
        }
        let of_rank = |&rank: &usize| {
            let (begun, mut rounds) = (Instant::now(), Vec::new());
            let mut shortest = u64::MAX;
            while rounds.len() < ROUNDS || shortest > SHORT && begun.elapsed() < PATIENCE / asked.len() as u32 {
                let before = now();
                self.send_time(before, rank)?;
                let theirs = self.receive_time(rank)?;
                let after = now();
                shortest = shortest.min(after - before);
                rounds.push((before, after, theirs));
            }
            self.send_time(ENOUGH, rank)?;
            Ok(rounds)
        };
        asked.iter().map(of_rank).collect()
    }

    fn send_time(&self, time: u64, to: usize) -> Result<()> {
        let mut words: [u32; WORDS] = bytemuck::cast(time);
        // SAFETY: the request completes before the words go.
        let sent = unsafe { self.comm.send(words.as_mut_ptr(), WORDS, to, 0) }?;
        Request::wait_all(&mut [sent])
    }

    fn receive_time(&self, from: usize) -> Result<u64> {
        let mut words = [0u32; WORDS];
        // SAFETY: as above.
        let received = unsafe { self.comm.receive(words.as_mut_ptr(), WORDS, from, 0) }?;
        Request::wait_all(&mut [received])?;
        Ok(bytemuck::cast(words))
    }
}
