//! A worker's hold on its GPU: context, streams, memory, compiled kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, sys};

use super::dnn::Dnn;
use super::host_memory::Pinned;
use super::shared::Shared;
use super::{capture, kernels, libraries};
use crate::{Error, Result};

/// The type of elements of activations in device memory. Parameters, gradients and statistics are always `F32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// The upper halves of 32-bit floats.
    Bf16,
}

impl Element {
    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }
}

/// An array in device memory, made once; its contents are whatever was there before. Clones and views share the memory.
#[derive(Clone, Debug)]
pub struct Array {
    _memory: Memory,
    pointer: u64,
    elements: usize,
    element: Element,
}

/// What an array is part of, held for its drop.
#[derive(Clone, Debug)]
enum Memory {
    /// The driver's pool; freed behind the work in the compute stream.
    Pool { _held: Arc<CudaSlice<u8>> },
    /// Memory that other processes may write into.
    Shared { _held: Arc<Shared> },
}

impl Array {
    /// `elements` from byte `offset` on of memory that may be shared with other processes.
    ///
    /// # Errors
    /// [`Error::Run`] if it ends before.
    pub fn within(memory: &Arc<Shared>, offset: usize, elements: usize, element: Element) -> Result<Array> {
        if offset + elements * element.size() > memory.bytes() || !offset.is_multiple_of(element.size()) {
            let bytes = memory.bytes();
            return Err(Error::Run(format!("{elements} elements from byte {offset} on of {bytes} shared bytes")));
        }
        let pointer = memory.pointer() + offset as u64;
        Ok(Array { _memory: Memory::Shared { _held: memory.clone() }, pointer, elements, element })
    }

    /// Its address on the device, as kernels take it.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// The type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.elements * self.element.size()
    }

    /// Its first `elements` elements.
    ///
    /// # Errors
    /// [`Error::Run`] if it has fewer.
    pub fn first(&self, elements: usize) -> Result<Array> {
        if elements > self.elements {
            return Err(Error::Run(format!("{elements} elements of an array of {}", self.elements)));
        }
        Ok(Array { elements, ..self.clone() })
    }
}

/// One worker's GPU. Workers of one process share the context and have streams of their own.
pub struct Gpu {
    // Dropped first: it works on the compute stream.
    pub(super) dnn: Dnn,
    pub(super) context: Arc<CudaContext>,
    /// Forward and backward passes and updates, in order.
    pub compute: Arc<CudaStream>,
    /// Copies from the host.
    pub incoming: Arc<CudaStream>,
    /// Copies to the host.
    pub outgoing: Arc<CudaStream>,
    functions: HashMap<(&'static str, Element), CudaFunction>,
    pub(super) pinned: Mutex<Vec<Pinned>>,
    allocated: Mutex<usize>,
}

impl Gpu {
    /// Opens GPU number `ordinal` of those this process sees, with products in TF32 if `tf32`.
    ///
    /// # Errors
    /// [`Error::Input`] where a library of CUDA is missing or there is no such GPU, with what to do.
    pub fn open(ordinal: usize, tf32: bool) -> Result<Arc<Gpu>> {
        check_ordinal(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", &e))?;
        // Order between streams is ours to say, with events of our own.
        // SAFETY: no array of this program relies on cudarc's own events.
        unsafe { context.disable_event_tracking() };
        let stream = || new_stream(&context);
        let (compute, incoming, outgoing) = (stream()?, stream()?, stream()?);
        let functions = kernels::load(&context)?;
        let dnn = Dnn::new(&compute, tf32)?;
        let (pinned, allocated) = (Mutex::default(), Mutex::default());
        Ok(Arc::new(Gpu { dnn, context, compute, incoming, outgoing, functions, pinned, allocated }))
    }

    /// Whether products of 32-bit floats are in TF32.
    pub(super) fn tf32(&self) -> bool {
        self.dnn.tf32()
    }

    /// Its name, for a log.
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_else(|_| "a GPU".into())
    }

