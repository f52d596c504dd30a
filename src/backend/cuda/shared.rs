//! Device memory that other processes of the node can write into, and copies that are waited for.
//!
//! The driver shares memory of `cuMemAlloc` only, as a whole allocation, by a handle of 64 bytes. Whoever opened a handle has
//! to close it before the owner frees the memory.

use std::cell::RefCell;
use std::ffi::c_char;
use std::sync::Arc;

use cudarc::driver::sys::{CUipcMem_flags, CUipcMemHandle};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::capture;
use super::gpu::{Array, Element, check_ordinal, failed};
use crate::{Error, Result};

/// Bytes of a handle.
pub const HANDLE: usize = 64;
/// Where arrays begin in shared memory, as in memory of the driver's.
const ALIGNMENT: usize = 256;
/// The driver shares whole blocks of this size: memory that has its own shows nothing else.
const BLOCK: usize = 2 << 20;

/// `bytes`, rounded up to where the next array may begin.
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// A piece of device memory, of this process's own or opened from another's. Freed or closed when dropped.
#[derive(Debug)]
pub struct Shared {
    context: Arc<CudaContext>,
    pointer: u64,
    bytes: usize,
    opened: bool,
}

impl Shared {
    /// Its address in this process.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What another process of this node opens it with.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn handle(&self) -> Result<[u8; HANDLE]> {
        let mut handle = CUipcMemHandle { reserved: [0; HANDLE] };
        // SAFETY: the start of an allocation of `cuMemAlloc`; the driver checks it.
        let code = unsafe { sys::cuIpcGetMemHandle(&mut handle, self.pointer) };
        code.result().map_err(|e| failed("sharing memory with other processes", &e))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        let _alone = capture::alone();
        // SAFETY: allocated or opened once; nobody holds an address in it any more.
        let done: std::result::Result<(), DriverError> = unsafe {
            match self.opened {
                true => sys::cuIpcCloseMemHandle(self.pointer).result(),
                false => result::free_sync(self.pointer),
            }
        };
        if let Err(e) = done {
            log::debug!("giving {} bytes of shared memory back: {e}", self.bytes);
        }
    }
}

/// A link's places for messages in the receiver's memory, used round and round.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Where they are, as this process sees it.
    pub memory: Arc<Shared>,
    /// Bytes before the first.
    pub offset: usize,
    /// Bytes from one to the next.
    pub stride: usize,
    /// How many there are ([`crate::comm::LinkSpec::in_flight`]).
    pub places: usize,
}

impl Ring {
    /// Memory for `places` messages of `bytes` each, of this process alone.
    ///
    /// # Errors
    /// As [`Port::allocate`].
    pub fn allocate(port: &Port, bytes: usize, places: usize) -> Result<Ring> {
        let stride = aligned(bytes);
        Ok(Ring { memory: port.allocate(places * stride, false)?, offset: 0, stride, places })
    }

    /// The address at which message number `n` goes.
    pub fn place(&self, n: usize) -> u64 {
        self.memory.pointer() + (self.offset + n % self.places * self.stride) as u64
    }

    /// The places, each as one end of the link uses it.
    pub fn places(&self) -> Vec<Place> {
        let place = |n| Place { memory: self.memory.clone(), offset: self.offset + n * self.stride };
        (0..self.places).map(place).collect()
    }
}

/// A message's place in device memory.
#[derive(Clone, Debug)]
pub struct Place {
    memory: Arc<Shared>,
    offset: usize,
}

impl Place {
    /// A place for `bytes` on GPU number `ordinal`, of this process alone.
    ///
    /// # Errors
    /// As [`Port::open`] and [`Port::allocate`].
    pub fn allocate(ordinal: usize, bytes: usize) -> Result<Place> {
        let place = Place { memory: Port::open(ordinal)?.allocate(bytes, false)?, offset: 0 };
        // SAFETY: as long as allocated.
        unsafe { result::memset_d8_sync(place.memory.pointer(), 0, bytes) }
            .map_err(|e| failed("clearing memory", &e))?;
        Ok(place)
    }

    /// Its first `elements`.
    ///
    /// # Errors
    /// As [`Array::within`].
    pub(super) fn array(&self, elements: usize, element: Element) -> Result<Array> {
        Array::within(&self.memory, self.offset, elements, element)
    }
}

