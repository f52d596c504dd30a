//! The GPU's own operators against a copy within its memory of as many bytes: what merely reads and writes should be
//! near 1 (of a copy's bytes a second), and small shapes show what a launch costs.
//!
//! `cargo bench --features cuda --bench cuda_ops`; bfloat16 and 32-bit floats, shapes of `resnet50` and `vgg8`.

use std::time::Instant;

use sideways::Result;
use sideways::backend::cpu::Window;
use sideways::backend::cuda::ops::{self, Norm, NormShape, Over, Parameter, Parameters};
use sideways::backend::cuda::{Array, Element, Gpu};
use sideways::nn::optim::OptimizerSpec;

/// Seconds of one call: the best of some batches of 20 in a row.
fn best(gpu: &Gpu, f: &dyn Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        gpu.synchronize()?;
        let start = Instant::now();
        (0..20).try_for_each(|_| f())?;
        gpu.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / 20.0);
    }
    Ok(best)
}

/// Prints the time of `f`, which reads and writes `passes` times `x`'s bytes at least, beside a copy's (two passes).
fn line(gpu: &Gpu, name: &str, x: &Array, to: &Array, passes: f64, f: &dyn Fn() -> Result<()>) -> Result<()> {
    let (copy, own) = (best(gpu, &|| gpu.copy(x, to))?, best(gpu, f)?);
    let rate = passes * x.bytes() as f64 / own;
    println!("  {name:<22} {:8.1} us {:7.0} GB/s {:5.2} of a copy", own * 1e6, rate / 1e9, passes / 2.0 * copy / own);
    Ok(())
}

fn shape(gpu: &Gpu, element: Element, [b, h, w, c]: [usize; 4]) -> Result<()> {
    let n = b * h * w * c;
    println!("{element:?} [{b}, {h}, {w}, {c}], {:.1} MiB", (n * element.size()) as f64 / f64::from(1 << 20));
    let array = || {
        let array = gpu.array(n, element)?;
        ops::fill(gpu, &array, 0.5)?;
        Result::Ok(array)
    };
    let (x, y, gy, gx) = (array()?, array()?, array()?, array()?);
    let floats = |n| gpu.zeros(n, Element::F32);
    let shape = NormShape { samples: b, rows: h * w, channels: c };
    let rows = b * h * w;
    let scratch = floats(ops::norm_scratch(&shape).max(ops::bias_gradient_scratch(rows, c)))?;
    let (weight, bias, statistics) = (floats(c)?, floats(c)?, floats(b * 32 * 2)?);
    let (gw, gb) = (floats(c)?, floats(c)?);
    let norm = Norm {
        shape,
        over: Over::Groups(32),
        epsilon: 1e-5,
        relu: true,
        weight: &weight,
        bias: &bias,
        statistics: &statistics,
        scratch: &scratch,
    };
    line(gpu, "relu", &x, &gx, 2.0, &|| ops::relu(gpu, &x, &y))?;
    line(gpu, "add_relu", &x, &gx, 3.0, &|| ops::add_relu(gpu, &x, &gy, &y))?;
    line(gpu, "group norm, relu", &x, &gx, 2.0, &|| norm.forward(gpu, &x, &y))?;
    line(gpu, "its vjp", &x, &gx, 3.0, &|| norm.vjp(gpu, &x, &gy, Some(&gx), [&gw, &gb]))?;
    line(gpu, "bias, relu", &x, &gx, 2.0, &|| ops::bias_relu(gpu, &y, &bias, c))?;
    line(gpu, "its vjp", &x, &gx, 3.0, &|| ops::bias_relu_vjp(gpu, &y, &gy, &gx, &gb, c, &scratch))?;
    let (window, dims) = (Window::square(2, 2, 0), [b, h, w, c]);
    let small = gpu.zeros(b * (h / 2) * (w / 2) * c, element)?;
    let winners = floats(small.len().div_ceil(4))?;
    line(gpu, "max pool 2x2", &x, &gx, 1.25, &|| ops::max_pool(gpu, dims, &window, &x, &small, &winners))?;
    line(gpu, "its vjp", &x, &gx, 1.25, &|| ops::max_pool_vjp(gpu, dims, &window, &winners, &small, &gx))
}

fn updates(gpu: &Gpu) -> Result<()> {
    let n = 25 << 20;
    println!("AdamW of {n} parameters with bfloat16 copies");
    let spec = OptimizerSpec::default();
    let floats = || gpu.zeros(n, Element::F32);
    let (value, gradient, buffers, rounded) =
        (floats()?, floats()?, [floats()?, floats()?], gpu.zeros(n, Element::Bf16)?);
    let buffers: Vec<&Array> = buffers.iter().collect();
    let (rounded, decays, average) = (Some(&rounded), true, None);
    let parameter = Parameter { value: &value, gradient: &gradient, buffers: &buffers, rounded, decays, average };
    let all = Parameters::new(gpu, &spec, &[parameter])?;
    let other = floats()?;
    line(gpu, "norm", &value, &other, 1.0, &|| all.norm(gpu, 1.0, None))?;
    line(gpu, "step", &value, &other, 8.5, &|| all.step(gpu, &spec, 1.0, 1))
}

fn main() -> Result<()> {
    let gpu = Gpu::open(0, false)?;
    gpu.bind()?;
    println!("{}", gpu.name());
    for element in [Element::Bf16, Element::F32] {
        for b in [4, 16, 64] {
            for dims in [[b, 112, 112, 64], [b, 56, 56, 256], [b, 28, 28, 512], [b, 14, 14, 1024], [b, 8, 8, 2048]] {
                shape(&gpu, element, dims)?;
            }
        }
    }
    updates(&gpu)
}
