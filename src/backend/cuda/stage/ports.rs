//! Values out of messages into arrays, and out of arrays into messages: copies on streams of their own, beside the passes.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use crate::backend::cuda::event::Event;
use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::host_memory::Locked;
use crate::backend::cuda::{Array, Element, Gpu, ops};
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::{Error, Result};

/// Where values come from messages.
pub(crate) struct InPort {
    elements: usize,
    /// Their type on the way.
    wire: Element,
    /// Where those of messages in host memory are copied to; made when the first comes.
    landing: Option<Array>,
    /// Host memory that is copied from by way of this one, because it comes and goes (frames).
    locked: Option<Locked>,
    arrived: Arc<CudaEvent>,
    used: Arc<CudaEvent>,
}

impl InPort {
    /// For `elements` values that travel as `wire`.
    pub(crate) fn new(gpu: &Gpu, elements: usize, wire: Element) -> Result<Self> {
        let (arrived, used) = (Arc::new(gpu.event()?), Arc::new(gpu.event()?));
        record(&used, &gpu.compute)?;
        Ok(InPort { elements, wire, landing: None, locked: None, arrived, used })
    }

    /// Takes a message's values to the GPU, behind the last use of their place there, and launches with `f` what uses them.
    pub(crate) fn read(&mut self, gpu: &Gpu, message: Slot<'_>, f: impl FnOnce(&Array) -> Result<()>) -> Result<Done> {
        match message {
            Slot::Host(values) => {
                gpu.pin(values);
                self.copy(gpu, values, f)?;
                Ok(Done::At(Event::new(&self.arrived)))
            }
            Slot::Device(place) => {
                f(&place.array(self.elements, self.wire)?)?;
                record(&self.used, &gpu.compute)?;
                Ok(Done::At(Event::new(&self.used)))
            }
        }
    }

    /// As [`InPort::read`], out of host memory that may go or change when this returns.
    pub(crate) fn read_passing(
        &mut self,
        gpu: &Gpu,
        values: &[f32],
        f: impl FnOnce(&Array) -> Result<()>,
    ) -> Result<()> {
        let mut locked = match self.locked.take() {
            Some(locked) => {
                self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))?;
                locked
            }
            None => gpu.locked(values.len())?,
        };
        if locked.words().len() != values.len() {
            return Err(Error::Run(format!("{} words came where {} were due", values.len(), locked.words().len())));
        }
        locked.words().copy_from_slice(values);
        let copied = self.copy(gpu, locked.words(), f);
        self.locked = Some(locked);
        copied
    }

    /// Copies from locked memory that stays what it is until `arrived`.
    fn copy(&mut self, gpu: &Gpu, values: &[f32], f: impl FnOnce(&Array) -> Result<()>) -> Result<()> {
        if self.landing.is_none() {
            self.landing = Some(gpu.array(self.elements, self.wire)?);
            // The memory is there in the order of the compute stream, for which the other one has to wait.
            record(&self.used, &gpu.compute)?;
        }
        let Some(landing) = &self.landing else { return Ok(()) };
        if values.len() != landing.bytes().div_ceil(4) {
            return Err(Error::Run(format!("{} words came for {} bytes", values.len(), landing.bytes())));
        }
        wait(&gpu.incoming, &self.used)?;
        // SAFETY: the array has these bytes, and so have the values, which stay what they are until `arrived`: a message is
        // given back when that event has come, locked memory written again behind a wait for it.
        unsafe {
            let bytes = std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), landing.bytes());
            cudarc::driver::result::memcpy_htod_async(landing.pointer(), bytes, gpu.incoming.cu_stream())
                .map_err(|e| failed("copying a message to the GPU", &e))?;
        }
        record(&self.arrived, &gpu.incoming)?;
        wait(&gpu.compute, &self.arrived)?;
        f(landing)?;
        record(&self.used, &gpu.compute)
    }
}

/// Where values go to messages.
pub(crate) struct OutPort {
    /// The values as they travel, where activations are of another type.
    wire: Option<Array>,
    made: CudaEvent,
    arrived: Arc<CudaEvent>,
}

impl OutPort {
    /// For values of the first type that travel as the second.
    pub(crate) fn new(gpu: &Gpu, elements: usize, [element, wire]: [Element; 2]) -> Result<Self> {
        let wire = (element != wire).then(|| gpu.array(elements, wire)).transpose()?;
        Ok(OutPort { wire, made: gpu.event()?, arrived: Arc::new(gpu.event()?) })
    }

    /// Keeps what is launched from now on waiting for the copy that was begun last.
    pub(crate) fn wait(&self, gpu: &Gpu) -> Result<()> {
        wait(&gpu.compute, &self.arrived)
    }

    /// Copies `values`, as the compute stream has made them or will, into a message. They may be written again when that is done.
    pub(crate) fn write(&mut self, gpu: &Gpu, values: &Array, message: SlotMut<'_>) -> Result<Done> {
        let values = match &self.wire {
            Some(wire) => cast(gpu, values, wire).map(|()| wire)?,
            None => values,
        };
        record(&self.made, &gpu.compute)?;
        wait(&gpu.outgoing, &self.made)?;
        let copied = match message {
            SlotMut::Host(words) => {
                if size_of_val(words) < values.bytes() {
                    return Err(Error::Run("a message is too small for its array".into()));
                }
                gpu.pin(words);
                // SAFETY: as long as the values; a link's buffer is not used before the copy is done, and outlives it because a
                // worker's stage is dropped before its links, and waits for the streams.
                unsafe {
                    let bytes = std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), values.bytes());
                    cudarc::driver::result::memcpy_dtoh_async(bytes, values.pointer(), gpu.outgoing.cu_stream())
                }
            }
            SlotMut::Device(place) => {
                let place = place.array(values.len(), values.element())?;
                // SAFETY: both have these bytes; nobody reads the place before the message tells, nor writes it before that was
                // given back.
                unsafe {
                    let (to, from, bytes) = (place.pointer(), values.pointer(), values.bytes());
                    cudarc::driver::result::memcpy_dtod_async(to, from, bytes, gpu.outgoing.cu_stream())
                }
            }
        };
        copied.map_err(|e| failed("copying a message from the GPU", &e))?;
        record(&self.arrived, &gpu.outgoing)?;
        Ok(Done::At(Event::new(&self.arrived)))
    }
}

/// Copies values into an array of the other type, or of the same.
pub(super) fn cast(gpu: &Gpu, from: &Array, to: &Array) -> Result<()> {
    match (from.element(), to.element()) {
        (Element::F32, _) => ops::from_f32(gpu, from, to),
        (_, Element::F32) => ops::to_f32(gpu, from, to),
        _ => gpu.copy(from, to),
    }
}

pub(super) fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).map_err(|e| failed("recording an event", &e))
}

pub(super) fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).map_err(|e| failed("ordering streams", &e))
}
