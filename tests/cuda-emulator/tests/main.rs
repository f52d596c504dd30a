//! The emulator of CUDA's libraries (tests/cuda-emulator) through the bindings that the program uses: it does what CUDA
//! does, and notices what would go wrong on a GPU.
//!
//! The libraries are found as a process starts, so every test runs again in a process of its own that finds them.

mod convolutions;
mod driver;
mod mistakes;
mod processes;

use std::ffi::{CString, c_char};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, sys};

const CHILD: &str = "SIDEWAYS_TEST_EMULATED";

/// Runs `check`, the body of `test` (its name with its module's), in a process of its own on the emulator, with these of its
/// knobs. It must end well, or with `death` in what it says.
fn emulated(test: &str, knobs: &[(&str, &str)], death: Option<&str>, check: impl Fn()) {
    if std::env::var_os(CHILD).is_some() {
        return check();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let libraries = root.join("target/cuda-emulator");
    let built = Command::new(root.join("tests/cuda-emulator/build.sh")).arg(&libraries).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture"]).env(CHILD, "1").env("LD_LIBRARY_PATH", &libraries);
    for (name, value) in knobs {
        child.env(format!("SIDEWAYS_EMULATOR_{name}"), value);
    }
    let output = child.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match death {
        None => assert!(output.status.success() && said.contains("1 passed"), "{said}"),
        Some(words) => assert!(!output.status.success() && said.contains(words), "{said}"),
    }
}

/// How often something happened in this process.
fn count(what: &str) -> u64 {
    let what = CString::new(what).unwrap();
    // SAFETY: the emulator's signature.
    unsafe {
        let ask = sys::culib().get::<unsafe extern "C" fn(*const c_char) -> u64>(b"sideways_emulator_count\0").unwrap();
        ask(what.as_ptr())
    }
}

struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: the tests order their streams themselves.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        Gpu { context, stream }
    }

    fn kernel(&self, name: &str) -> CudaFunction {
        let ptx = cudarc::nvrtc::compile_ptx(include_str!("../check.cu")).unwrap();
        self.context.load_module(ptx).unwrap().load_function(name).unwrap()
    }
}

fn threads(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

fn address<T>(array: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    array.device_ptr(stream).0
}
