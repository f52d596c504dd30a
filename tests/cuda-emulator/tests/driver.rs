//! Memory, streams, kernels and graphs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys};

use crate::{Gpu, address, count, emulated, threads};

fn code<T: PartialEq + std::fmt::Debug>(result: Result<T, DriverError>) -> Option<sys::CUresult> {
    result.err().map(|e| e.0)
}

#[test]
fn memory_is_counted_bounded_and_unset() {
    emulated("driver::memory_is_counted_bounded_and_unset", &[("MEMORY", "1000000"), ("DEVICES", "3")], None, || {
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
            let invalid = sys::CUresult::CUDA_ERROR_INVALID_VALUE;
            assert_eq!(sys::cuMemcpyDtoH_v2(host.as_mut_ptr().cast(), at, 404), invalid);
            assert_eq!(sys::cuMemcpyHtoDAsync_v2(at + 4, host.as_ptr().cast(), 400, stream.cu_stream()), invalid);
            assert_eq!(sys::cuMemsetD8_v2(at + 390, 0, 20), invalid);
            assert_eq!(sys::cuMemFree_v2(at + 4), invalid);
        }
        stream.synchronize().unwrap();
    });
}

#[test]
fn streams_run_beside_each_other_and_events_order_them() {
    let knobs = [("COPY_DELAY_US", "600000")];
    emulated("driver::streams_run_beside_each_other_and_events_order_them", &knobs, None, || {
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
    emulated("driver::kernels_with_barriers_and_shuffles", &[], None, || {
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
        assert_eq!(stream.clone_dtoh(&dy).unwrap(), x.iter().map(|x| 2.5 * x).collect::<Vec<_>>());
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
            let launched = unsafe { stream.launch_builder(&add).arg(&mut dy).arg(&n).launch(bad) };
            assert_eq!(launched.err().map(|e| e.0), Some(sys::CUresult::CUDA_ERROR_INVALID_VALUE), "{bad:?}");
        }
        let host = x.as_ptr() as u64;
        let launched = unsafe { stream.launch_builder(&add).arg(&host).arg(&n).launch(threads(1, 32)) };
        assert_eq!(launched.err().map(|e| e.0), Some(sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        context.check_err().unwrap();
    });
}

#[test]
fn graphs_replay_what_was_captured() {
    let knobs = [("GRAPH_ORDER", "shuffled"), ("JITTER_US", "1000")];
    emulated("driver::graphs_replay_what_was_captured", &knobs, None, || {
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
        use sys::CUresult::{
            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        };
        let invalidated = || assert_eq!(end().err().unwrap().0, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        begin();
        assert_eq!(code(stream.synchronize()), Some(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
        invalidated();
        begin();
        assert_eq!(stream.alloc_zeros::<f32>(4).err().unwrap().0, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        invalidated();
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
            assert_eq!(code(waited), Some(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
        });
        invalidated();
        stream.synchronize().unwrap();
    });
}
