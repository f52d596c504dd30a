//! Convolution speed on this machine: GFLOP/s of the forward product, of the weight gradient alone, and of both gradients, by
//! shape.
//!
//! `cargo bench --bench conv [THREADS]`; an operation counts two per multiply-add.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::backend::cpu::conv::{Conv, Convolution, InputCotangent};
use sideways::backend::cpu::{Recycling, Window, back_end, with_threads};

#[global_allocator]
static HEAP: Recycling = Recycling::new();

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
    let mut product = Convolution::new(conv);
    let (gy, kept) = product.forward(&x, &w, None)?;
    let flops = 2.0 * (gy.elem_count() * c * kernel * kernel) as f64 / 1e9;
    let mut sum = Some(product.vjp(x.dims(), kept.clone(), &w, &gy, None, InputCotangent::Skip)?.0);
    let forward = best(|| Ok(product.forward(&x, &w, None)?.0))?;
    let mut vjp = |need_input| {
        best(|| {
            let (gw, _) = product.vjp(x.dims(), kept.clone(), &w, &gy, sum.take(), InputCotangent::new(need_input))?;
            sum = Some(gw.clone());
            Ok(gw)
        })
    };
    let rates = [(forward, 1.0), (vjp(false)?, 1.0), (vjp(true)?, 2.0)];
    let algorithm = product.algorithm(x.dims(), w.dims())?;
    print!("B={b} {side:>3}x{side:<3} {c:>3}->{o:<3} {kernel}x{kernel}/{stride} {:<9}", format!("{algorithm:?}"));
    rates.iter().for_each(|(s, products)| print!(" {:7.3} ms {:6.1} GF/s", s * 1e3, products * flops / s));
    println!();
    Ok(())
}

fn main() -> Result<()> {
    let threads = std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or(1);
    println!("{threads} thread(s), {}: forward, weight gradient, both gradients", back_end());
    with_threads(threads, || {
        measure(4, 112, 3, 64, 3, 1)?;
        measure(4, 56, 64, 128, 3, 1)?;
        measure(4, 28, 128, 256, 3, 1)?;
        measure(4, 28, 256, 256, 3, 1)?;
        measure(4, 14, 256, 512, 3, 1)?;
        measure(4, 14, 512, 512, 3, 1)?;
        measure(4, 112, 3, 64, 7, 2)?;
        measure(4, 28, 64, 64, 3, 1)?;
        measure(4, 28, 64, 128, 3, 2)?;
        measure(4, 28, 64, 128, 1, 2)?;
        measure(4, 14, 128, 128, 3, 1)?;
        measure(4, 7, 256, 256, 3, 1)?;
        measure(4, 4, 512, 512, 3, 1)?;
        measure(16, 16, 12, 16, 3, 1)
    })?
}
