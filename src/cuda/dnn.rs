//! Convolutions by cuDNN.

use std::sync::Arc;

use cudarc::cudnn::{result, sys};
use cudarc::driver::CudaStream;

use crate::{Error, Result};

/// A handle of cuDNN on one stream.
pub struct Dnn {
    handle: sys::cudnnHandle_t,
    /// Whether products of 32-bit floats may be rounded to TF32.
    pub tf32: bool,
}

// SAFETY: the handle may be used by any thread, one at a time; a worker's layers are all on its thread.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Dnn {
    /// A handle that works on `stream`.
    ///
    /// # Errors
    /// [`Error::Run`] if cuDNN does not start.
    pub fn new(stream: &Arc<CudaStream>, tf32: bool) -> Result<Self> {
        let failed = |e: cudarc::cudnn::CudnnError| Error::Run(format!("cuDNN does not start: {e:?}"));
        let handle = result::create_handle().map_err(failed)?;
        // SAFETY: both are alive; the stream outlives the handle, which its Gpu drops first.
        unsafe { result::set_stream(handle, stream.cu_stream() as sys::cudaStream_t) }.map_err(failed)?;
        Ok(Dnn { handle, tf32 })
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        // SAFETY: made above, and not used any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
