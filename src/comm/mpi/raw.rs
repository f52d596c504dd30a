//! MPI's own speed, without links: the baseline that the link benchmark compares with.

use std::sync::Arc;

use super::super::message::Buffer;
use super::calls::{Comm, Request};
use super::{HEADER_WORDS, Session};
use crate::{Error, Result};

/// Plain nonblocking sends and receives between ranks 0 and 1, receives posted early, two buffers a direction.
///
/// The rank's lock is held throughout an exchange, so nothing else of this rank calls MPI meanwhile.
pub(crate) struct Baseline {
    session: Arc<Session>,
    comm: Comm,
    out: [Buffer; 2],
    inward: [Buffer; 2],
}

impl Baseline {
    /// Buffers of `words`. Collective over all ranks.
    pub(in crate::comm) fn new(session: &Arc<Session>, words: usize) -> Result<Baseline> {
        let _calls = session.core.lock();
        let comm = Comm::duplicate_world()?;
        let pair = || [Buffer::new(words, true), Buffer::new(words, true)];
        Ok(Baseline { session: session.clone(), comm, out: pair(), inward: pair() })
    }

    /// Sends `words` to the other rank and back `rounds` times, or at the same time if `both`. `fill` gets each
    /// payload before it is sent, `read` each one that came.
    pub(crate) fn exchange(
        &mut self,
        words: usize,
        rounds: usize,
        both: bool,
        fill: impl Fn(&mut [f32]),
        read: impl Fn(&[f32]),
    ) -> Result<()> {
        let session = self.session.clone();
        let _calls = session.core.lock();
        let rank = session.rank;
        if rank > 1 || words > self.out[0].payload().len() {
            return Err(Error::Run(format!("no baseline of {words} words on rank {rank}")));
        }
        let leads = both || rank == 0;
        let mut receiving = [self.receive(0, words)?];
        for round in 0..rounds {
            let (this, next) = (round % 2, (round + 1) % 2);
            if leads {
                let sent = self.send(this, words, &fill)?;
                Request::wait_all(&mut [sent, receiving[0]])?;
            } else {
                Request::wait_all(&mut receiving)?;
            }
            read(&self.inward[this].payload()[..words]);
            if round + 1 < rounds {
                receiving = [self.receive(next, words)?];
            }
            if !leads {
                let sent = self.send(this, words, &fill)?;
                Request::wait_all(&mut [sent])?;
            }
        }
        Ok(())
    }

    fn send(&mut self, buffer: usize, words: usize, fill: &impl Fn(&mut [f32])) -> Result<Request> {
        let buffer = &mut self.out[buffer];
        fill(&mut buffer.payload_mut()[..words]);
        // SAFETY: the buffer lives in `self`, and `exchange` completes every request before it is touched again.
        unsafe { self.comm.send(buffer.start(), HEADER_WORDS + words, 1 - self.session.rank, 0) }
    }

    fn receive(&mut self, buffer: usize, words: usize) -> Result<Request> {
        // SAFETY: as in `send`.
        unsafe { self.comm.receive(self.inward[buffer].start(), HEADER_WORDS + words, 1 - self.session.rank, 0) }
    }
}

/// Plain nonblocking all-reduces among all ranks, each waited for at once. The rank's lock is held meanwhile.
pub(crate) struct Sums {
    session: Arc<Session>,
    comm: Comm,
    from: Vec<f32>,
    to: Vec<f32>,
}

impl Sums {
    /// Places for `words`. Collective over all ranks.
    pub(in crate::comm) fn new(session: &Arc<Session>, words: usize) -> Result<Sums> {
        let _calls = session.core.lock();
        Ok(Sums {
            session: session.clone(),
            comm: Comm::duplicate_world()?,
            from: vec![1.0; words],
            to: vec![0.0; words],
        })
    }

    /// Sums them up over all ranks, `rounds` times.
    pub(crate) fn run(&mut self, rounds: usize) -> Result<()> {
        let _calls = self.session.core.lock();
        for _ in 0..rounds {
            // SAFETY: both live in `self` and are as long as said; the request completes before they are touched again.
            let sum = unsafe { self.comm.sum(self.from.as_ptr(), self.to.as_mut_ptr(), self.from.len()) }?;
            Request::wait_all(&mut [sum])?;
        }
        Ok(())
    }
}
