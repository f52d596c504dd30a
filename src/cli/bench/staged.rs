//! A device array's way over a link: copied into the link's own buffer, sent when it is there, copied to the GPU at the other
//! end. As a run's modules do it, without their work.

use cudarc::driver::{CudaEvent, CudaStream};

use crate::cuda::gpu::failed;
use crate::cuda::{Array, Element, Gpu};
use crate::transport::{Header, LinkSpec, Receiver, Sender};
use crate::{Error, Result};

/// The end that sends.
pub(super) struct Out {
    pub link: LinkSpec,
    pub sender: Sender,
    pub array: Array,
    made: CudaEvent,
    arrived: CudaEvent,
    unsent: Option<Header>,
}

impl Out {
    pub fn new(gpu: &Gpu, link: LinkSpec, sender: Sender) -> Result<Self> {
        let array = gpu.zeros(link.words, Element::F32)?;
        Ok(Out { link, sender, array, made: gpu.event()?, arrived: gpu.event()?, unsent: None })
    }

    /// Copies the array, as the compute stream will have made it, into the next message.
    pub fn copy(&mut self, gpu: &Gpu, header: &Header) -> Result<()> {
        let slot = self.sender.slot()?.get_mut(..self.array.len());
        let slot = slot.ok_or_else(|| Error::Run("a message is too small for its array".into()))?;
        gpu.pin(slot);
        record(&self.made, &gpu.compute)?;
        order(&gpu.outgoing, &self.made)?;
        // SAFETY: as long as the array; the buffer is not used before `start` has seen the copy's end, and outlives it: whoever
        // ends early waits for the streams first (`Gpu`'s drop).
        unsafe { cudarc::driver::result::memcpy_dtoh_async(slot, self.array.pointer(), gpu.outgoing.cu_stream()) }
            .map_err(|e| failed("copying a message from the GPU", &e))?;
        record(&self.arrived, &gpu.outgoing)?;
        self.unsent = Some(*header);
        Ok(())
    }

    /// Whether a message waits for its copy.
    pub fn is_pending(&self) -> bool {
        self.unsent.is_some()
    }

    /// Starts the message if its copy has arrived, or waits for that.
    pub fn start(&mut self, wait: bool) -> Result<()> {
        let Some(header) = self.unsent else { return Ok(()) };
        if wait {
            self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))?;
        } else if !self.arrived.try_is_complete().map_err(|e| failed("asking for a copy", &e))? {
            return Ok(());
        }
        self.unsent = None;
        self.sender.start(&header)
    }
}

/// The end that receives.
pub(super) struct In {
    pub link: LinkSpec,
    pub receiver: Receiver,
    pub array: Array,
    arrived: CudaEvent,
    used: CudaEvent,
}

impl In {
    pub fn new(gpu: &Gpu, link: LinkSpec, receiver: Receiver) -> Result<Self> {
        let array = gpu.zeros(link.words, Element::F32)?;
        gpu.synchronize()?;
        let end = In { link, receiver, array, arrived: gpu.event()?, used: gpu.event()? };
        end.done(gpu)?;
        Ok(end)
    }

    /// Takes the message to the GPU, behind the last use of the array; the compute stream waits for it.
    pub fn receive(&mut self, gpu: &Gpu, header: &Header) -> Result<()> {
        let values = self.receiver.wait(header)?;
        gpu.pin(values);
        order(&gpu.incoming, &self.used)?;
        // SAFETY: as long as the array, by the header; the values stay until the wait below.
        unsafe { cudarc::driver::result::memcpy_htod_async(self.array.pointer(), values, gpu.incoming.cu_stream()) }
            .map_err(|e| failed("copying a message to the GPU", &e))?;
        record(&self.arrived, &gpu.incoming)?;
        order(&gpu.compute, &self.arrived)?;
        self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))?;
        self.receiver.release()
    }

    /// What was launched so far is the last to use the array.
    pub fn done(&self, gpu: &Gpu) -> Result<()> {
        record(&self.used, &gpu.compute)
    }
}

pub(super) fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).map_err(|e| failed("recording an event", &e))
}

fn order(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).map_err(|e| failed("ordering streams", &e))
}
