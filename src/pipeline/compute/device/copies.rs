//! Values from messages into arrays, and from arrays into messages.
//!
//! Messages are staged in the links' own buffers, locked into memory, or put into the receiver's GPU memory (see
//! [`crate::comm::exchange`]).

use cudarc::driver::{CudaEvent, CudaStream};

use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::host_memory::{Locked, PINNED_FROM};
use crate::backend::cuda::shared::Ring;
use crate::backend::cuda::{Array, Element, Gpu, ops};
use crate::comm::{Header, Receiver, Sender, Values};
use crate::{Error, Result};

/// The places in GPU memory into which a link's messages are put, and what moves them there where MPI does.
pub struct Route<'a> {
    /// The places.
    pub ring: &'a Ring,
    /// What moves values.
    pub values: Option<Values>,
}

/// Routes by edge; `None` where messages are staged.
#[derive(Default)]
pub struct Routes<'a> {
    /// Activations that come, and the cotangents sent back for them.
    pub inputs: Vec<[Option<Route<'a>>; 2]>,
    /// Activations that are sent, and the cotangents that come back for them.
    pub outputs: Vec<[Option<Route<'a>>; 2]>,
}

/// What comes in messages: its place on the GPU, and when it arrived and was used.
pub(crate) struct Incoming {
    /// What fills the places, where MPI does. Dropped before them.
    values: Option<Values>,
    /// One place, into which messages are copied; or those into which the sender puts them, in turn.
    places: Vec<Array>,
    /// Which one came last, and messages so far.
    at: usize,
    came: usize,
    put: bool,
    /// Where small messages, and frames, are copied from.
    locked: Option<Locked>,
    /// Whether the message that came last was not given back yet (those that were put only).
    held: bool,
    /// 32-bit words of a message.
    words: u32,
    arrived: CudaEvent,
    used: CudaEvent,
    ahead: Ahead,
}

/// How far the next message is that is fetched before it is asked for; with its flags.
#[derive(Clone, Copy, Default)]
enum Ahead {
    #[default]
    Nothing,
    Copying(u32),
    Copied(u32),
}

/// A copy from the GPU to where its receiver finds it, and a message that starts when it is there.
pub(crate) struct Outgoing {
    /// What sends the places' values, where MPI does. Dropped before them.
    pub(crate) values: Option<Values>,
    /// The values as they travel, where activations are of another type.
    wire: Option<Array>,
    /// The receiver's places, or those from which MPI sends, used in turn; none: values travel in the message.
    places: Vec<Array>,
    /// Where small messages are copied to.
    locked: Option<Locked>,
    /// Messages so far.
    sent: usize,
    /// 32-bit words of a message.
    words: u32,
    made: CudaEvent,
    arrived: CudaEvent,
    unsent: Option<Header>,
}

impl Incoming {
    /// For frames, which may also come as tensors of the host, whose memory comes and goes.
    pub(crate) fn of_frames(gpu: &Gpu, elements: usize) -> Result<Self> {
        let mut incoming = Incoming::new(gpu, elements, Element::F32, None)?;
        if incoming.locked.is_none() {
            incoming.locked = Some(gpu.locked(elements)?);
        }
        Ok(incoming)
    }

    /// For values that travel as `wire`.
    pub(crate) fn new(gpu: &Gpu, elements: usize, wire: Element, route: Option<Route>) -> Result<Self> {
        let (ring, values) = route.map_or((None, None), |route| (Some(route.ring), route.values));
        let places = match ring {
            Some(ring) => ring.arrays(elements, wire)?,
            None => vec![gpu.array(elements, wire)?],
        };
        if let Some(ring) = ring {
            gpu.count_allocated(ring.places * ring.stride);
        }
        let words = if ring.is_some() { 0 } else { places[0].bytes().div_ceil(4) as u32 };
        let (arrived, used) = (gpu.event()?, gpu.event()?);
        let put = ring.is_some();
        let locked = locked(gpu, words)?;
        let ahead = Ahead::Nothing;
        let incoming =
            Incoming { values, places, at: 0, came: 0, put, locked, held: false, words, arrived, used, ahead };
        incoming.done(gpu)?;
        Ok(incoming)
    }

    /// The values of the message that came last.
    pub(crate) fn values(&self) -> &Array {
        &self.places[self.at]
    }

    /// Copies a payload behind the last use of the place; what comes next in the compute stream waits for it.
    pub(crate) fn copy(&mut self, gpu: &Gpu, payload: &[f32]) -> Result<()> {
        let place = &self.places[self.at];
        if payload.len() != place.bytes().div_ceil(4) {
            return Err(Error::Run(format!("{} words came for {} bytes", payload.len(), place.bytes())));
        }
        let payload = match &mut self.locked {
            Some(locked) => {
                // Of a message, the copy before has: it was given back.
                self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))?;
                locked.words().copy_from_slice(payload);
                locked.words()
            }
            None => {
                gpu.pin(payload);
                payload
            }
        };
        wait(&gpu.incoming, &self.used)?;
        // SAFETY: the place is as large as the bytes, and they as the payload, which stays what it is until `arrived`: a
        // message is given back behind `wait`, and locked memory is written behind the wait above.
        unsafe {
            let bytes = std::slice::from_raw_parts(payload.as_ptr().cast::<u8>(), place.bytes());
            cudarc::driver::result::memcpy_htod_async(place.pointer(), bytes, gpu.incoming.cu_stream())
                .map_err(|e| failed("copying a message to the GPU", &e))?;
        }
        record(&self.arrived, &gpu.incoming)?;
        wait(&gpu.compute, &self.arrived)
    }

    /// Waits until the values are on the GPU.
    pub(crate) fn wait(&self) -> Result<()> {
        self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))
    }

    /// Waits for the message that is `due` and takes its values to the GPU; its flags.
    pub(crate) fn receive(&mut self, gpu: &Gpu, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        if self.put {
            // The one before went back when its tick ended.
            let (flags, _) = receiver.wait_flagged(&due.carrying(0))?;
            if let Some(values) = &mut self.values {
                values.wait()?;
            }
            (self.at, self.came, self.held) = (self.came % self.places.len(), self.came + 1, true);
            return Ok(flags);
        }
        let ahead = std::mem::take(&mut self.ahead);
        if let Ahead::Copied(flags) = ahead {
            return Ok(flags);
        }
        let (flags, values) = receiver.wait_flagged(&due.carrying(self.words))?;
        if matches!(ahead, Ahead::Nothing) {
            self.copy(gpu, values)?;
        }
        self.wait()?;
        receiver.release()?;
        Ok(flags)
    }

    /// Starts that, if the message is there.
    pub(crate) fn prefetch(&mut self, gpu: &Gpu, receiver: &mut Receiver, due: &Header) -> Result<()> {
        if self.put {
            return Ok(());
        }
        self.ahead = match self.ahead {
            Ahead::Nothing if receiver.ready()? => {
                let (flags, values) = receiver.wait_flagged(&due.carrying(self.words))?;
                self.copy(gpu, values)?;
                Ahead::Copying(flags)
            }
            Ahead::Copying(flags) if self.arrived.try_is_complete().map_err(|e| failed("asking for a copy", &e))? => {
                receiver.release()?;
                Ahead::Copied(flags)
            }
            ahead => ahead,
        };
        Ok(())
    }

    /// Gives the message back if its values were used; whether none is held.
    pub(crate) fn give_back(&mut self, receiver: &mut Receiver) -> Result<bool> {
        if self.held && self.used.try_is_complete().map_err(|e| failed("asking for a use", &e))? {
            self.values.as_mut().map_or(Ok(()), Values::start)?;
            receiver.release()?;
            self.held = false;
        }
        Ok(!self.held)
    }

    /// What was launched so far is the last to use the values.
    pub(crate) fn done(&self, gpu: &Gpu) -> Result<()> {
        record(&self.used, &gpu.compute)
    }
}

