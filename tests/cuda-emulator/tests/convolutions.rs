//! Convolutions by cuDNN's functions.

use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::cudnn::sys as dnn;
use cudarc::driver::{CudaSlice, DeviceRepr};

use crate::{Gpu, address, emulated};

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
            let got = stream.clone_dtoh(got).unwrap();
            assert_eq!(got.len(), wanted.len(), "{case:?}, {what}");
            for (got, wanted) in got.iter().zip(wanted) {
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
    emulated("convolutions::convolutions_agree_with_their_definition", &[], None, || {
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
    emulated("convolutions::a_workspace_shared_by_streams_is_noticed", &[], death, || {
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
