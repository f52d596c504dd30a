//! Convolutions by cuDNN: NHWC activations, filters `[O, kH, kW, C/g]`, sums in 32-bit floats.
//!
//! Algorithms are chosen once a shape by cuDNN's heuristics, among the deterministic ones: the choice is the same on every
//! rank, so results do not depend on where a module runs. All convolutions of a worker share one workspace.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cudnn::{CudnnError, result, sys};
use cudarc::driver::CudaStream;

use super::capture;
use super::gpu::{Array, Element, Gpu};
use crate::backend::cpu::conv::Conv;
use crate::{Error, Result};

/// Algorithms that need more than this are passed over.
const LARGEST_WORKSPACE: usize = 1 << 30;
/// Algorithms cuDNN is asked for.
const ASKED: usize = 12;

/// A handle of cuDNN on one stream, and the workspace.
pub struct Dnn {
    handle: sys::cudnnHandle_t,
    tf32: bool,
    workspace: Mutex<Option<Array>>,
}

// SAFETY: the handle may be used by any thread, one at a time; a worker's layers are all on its thread.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Dnn {
    /// A handle that works on `stream`, with products of 32-bit floats in TF32 if `tf32`.
    ///
    /// # Errors
    /// [`Error::Run`] if cuDNN does not start.
    pub fn new(stream: &Arc<CudaStream>, tf32: bool) -> Result<Self> {
        let handle = result::create_handle().map_err(|e| failed("starting", &e))?;
        // SAFETY: both are alive; the Gpu that owns them drops this handle first.
        unsafe { result::set_stream(handle, stream.cu_stream() as sys::cudaStream_t) }
            .map_err(|e| failed("setting the stream", &e))?;
        Ok(Dnn { handle, tf32, workspace: Mutex::default() })
    }

    /// Whether products of 32-bit floats are in TF32.
    pub fn tf32(&self) -> bool {
        self.tf32
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        // Waits for the whole context.
        let _alone = capture::alone();
        // SAFETY: made above, and not used any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Makes the shared workspace at least this large. Before graphs are captured: they keep its address.
fn reserve(gpu: &Gpu, bytes: usize) -> Result<()> {
    let mut workspace = gpu.dnn.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    if workspace.as_ref().is_none_or(|w| w.bytes() < bytes) {
        gpu.synchronize()?;
        *workspace = Some(gpu.array(bytes.div_ceil(4), Element::F32)?);
    }
    Ok(())
}

fn workspace(gpu: &Gpu) -> (*mut c_void, usize) {
    let workspace = gpu.dnn.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    workspace.as_ref().map_or((null_mut(), 0), |w| (w.pointer() as *mut c_void, w.bytes()))
}

/// Owned descriptors of cuDNN.
macro_rules! descriptor {
    ($name:ident, $raw:ty, $create:path, $destroy:path) => {
        struct $name($raw);

        impl $name {
            fn new() -> Result<Self> {
                Ok(Self($create().map_err(|e| failed("making a descriptor", &e))?))
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by `new`, destroyed once.
                let _ = unsafe { $destroy(self.0) };
            }
        }

        // SAFETY: a descriptor belongs to no thread.
        unsafe impl Send for $name {}
    };
}

descriptor!(
    TensorDescriptor,
    sys::cudnnTensorDescriptor_t,
    result::create_tensor_descriptor,
    result::destroy_tensor_descriptor
);
descriptor!(
    FilterDescriptor,
    sys::cudnnFilterDescriptor_t,
    result::create_filter_descriptor,
    result::destroy_filter_descriptor
);
descriptor!(
    ConvolutionDescriptor,
    sys::cudnnConvolutionDescriptor_t,
    result::create_convolution_descriptor,
    result::destroy_convolution_descriptor
);

/// What cuDNN chose for one product.
struct Chosen<A> {
    algorithm: A,
    convolution: ConvolutionDescriptor,
    workspace: usize,
}

/// A convolution of one shape, `[B, H, W, C]` to `[B, H', W', O]`.
pub struct Convolution {
    x: TensorDescriptor,
    y: TensorDescriptor,
    w: FilterDescriptor,
    forward: Chosen<sys::cudnnConvolutionFwdAlgo_t>,
    data: Chosen<sys::cudnnConvolutionBwdDataAlgo_t>,
    filter: Chosen<sys::cudnnConvolutionBwdFilterAlgo_t>,
    /// Elements of x, w and y.
    sizes: [usize; 3],
}

impl Convolution {
    /// Chooses algorithms for inputs `[B, H, W, C]` of `element` and `out` output channels.
    ///
    /// # Errors
    /// [`Error::Input`] where the window does not fit, [`Error::Run`] where cuDNN has no way to compute it.
    pub fn new(gpu: &Gpu, conv: &Conv, input: [usize; 4], out: usize, element: Element) -> Result<Self> {
        let [b, h, width, c] = input;
        let [oh, ow] = conv.window.output(h, width)?;
        let [kh, kw] = conv.window.kernel;
        let (x, y, w) = (TensorDescriptor::new()?, TensorDescriptor::new()?, FilterDescriptor::new()?);
        let (kind, format) = (data_type(element), sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC);
        let filter = [out, c / conv.groups, kh, kw];
        // SAFETY: the descriptors are alive.
        unsafe {
            result::set_tensor4d_descriptor(x.0, format, kind, ints([b, c, h, width])?)
                .and_then(|()| result::set_tensor4d_descriptor(y.0, format, kind, ints_of([b, out, oh, ow])))
                .and_then(|()| result::set_filter4d_descriptor(w.0, kind, format, ints_of(filter)))
                .map_err(|e| failed("describing a convolution", &e))?;
        }
        let handle = gpu.dnn.handle;
        let exact = element == Element::F32 && !gpu.dnn.tf32;
        let convolution = || describe(conv, element, gpu.dnn.tf32);
        // SAFETY: all descriptors are alive, and the arrays as long as `ask` says.
        let forward = choose(convolution()?, "forward", exact, |d, n, found, perf| unsafe {
            result::get_convolution_forward_algorithm(handle, x.0, w.0, d, y.0, n, found, perf)
        })?;
        // SAFETY: as above.
        let data = choose(convolution()?, "data gradient", exact, |d, n, found, perf| unsafe {
            result::get_convolution_backward_data_algorithm(handle, w.0, y.0, d, x.0, n, found, perf)
        })?;
        // SAFETY: as above.
        let filter_gradient = choose(convolution()?, "filter gradient", exact, |d, n, found, perf| unsafe {
            result::get_convolution_backward_filter_algorithm(handle, x.0, y.0, d, w.0, n, found, perf)
        })?;
        reserve(gpu, forward.workspace.max(data.workspace).max(filter_gradient.workspace))?;
        let sizes = [b * h * width * c, filter.iter().product(), b * oh * ow * out];
        Ok(Convolution { x, y, w, forward, data, filter: filter_gradient, sizes })
    }

    /// `y = x * w`.
    ///
    /// # Errors
    /// [`Error::Run`] on sizes that differ from those it was made for, or if cuDNN fails.
    pub fn forward(&self, gpu: &Gpu, x: &Array, w: &Array, y: &Array) -> Result<()> {
        self.check([x, w, y])?;
        let (alpha, beta) = (&1.0f32 as *const f32, &0.0f32 as *const f32);
        let (space, bytes) = workspace(gpu);
        // SAFETY: arrays and workspace have the sizes that the descriptors and the algorithm ask for.
        unsafe {
            result::convolution_forward(
                gpu.dnn.handle,
                alpha.cast(),
                self.x.0,
                x.pointer() as *const c_void,
                self.w.0,
                w.pointer() as *const c_void,
                self.forward.convolution.0,
                self.forward.algorithm,
                space,
                bytes,
                beta.cast(),
                self.y.0,
                y.pointer() as *mut c_void,
            )
        }
        .map_err(|e| failed("a convolution", &e))
    }

    /// The input's cotangent, `gx`.
    ///
    /// # Errors
    /// As [`Convolution::forward`].
    pub fn backward_data(&self, gpu: &Gpu, w: &Array, gy: &Array, gx: &Array) -> Result<()> {
        self.check([gx, w, gy])?;
        let (alpha, beta) = (&1.0f32 as *const f32, &0.0f32 as *const f32);
        let (space, bytes) = workspace(gpu);
        // SAFETY: as in `forward`.
        unsafe {
            result::convolution_backward_data(
                gpu.dnn.handle,
                alpha.cast(),
                self.w.0,
                w.pointer() as *const c_void,
                self.y.0,
                gy.pointer() as *const c_void,
                self.data.convolution.0,
                self.data.algorithm,
                space,
                bytes,
                beta.cast(),
                self.x.0,
                gx.pointer() as *mut c_void,
            )
        }
        .map_err(|e| failed("a convolution's data gradient", &e))
    }

    /// The filter's gradient into `gw`, of the activations' type: in its place, or added to it.
    ///
    /// # Errors
    /// As [`Convolution::forward`].
    pub fn backward_filter(&self, gpu: &Gpu, x: &Array, gy: &Array, gw: &Array, add: bool) -> Result<()> {
        self.check([x, gw, gy])?;
        let (alpha, beta) = (&1.0f32 as *const f32, &f32::from(u8::from(add)) as *const f32);
        let (space, bytes) = workspace(gpu);
        // SAFETY: as in `forward`.
        unsafe {
            result::convolution_backward_filter(
                gpu.dnn.handle,
                alpha.cast(),
                self.x.0,
                x.pointer() as *const c_void,
                self.y.0,
                gy.pointer() as *const c_void,
                self.filter.convolution.0,
                self.filter.algorithm,
                space,
                bytes,
                beta.cast(),
                self.w.0,
                gw.pointer() as *mut c_void,
            )
        }
        .map_err(|e| failed("a convolution's filter gradient", &e))
    }

    fn check(&self, arrays: [&Array; 3]) -> Result<()> {
        let found = arrays.map(Array::len);
        if found != self.sizes {
            return Err(Error::Run(format!(
                "a convolution's input, filter and output have {found:?} elements, not {:?}",
                self.sizes
            )));
        }
        Ok(())
    }
}

fn data_type(element: Element) -> sys::cudnnDataType_t {
    match element {
        Element::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
        Element::Bf16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
    }
}

fn describe(conv: &Conv, element: Element, tf32: bool) -> Result<ConvolutionDescriptor> {
    let descriptor = ConvolutionDescriptor::new()?;
    let ([ph, pw], [sh, sw]) = (conv.window.padding, conv.window.stride);
    let [ph, pw, sh, sw] = ints([ph, pw, sh, sw])?;
    let (mode, float) = (sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION, sys::cudnnDataType_t::CUDNN_DATA_FLOAT);
    // Products of floats are exact to rounding unless TF32 was asked for; those of bfloat16 are tensor cores'.
    let math = match element {
        Element::F32 if !tf32 => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    };
    // SAFETY: the descriptor is alive.
    unsafe {
        result::set_convolution2d_descriptor(descriptor.0, ph, pw, sh, sw, 1, 1, mode, float)
            .and_then(|()| result::set_convolution_group_count(descriptor.0, conv.groups as i32))
            .and_then(|()| result::set_convolution_math_type(descriptor.0, math))
            .map_err(|e| failed("describing a convolution", &e))?;
    }
    Ok(descriptor)
}

/// What cuDNN says of an algorithm, whichever the product.
trait Performance {
    type Algorithm: Copy;
    fn works(&self) -> bool;
    fn is_deterministic(&self) -> bool;
    fn parts(&self) -> (Self::Algorithm, usize, sys::cudnnMathType_t);
}

macro_rules! performance {
    ($perf:ty, $algorithm:ty) => {
        impl Performance for $perf {
            type Algorithm = $algorithm;

            fn works(&self) -> bool {
                self.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS && self.memory <= LARGEST_WORKSPACE
            }

            fn is_deterministic(&self) -> bool {
                self.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
            }

            fn parts(&self) -> ($algorithm, usize, sys::cudnnMathType_t) {
                (self.algo, self.memory, self.mathType)
            }
        }
    };
}

performance!(sys::cudnnConvolutionFwdAlgoPerf_t, sys::cudnnConvolutionFwdAlgo_t);
performance!(sys::cudnnConvolutionBwdDataAlgoPerf_t, sys::cudnnConvolutionBwdDataAlgo_t);
performance!(sys::cudnnConvolutionBwdFilterAlgoPerf_t, sys::cudnnConvolutionBwdFilterAlgo_t);

/// The first algorithm of those cuDNN thinks fastest that is deterministic, rounds no more than was asked for, and needs a
/// bearable workspace; where there is none, one that is not deterministic, with a warning.
fn choose<P: Performance>(
    convolution: ConvolutionDescriptor,
    product: &str,
    exact: bool,
    ask: impl Fn(sys::cudnnConvolutionDescriptor_t, c_int, *mut c_int, *mut P) -> std::result::Result<(), CudnnError>,
) -> Result<Chosen<P::Algorithm>> {
    let mut found: c_int = 0;
    let mut answers: [MaybeUninit<P>; ASKED] = [const { MaybeUninit::uninit() }; ASKED];
    ask(convolution.0, ASKED as c_int, &mut found, answers.as_mut_ptr().cast())
        .map_err(|e| failed(&format!("choosing an algorithm for the {product}"), &e))?;
    let answers = &answers[..usize::try_from(found).unwrap_or(0).min(ASKED)];
    // SAFETY: cuDNN filled as many as it says.
    let answers = answers.iter().map(|p| unsafe { p.assume_init_ref() }).filter(|p| p.works());
    // Other arithmetic than FMA may round floats to TF32.
    let fitting: Vec<&P> = answers.filter(|p| !exact || p.parts().2 == sys::cudnnMathType_t::CUDNN_FMA_MATH).collect();
    let chosen = fitting.iter().find(|p| p.is_deterministic()).or_else(|| {
        log::warn!(
            "cuDNN has no deterministic algorithm for a convolution's {product}: last bits may differ between runs"
        );
        fitting.first()
    });
    let Some((algorithm, workspace, math)) = chosen.map(|p| p.parts()) else {
        return Err(Error::Run(format!(
            "cuDNN has no algorithm for a convolution's {product} in this precision: try run.precision = \"tf32\" or \"bf16\""
        )));
    };
    // SAFETY: the descriptor is alive.
    unsafe { result::set_convolution_math_type(convolution.0, math) }
        .map_err(|e| failed("setting the type of arithmetic", &e))?;
    Ok(Chosen { algorithm, convolution, workspace })
}

fn ints(sizes: [usize; 4]) -> Result<[c_int; 4]> {
    if sizes.iter().product::<usize>() > i32::MAX as usize {
        return Err(Error::input(format!(
            "a tensor of {sizes:?} elements is larger than cuDNN takes: use a smaller data.batch"
        )));
    }
    Ok(ints_of(sizes))
}

fn ints_of(sizes: [usize; 4]) -> [c_int; 4] {
    sizes.map(|size| size as c_int)
}

fn failed(doing: &str, e: &CudnnError) -> Error {
    Error::Run(format!("cuDNN: {doing} failed: {:?}", e.0))
}