    /// Bytes of its memory that are free, and of all of it.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(|e| failed("asking for the free memory", &e))
    }

    /// Bytes that this worker's arrays take.
    pub fn allocated(&self) -> usize {
        *self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this GPU the calling thread's: once a thread, before anything else.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("binding the GPU to a thread", &e))
    }

    /// A new array. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if the GPU's memory does not suffice, with what is free.
    pub fn array(&self, elements: usize, element: Element) -> Result<Array> {
        let bytes = elements * element.size();
        // SAFETY: what is read of an array was written before: arrays are filled by kernels, copies or `zero`.
        let memory = unsafe { self.compute.alloc::<u8>(bytes.max(1)) }.map_err(|e| self.out_of_memory(bytes, &e))?;
        *self.allocated.lock().unwrap_or_else(PoisonError::into_inner) += bytes;
        let pointer = memory.device_ptr(&self.compute).0;
        Ok(Array { _memory: Memory::Pool { _held: Arc::new(memory) }, pointer, elements, element })
    }

    /// A new array of zeros. Not for use in a tick.
    ///
    /// # Errors
    /// As [`Gpu::array`].
    pub fn zeros(&self, elements: usize, element: Element) -> Result<Array> {
        let array = self.array(elements, element)?;
        self.zero(&array)?;
        Ok(array)
    }

    /// A new array of 32-bit floats with `values`. Not for use in a tick.
    ///
    /// # Errors
    /// As [`Gpu::array`].
    pub fn upload(&self, values: &[f32]) -> Result<Array> {
        let array = self.array(values.len(), Element::F32)?;
        self.write(&array, values)?;
        Ok(array)
    }

    /// Writes `values` into an array of 32-bit floats and waits for it. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if lengths differ or the copy fails.
    pub fn write(&self, array: &Array, values: &[f32]) -> Result<()> {
        same_length(array, values.len())?;
        // SAFETY: the array is as long as the values, which outlive the wait below.
        unsafe {
            cudarc::driver::result::memcpy_htod_async(array.pointer, values, self.compute.cu_stream())
                .map_err(|e| failed("copying to the GPU", &e))?;
        }
        self.synchronize()
    }

