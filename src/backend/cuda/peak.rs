//! What a GPU can do at most, as far as this program's own means go: copies within its memory, and large products by cuDNN.

use super::dnn::Convolution;
use super::gpu::{Array, Element, Gpu, failed};
use crate::Result;
use crate::backend::Peaks;
use crate::backend::cpu::conv::Conv;

/// Sizes grow until one repetition takes this many seconds: enough to hide what a launch costs.
const LONG_ENOUGH: f64 = 4e-3;
/// Repetitions a size; the fastest counts.
const REPEAT: usize = 5;
/// Pixels of a product: rows of its matrices.
const ROWS: [usize; 4] = [8, 32, 32, 0];

/// Measures GPU number `ordinal`; takes about a second.
///
/// # Errors
/// As [`Gpu::open`]; [`crate::Error::Run`] if CUDA fails.
pub fn peaks(ordinal: usize) -> Result<Peaks> {
    let (gpu, tf32) = (Gpu::open(ordinal, false)?, Gpu::open(ordinal, true)?);
    let (to_device, to_host) = host_copies(&gpu)?;
    Ok(Peaks {
        memory: copies(&gpu)?,
        f32: products(&gpu, Element::F32)?,
        tf32: products(&tf32, Element::F32)?,
        bf16: products(&gpu, Element::Bf16)?,
        to_device,
        to_host,
    })
}

/// Seconds of `work` in the compute stream by the GPU's clock: the least of several times, after one that does not count.
///
/// # Errors
/// Those of `work`; [`crate::Error::Run`] if CUDA fails.
pub fn fastest(gpu: &Gpu, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let (from, to) = (gpu.clock()?, gpu.clock()?);
    let record = |event: &cudarc::driver::CudaEvent| event.record(&gpu.compute).map_err(|e| failed("a clock", &e));
    work()?;
    let mut least = f64::INFINITY;
    for _ in 0..REPEAT {
        record(&from)?;
        work()?;
        record(&to)?;
        let ms = from.elapsed_ms(&to).map_err(|e| failed("reading a clock", &e))?;
        least = least.min(f64::from(ms) * 1e-3);
    }
    Ok(least.max(1e-9))
}

/// Bytes a second of the largest copy within the memory that is free; larger ones until one takes long enough.
fn copies(gpu: &Gpu) -> Result<f64> {
    let most = (gpu.memory()?.0 / 8).min(1 << 30);
    let (mut bytes, mut best) = (4 << 20, 0.0f64);
    while bytes <= most {
        let (a, b) = (gpu.zeros(bytes / 4, Element::F32)?, gpu.zeros(bytes / 4, Element::F32)?);
        let seconds = fastest(gpu, || gpu.copy(&a, &b))?;
        gpu.synchronize()?;
        // Small ones stay in a cache: the last counts.
        best = 2.0 * bytes as f64 / seconds;
        if seconds > LONG_ENOUGH / 4.0 {
            break;
        }
        bytes *= 4;
    }
    Ok(best)
}

/// Operations a second of the fastest of growing products `[8192, n] x [n, n]`, as cuDNN's 1x1 convolutions.
fn products(gpu: &Gpu, element: Element) -> Result<f64> {
    let (mut n, mut best) = (64, 0.0f64);
    while n <= 8192 {
        let [b, h, w, _] = ROWS;
        let conv = Convolution::new(gpu, &Conv::pointwise(), [b, h, w, n], n, element)?;
        let (x, y) = (filled(gpu, b * h * w * n, element)?, gpu.array(b * h * w * n, element)?);
        let filter = filled(gpu, n * n, element)?;
        let seconds = fastest(gpu, || conv.forward(gpu, &x, &filter, &y))?;
        gpu.synchronize()?;
        best = best.max(2.0 * (b * h * w * n * n) as f64 / seconds);
        if seconds > LONG_ENOUGH {
            break;
        }
        n *= 2;
    }
    Ok(best)
}

/// A new array of numbers from -1 to 1: products of zeros draw less power, so clocks would stay higher than they do.
fn filled(gpu: &Gpu, elements: usize, element: Element) -> Result<Array> {
    let array = gpu.array(elements, element)?;
    fill(gpu, &array, 1.0)?;
    Ok(array)
}

/// Fills an array with numbers from `-scale` to `scale`, the same ones each time. Waits.
///
/// # Errors
/// [`crate::Error::Run`] if a copy fails.
pub fn fill(gpu: &Gpu, array: &Array, scale: f32) -> Result<()> {
    let mut state = 1u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        scale * ((state >> 8) as f32 / 8_388_608.0 - 1.0)
    };
    // Over and over: large arrays would take long.
    let some: Vec<f32> = (0..array.len().min(1 << 20)).map(|_| number()).collect();
    let values = gpu.upload(&some.iter().copied().cycle().take(array.len()).collect::<Vec<_>>())?;
    super::ops::from_f32(gpu, &values, array)?;
    gpu.synchronize()
}

/// Bytes a second to the GPU and from it, of a page-locked buffer of 32 MiB.
///
/// # Errors
/// [`crate::Error::Run`] if CUDA fails.
pub fn host_copies(gpu: &Gpu) -> Result<(f64, f64)> {
    let mut host = vec![1.0f32; 8 << 20];
    gpu.pin(&host);
    let array = gpu.zeros(host.len(), Element::F32)?;
    let (stream, bytes) = (gpu.compute.cu_stream(), array.bytes() as f64);
    let down = fastest(gpu, || {
        // SAFETY: the array is as long as the buffer, which is alive until the wait below.
        unsafe { cudarc::driver::result::memcpy_htod_async(array.pointer(), &host, stream) }
            .map_err(|e| failed("copying to the GPU", &e))
    });
    let up = fastest(gpu, || {
        // SAFETY: as above.
        unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut host, array.pointer(), stream) }
            .map_err(|e| failed("copying from the GPU", &e))
    });
    gpu.unpin(&host)?;
    Ok((bytes / down?, bytes / up?))
}
