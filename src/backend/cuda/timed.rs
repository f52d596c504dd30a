//! A stage whose passes take a set time and next to nothing of the GPU, its messages copied as a module's are: for measuring.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

use candle_core::Tensor;

use super::event::Clock;
use super::gpu::{Array, Element, Gpu, capability, failed};
use super::stage::{InPort, OutPort};
use crate::backend::cpu::mix::Mixing;
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::backend::stage::{self, BatchEnd, Lent, NotFinite, Snapshot, Stage, StageSpec, TimedStage, Updated};
use crate::method::Keep;
use crate::nn::head::Labels;
use crate::nn::layers::Pass;
use crate::{Error, Result};

/// One thread that looks at the GPU's clock, which counts on while others use the GPU.
const SOURCE: &str = r#"
#ifndef globaltimer
static __device__ __forceinline__ unsigned long long globaltimer() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
#endif
extern "C" __global__ void wait_for(unsigned long long nanoseconds) {
    unsigned long long start = globaltimer();
    while (globaltimer() - start < nanoseconds) {}
}
"#;

/// How a stream is kept waiting.
enum Wait {
    /// By a kernel: any number of streams of a process wait at once, but processes that share a GPU take turns.
    Kernel(CudaFunction),
    /// By a function on the host: any number of processes wait at once, but streams of a process may take turns.
    Host,
}

impl Wait {
    /// Compiles the kernel for `gpu`.
    ///
    /// # Errors
    /// [`Error::Run`] with the compiler's or the driver's words.
    fn kernel(gpu: &Gpu) -> Result<Self> {
        let context = gpu.compute.context();
        let (major, minor) = capability(context)?;
        let options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
        let options = CompileOptions { options, ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(SOURCE, options)
            .map_err(|e| Error::Run(format!("NVRTC does not compile a kernel that waits: {e}")))?;
        let module = context.load_module(ptx).map_err(|e| failed("loading a kernel", &e))?;
        let function = module.load_function("wait_for").map_err(|e| failed("finding a kernel", &e))?;
        Ok(Wait::Kernel(function))
    }

    /// Launches a wait of `seconds` into the compute stream.
    ///
    /// # Errors
    /// [`Error::Run`] if the launch fails.
    fn launch(&self, gpu: &Gpu, seconds: f64) -> Result<()> {
        let nanoseconds = (seconds * 1e9) as u64;
        let launched = match self {
            Wait::Kernel(function) => {
                let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
                // SAFETY: the kernel takes one number and touches no memory.
                unsafe { gpu.compute.launch_builder(function).arg(&nanoseconds).launch(config) }.map(|_| ())
            }
            // SAFETY: the argument is a number, whatever its type is called.
            Wait::Host => unsafe {
                let stream = gpu.compute.cu_stream();
                cudarc::driver::result::stream::launch_host_function(stream, sleep, nanoseconds as *mut c_void)
            },
        };
        launched.map_err(|e| failed("launching a wait", &e))
    }
}

unsafe extern "C" fn sleep(nanoseconds: *mut c_void) {
    std::thread::sleep(Duration::from_nanos(nanoseconds as u64));
}

/// An array that travels in messages one way, and back.
struct Port {
    array: Array,
    out: OutPort,
    inward: InPort,
}

/// Stands in for a module on a GPU.
pub struct CudaTimedStage {
    /// What needs no GPU.
    host: TimedStage,
    /// Of each input, and of each output.
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    seconds: f64,
    wait: Wait,
    gpu: Arc<Gpu>,
}

impl CudaTimedStage {
    /// See [`super::timed_stage`].
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn new(spec: StageSpec, ordinal: usize, seconds: f64, alone: bool) -> Result<Self> {
        let gpu = Gpu::open(ordinal, false)?;
        let port = |shape: [usize; 3]| {
            let elements = spec.batch * shape.iter().product::<usize>();
            Ok::<_, Error>(Port {
                array: gpu.zeros(elements, Element::F32)?,
                out: OutPort::new(&gpu, elements, [Element::F32; 2])?,
                inward: InPort::new(&gpu, elements, Element::F32)?,
            })
        };
        let shapes = std::iter::once(spec.main).chain(spec.skips.iter().map(|skip| skip.shape));
        Ok(CudaTimedStage {
            inputs: shapes.map(port).collect::<Result<_>>()?,
            outputs: spec.outputs.iter().map(|out| port(out.shape)).collect::<Result<_>>()?,
            seconds,
            wait: if alone { Wait::Host } else { Wait::kernel(&gpu)? },
            host: TimedStage::new(spec, Duration::ZERO, false),
            gpu,
        })
    }
}

impl Stage for CudaTimedStage {
    fn begin(&mut self, _: Option<&Labels>, _: bool) -> Result<()> {
        Ok(())
    }

    fn set_input(&mut self, _: usize, _: Tensor, _: Option<Mixing>) -> Result<()> {
        Ok(())
    }

    fn receive(&mut self, k: usize, message: Slot<'_>) -> Result<Done> {
        self.inputs[k].inward.read(&self.gpu, message, |_| Ok(()))
    }

    fn forward(&mut self, _: usize, _: &Pass, _: Keep, _: &[bool]) -> Result<()> {
        self.wait.launch(&self.gpu, self.seconds)
    }

    fn send(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let Port { array, out, .. } = &mut self.outputs[k];
        out.write(&self.gpu, array, message)
    }

    fn output(&mut self) -> Result<Tensor> {
        self.host.output()
    }

    fn loss(&mut self, step: usize, target: Option<Slot<'_>>) -> Result<(Done, Option<NotFinite>)> {
        self.host.loss(step, target)
    }

    fn add_cotangent(&mut self, k: usize, _: usize, message: Slot<'_>) -> Result<(Done, Option<NotFinite>)> {
        Ok((self.outputs[k].inward.read(&self.gpu, message, |_| Ok(()))?, None))
    }

    fn backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        self.host.backward(step, pass, wanted)?;
        self.wait.launch(&self.gpu, self.seconds)
    }

    fn send_cotangent(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let Port { array, out, .. } = &mut self.inputs[k];
        out.write(&self.gpu, array, message)
    }

    fn steps(&self) -> u64 {
        self.host.steps()
    }

    fn gradients(&mut self) -> Result<Vec<f32>> {
        self.host.gradients()
    }

    fn lend(&mut self) -> Result<Lent> {
        self.host.lend()
    }

    fn put(&mut self, lent: &mut Lent, words: &Range<usize>) -> Result<()> {
        self.host.put(lent, words)
    }

    fn take_back(&mut self, lent: Lent) -> Result<()> {
        self.host.take_back(lent)
    }

    fn update(&mut self, lr_factor: f64, divisor: f64, clip_norm: Option<f64>) -> Result<Updated> {
        self.host.update(lr_factor, divisor, clip_norm)
    }

    fn end(&mut self) -> Result<BatchEnd> {
        self.gpu.compute.synchronize().map_err(|e| failed("waiting for a GPU", &e))?;
        self.host.end()
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        self.host.snapshot()
    }

    fn mark(&mut self) -> Result<()> {
        Ok(())
    }

    fn unmark(&mut self) {}

    fn rewind(&mut self) -> Result<Option<Snapshot>> {
        Ok(None)
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn clock(&mut self) -> Result<stage::Clock> {
        Clock::now(&self.gpu).map(stage::Clock::Device)
    }

    fn needs_core(&self) -> bool {
        false
    }
}
