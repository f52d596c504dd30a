//! An array on a GPU that travels in messages, without a module: for measuring links.

use std::sync::Arc;

use super::gpu::{Array, Element, Gpu, failed};
use super::peak;
use super::stage::{InPort, OutPort};
use crate::Result;
use crate::backend::slots::{Done, Slot, SlotMut};

/// The array, and what copies it into messages and out of them.
pub struct Probe {
    array: Array,
    out: OutPort,
    inward: InPort,
    gpu: Arc<Gpu>,
}

impl Probe {
    /// An array of `words` 32-bit floats on GPU number `ordinal`.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn new(ordinal: usize, words: usize) -> Result<Probe> {
        let gpu = Gpu::open(ordinal, false)?;
        Ok(Probe {
            array: gpu.zeros(words, Element::F32)?,
            out: OutPort::new(&gpu, words, [Element::F32; 2])?,
            inward: InPort::new(&gpu, words, Element::F32)?,
            gpu,
        })
    }

    /// Makes the GPU the calling thread's.
    ///
    /// # Errors
    /// As [`Gpu::bind`].
    pub fn bind(&self) -> Result<()> {
        self.gpu.bind()
    }

    /// Copies the array into a message.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if CUDA fails.
    pub fn write(&mut self, message: SlotMut<'_>) -> Result<Done> {
        self.out.write(&self.gpu, &self.array, message)
    }

    /// Takes a message's values to the GPU.
    ///
    /// # Errors
    /// As [`Probe::write`].
    pub fn read(&mut self, message: Slot<'_>) -> Result<Done> {
        self.inward.read(&self.gpu, message, |_| Ok(()))
    }

    /// Seconds of the copies alone, to page-locked host memory and from it, by the GPU's clock.
    ///
    /// # Errors
    /// As [`Probe::write`].
    pub fn host_copies(&mut self) -> Result<[f64; 2]> {
        let mut host = self.gpu.locked(self.array.len())?;
        let (stream, pointer) = (self.gpu.compute.cu_stream(), self.array.pointer());
        let to_host = peak::fastest(&self.gpu, || {
            // SAFETY: as long as the array; both live until the wait below.
            unsafe { cudarc::driver::result::memcpy_dtoh_async(host.words(), pointer, stream) }
                .map_err(|e| failed("copying from the GPU", &e))
        });
        let to_device = peak::fastest(&self.gpu, || {
            // SAFETY: as above.
            unsafe { cudarc::driver::result::memcpy_htod_async(pointer, host.words(), stream) }
                .map_err(|e| failed("copying to the GPU", &e))
        });
        self.gpu.synchronize()?;
        Ok([to_host?, to_device?])
    }
}