/// A GPU without kernels: what it takes to share memory and to copy. Bound to the thread that opened it.
pub struct Port {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    pinned: RefCell<Vec<usize>>,
}

impl Port {
    /// GPU number `ordinal` of those this process sees.
    ///
    /// # Errors
    /// As [`super::Gpu::open`].
    pub fn open(ordinal: usize) -> Result<Port> {
        check_ordinal(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", &e))?;
        let stream = context.new_stream().map_err(|e| failed("making a stream", &e))?;
        Ok(Port { context, stream, pinned: RefCell::default() })
    }

    /// What makes the GPU another thread's too.
    pub fn binding(&self) -> impl Fn() + Send + Sync + 'static {
        let context = self.context.clone();
        move || {
            if let Err(e) = context.bind_to_thread() {
                log::warn!("binding the GPU to a thread: {e}");
            }
        }
    }

    /// Memory of `bytes`; for other processes too if `exported`.
    ///
    /// # Errors
    /// [`Error::Run`] if there is too little.
    pub fn allocate(&self, bytes: usize, exported: bool) -> Result<Arc<Shared>> {
        let bytes = if exported { bytes.max(1).next_multiple_of(BLOCK) } else { bytes.max(1) };
        // SAFETY: what is read of it was written before.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            Error::Run(format!("{bytes} bytes of GPU memory for messages: {e}; run.exchange = \"staged\" needs fewer"))
        })?;
        Ok(Arc::new(Shared { context: self.context.clone(), pointer, bytes, opened: false }))
    }

    /// Opens another process's memory of `bytes`.
    ///
    /// # Errors
    /// [`Error::Run`] where the driver cannot: the GPU has no access to the other, or does not see it.
    pub fn import(&self, handle: &[u8; HANDLE], bytes: usize) -> Result<Arc<Shared>> {
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut pointer = 0;
        // SAFETY: the driver checks the handle.
        let code = unsafe { sys::cuIpcOpenMemHandle_v2(&mut pointer, handle, flags) };
        code.result().map_err(|e| failed("opening another process's GPU memory", &e))?;
        Ok(Arc::new(Shared { context: self.context.clone(), pointer, bytes, opened: true }))
    }

    /// Locks host memory until [`Port::unpin`], where that is not refused; once a piece.
    pub fn pin(&self, memory: &[f32]) {
        let (start, bytes) = (memory.as_ptr() as usize, size_of_val(memory));
        let mut pinned = self.pinned.borrow_mut();
        if bytes > 0 && !pinned.contains(&start) {
            // SAFETY: the memory exists; registering changes none of it. A refusal is seen again when it is undone.
            let _ = unsafe { sys::cuMemHostRegister_v2(start as *mut _, bytes, 0) };
            pinned.push(start);
        }
    }

    /// Unlocks what was locked; before that memory goes.
    pub fn unpin(&self) {
        let _alone = capture::alone();
        for start in self.pinned.borrow_mut().drain(..) {
            // SAFETY: registered above, or this is refused too; all copies were waited for.
            let _ = unsafe { sys::cuMemHostUnregister(start as *mut _) };
        }
    }

    /// Copies between places in device memory and waits for it.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    ///
    /// # Safety
    /// Both places have `bytes`, and nothing else writes them.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        self.done(copied)
    }

    /// Copies host memory to the device and waits for it.
    ///
    /// # Errors
    /// As [`Port::copy`].
    ///
    /// # Safety
    /// As [`Port::copy`].
    pub unsafe fn write(&self, to: u64, from: &[f32]) -> Result<()> {
        // SAFETY: the caller's promise; waited for below.
        let copied = unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) };
        self.done(copied)
    }

    /// Copies device memory to the host and waits for it.
    ///
    /// # Errors
    /// As [`Port::copy`].
    ///
    /// # Safety
    /// As [`Port::copy`].
    pub unsafe fn read(&self, from: u64, to: &mut [f32]) -> Result<()> {
        // SAFETY: the caller's promise; waited for below.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
        self.done(copied)
    }

    fn done(&self, copied: std::result::Result<(), DriverError>) -> Result<()> {
        copied.and_then(|()| self.stream.synchronize()).map_err(|e| failed("copying a message", &e))
    }
}