impl Outgoing {
    /// For values of the first type that travel as the second.
    pub(crate) fn new(gpu: &Gpu, elements: usize, [element, wire]: [Element; 2], route: Option<Route>) -> Result<Self> {
        let (ring, values) = route.map_or((None, None), |route| (Some(route.ring), route.values));
        let places = ring.map_or(Ok(Vec::new()), |ring| ring.arrays(elements, wire))?;
        let words = if ring.is_some() { 0 } else { (elements * wire.size()).div_ceil(4) as u32 };
        let wire = (element != wire).then(|| gpu.array(elements, wire)).transpose()?;
        let (made, arrived, locked) = (gpu.event()?, gpu.event()?, locked(gpu, words)?);
        Ok(Outgoing { values, wire, places, locked, sent: 0, words, made, arrived, unsent: None })
    }

    /// Copies `values`, as the compute stream has made them or will, to where the receiver finds them. They may be written
    /// again when the message is off.
    pub(crate) fn copy(&mut self, gpu: &Gpu, values: &Array, sender: &mut Sender, header: &Header) -> Result<()> {
        let values = match &self.wire {
            Some(wire) => cast(gpu, values, wire).map(|()| wire)?,
            None => values,
        };
        // Once there is a buffer, the place that is next is free too: see `LinkSpec::in_flight`.
        let slot = sender.slot()?;
        if let Some(values) = &mut self.values {
            values.wait()?;
        }
        record(&self.made, &gpu.compute)?;
        wait(&gpu.outgoing, &self.made)?;
        if self.places.is_empty() {
            let slot = match &mut self.locked {
                Some(locked) => locked.words(),
                None => {
                    let slot = slot.get_mut(..self.words as usize).unwrap_or_default();
                    gpu.pin(slot);
                    slot
                }
            };
            if size_of_val(slot) < values.bytes() {
                return Err(Error::Run("a message is too small for its array".into()));
            }
            // SAFETY: as long as the values; the link's buffer is not used before `start` has seen the copy's end, and
            // outlives it because a worker's registers are dropped before its links, and wait for the streams.
            unsafe {
                let bytes = std::slice::from_raw_parts_mut(slot.as_mut_ptr().cast::<u8>(), values.bytes());
                cudarc::driver::result::memcpy_dtoh_async(bytes, values.pointer(), gpu.outgoing.cu_stream())
            }
        } else {
            let place = &self.places[self.sent % self.places.len()];
            if place.bytes() != values.bytes() {
                return Err(Error::Run("a place for a message has another size than its array".into()));
            }
            self.sent += 1;
            // SAFETY: both have these bytes; nobody reads the place before the message tells, nor writes it before that was
            // given back.
            unsafe {
                let (to, from, bytes) = (place.pointer(), values.pointer(), values.bytes());
                cudarc::driver::result::memcpy_dtod_async(to, from, bytes, gpu.outgoing.cu_stream())
            }
        }
        .map_err(|e| failed("copying a message from the GPU", &e))?;
        record(&self.arrived, &gpu.outgoing)?;
        self.unsent = Some(header.carrying(self.words));
        Ok(())
    }

