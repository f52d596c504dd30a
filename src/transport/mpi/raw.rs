//! MPI's own speed, without links: the baseline that the link benchmark compares with.

use std::sync::Arc;

use super::calls::{Comm, Request};
use super::{Buffer, Session};
use crate::{Error, Result};

/// Plain nonblocking sends and receives between rank 0 and rank 1, the rank's lock held throughout.
pub(crate) struct Baseline {
    session: Arc<Session>,
    comm: Comm,
    out: Buffer,
    inward: Buffer,
}

impl Baseline {
    /// Two buffers of `words`. Collective over all ranks.
    pub(in crate::transport) fn new(session: &Arc<Session>, words: usize) -> Result<Baseline> {
        let _calls = session.core.lock();
        let comm = Comm::duplicate_world()?;
        Ok(Baseline { session: session.clone(), comm, out: Buffer::new(words), inward: Buffer::new(words) })
    }

    /// Sends `words` to the other rank and back `rounds` times, `each` called with what is about to be sent and
    /// with what came, as on a link. `both`: the two ranks send at the same time.
    pub(crate) fn exchange(
        &mut self,
        words: usize,
        rounds: usize,
        both: bool,
        mut fill: impl FnMut(&mut [f32]),
        mut read: impl FnMut(&[f32]),
    ) -> Result<()> {
        let _calls = self.session.core.lock();
        let (rank, peer) = (self.session.rank, 1 - self.session.rank.min(1));
        if rank > 1 || words > self.out.payload().len() {
            return Err(Error::Run(format!("no baseline of {words} words on rank {rank}")));
        }
        let (out, inward) = (self.out.start(), self.inward.start());
        for _ in 0..rounds {
            // SAFETY: the buffers live in `self`, and every request completes before they are touched again.
            unsafe {
                if both {
                    fill(&mut self.out.payload_mut()[..words]);
                    let received = self.comm.receive(inward, super::HEADER_WORDS + words, peer, 0)?;
                    let sent = self.comm.send(out, super::HEADER_WORDS + words, peer, 0)?;
                    Request::wait_all(&mut [received, sent])?;
                    read(&self.inward.payload()[..words]);
                    continue;
                }
                for sender in [0, 1] {
                    if rank == sender {
                        fill(&mut self.out.payload_mut()[..words]);
                        let sent = self.comm.send(out, super::HEADER_WORDS + words, peer, 0)?;
                        Request::wait_all(&mut [sent])?;
                    } else {
                        let received = self.comm.receive(inward, super::HEADER_WORDS + words, peer, 0)?;
                        Request::wait_all(&mut [received])?;
                        read(&self.inward.payload()[..words]);
                    }
                }
            }
        }
        Ok(())
    }
}
