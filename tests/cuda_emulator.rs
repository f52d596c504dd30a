//! The emulator of CUDA's libraries (tests/cuda-emulator) through the bindings that the program uses: it does what CUDA
//! does, and notices what would go wrong on a GPU.
//!
//! The libraries are found as a process starts, so every test runs again in a process of its own that finds them.
#![cfg(feature = "cuda")]

use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::cudnn::sys as dnn;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
    sys,
};

const CHILD: &str = "SIDEWAYS_TEST_EMULATED";
const ARGUMENTS: &str = "SIDEWAYS_TEST_ARGUMENTS";

/// Runs `check` in a process of its own on the emulator, with these of its knobs. It must end well, or with `death` in what
/// it says.
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
        let ptx = cudarc::nvrtc::compile_ptx(include_str!("cuda-emulator/check.cu")).unwrap();
        self.context.load_module(ptx).unwrap().load_function(name).unwrap()
    }
}

fn threads(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

fn address<T>(array: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    array.device_ptr(stream).0
}

fn driver<T: PartialEq + std::fmt::Debug>(result: Result<T, DriverError>) -> Option<sys::CUresult> {
    result.err().map(|e| e.0)
}

#[test]
fn memory_is_counted_bounded_and_unset() {
    emulated("memory_is_counted_bounded_and_unset", &[("MEMORY", "1000000"), ("DEVICES", "3")], None, || {
        let Gpu { context, stream } = Gpu::new();
        assert_eq!((CudaContext::device_count().unwrap(), context.compute_capability().unwrap()), (3, (9, 0)));
        assert_eq!(context.mem_get_info().unwrap(), (1_000_000, 1_000_000));
        let array = stream.alloc_zeros::<u8>(600_000).unwrap();
        assert_eq!(context.mem_get_info().unwrap().0, 400_000);
        let refused = stream.alloc_zeros::<u8>(600_000).err().unwrap();
        assert_eq!(refused.0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        drop(array);
        // SAFETY: what is in it is what is asked.
        let unset = unsafe { stream.alloc::<f32>(100) }.unwrap();
        assert!(stream.clone_dtoh(&unset).unwrap().iter().all(|v| v.is_nan()));
        let (at, mut host) = (address(&unset, &stream), [0f32; 200]);
        // SAFETY: out of bounds on purpose, which is refused.
        unsafe {
            assert!(sys::cuMemcpyDtoH_v2(host.as_mut_ptr().cast(), at, 404).result().is_err());
            assert!(sys::cuMemcpyHtoDAsync_v2(at + 4, host.as_ptr().cast(), 400, stream.cu_stream()).result().is_err());
            assert!(sys::cuMemsetD8_v2(at + 390, 0, 20).result().is_err());
            assert!(sys::cuMemFree_v2(at + 4).result().is_err());
        }
        stream.synchronize().unwrap();
    });
}

#[test]
fn streams_run_beside_each_other_and_events_order_them() {
    let knobs = [("COPY_DELAY_US", "600000")];
    emulated("streams_run_beside_each_other_and_events_order_them", &knobs, None, || {
        let Gpu { context, stream: a } = Gpu::new();
        let b = context.new_stream().unwrap();
        let n = 1 << 16;
        // SAFETY: filled below, or read as it is.
        let (mut host, mut back) =
            unsafe { (context.alloc_pinned::<f32>(n).unwrap(), context.alloc_pinned::<f32>(n).unwrap()) };
        host.as_mut_slice().unwrap().fill(3.0);
        let (mut first, mut second) = unsafe { (a.alloc::<f32>(n).unwrap(), a.alloc::<f32>(n).unwrap()) };
        let start = Instant::now();
        a.memcpy_htod(&host, &mut first).unwrap();
        let event = a.record_event(None).unwrap();
        assert!(!event.is_complete());
        b.wait(&event).unwrap();
        b.memcpy_dtoh(&first, &mut back).unwrap();
        assert!(start.elapsed() < Duration::from_millis(600), "a call waited");
        b.synchronize().unwrap();
        assert!(start.elapsed() >= Duration::from_millis(1200));
        assert!(back.as_slice().unwrap().iter().all(|&v| v == 3.0));
        // Without an event, b reads what a has not written yet.
        a.memcpy_htod(&host, &mut first).unwrap();
        a.memcpy_htod(&host, &mut second).unwrap();
        b.memcpy_dtoh(&second, &mut back).unwrap();
        b.synchronize().unwrap();
        assert!(back.as_slice().unwrap().iter().all(|v| v.is_nan()));
        a.synchronize().unwrap();
        let timed = || a.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
        let start = timed();
        a.memcpy_htod(&host, &mut second).unwrap();
        assert!(start.elapsed_ms(&timed()).unwrap() >= 600.0);
        context.check_err().unwrap();
    });
}

#[test]
fn kernels_with_barriers_and_shuffles() {
    emulated("kernels_with_barriers_and_shuffles", &[], None, || {
        let Gpu { context, stream } = Gpu::new();
        let gpu = Gpu { context: context.clone(), stream: stream.clone() };
        let n = 100_000;
        let x: Vec<f32> = (0..n).map(|i| (i % 17) as f32).collect();
        let (dx, mut dy) = (stream.clone_htod(&x).unwrap(), stream.alloc_zeros::<f32>(n as usize).unwrap());
        let scale = gpu.kernel("scale_f32");
        let mut launch = stream.launch_builder(&scale);
        // SAFETY: the arguments are the kernel's, here and below.
        unsafe { launch.arg(&mut dy).arg(&dx).arg(&2.5f32).arg(&n).launch(LaunchConfig::for_num_elems(n as u32)) }
            .unwrap();
        assert!(stream.clone_dtoh(&dy).unwrap().iter().zip(&x).all(|(y, x)| *y == 2.5 * x));
        let sum = gpu.kernel("block_sum");
        for size in [32, 96, 256, 1000, 1024] {
            let mut out = stream.alloc_zeros::<f32>(7).unwrap();
            unsafe { stream.launch_builder(&sum).arg(&dx).arg(&mut out).arg(&n).launch(threads(7, size)) }.unwrap();
            let total: f64 = stream.clone_dtoh(&out).unwrap().iter().map(|&v| f64::from(v)).sum();
            assert_eq!(total, x.iter().map(|&v| f64::from(v)).sum::<f64>(), "{size} threads");
        }
        let mut row = stream.clone_htod(&(0..512u16).map(f32::from).collect::<Vec<_>>()).unwrap();
        let shared = LaunchConfig { shared_mem_bytes: 1024, ..threads(2, 256) };
        unsafe { stream.launch_builder(&gpu.kernel("reverse")).arg(&mut row).launch(shared) }.unwrap();
        let row = stream.clone_dtoh(&row).unwrap();
        assert!((0..512).all(|i| row[i] == (i / 256 * 256 + 255 - i % 256) as f32));
        let mut out = stream.alloc_zeros::<f32>(32).unwrap();
        unsafe { stream.launch_builder(&gpu.kernel("halves")).arg(&mut out).launch(threads(1, 32)) }.unwrap();
        let wanted: Vec<f32> = (0..32).rev().map(|lane| if lane < 16 { 120.0 } else { lane as f32 }).collect();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), wanted);
        // What cannot be compiled, found or launched.
        let source = "extern \"C\" __global__ void f(float *x) { x[0] = nothing; }";
        assert!(format!("{:?}", cudarc::nvrtc::compile_ptx(source).err().unwrap()).contains("nothing"));
        let add = gpu.kernel("add_one");
        for bad in [threads(1, 2048), threads(0, 32), LaunchConfig { shared_mem_bytes: 100 << 10, ..threads(1, 32) }] {
            assert!(unsafe { stream.launch_builder(&add).arg(&mut dy).arg(&n).launch(bad) }.is_err());
        }
        let host = x.as_ptr() as u64;
        assert!(unsafe { stream.launch_builder(&add).arg(&host).arg(&n).launch(threads(1, 32)) }.is_err());
        context.check_err().unwrap();
    });
}

