//! Sums of gradients in one piece of GPU memory, averaged over replicas there: copies and sums on a stream beside the passes.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::capture;
use super::event::Event;
use super::gpu::{Array, Element, Gpu, failed};
use super::ops;
use super::ops::SUMMANDS;
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::{Error, Result};

/// Sums of gradients, one parameter after another, as they come from the parameters' own arrays piece by piece, the last one first.
/// What is asked for is launched, in that order, behind the arrival of the words that it is about; nothing waits.
pub struct Flat {
    gpu: Arc<Gpu>,
    sums: Array,
    /// On which pieces come.
    incoming: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    /// Words of a piece.
    piece: usize,
    /// When each piece is there, by its last copy.
    arrived: Vec<Arc<CudaEvent>>,
    /// The first piece that the stream has waited for, with those behind it.
    awaited: usize,
    /// Where summands in host memory are copied to.
    landing: Array,
    /// Those that nobody asks for any more are recorded again.
    events: Vec<Arc<CudaEvent>>,
}

impl Flat {
    /// For `words` that come on the first of the streams, of which so many messages are read or written `at_once`; what is asked for is
    /// launched into the second one. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if the GPU's memory does not suffice.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        [incoming, stream]: [&Arc<CudaStream>; 2],
        (words, piece): (usize, usize),
        arrived: &[Arc<CudaEvent>],
        at_once: usize,
    ) -> Result<Self> {
        Ok(Flat {
            gpu: gpu.clone(),
            sums: gpu.array(words, Element::F32)?,
            incoming: incoming.clone(),
            stream: stream.clone(),
            piece,
            arrived: arrived.to_vec(),
            awaited: arrived.len(),
            landing: gpu.array(piece + SUMMANDS, Element::F32)?,
            events: (0..=at_once).map(|_| gpu.event().map(Arc::new)).collect::<Result<_>>()?,
        })
    }

    /// How many words it has.
    pub fn words(&self) -> usize {
        self.sums.len()
    }

    /// The address of a word.
    pub(super) fn at(&self, word: usize) -> u64 {
        self.sums.pointer() + 4 * word as u64
    }

    /// From now on the pieces are those of the next backward pass.
    pub(super) fn begin_anew(&mut self) {
        self.awaited = self.arrived.len();
    }

    /// Copies `words` into a message.
    ///
    /// # Errors
    /// [`Error::Run`] if they are too many, or the driver refuses.
    pub fn write(&mut self, words: Range<usize>, to: SlotMut<'_>) -> Result<Done> {
        let from = self.arrival_of(&words)?;
        match to {
            SlotMut::Host(to) => {
                // As a whole: a later message may be longer.
                self.gpu.pin(to);
                let to = to.get_mut(..words.len()).ok_or_else(too_small)?;
                // SAFETY: as many words of a message, which is not used before the copy is done and outlives it: a worker's stage is
                // dropped before its links, and waits for the streams.
                unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }
            }
            SlotMut::Device(place) => {
                let place = place.array(words.len(), Element::F32)?;
                // SAFETY: both have these bytes; nobody reads the place before the message tells, nor writes it before that was
                // given back.
                unsafe { result::memcpy_dtod_async(place.pointer(), from, place.bytes(), self.stream.cu_stream()) }
            }
        }
        .map_err(|e| failed("copying gradients into a message", &e))?;
        self.done()
    }

    /// Makes `words` the sum of `terms` in their order, times `scale`; the term that is none is what they are.
    ///
    /// # Errors
    /// As [`Flat::write`].
    pub fn sum(&mut self, words: Range<usize>, terms: &[Option<Slot<'_>>], scale: f32) -> Result<Done> {
        let own = self.arrival_of(&words)?;
        let mut summands = [0; SUMMANDS];
        let mut landed = 0;
        for (summand, term) in summands.iter_mut().zip(terms) {
            *summand = match term {
                None => own,
                Some(Slot::Device(place)) => place.array(words.len(), Element::F32)?.pointer(),
                Some(Slot::Host(values)) => {
                    if landed + words.len() > self.landing.len() {
                        return Err(too_small());
                    }
                    let to = self.landing.pointer() + 4 * landed as u64;
                    landed += words.len();
                    self.copy_from_host(values, words.len(), to)?;
                    to
                }
            };
        }
        ops::sum_in_order(&self.gpu, &self.stream, own, &summands[..terms.len().min(SUMMANDS)], scale, words.len())?;
        self.done()
    }

    /// Makes `words` what is in a message.
    ///
    /// # Errors
    /// As [`Flat::write`].
    pub fn read(&mut self, words: Range<usize>, from: Slot<'_>) -> Result<Done> {
        let to = self.arrival_of(&words)?;
        match from {
            Slot::Host(values) => self.copy_from_host(values, words.len(), to)?,
            Slot::Device(place) => {
                let place = place.array(words.len(), Element::F32)?;
                // SAFETY: both have these bytes; the place is not written before it is given back.
                unsafe { result::memcpy_dtod_async(to, place.pointer(), place.bytes(), self.stream.cu_stream()) }
                    .map_err(|e| failed("copying gradients out of a message", &e))?;
            }
        }
        self.done()
    }

    /// Copies the first `words` of a message in host memory.
    fn copy_from_host(&self, message: &[f32], words: usize, to: u64) -> Result<()> {
        // As a whole: a later message may be longer.
        self.gpu.pin(message);
        let values = message.get(..words).ok_or_else(too_small)?;
        // SAFETY: as many words of this GPU's; the message stays what it is until the copy is done.
        unsafe { result::memcpy_htod_async(to, values, self.stream.cu_stream()) }
            .map_err(|e| failed("copying gradients out of a message", &e))
    }

    /// The address of `words`; what is launched from now on finds them there.
    fn arrival_of(&mut self, words: &Range<usize>) -> Result<u64> {
        if words.end > self.words() {
            return Err(Error::Run(format!("words {words:?} of {}", self.words())));
        }
        let piece = words.start / self.piece;
        // Pieces behind came before.
        if let Some(arrived) = self.arrived.get(piece).filter(|_| piece < self.awaited) {
            self.stream.wait(arrived).map_err(|e| failed("waiting for gradients", &e))?;
            self.awaited = piece;
        }
        Ok(self.at(words.start))
    }

    /// The moment behind all that was launched so far.
    fn done(&mut self) -> Result<Done> {
        let free = self.events.iter().position(|event| Arc::strong_count(event) == 1);
        let event = match free {
            Some(n) => self.events[n].clone(),
            None => {
                self.events.push(Arc::new(self.gpu.event()?));
                self.events[self.events.len() - 1].clone()
            }
        };
        event.record(&self.stream).map_err(|e| failed("recording a copy", &e))?;
        Ok(Done::At(Event::new(&event)))
    }
}

impl Drop for Flat {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        let _alone = capture::alone();
        // Where a run fails copies may be under way, and arrays are given back behind the work of another stream.
        for stream in [&self.incoming, &self.stream] {
            let _ = stream.synchronize();
        }
    }
}

fn too_small() -> Error {
    Error::Run("a message of gradients is shorter than they are".into())
}
