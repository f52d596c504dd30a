//! A device array's way over a link, by way of host memory or not, as a run's modules do it, without their work.

use crate::Result;
use crate::backend::cuda::{Array, Element, Gpu};
use crate::comm::{Header, LinkSpec, Receiver, Sender, Values};
use crate::pipeline::compute::{Incoming, Outgoing, Route};

/// The end that sends.
pub(super) struct Out {
    pub array: Array,
    pub link: LinkSpec,
    // Before the link's end, whose buffer a copy may be writing.
    outgoing: Outgoing,
    pub sender: Sender,
    pending: bool,
}

impl Out {
    /// For messages as long as `link` says, staged if there is no `route`.
    pub fn new(gpu: &Gpu, link: LinkSpec, sender: Sender, route: Option<Route>) -> Result<Self> {
        let array = gpu.zeros(link.words, Element::F32)?;
        let outgoing = Outgoing::new(gpu, link.words, [Element::F32; 2], route)?;
        Ok(Out { array, link, outgoing, sender, pending: false })
    }

    /// Copies the array, as the compute stream will have made it, into the next message.
    pub fn copy(&mut self, gpu: &Gpu, header: &Header) -> Result<()> {
        self.pending = true;
        self.outgoing.copy(gpu, &self.array, &mut self.sender, header)
    }

    /// Whether a message waits for its copy.
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// Starts the message if its copy has arrived.
    pub fn start(&mut self) -> Result<()> {
        self.pending = !self.outgoing.start(&mut self.sender)?;
        Ok(())
    }

    /// Waits until every message has left.
    pub fn flush(&mut self) -> Result<()> {
        self.outgoing.values.as_mut().map_or(Ok(()), Values::flush)?;
        self.sender.flush()
    }

    /// Starts the message when its copy has arrived.
    pub fn finish(&mut self) -> Result<()> {
        self.start()?;
        while self.pending {
            std::thread::yield_now();
            self.start()?;
        }
        Ok(())
    }
}

/// The end that receives.
pub(super) struct In {
    pub link: LinkSpec,
    incoming: Incoming,
    pub receiver: Receiver,
}

impl In {
    /// As [`Out::new`].
    pub fn new(gpu: &Gpu, link: LinkSpec, receiver: Receiver, route: Option<Route>) -> Result<Self> {
        let incoming = Incoming::new(gpu, link.words, Element::F32, route)?;
        Ok(In { link, incoming, receiver })
    }

    /// Takes the message to the GPU, behind the last use of its place; the compute stream waits for it.
    pub fn receive(&mut self, gpu: &Gpu, header: &Header) -> Result<()> {
        self.incoming.receive(gpu, &mut self.receiver, header).map(|_| ())
    }

    /// What was launched so far is the last to use the values.
    pub fn done(&self, gpu: &Gpu) -> Result<()> {
        self.incoming.done(gpu)
    }

    /// Waits until a message that was put into the GPU's memory is used, and gives it back.
    pub fn give_back(&mut self) -> Result<()> {
        while !self.incoming.give_back(&mut self.receiver)? {
            std::thread::yield_now();
        }
        Ok(())
    }
}
