//! Convolution speed on this machine: GFLOP/s of the forward product and of both gradients, by shape.
//!
//! `cargo bench --bench conv [THREADS]`; an operation counts two per multiply-add.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::kernels::conv::{self, Conv};
use sideways::kernels::{Window, keep_freed_memory, with_threads};

/// Best of several calls, in seconds.
fn best(mut f: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        f()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn measure(b: usize, side: usize, c: usize, o: usize, kernel: usize, stride: usize) -> Result<()> {
    let device = Device::Cpu;
    let conv = Conv { window: Window::square(kernel, stride, kernel / 2), groups: 1 };
    let x = Tensor::randn(0f32, 1., (b, side, side, c), &device)?.to_dtype(DType::F32)?;
    let w = Tensor::randn(0f32, 1., (o, c, kernel, kernel), &device)?;
    let gy = conv::forward(&conv, &x, &w, None)?;
    let flops = 2.0 * (gy.elem_count() * c * kernel * kernel) as f64 / 1e9;
    let rates = [
        best(|| conv::forward(&conv, &x, &w, None))?,
        best(|| conv::input_gradient(&conv, x.dims(), &w, &gy))?,
        best(|| conv::weight_gradient(&conv, &x, w.dims(), &gy))?,
    ];
    print!("B={b} {side:>3}x{side:<3} {c:>3}->{o:<3} {kernel}x{kernel}/{stride} ");
    rates.iter().for_each(|s| print!(" {:7.3} ms {:6.1} GF/s", s * 1e3, flops / s));
    println!();
    Ok(())
}

fn main() -> Result<()> {
    keep_freed_memory();
    let threads = std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or(1);
    println!("{threads} thread(s): forward, input gradient, weight gradient");
    with_threads(threads, || {
        measure(8, 32, 3, 32, 3, 2)?;
        measure(8, 16, 32, 32, 3, 1)?;
        measure(8, 16, 32, 64, 3, 2)?;
        measure(8, 8, 64, 64, 3, 1)?;
        measure(8, 112, 3, 64, 3, 1)?;
        measure(8, 56, 64, 128, 3, 1)?;
        measure(8, 28, 128, 256, 3, 1)?;
        measure(8, 14, 256, 256, 3, 1)?;
        measure(8, 28, 256, 128, 1, 1)
    })?
}