#[test]
fn graphs_replay_what_was_captured() {
    let knobs = [("GRAPH_ORDER", "shuffled"), ("JITTER_US", "1000")];
    emulated("graphs_replay_what_was_captured", &knobs, None, || {
        let gpu = Gpu::new();
        let (stream, beside) = (&gpu.stream, gpu.context.new_stream().unwrap());
        let add = gpu.kernel("add_one");
        let (x, y) = (stream.alloc_zeros::<f32>(1000).unwrap(), stream.alloc_zeros::<f32>(1000).unwrap());
        stream.synchronize().unwrap();
        let launch = |stream: &Arc<CudaStream>, array: &CudaSlice<f32>| {
            let mut launch = stream.launch_builder(&add);
            unsafe { launch.arg(array).arg(&1000).launch(LaunchConfig::for_num_elems(1000)) }.unwrap();
        };
        let begin = || {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            stream.begin_capture(mode).unwrap();
        };
        let end = || stream.end_capture(sys::CUgraphInstantiate_flags(0));
        begin();
        launch(stream, &x);
        launch(stream, &x);
        beside.join(stream).unwrap();
        launch(&beside, &y);
        launch(stream, &x);
        stream.join(&beside).unwrap();
        launch(stream, &y);
        let graph = end().unwrap().unwrap();
        assert_eq!(count("kernel"), 0);
        let counts = || ["alloc", "sync", "launch", "event_record"].map(count);
        let before = counts();
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        assert_eq!(counts(), before);
        assert!(stream.clone_dtoh(&x).unwrap().iter().all(|&v| v == 9.0));
        assert!(stream.clone_dtoh(&y).unwrap().iter().all(|&v| v == 6.0));
        assert_eq!(count("kernel"), 15);
        // What a capture forbids ends it.
        use sys::CUresult::{CUDA_ERROR_STREAM_CAPTURE_UNJOINED, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
        begin();
        assert_eq!(driver(stream.synchronize()), Some(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
        assert!(end().is_err());
        begin();
        assert!(stream.alloc_zeros::<f32>(4).is_err());
        assert!(end().is_err());
        begin();
        beside.join(stream).unwrap();
        launch(&beside, &y);
        assert_eq!(end().err().unwrap().0, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        // So does another thread's wait for the whole context.
        begin();
        launch(stream, &x);
        std::thread::scope(|scope| {
            let waits = || gpu.context.bind_to_thread().and_then(|()| gpu.context.synchronize());
            let waited = scope.spawn(waits).join().unwrap();
            assert_eq!(driver(waited), Some(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
        });
        assert!(end().is_err());
        stream.synchronize().unwrap();
    });
}

fn to_hex(bytes: &[c_char; 64]) -> String {
    bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
}

fn from_hex(text: &str) -> [c_char; 64] {
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap() as c_char)
}

#[test]
fn memory_and_events_are_shared_between_processes() {
    const TEST: &str = "memory_and_events_are_shared_between_processes";
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
            assert!(sys::cuMemFree_v2(array).result().is_err());
            // Memory of the stream-ordered allocator cannot be shared.
            let pooled = gpu.stream.alloc_zeros::<f32>(8).unwrap();
            assert!(sys::cuIpcGetMemHandle(&mut memory, address(&pooled, &gpu.stream)).result().is_err());
        }
    });
}

/// A kernel writes to element `at` of an array of 100.
fn write_at(at: i32, freed: bool) {
    let gpu = Gpu::new();
    let kernel = gpu.kernel("write_at");
    let array = gpu.stream.alloc_zeros::<f32>(100).unwrap();
    let place = address(&array, &gpu.stream);
    match freed {
        true => drop(array),
        false => std::mem::forget(array),
    }
    gpu.stream.synchronize().unwrap();
    // SAFETY: it is not, which is what is tested.
    unsafe { gpu.stream.launch_builder(&kernel).arg(&place).arg(&at).launch(threads(1, 1)) }.unwrap();
    gpu.stream.synchronize().unwrap();
}

#[test]
fn writing_beside_an_array_is_noticed_at_the_end() {
    let death = Some("guard zone: something wrote 4 bytes past the end of the device allocation of 400 bytes");
    emulated("writing_beside_an_array_is_noticed_at_the_end", &[], death, || write_at(101, false));
}

#[test]
fn writing_far_beside_an_array_is_noticed_at_once() {
    let death = Some("kernel write_at is out of bounds");
    emulated("writing_far_beside_an_array_is_noticed_at_once", &[], death, || write_at(1000, false));
}

#[test]
fn writing_before_an_array_is_noticed() {
    let death = Some("before the device allocation of 400 bytes");
    emulated("writing_before_an_array_is_noticed", &[], death, || write_at(-1, false));
}

#[test]
fn using_freed_memory_is_noticed() {
    let death = Some("kernel write_at used device memory that was freed");
    emulated("using_freed_memory_is_noticed", &[], death, || write_at(3, true));
}

#[test]
fn a_barrier_that_not_all_reach_is_noticed() {
    emulated("a_barrier_that_not_all_reach_is_noticed", &[], Some("kernel hang hangs"), || {
        let gpu = Gpu::new();
        let mut out = gpu.stream.alloc_zeros::<f32>(1).unwrap();
        let _ = unsafe { gpu.stream.launch_builder(&gpu.kernel("hang")).arg(&mut out).launch(threads(1, 32)) };
        let _ = gpu.stream.synchronize();
    });
}

// ---- Convolutions ----

trait Value: DeviceRepr + Copy {
    const KIND: dnn::cudnnDataType_t;
    fn of(value: f32) -> Self;
    fn to(self) -> f64;
}

impl Value for f32 {
    const KIND: dnn::cudnnDataType_t = dnn::cudnnDataType_t::CUDNN_DATA_FLOAT;
    fn of(value: f32) -> Self {
        value
    }
    fn to(self) -> f64 {
        self.into()
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16(u16);

// SAFETY: two bytes on both sides.
unsafe impl DeviceRepr for Bf16 {}

impl Value for Bf16 {
    const KIND: dnn::cudnnDataType_t = dnn::cudnnDataType_t::CUDNN_DATA_BFLOAT16;
    fn of(value: f32) -> Self {
        Bf16((value.to_bits() >> 16) as u16)
    }
    fn to(self) -> f64 {
        f32::from_bits(u32::from(self.0) << 16).into()
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    x: [i32; 4], // N, C, H, W
    k: i32,
    window: [i32; 2],
    pad: i32,
    stride: i32,
    dilation: i32,
    groups: i32,
    nhwc: bool,
}

fn at(i: [i32; 4], size: [i32; 4], nhwc: bool) -> usize {
    let [n, c, h, w] = i;
    (match nhwc {
        true => ((n * size[2] + h) * size[3] + w) * size[1] + c,
        false => ((n * size[1] + c) * size[2] + h) * size[3] + w,
    }) as usize
}

fn elements(size: [i32; 4]) -> usize {
    size.iter().product::<i32>() as usize
}

/// Output, data gradient, filter gradient and bias gradient in 64-bit floats.
fn reference<T: Value>(case: &Case, y_size: [i32; 4], x: &[T], w: &[T], dy: &[T]) -> [Vec<f64>; 4] {
    let Case { x: size, k, window: [r, s], groups, nhwc, .. } = *case;
    let (cg, kg) = (size[1] / groups, k / groups);
    let w_size = [k, cg, r, s];
    let mut out = [elements(y_size), elements(size), elements(w_size), k as usize].map(|n| vec![0f64; n]);
    for (n, o) in (0..size[0]).flat_map(|n| (0..k).map(move |o| (n, o))) {
        for (p, q) in (0..y_size[2]).flat_map(|p| (0..y_size[3]).map(move |q| (p, q))) {
            let yi = at([n, o, p, q], y_size, nhwc);
            out[3][o as usize] += dy[yi].to();
            for (c, u) in (0..cg).flat_map(|c| (0..r).map(move |u| (c, u))) {
                for v in 0..s {
                    let h = p * case.stride - case.pad + u * case.dilation;
                    let l = q * case.stride - case.pad + v * case.dilation;
                    if !(0..size[2]).contains(&h) || !(0..size[3]).contains(&l) {
                        continue;
                    }
                    let xi = at([n, o / kg * cg + c, h, l], size, nhwc);
                    let wi = at([o, c, u, v], w_size, nhwc);
                    out[0][yi] += x[xi].to() * w[wi].to();
                    out[1][xi] += dy[yi].to() * w[wi].to();
                    out[2][wi] += dy[yi].to() * x[xi].to();
                }
            }
        }
    }
    out
}

fn ok(status: dnn::cudnnStatus_t) {
    assert_eq!(status, dnn::cudnnStatus_t::CUDNN_STATUS_SUCCESS);
}

fn float(value: &f32) -> *const c_void {
    std::ptr::from_ref(value).cast()
}

/// All products of one shape against the reference, to `tolerance` of 1 + the value.
fn convolve<T: Value>(gpu: &Gpu, case: &Case, tolerance: f64) {
    let Case { x: x_size, k, window: [r, s], pad, stride, dilation, groups, nhwc } = *case;
    let stream = &gpu.stream;
    let mut state = 7u64;
    let mut random = |n: usize| -> Vec<T> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            T::of((state >> 40) as f32 / (1 << 24) as f32 - 0.5)
        };
        (0..n).map(|_| next()).collect()
    };
    // SAFETY: descriptors and arrays live until the end, with the sizes that the calls are told.
    unsafe {
        use dnn::*;
        let format = if nhwc { cudnnTensorFormat_t::CUDNN_TENSOR_NHWC } else { cudnnTensorFormat_t::CUDNN_TENSOR_NCHW };
        let (mut handle, mut xd, mut yd, mut bd, mut wd) = (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
        let (mut cd, mut ad) = (null_mut(), null_mut());
        ok(cudnnCreate(&mut handle));
        ok(cudnnSetStream(handle, stream.cu_stream().cast()));
        for descriptor in [&mut xd, &mut yd, &mut bd] {
            ok(cudnnCreateTensorDescriptor(descriptor));
        }
        ok(cudnnCreateFilterDescriptor(&mut wd));
        ok(cudnnCreateConvolutionDescriptor(&mut cd));
        ok(cudnnCreateActivationDescriptor(&mut ad));
        ok(cudnnSetTensor4dDescriptor(xd, format, T::KIND, x_size[0], x_size[1], x_size[2], x_size[3]));
        ok(cudnnSetFilter4dDescriptor(wd, T::KIND, format, k, x_size[1] / groups, r, s));
        let mode = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let sums = cudnnDataType_t::CUDNN_DATA_FLOAT;
        ok(cudnnSetConvolution2dDescriptor(cd, pad, pad, stride, stride, dilation, dilation, mode, sums));
        ok(cudnnSetConvolutionGroupCount(cd, groups));
        ok(cudnnSetConvolutionMathType(cd, cudnnMathType_t::CUDNN_FMA_MATH));
        let mut y_size = [0; 4];
        let [yn, yk, yp, yq] = &mut y_size;
        ok(cudnnGetConvolution2dForwardOutputDim(cd, xd, wd, yn, yk, yp, yq));
        ok(cudnnSetTensor4dDescriptor(yd, format, T::KIND, y_size[0], k, y_size[2], y_size[3]));
        ok(cudnnSetTensor4dDescriptor(bd, format, T::KIND, 1, k, 1, 1));
        let (relu, nan) = (cudnnActivationMode_t::CUDNN_ACTIVATION_RELU, cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN);
        ok(cudnnSetActivationDescriptor(ad, relu, nan, 0.0));
        let w_size = [k, x_size[1] / groups, r, s];
        let (x, w, dy, b) =
            (random(elements(x_size)), random(elements(w_size)), random(elements(y_size)), random(k as usize));
        let wanted = reference(case, y_size, &x, &w, &dy);
        let inputs = [&x, &w, &dy, &b].map(|values| stream.clone_htod(values).unwrap());
        let [px, pw, pdy, pb] = inputs.each_ref().map(|array| address(array, stream) as *const c_void);
        let outputs =
            [elements(y_size), elements(x_size), elements(w_size), k as usize].map(|n| stream.alloc::<T>(n).unwrap());
        let [py, pdx, pdw, pdb] = outputs.each_ref().map(|array| address(array, stream) as *mut c_void);
        let mut found = 0;
        let mut forward: [cudnnConvolutionFwdAlgoPerf_t; 8] = std::mem::zeroed();
        let mut data: [cudnnConvolutionBwdDataAlgoPerf_t; 8] = std::mem::zeroed();
        let mut filter: [cudnnConvolutionBwdFilterAlgoPerf_t; 8] = std::mem::zeroed();
        ok(cudnnGetConvolutionForwardAlgorithm_v7(handle, xd, wd, cd, yd, 8, &mut found, forward.as_mut_ptr()));
        ok(cudnnGetConvolutionBackwardDataAlgorithm_v7(handle, wd, yd, cd, xd, 8, &mut found, data.as_mut_ptr()));
        ok(cudnnGetConvolutionBackwardFilterAlgorithm_v7(handle, xd, yd, cd, wd, 8, &mut found, filter.as_mut_ptr()));
        let bytes = forward[0].memory.max(data[0].memory).max(filter[0].memory);
        assert!(found > 0 && bytes > 0);
        let workspace = stream.alloc::<u8>(bytes).unwrap();
        let space = address(&workspace, stream) as *mut c_void;
        let [zero, half, one] = [&0.0f32, &0.5, &1.0].map(float);
        let (f, d, g) = (forward[0].algo, data[0].algo, filter[0].algo);
        ok(cudnnConvolutionForward(handle, one, xd, px, wd, pw, cd, f, space, bytes, zero, yd, py));
        ok(cudnnConvolutionBackwardData(handle, one, wd, pw, yd, pdy, cd, d, space, bytes, zero, xd, pdx));
        // 1/2, 3/4, 7/8 and all of it.
        for (alpha, beta) in [(half, zero), (half, half), (half, half), (&0.125f32 as *const f32 as *const c_void, one)]
        {
            ok(cudnnConvolutionBackwardFilter(handle, alpha, xd, px, yd, pdy, cd, g, space, bytes, beta, wd, pdw));
        }
        ok(cudnnConvolutionBackwardBias(handle, one, yd, pdy, zero, bd, pdb));
        let close = |got: &CudaSlice<T>, wanted: &[f64], what: &str| {
            for (got, wanted) in stream.clone_dtoh(got).unwrap().iter().zip(wanted) {
                let off = (got.to() - wanted).abs() / (1.0 + wanted.abs());
                assert!(off < tolerance, "{case:?}, {what}: {} for {wanted}", got.to());
            }
        };
        let names = ["output", "data gradient", "filter gradient", "bias gradient"];
        for ((got, wanted), name) in outputs.iter().zip(&wanted).zip(names) {
            close(got, wanted, name);
        }
        // relu(x * w + dy / 2 + b)
        ok(cudnnConvolutionBiasActivationForward(
            handle, one, xd, px, wd, pw, cd, f, space, bytes, half, yd, pdy, bd, pb, ad, yd, py,
        ));
        let channel = |i: usize| if nhwc { i % k as usize } else { i / (y_size[2] * y_size[3]) as usize % k as usize };
        let fused = |(i, y): (usize, &f64)| (y + 0.5 * dy[i].to() + b[channel(i)].to()).max(0.0);
        let fused: Vec<f64> = wanted[0].iter().enumerate().map(fused).collect();
        close(&outputs[0], &fused, "fused output");
        // What does not fit is refused: the workspace, an output that ends too early, a wrong shape.
        let success = cudnnStatus_t::CUDNN_STATUS_SUCCESS;
        assert_ne!(cudnnConvolutionForward(handle, one, xd, px, wd, pw, cd, f, space, 100, zero, yd, py), success);
        let late = py.cast::<u8>().add(16).cast();
        assert_ne!(cudnnConvolutionForward(handle, one, xd, px, wd, pw, cd, f, space, bytes, zero, yd, late), success);
        if x_size != y_size {
            assert_ne!(
                cudnnConvolutionForward(handle, one, yd, px, wd, pw, cd, f, space, bytes, zero, xd, py),
                success
            );
        }
        for descriptor in [xd, yd, bd] {
            ok(cudnnDestroyTensorDescriptor(descriptor));
        }
        ok(cudnnDestroyFilterDescriptor(wd));
        ok(cudnnDestroyConvolutionDescriptor(cd));
        ok(cudnnDestroyActivationDescriptor(ad));
        ok(cudnnDestroy(handle));
        stream.synchronize().unwrap();
    }
}

#[test]
fn convolutions_agree_with_their_definition() {
    emulated("convolutions_agree_with_their_definition", &[], None, || {
        let gpu = Gpu::new();
        let base =
            Case { x: [2, 8, 9, 11], k: 12, window: [3, 3], pad: 1, stride: 1, dilation: 1, groups: 1, nhwc: true };
        for case in [
            base,
            Case { nhwc: false, ..base },
            Case { stride: 2, nhwc: false, pad: 0, ..base },
            Case { groups: 4, stride: 2, ..base },
            Case { window: [1, 1], pad: 0, ..base },
            Case { x: [2, 3, 17, 14], window: [7, 7], pad: 3, stride: 2, ..base },
            Case { dilation: 2, pad: 2, ..base },
            Case { k: 8, groups: 8, ..base },
            Case { window: [1, 3], pad: 0, stride: 3, ..base },
        ] {
            convolve::<f32>(&gpu, &case, 1e-5);
            convolve::<Bf16>(&gpu, &case, 2e-2);
        }
    });
}

/// Two products at once with one workspace.
#[test]
fn a_workspace_shared_by_streams_is_noticed() {
    let death = Some("something wrote to the workspace while the product ran");
    emulated("a_workspace_shared_by_streams_is_noticed", &[], death, || {
        let gpu = Gpu::new();
        let other = gpu.context.new_stream().unwrap();
        let stream = &gpu.stream;
        // SAFETY: as in `convolve`, but for the workspace.
        unsafe {
            use dnn::*;
            let (mut td, mut wd, mut cd) = (null_mut(), null_mut(), null_mut());
            let (kind, format) = (cudnnDataType_t::CUDNN_DATA_FLOAT, cudnnTensorFormat_t::CUDNN_TENSOR_NHWC);
            ok(cudnnCreateTensorDescriptor(&mut td));
            ok(cudnnCreateFilterDescriptor(&mut wd));
            ok(cudnnCreateConvolutionDescriptor(&mut cd));
            ok(cudnnSetTensor4dDescriptor(td, format, kind, 4, 64, 32, 32));
            ok(cudnnSetFilter4dDescriptor(wd, kind, format, 64, 64, 3, 3));
            let mode = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
            ok(cudnnSetConvolution2dDescriptor(cd, 1, 1, 1, 1, 1, 1, mode, kind));
            let x = stream.alloc_zeros::<f32>(4 * 64 * 32 * 32).unwrap();
            let w = stream.alloc_zeros::<f32>(64 * 64 * 9).unwrap();
            let outputs = [0; 2].map(|_| stream.alloc_zeros::<f32>(x.len()).unwrap());
            let workspace = stream.alloc_zeros::<u8>(1 << 20).unwrap();
            stream.synchronize().unwrap();
            let [px, pw, space] = [address(&x, stream), address(&w, stream), address(&workspace, stream)];
            let algorithm = cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM;
            let (one, zero) = (float(&1.0), float(&0.0));
            for (stream, y) in [stream, &other].into_iter().zip(&outputs) {
                let mut handle = null_mut();
                ok(cudnnCreate(&mut handle));
                ok(cudnnSetStream(handle, stream.cu_stream().cast()));
                for _ in 0..20 {
                    ok(cudnnConvolutionForward(
                        handle,
                        one,
                        td,
                        px as *const c_void,
                        wd,
                        pw as *const c_void,
                        cd,
                        algorithm,
                        space as *mut c_void,
                        1 << 20,
                        zero,
                        td,
                        address(y, stream) as *mut c_void,
                    ));
                }
            }
            gpu.context.synchronize().unwrap();
        }
    });
}