    /// The values of an array of 32-bit floats, when all work before is done. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if the copy, or work before it, failed.
    pub fn download(&self, array: &Array) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; array.len()];
        same_length(array, values.len())?;
        // SAFETY: as long as the array; the wait below comes before any use.
        unsafe {
            cudarc::driver::result::memcpy_dtoh_async(&mut values, array.pointer, self.compute.cu_stream())
                .map_err(|e| failed("copying from the GPU", &e))?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// Sets an array to zeros, behind the work in the compute stream.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn zero(&self, array: &Array) -> Result<()> {
        // SAFETY: the array's own bytes.
        unsafe { cudarc::driver::result::memset_d8_async(array.pointer, 0, array.bytes(), self.compute.cu_stream()) }
            .map_err(|e| failed("clearing an array", &e))
    }

    /// Copies an array into another of the same size, behind the work in the compute stream.
    ///
    /// # Errors
    /// [`Error::Run`] if sizes differ or the driver refuses.
    pub fn copy(&self, from: &Array, to: &Array) -> Result<()> {
        if from.bytes() != to.bytes() {
            return Err(Error::Run(format!("copying {} bytes into {}", from.bytes(), to.bytes())));
        }
        // SAFETY: both arrays have these bytes.
        unsafe {
            cudarc::driver::result::memcpy_dtod_async(to.pointer, from.pointer, from.bytes(), self.compute.cu_stream())
        }
        .map_err(|e| failed("copying within the GPU", &e))
    }

    /// Waits for all work in the compute stream. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] with the driver's word for whatever failed before.
    pub fn synchronize(&self) -> Result<()> {
        self.compute.synchronize().map_err(|e| failed("waiting for the GPU", &e))
    }

    /// A kernel by its name and the type of its activations.
    ///
    /// # Errors
    /// [`Error::Run`] if there is none.
    pub(super) fn function(&self, name: &'static str, element: Element) -> Result<&CudaFunction> {
        self.functions
            .get(&(name, element))
            .ok_or_else(|| Error::Run(format!("there is no kernel {name} for {element:?}")))
    }

    /// A stream beside the others.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn stream(&self) -> Result<Arc<CudaStream>> {
        new_stream(&self.context)
    }

    /// An event that can be recorded and waited for, without a clock.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn event(&self) -> Result<CudaEvent> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING;
        self.context.new_event(Some(flags)).map_err(|e| failed("making an event", &e))
    }

    /// An event that tells the time at which it was recorded, for measuring.
    ///
    /// # Errors
    /// [`Error::Run`] if the driver refuses.
    pub fn clock(&self) -> Result<CudaEvent> {
        let flags = CUevent_flags::CU_EVENT_DEFAULT;
        self.context.new_event(Some(flags)).map_err(|e| failed("making an event", &e))
    }

    fn out_of_memory(&self, bytes: usize, e: &DriverError) -> Error {
        let free = self.memory().map_or(0, |(free, _)| free);
        Error::Run(format!(
            "{:.1} MiB of GPU memory are needed and {:.1} are free ({e}): use a smaller data.batch, more modules, or \
             fewer ranks a GPU",
            bytes as f64 / f64::from(1 << 20),
            free as f64 / f64::from(1 << 20)
        ))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        let _alone = capture::alone();
        // Of all workers' streams: one may still copy from a buffer that this one locked.
        let _ = self.context.synchronize();
        for piece in self.pinned.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // SAFETY: everything was waited for.
            unsafe { piece.undo() };
        }
    }
}

/// Refuses a GPU that this process does not see.
pub(super) fn check_ordinal(ordinal: usize) -> Result<()> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(Error::input(format!(
            "GPU {ordinal} was asked for and this process sees {count}: ask for more (Slurm: --gpus-per-node), or start \
             fewer ranks a node"
        )));
    }
    Ok(())
}

/// How many GPUs this process sees.
///
/// # Errors
/// [`Error::Input`] where CUDA's driver is missing or does not start.
pub fn device_count() -> Result<usize> {
    libraries::check()?;
    let found = cudarc::driver::result::init().and_then(|()| CudaContext::device_count());
    match found {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(e) if e.0 == sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(e) => Err(Error::input(format!("CUDA's driver does not start ({e}): see nvidia-smi"))),
    }
}

/// The name of GPU number `ordinal`, and cuDNN's version.
///
/// # Errors
/// As [`device_count`]; [`Error::Run`] if the driver does not say.
pub fn describe(ordinal: usize) -> Result<(String, usize)> {
    libraries::check()?;
    let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", &e))?;
    let name = context.name().map_err(|e| failed("asking for the GPU's name", &e))?;
    Ok((name, cudarc::cudnn::result::get_version()))
}

/// Major and minor compute capability.
pub(super) fn capability(context: &CudaContext) -> Result<(i32, i32)> {
    let ask = |what| context.attribute(what).map_err(|e| failed("asking for the compute capability", &e));
    Ok((
        ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

fn new_stream(context: &Arc<CudaContext>) -> Result<Arc<CudaStream>> {
    context.new_stream().map_err(|e| failed("making a stream", &e))
}

fn same_length(array: &Array, values: usize) -> Result<()> {
    if array.len() != values || array.element() != Element::F32 {
        return Err(Error::Run(format!(
            "{values} floats for an array of {} elements of {:?}",
            array.len(),
            array.element()
        )));
    }
    Ok(())
}

/// The error of a call to the driver.
pub(crate) fn failed(doing: &str, e: &DriverError) -> Error {
    Error::Run(format!("{doing} failed: {e}"))
}
