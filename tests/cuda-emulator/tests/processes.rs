//! What processes share.

use std::ffi::c_char;
use std::process::Command;
use std::ptr::null_mut;

use cudarc::driver::{LaunchConfig, PushKernelArg, sys};

use crate::{Gpu, address, emulated};

const ARGUMENTS: &str = "SIDEWAYS_TEST_ARGUMENTS";

fn to_hex(bytes: &[c_char; 64]) -> String {
    bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
}

fn from_hex(text: &str) -> [c_char; 64] {
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap() as c_char)
}

#[test]
fn memory_and_events_are_shared_between_processes() {
    const TEST: &str = "processes::memory_and_events_are_shared_between_processes";
    emulated(TEST, &[("COPY_DELAY_US", "500000")], None, || {
        let gpu = Gpu::new();
        let stream = gpu.stream.cu_stream();
        let n = 5000;
        if let Ok(handles) = std::env::var(ARGUMENTS) {
            // The other process: adds one behind the first's event.
            let (memory, event) = handles.split_once(' ').unwrap();
            let add = gpu.kernel("add_one");
            let (mut array, mut copied) = (0u64, null_mut());
            // SAFETY: the handles are the first process's, which waits for this one.
            unsafe {
                let memory = sys::CUipcMemHandle { reserved: from_hex(memory) };
                let event = sys::CUipcEventHandle { reserved: from_hex(event) };
                sys::cuIpcOpenMemHandle_v2(&mut array, memory, 1).result().unwrap();
                sys::cuIpcOpenEventHandle(&mut copied, event).result().unwrap();
                sys::cuStreamWaitEvent(stream, copied, 0).result().unwrap();
                gpu.stream.launch_builder(&add).arg(&array).arg(&n).launch(LaunchConfig::for_num_elems(5000)).unwrap();
                gpu.stream.synchronize().unwrap();
                sys::cuIpcCloseMemHandle(array).result().unwrap();
            }
            return;
        }
        let bytes = n as usize * 4;
        // SAFETY: everything lives until it is given back.
        unsafe {
            let (mut array, mut copied) = (0u64, null_mut());
            let mut memory = sys::CUipcMemHandle { reserved: [0; 64] };
            let mut event = sys::CUipcEventHandle { reserved: [0; 64] };
            sys::cuMemAlloc_v2(&mut array, bytes).result().unwrap();
            sys::cuIpcGetMemHandle(&mut memory, array).result().unwrap();
            sys::cuEventCreate(&mut copied, 6).result().unwrap(); // interprocess, without time
            sys::cuIpcGetEventHandle(&mut event, copied).result().unwrap();
            let mut host = gpu.context.alloc_pinned::<f32>(n as usize).unwrap();
            host.as_mut_slice().unwrap().fill(4.0);
            let from = host.as_slice().unwrap().as_ptr();
            sys::cuMemcpyHtoDAsync_v2(array, from.cast(), bytes, stream).result().unwrap();
            sys::cuEventRecord(copied, stream).result().unwrap();
            let mut other = Command::new(std::env::current_exe().unwrap());
            other
                .args([TEST, "--exact"])
                .env(ARGUMENTS, format!("{} {}", to_hex(&memory.reserved), to_hex(&event.reserved)));
            assert!(other.status().unwrap().success());
            let mut back = vec![0f32; n as usize];
            sys::cuMemcpyDtoH_v2(back.as_mut_ptr().cast(), array, bytes).result().unwrap();
            assert!(back.iter().all(|&v| v == 5.0));
            sys::cuMemFree_v2(array).result().unwrap();
            assert_eq!(sys::cuMemFree_v2(array), sys::CUresult::CUDA_ERROR_INVALID_VALUE);
            // Memory of the stream-ordered allocator cannot be shared.
            let pooled = gpu.stream.alloc_zeros::<f32>(8).unwrap();
            let shared = sys::cuIpcGetMemHandle(&mut memory, address(&pooled, &gpu.stream));
            assert_eq!(shared, sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        }
    });
}
