//! Sums of gradients on their way to where they are averaged and back, piece by piece: copies on streams of their own, beside the passes.
//!
//! ```text
//! compute:  backward, last layers │ … │ first layers ─────────────────────── update
//! down:                           └▶ last piece ─▶ … ─▶ first piece
//! up:                                          (averaged) last piece ─▶ … ─▶ first piece
//! ```
//!
//! They are averaged in host memory; or, where a replica's GPU writes into this one's memory, on this one, by the stream *up*.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::ports::{record, wait};
use crate::backend::cuda::event::Event;
use crate::backend::cuda::flat::Flat;
use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::host_memory::Locked;
use crate::backend::cuda::module::Module;
use crate::backend::cuda::{Array, Gpu};
use crate::backend::slots::Done;
use crate::backend::stage::{Lends, Lent};
use crate::{Error, Result};

/// Where sums of gradients are averaged.
enum Memory {
    Host(Locked),
    Gpu(Flat),
}

/// What sums of gradients are lent out with.
pub(super) struct Lending {
    /// Words of a piece.
    piece: usize,
    /// Each sum with the word at which it begins.
    sums: Vec<(usize, Array)>,
    words: usize,
    /// Absent while it is lent out.
    memory: Option<Memory>,
    down: Arc<CudaStream>,
    up: Arc<CudaStream>,
    /// What is copied next is computed; the backward pass is through.
    computed: CudaEvent,
    through: Arc<CudaEvent>,
    /// By piece.
    arrived: Vec<Arc<CudaEvent>>,
    back: CudaEvent,
    /// The first piece on its way to the host, or there; with those behind it.
    begun: usize,
}

impl Lending {
    /// For the sums of gradients of `module`. Not for use in a tick.
    pub(super) fn new(gpu: &Arc<Gpu>, module: &mut Module, Lends { piece, on_gpu }: Lends) -> Result<Self> {
        let (mut sums, mut words) = (Vec::new(), 0);
        module.visit(&mut |p| {
            if let Some(grad) = &p.grad {
                sums.push((words, grad.clone()));
                words += grad.len();
            }
            Ok(())
        })?;
        let pieces = words.div_ceil(piece);
        let event = || gpu.event().map(Arc::new);
        let (down, up) = (gpu.stream()?, gpu.stream()?);
        let arrived: Vec<Arc<CudaEvent>> = (0..pieces).map(|_| event()).collect::<Result<_>>()?;
        let memory = match on_gpu {
            None => Memory::Host(gpu.locked(words)?),
            Some(at_once) => Memory::Gpu(Flat::new(gpu, [&down, &up], (words, piece), &arrived, at_once)?),
        };
        Ok(Lending {
            piece,
            sums,
            words,
            memory: Some(memory),
            down,
            up,
            computed: gpu.event()?,
            through: event()?,
            arrived,
            back: gpu.event()?,
            begun: pieces,
        })
    }

    /// Begins to copy the pieces that begin at word `from` or behind it, as they are behind all that was launched.
    pub(super) fn begin(&mut self, gpu: &Gpu, from: usize) -> Result<()> {
        let first = from.div_ceil(self.piece);
        if first >= self.begun {
            return Ok(());
        }
        let Some(memory) = &mut self.memory else { return Err(Error::Run("gradients are lent out already".into())) };
        record(&self.computed, &gpu.compute)?;
        wait(&self.down, &self.computed)?;
        for piece in (first..self.begun).rev() {
            for (array, place, words) in
                parts(&self.sums, piece * self.piece..((piece + 1) * self.piece).min(self.words))
            {
                let (from, stream) = (array.pointer() + 4 * place as u64, self.down.cu_stream());
                // SAFETY: these are words of the array, and as many of the memory, which nobody looks at before `arrived`.
                match memory {
                    Memory::Host(locked) => unsafe { result::memcpy_dtoh_async(locked.part(words), from, stream) },
                    Memory::Gpu(flat) => unsafe {
                        result::memcpy_dtod_async(flat.at(words.start), from, 4 * words.len(), stream)
                    },
                }
                .map_err(|e| failed("copying gradients to where they are averaged", &e))?;
            }
            record(&self.arrived[piece], &self.down)?;
        }
        self.begun = first;
        Ok(())
    }

    /// Lends the memory out.
    pub(super) fn lend(&mut self, gpu: &Gpu) -> Result<Lent> {
        self.begin(gpu, 0)?;
        record(&self.through, &gpu.compute)?;
        let Some(memory) = self.memory.take() else { return Err(Error::Run("gradients are lent out already".into())) };
        let at = |event: &Arc<CudaEvent>| Done::At(Event::new(event));
        Ok(match memory {
            Memory::Host(locked) => {
                Lent::arriving(locked, self.piece, self.arrived.iter().map(at).collect(), at(&self.through))
            }
            Memory::Gpu(mut flat) => {
                flat.begin_anew();
                Lent::staying(flat, at(&self.through))
            }
        })
    }

    /// Begins to copy `words` of what is lent out back.
    pub(super) fn put(&mut self, lent: &mut Lent, words: &Range<usize>) -> Result<()> {
        for (array, place, words) in parts(&self.sums, words.clone()) {
            let (to, stream) = (array.pointer() + 4 * place as u64, self.up.cu_stream());
            // SAFETY: as many words of the memory, which stays what it is until `back`, and of the array, which was read.
            match lent.flat() {
                Some(flat) => unsafe { result::memcpy_dtod_async(to, flat.at(words.start), 4 * words.len(), stream) },
                None => unsafe { result::memcpy_htod_async(to, lent.at(&words), stream) },
            }
            .map_err(|e| failed("copying gradients back", &e))?;
        }
        Ok(())
    }

    /// Takes the memory back: what is launched from now on finds the sums as they were put.
    pub(super) fn take_back(&mut self, gpu: &Gpu, mut lent: Lent) -> Result<()> {
        self.memory = match lent.flat() {
            Some(_) => lent.into_flat().map(Memory::Gpu),
            None => lent.into_locked().map(Memory::Host),
        };
        self.begun = self.arrived.len();
        record(&self.back, &self.up)?;
        wait(&gpu.compute, &self.back)
    }
}

/// The pieces of arrays that make up `words`: where each begins in its array, and its words.
fn parts(sums: &[(usize, Array)], words: Range<usize>) -> impl Iterator<Item = (&Array, usize, Range<usize>)> {
    let first = sums.partition_point(|(from, array)| from + array.len() <= words.start);
    sums[first..].iter().map_while(move |(from, array)| {
        let own = words.start.max(*from)..words.end.min(from + array.len());
        (own.start < own.end).then(|| (array, own.start - from, own))
    })
}