    /// Starts the message if its copy has arrived; whether it is off.
    pub(crate) fn start(&mut self, sender: &mut Sender) -> Result<bool> {
        let Some(header) = self.unsent else { return Ok(true) };
        if !self.arrived.try_is_complete().map_err(|e| failed("asking for a copy", &e))? {
            return Ok(false);
        }
        self.unsent = None;
        if let Some(locked) = &mut self.locked {
            let words = locked.words();
            let slot = sender.slot()?.get_mut(..words.len());
            slot.ok_or_else(|| Error::Run("a message is too small for its array".into()))?.copy_from_slice(words);
        }
        self.values.as_mut().map_or(Ok(()), Values::start)?;
        sender.start(&header).map(|()| true)
    }
}

/// Locked memory for staged messages of so many words, if they are small.
fn locked(gpu: &Gpu, words: u32) -> Result<Option<Locked>> {
    let words = words as usize;
    (words > 0 && 4 * words < PINNED_FROM).then(|| gpu.locked(words)).transpose()
}

/// Copies values into an array of the other type, or of the same.
pub(super) fn cast(gpu: &Gpu, from: &Array, to: &Array) -> Result<()> {
    match (from.element(), to.element()) {
        (Element::F32, _) => ops::from_f32(gpu, from, to),
        (_, Element::F32) => ops::to_f32(gpu, from, to),
        _ => gpu.copy(from, to),
    }
}

fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).map_err(|e| failed("recording an event", &e))
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).map_err(|e| failed("ordering streams", &e))
}
