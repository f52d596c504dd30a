//! Sums of gradients on their way to the host and back, piece by piece: copies on streams of their own, beside the passes.
//!
//! ```text
//! compute:  backward, last layers │ … │ first layers ─────────────────────── update
//! down:                           └▶ last piece ─▶ … ─▶ first piece
//! up:                                          (averaged) last piece ─▶ … ─▶ first piece
//! ```

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::ports::{record, wait};
use crate::backend::cuda::event::Event;
use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::host_memory::Locked;
use crate::backend::cuda::module::Module;
use crate::backend::cuda::{Array, Gpu};
use crate::backend::slots::Done;
use crate::backend::stage::Lent;
use crate::{Error, Result};

/// What sums of gradients are lent out with.
pub(super) struct Lending {
    /// Words of a piece.
    piece: usize,
    /// Each sum with the word at which it begins.
    sums: Vec<(usize, Array)>,
    words: usize,
    /// Absent while it is lent out.
    memory: Option<Locked>,
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
    /// For the sums of gradients of `module`, in pieces of `piece` words. Not for use in a tick.
    pub(super) fn new(gpu: &Gpu, module: &mut Module, piece: usize) -> Result<Self> {
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
        Ok(Lending {
            piece,
            sums,
            words,
            memory: Some(gpu.locked(words)?),
            down: gpu.stream()?,
            up: gpu.stream()?,
            computed: gpu.event()?,
            through: event()?,
            arrived: (0..pieces).map(|_| event()).collect::<Result<_>>()?,
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
                let values = memory.part(words);
                // SAFETY: these are words of the array, and as many of locked memory, which nobody looks at before `arrived`.
                unsafe { result::memcpy_dtoh_async(values, array.pointer() + 4 * place as u64, self.down.cu_stream()) }
                    .map_err(|e| failed("copying gradients from the GPU", &e))?;
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
        Ok(Lent::arriving(memory, self.piece, self.arrived.iter().map(at).collect(), at(&self.through)))
    }

    /// Begins to copy `words` of what is lent out back.
    pub(super) fn put(&mut self, lent: &mut Lent, words: &Range<usize>) -> Result<()> {
        for (array, place, words) in parts(&self.sums, words.clone()) {
            let values = lent.at(&words);
            // SAFETY: as many words of locked memory, which stays what it is until `back`, and of the array, which was read.
            unsafe { result::memcpy_htod_async(array.pointer() + 4 * place as u64, values, self.up.cu_stream()) }
                .map_err(|e| failed("copying gradients to the GPU", &e))?;
        }
        Ok(())
    }

    /// Takes the memory back: what is launched from now on finds the sums as they were put.
    pub(super) fn take_back(&mut self, gpu: &Gpu, lent: Lent) -> Result<()> {
        self.memory = lent.into_locked();
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
