//! A kernel that takes a set time and next to nothing of the GPU: a module's stand-in for measuring.

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

/// The kernel, compiled.
pub struct Wait {
    function: CudaFunction,
}

impl Wait {
    /// Compiles it for `gpu`.
    ///
    /// # Errors
    /// [`Error::Run`] with the compiler's or the driver's words.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let context = gpu.compute.context();
        let (major, minor) = capability(context)?;
        let options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
        let options = CompileOptions { options, ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(SOURCE, options)
            .map_err(|e| Error::Run(format!("NVRTC does not compile a kernel that waits: {e}")))?;
        let module = context.load_module(ptx).map_err(|e| failed("loading a kernel", &e))?;
        let function = module.load_function("wait_for").map_err(|e| failed("finding a kernel", &e))?;
        Ok(Wait { function })
    }

    /// Launches a wait of `seconds` into the compute stream.
    ///
    /// # Errors
    /// [`Error::Run`] if the launch fails.
    pub fn launch(&self, gpu: &Gpu, seconds: f64) -> Result<()> {
        let nanoseconds = (seconds * 1e9) as u64;
        let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes one number and touches no memory.
        unsafe { gpu.compute.launch_builder(&self.function).arg(&nanoseconds).launch(config) }
            .map(|_| ())
            .map_err(|e| failed("launching a wait", &e))
    }
}
