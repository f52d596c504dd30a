//! Work that takes a set time and next to nothing of the GPU: a module's stand-in for measuring.

use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

use super::gpu::{Gpu, capability, failed};
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
pub enum Wait {
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
    pub fn kernel(gpu: &Gpu) -> Result<Self> {
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
    pub fn launch(&self, gpu: &Gpu, seconds: f64) -> Result<()> {
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
