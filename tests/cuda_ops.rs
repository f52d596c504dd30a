//! The GPU's operators against the CPU's kernels, for both types of activations, on shapes that fill no block evenly.
//!
//! The reference computes in 64-bit floats from the very inputs of the GPU (rounded to bfloat16 where they are). Tolerances:
//! 2e-5 of the largest value of a result for float arithmetic, and for results in bfloat16 half a unit in the last place
//! of each value beside it.

#![cfg(feature = "cuda")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use sideways::Result;
use sideways::cuda::ops::{self, BatchNorm, NormShape, Parameter, Parameters};
use sideways::cuda::{Array, Element, Gpu};
use sideways::kernels::norm::GroupNorm;
use sideways::kernels::{Window, activation, batch_norm, norm, pool, resample};
use sideways::model::loss::{self, PixelLoss};
use sideways::model::param::Param;
use sideways::optim::{Optimizer, OptimizerSpec};

const EPSILON: f64 = 1e-5;
/// `[B, H, W, C]`: odd everywhere; channels for vectors of 4 and of 8; many rows; more channels than a block's columns.
const SHAPES: [[usize; 4]; 8] = [
    [2, 5, 7, 3],
    [3, 9, 4, 8],
    [1, 33, 17, 64],
    [2, 3, 5, 20],
    [4, 40, 41, 8],
    [2, 6, 5, 296],
    [3, 4, 5, 64],
    [2, 3, 3, 512],
];

fn random(n: usize, seed: u64) -> Vec<f32> {
    StandardNormal.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(n).collect()
}

/// The GPU with one type of activations.
struct On {
    gpu: Arc<Gpu>,
    element: Element,
}

impl On {
    /// Runs `test` for both types.
    fn each(test: impl Fn(&On) -> Result<()>) -> Result<()> {
        let gpu = Gpu::open(0, false).expect("these tests need a GPU, or the emulator (tests/cuda-emulator/README.md)");
        gpu.bind()?;
        for element in [Element::F32, Element::Bf16] {
            test(&On { gpu: gpu.clone(), element })?;
        }
        Ok(())
    }

    /// Random values that activations can have.
    fn random(&self, n: usize, seed: u64) -> Vec<f32> {
        self.rounded(random(n, seed))
    }

    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        if self.element == Element::Bf16 {
            values.iter_mut().for_each(|v| *v = bf16(*v));
        }
        values
    }

    fn up(&self, values: &[f32]) -> Result<Array> {
        let (wide, array) = (self.gpu.upload(values)?, self.empty(values.len())?);
        ops::from_f32(&self.gpu, &wide, &array)?;
        self.gpu.synchronize()?;
        Ok(array)
    }

    /// An array whose every element is to be written.
    fn empty(&self, n: usize) -> Result<Array> {
        let array = self.gpu.array(n, self.element)?;
        ops::fill(&self.gpu, &array, f32::NAN)?;
        Ok(array)
    }

    fn floats(&self, n: usize) -> Result<Array> {
        let array = self.gpu.array(n.max(1), Element::F32)?;
        ops::fill(&self.gpu, &array, f32::NAN)?;
        Ok(array)
    }

    fn down(&self, array: &Array) -> Result<Vec<f32>> {
        let wide = self.gpu.array(array.len(), Element::F32)?;
        ops::to_f32(&self.gpu, array, &wide)?;
        self.gpu.download(&wide)
    }

    /// Fails where the activations in `array` are not `expected`.
    #[track_caller]
    fn same(&self, what: &str, array: &Array, expected: &Tensor) {
        let found = self.down(array).expect("activations");
        close(&format!("{what} ({:?})", self.element), &found, expected, self.element);
    }

    /// The same for sums in floats.
    #[track_caller]
    fn sums(&self, what: &str, array: &Array, expected: &Tensor) {
        let found = self.gpu.download(array).expect("floats");
        close(&format!("{what} ({:?})", self.element), &found, expected, Element::F32);
    }
}

fn bf16(v: f32) -> f32 {
    let bits = v.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

fn tensor(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
    Ok(Tensor::from_vec(wide, shape, &Device::Cpu)?)
}

fn list(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1()).expect("values")
}

#[track_caller]
fn close(what: &str, found: &[f32], expected: &Tensor, element: Element) {
    let expected = list(expected);
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (&f, &e)) in found.iter().zip(&expected).enumerate() {
        let last_place = if element == Element::Bf16 { e.abs() / 256.0 } else { 0.0 };
        let error = (f64::from(f) - e).abs();
        assert!(error <= 2e-5 * largest + last_place, "{what}: element {i} is {f}, not {e}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Labels as the GPU has them.
fn integers(gpu: &Gpu, values: &[i32]) -> Result<Array> {
    gpu.upload(&values.iter().map(|&v| f32::from_bits(v as u32)).collect::<Vec<_>>())
}

#[test]
fn elementwise() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for n in [1, 7, 8, 255, 2048, 5003, 9001] {
            let (a, b) = (on.random(n, 1), on.random(n, 2));
            let (x, z) = (on.up(&a)?, on.up(&b)?);
            let (ta, tb) = (tensor(&a, &[n])?, tensor(&b, &[n])?);
            let y = on.empty(n)?;
            ops::relu(gpu, &x, &y)?;
            on.same("relu", &y, &activation::relu(&ta)?);
            let gx = on.empty(n)?;
            ops::relu_vjp(gpu, &y, &z, &gx)?;
            on.same("relu_vjp", &gx, &activation::relu_vjp(&ta, &tb)?);
            ops::add(gpu, &x, &z, &y)?;
            on.same("add", &y, &activation::add(&ta, &tb)?);
            ops::add_relu(gpu, &x, &z, &y)?;
            on.same("add_relu", &y, &activation::add_relu(&ta, &tb)?);
            ops::gelu(gpu, &x, &y)?;
            on.same("gelu", &y, &activation::gelu(&ta)?);
            ops::gelu_vjp(gpu, &x, &z, &y)?;
            on.same("gelu_vjp", &y, &activation::gelu_vjp(&ta, &tb)?);
            let sum = gpu.upload(&random(n, 3))?;
            let other = on.floats(3)?;
            gpu.write(&other, &[1.0, 2.0, 3.0])?;
            let pairs = [(x.clone(), sum.clone()), (on.up(&[0.5, 0.5, 0.5])?, other.clone())];
            ops::Accumulation::new(gpu, &pairs)?.launch(gpu)?;
            on.sums("accumulated", &sum, &(tensor(&random(n, 3), &[n])? + &ta)?);
            assert_eq!(on.down(&other)?, [1.5, 2.5, 3.5]);
            // In place.
            ops::add_to(gpu, &x, &z)?;
            on.same("add_to", &z, &(&ta + &tb)?);
            ops::relu(gpu, &x, &x)?;
            on.same("relu in place", &x, &activation::relu(&ta)?);
            ops::fill(gpu, &x, 3.5)?;
            assert!(on.down(&x)?.iter().all(|&v| v == 3.5));
        }
        Ok(())
    })
}

#[test]
fn rounding_is_to_nearest_even_and_what_is_no_number_stays_none() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        let mut values = vec![0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, 1e-40, f32::INFINITY, f32::NEG_INFINITY];
        // Ties both ways, and neighbours of ties.
        values.extend([0x3f80_8000u32, 0x3f81_8000, 0x3f80_8001, 0x3f81_7fff].map(f32::from_bits));
        values.extend(random(1000, 4));
        let found = on.down(&on.up(&values)?)?;
        assert_eq!(bits(&found), bits(&on.rounded(values)));
        let odd = on.up(&[f32::NAN, -1.0, f32::from_bits(0x7f80_0001), f32::NEG_INFINITY])?;
        ops::relu(gpu, &odd, &odd)?;
        let found = on.down(&odd)?;
        assert!(found[0].is_nan() && found[2].is_nan() && found[1] == 0.0 && found[3] == 0.0, "{found:?}");
        Ok(())
    })
}

#[test]
fn dropout_has_the_cpus_masks() -> Result<()> {
    On::each(|on| {
        let n = 5003;
        let (x, y, keys) = (on.random(n, 5), on.empty(n)?, on.gpu.zeros(12, Element::F32)?);
        let device = on.up(&x)?;
        ops::set_words(&on.gpu, &keys, 0, &[1, 2, 3, 4])?;
        ops::set_words(&on.gpu, &keys, 4, &[u64::MAX, 0x0123_4567_89ab_cdef])?;
        for (index, key, rate) in [(2, 3, 0.5), (4, u64::MAX, 0.1), (5, 0x0123_4567_89ab_cdef, 0.9), (0, 1, 0.0)] {
            ops::dropout(&on.gpu, &device, &y, rate, &keys, index)?;
            let expected = activation::dropout(&tensor(&x, &[n])?, rate, key)?;
            on.same("dropout", &y, &expected);
            let zeros = on.down(&y)?.iter().map(|&v| v == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros, list(&expected).iter().map(|&v| v == 0.0).collect::<Vec<_>>());
        }
        assert!(ops::dropout(&on.gpu, &device, &y, 0.5, &keys, 6).is_err());
        Ok(())
    })
}

#[test]
fn the_guard_finds_and_clears() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for n in [5, 2048, 700_001] {
            let scratch = on.floats(ops::guard_scratch(n))?;
            let flag = gpu.zeros(1, Element::F32)?;
            let good = on.random(n, 6);
            let x = on.up(&good)?;
            ops::guard(gpu, &x, &flag, &scratch, true)?;
            assert_eq!(gpu.download(&flag)?, [0.0]);
            assert_eq!(bits(&on.down(&x)?), bits(&good));
            for (round, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                let mut values = good.clone();
                values[n - 1 - round] = bad;
                let x = on.up(&values)?;
                ops::guard(gpu, &x, &flag, &scratch, false)?;
                assert_eq!(gpu.download(&flag)?, [2.0 * round as f32 + 1.0]);
                assert_eq!(on.down(&x)?[0], good[0]);
                ops::guard(gpu, &x, &flag, &scratch, true)?;
                assert_eq!(gpu.download(&flag)?, [2.0 * round as f32 + 2.0]);
                assert!(on.down(&x)?.iter().all(|&v| v == 0.0));
            }
        }
        Ok(())
    })
}

#[test]
fn biases_and_their_gradients() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for (rows, c) in [(1, 1), (35, 3), (1000, 8), (5003, 64), (77, 100), (9, 2048), (4700, 1000)] {
            let (x, b, start) = (on.random(rows * c, 7), random(c, 8), random(c, 9));
            let (tx, tb) = (tensor(&x, &[rows, c])?, tensor(&b, &[c])?);
            let bias = gpu.upload(&b)?;
            for relu in [false, true] {
                let y = on.up(&x)?;
                let expected = tx.broadcast_add(&tb)?;
                match relu {
                    false => ops::bias(gpu, &y, &bias, c)?,
                    true => ops::bias_relu(gpu, &y, &bias, c)?,
                }
                on.same("bias", &y, &if relu { activation::relu(&expected)? } else { expected });
            }
            let scratch = on.floats(ops::bias_gradient_scratch(rows, c))?;
            let (y, gy, gb) = (on.random(rows * c, 18), on.up(&x)?, gpu.upload(&start)?);
            ops::bias_relu_vjp(gpu, &on.up(&y)?, &gy, &gy, &gb, c, &scratch)?;
            let expected = activation::relu_vjp(&tensor(&y, &[rows, c])?, &tx)?;
            on.same("bias_relu_vjp", &gy, &expected);
            on.sums("bias_relu_vjp", &gb, &(expected.sum(0)? + tensor(&start, &[c])?)?);
            let gradient = |scratch: &Array| -> Result<Array> {
                let gb = gpu.upload(&start)?;
                ops::bias_gradient(gpu, &on.up(&x)?, &gb, c, scratch)?;
                Ok(gb)
            };
            let gb = gradient(&scratch)?;
            on.sums("bias gradient", &gb, &(tx.sum(0)? + tensor(&start, &[c])?)?);
            let again = gradient(&scratch)?;
            assert_eq!(bits(&gpu.download(&gb)?), bits(&gpu.download(&again)?));
        }
        Ok(())
    })
}

#[test]
fn channels_are_put_and_got() -> Result<()> {
    On::each(|on| {
        let rows = 37;
        for parts in [vec![3, 4, 1], vec![8, 16], vec![5], vec![16, 8, 40]] {
            let c: usize = parts.iter().sum();
            let whole = on.empty(rows * c)?;
            let mut tensors = Vec::new();
            let mut first = 0;
            for &own in &parts {
                let part = on.random(rows * own, own as u64);
                ops::put_channels(&on.gpu, &on.up(&part)?, &whole, own, c, first)?;
                tensors.push(tensor(&part, &[rows, own])?);
                first += own;
            }
            on.same("put_channels", &whole, &Tensor::cat(&tensors, 1)?);
            first = 0;
            for (&own, expected) in parts.iter().zip(&tensors) {
                let part = on.empty(rows * own)?;
                ops::get_channels(&on.gpu, &whole, &part, own, c, first)?;
                on.same("get_channels", &part, expected);
                assert!(ops::get_channels(&on.gpu, &whole, &part, own, c, c - own + 1).is_err());
                first += own;
            }
        }
        Ok(())
    })
}

/// Arrays of a norm's test.
struct NormCase {
    shape: NormShape,
    x: Vec<f32>,
    gy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    dims: [usize; 4],
}

impl NormCase {
    fn new(on: &On, dims: [usize; 4]) -> Self {
        let [b, h, w, c] = dims;
        let n = b * h * w * c;
        // Far from 0, where a difference of large sums would be seen.
        let x = on.rounded(random(n, 10).into_iter().map(|v| 10.0 + 2.0 * v).collect());
        let shape = NormShape { samples: b, rows: h * w, channels: c };
        NormCase { shape, x, gy: on.random(n, 11), weight: random(c, 12), bias: random(c, 13), dims }
    }

    fn tensors(&self) -> Result<[Tensor; 4]> {
        let c = [self.shape.channels];
        Ok([
            tensor(&self.x, &self.dims)?,
            tensor(&self.gy, &self.dims)?,
            tensor(&self.weight, &c)?,
            tensor(&self.bias, &c)?,
        ])
    }
}

/// The cotangent behind a relu whose output is `y`.
fn through(relu: bool, y: &Tensor, gy: &Tensor) -> Result<Tensor> {
    if relu { activation::relu_vjp(y, gy) } else { Ok(gy.clone()) }
}

#[test]
fn group_norm() -> Result<()> {
    On::each(|on| {
        for (dims, groups) in SHAPES.into_iter().flat_map(|dims| {
            let of = |wanted: &[usize]| wanted.iter().copied().filter(|g| dims[3] % g == 0).collect::<Vec<_>>();
            of(&[1, 3, 4, 8, 74]).into_iter().map(move |g| (dims, g))
        }) {
            group_norm_of(on, dims, groups, &[false, true])?;
        }
        // So many samples that a thread has many rows.
        group_norm_of(on, [270, 12, 12, 136], 4, &[true])
    })
}

fn group_norm_of(on: &On, dims: [usize; 4], groups: usize, relus: &[bool]) -> Result<()> {
    let gpu = &*on.gpu;
    for &relu in relus {
        let case = NormCase::new(on, dims);
        let [x, gy, weight, bias] = case.tensors()?;
        let kind = GroupNorm { groups, epsilon: EPSILON, relu };
        let what = format!("group norm of {dims:?} in {groups}, relu {relu}");
        let (b, c) = (dims[0], dims[3]);
        let (dx, dg) = (on.up(&case.x)?, on.up(&case.gy)?);
        let (dw, db) = (gpu.upload(&case.weight)?, gpu.upload(&case.bias)?);
        let (y, statistics) = (on.empty(case.x.len())?, on.floats(b * groups * 2)?);
        let scratch = on.floats(ops::norm_scratch(&case.shape))?;
        ops::group_norm(gpu, &case.shape, &kind, &dx, &dw, &db, &y, &statistics, &scratch)?;
        let (expected, stats) = norm::group(&x, &weight, &bias, &kind)?;
        on.same(&what, &y, &expected);
        on.sums(&what, &statistics, &stats);
        let (gx, gw, gb) = norm::group_vjp(&x, &weight, &bias, &stats, &gy, &kind, true)?;
        let backward = |gx: Option<&Array>| -> Result<[Array; 2]> {
            let sums = [gpu.upload(&random(c, 14))?, gpu.upload(&random(c, 15))?];
            let [w, b] = &sums;
            ops::group_norm_vjp(gpu, &case.shape, &kind, &dx, &dw, &db, &statistics, &dg, gx, w, b, &scratch)?;
            Ok(sums)
        };
        let without = backward(None)?;
        // In place of the cotangent.
        let with = backward(Some(&dg))?;
        on.same(&format!("{what}: gx"), &dg, &gx.expect("an input's cotangent"));
        for (sums, (g, seed)) in with.iter().zip([(gw, 14), (gb, 15)]) {
            on.sums(&format!("{what}: gradients"), sums, &(g + tensor(&random(c, seed), &[c])?)?);
        }
        for (a, b) in with.iter().zip(&without) {
            assert_eq!(bits(&gpu.download(a)?), bits(&gpu.download(b)?));
        }
    }
    Ok(())
}

#[test]
fn batch_norm_in_training_and_evaluation() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            for relu in [false, true] {
                let case = NormCase::new(on, dims);
                let [x, gy, weight, bias] = case.tensors()?;
                let c = dims[3];
                let kind = BatchNorm { epsilon: EPSILON, momentum: 0.1, relu };
                let what = format!("batch norm of {dims:?}, relu {relu}");
                let (dx, dw, db) = (on.up(&case.x)?, gpu.upload(&case.weight)?, gpu.upload(&case.bias)?);
                let (y, statistics) = (on.empty(case.x.len())?, on.floats(2 * c)?);
                let scratch = on.floats(ops::norm_scratch(&case.shape))?;
                let old = [random(c, 16), random(c, 17).into_iter().map(|v| v * v + 0.5).collect()];
                let running = [gpu.upload(&old[0])?, gpu.upload(&old[1])?];
                let [mean, variance] = &running;
                ops::batch_norm(gpu, &case.shape, &kind, &dx, &dw, &db, mean, variance, &y, &statistics, &scratch)?;
                let stats = batch_norm::statistics(&x)?;
                let plain = batch_norm::apply(&x, &weight, &bias, &stats, EPSILON)?;
                let rectified = |y: &Tensor| if relu { activation::relu(y) } else { Ok(y.clone()) };
                on.same(&what, &y, &rectified(&plain)?);
                let n = (dims[0] * dims[1] * dims[2]) as f64;
                for (k, unbias) in [(0, 1.0), (1, n / (n - 1.0))] {
                    let blend =
                        (tensor(&old[k], &[c])?.affine(0.9, 0.0)? + stats.get(k)?.affine(0.1 * unbias, 0.0)?)?;
                    on.sums(&format!("{what}: running"), &running[k], &blend);
                }
                let check = |what: &str, gx: &Array, sums: &[Array; 2], stats: &Tensor, plain: &Tensor, of_batch| {
                    let g = through(relu, plain, &gy)?;
                    let (tx, tw, tb) = batch_norm::vjp(&x, &weight, stats, &g, EPSILON, of_batch, true)?;
                    on.same(&format!("{what}: gx"), gx, &tx.expect("an input's cotangent"));
                    on.sums(&format!("{what}: gw"), &sums[0], &tw);
                    on.sums(&format!("{what}: gb"), &sums[1], &tb);
                    Result::Ok(())
                };
                let zeros = || Result::Ok([gpu.zeros(c, Element::F32)?, gpu.zeros(c, Element::F32)?]);
                let (gx, sums) = (on.up(&case.gy)?, zeros()?);
                let [w, b] = &sums;
                ops::batch_norm_vjp(
                    gpu,
                    &case.shape,
                    &kind,
                    &dx,
                    &dw,
                    &db,
                    &statistics,
                    &gx,
                    Some(&gx),
                    w,
                    b,
                    &scratch,
                )?;
                check(&what, &gx, &sums, &stats, &plain, true)?;

                let what = format!("{what}, by running statistics");
                let found = [gpu.download(mean)?, gpu.download(variance)?];
                ops::running_norm(gpu, &case.shape, &kind, &dx, &dw, &db, mean, variance, &y, &statistics, &scratch)?;
                assert_eq!(bits(&gpu.download(mean)?), bits(&found[0]));
                let stats = tensor(&found.concat(), &[2, c])?;
                let plain = batch_norm::apply(&x, &weight, &bias, &stats, EPSILON)?;
                on.same(&what, &y, &rectified(&plain)?);
                let (gx, sums) = (on.up(&case.gy)?, zeros()?);
                let [w, b] = &sums;
                ops::running_norm_vjp(
                    gpu,
                    &case.shape,
                    &kind,
                    &dx,
                    &dw,
                    &db,
                    &statistics,
                    &gx,
                    Some(&gx),
                    w,
                    b,
                    &scratch,
                )?;
                check(&what, &gx, &sums, &stats, &plain, false)?;
            }
        }
        let one = NormShape { samples: 1, rows: 1, channels: 4 };
        let (x, c) = (on.empty(4)?, on.floats(8)?);
        let kind = BatchNorm { epsilon: EPSILON, momentum: 0.1, relu: false };
        let error = ops::batch_norm(gpu, &one, &kind, &x, &c, &c, &c, &c, &x, &c, &c).unwrap_err();
        assert!(error.to_string().contains("more than one value"), "{error}");
        Ok(())
    })
}

fn windows(dims: [usize; 4]) -> Vec<Window> {
    let tall = Window { kernel: [3, 2], stride: [1, 2], padding: [1, 0] };
    let all =
        [Window::square(2, 2, 0), Window::square(3, 2, 1), Window::square(3, 1, 1), Window::square(2, 3, 1), tall];
    all.into_iter().filter(|w| w.output(dims[1], dims[2]).is_ok()).collect()
}

#[test]
fn pools_over_windows() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            let n: usize = dims.iter().product();
            let mut x = on.random(n, 20);
            // Ties, and what is no number.
            x.iter_mut().step_by(3).for_each(|v| *v = 1.0);
            x[n / 2] = f32::NAN;
            let dx = on.up(&x)?;
            let input = tensor(&x, &dims)?;
            let finite: Vec<f32> = x.iter().map(|&v| if v.is_nan() { 2.0 } else { v }).collect();
            let (df, ordinary) = (on.up(&finite)?, tensor(&finite, &dims)?);
            for window in windows(dims) {
                let what = format!("{window:?} over {dims:?}");
                let [oh, ow] = window.output(dims[1], dims[2])?;
                let outputs = dims[0] * oh * ow * dims[3];
                let (y, winners, gx) = (on.empty(outputs)?, on.floats(outputs.div_ceil(4))?, on.empty(n)?);
                ops::max_pool(gpu, dims, &window, &dx, &y, &winners)?;
                let (expected, taps) = pool::max(&input, &window)?;
                let (found, expected) = (on.down(&y)?, list(&expected));
                let same = |(&f, &e): (&f32, &f64)| f64::from(f) == e || f.is_nan() && e.is_nan();
                assert!(found.iter().zip(&expected).all(same), "max pool {what} ({:?})", on.element);
                let bytes = gpu.download(&winners)?.iter().flat_map(|w| w.to_bits().to_le_bytes()).collect::<Vec<_>>();
                assert_eq!(bytes[..outputs], taps.flatten_all()?.to_vec1::<u8>()?, "max pool {what}");
                let g = on.random(outputs, 21);
                let (dg, gy) = (on.up(&g)?, tensor(&g, &[dims[0], oh, ow, dims[3]])?);
                ops::max_pool_vjp(gpu, dims, &window, &winners, &dg, &gx)?;
                on.same(&format!("max pool's vjp {what}"), &gx, &pool::max_vjp(&dims, &window, &taps, &gy)?);
                ops::average_pool(gpu, dims, &window, &df, &y)?;
                on.same(&format!("average pool {what}"), &y, &pool::average(&ordinary, &window)?);
                ops::average_pool_vjp(gpu, dims, &window, &dg, &gx)?;
                on.same(&format!("average pool's vjp {what}"), &gx, &pool::average_vjp(&dims, &window, &gy)?);
            }
        }
        Ok(())
    })
}

#[test]
fn global_pools_and_upsampling() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            let [b, h, w, c] = dims;
            let n = b * h * w * c;
            let x = on.random(n, 22);
            let (dx, input) = (on.up(&x)?, tensor(&x, &dims)?);
            let (y, gx) = (on.empty(b * c)?, on.empty(n)?);
            ops::global_average(gpu, dims, &dx, &y)?;
            on.same(&format!("global average of {dims:?}"), &y, &pool::global_average(&input)?);
            let g = on.random(b * c, 23);
            ops::global_average_vjp(gpu, dims, &on.up(&g)?, &gx)?;
            let expected = pool::global_average_vjp(&dims, &tensor(&g, &[b, 1, 1, c])?)?;
            on.same(&format!("global average's vjp of {dims:?}"), &gx, &expected);
            for factor in [1, 2, 3] {
                let many = n * factor * factor;
                let y = on.empty(many)?;
                ops::upsample(gpu, dims, factor, &dx, &y)?;
                on.same(&format!("upsample of {dims:?}"), &y, &resample::upsample(&input, factor)?);
                let g = on.random(many, 24);
                ops::upsample_vjp(gpu, dims, factor, &on.up(&g)?, &gx)?;
                let gy = tensor(&g, &[b, h * factor, w * factor, c])?;
                on.same(&format!("upsample's vjp of {dims:?}"), &gx, &resample::upsample_vjp(&gy, factor)?);
            }
        }
        Ok(())
    })
}

#[test]
fn cross_entropy() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for (b, k) in [(1, 2), (5, 7), (9, 400), (64, 101)] {
            // Large enough for their exponentials to overflow.
            let logits = on.rounded(random(b * k, 25).into_iter().map(|v| 4.0 * v + 200.0).collect());
            for padded in [0, 1, b] {
                let labels: Vec<i32> = (0..b).map(|i| if i >= b - padded { -1 } else { (i * 31 % k) as i32 }).collect();
                let x = on.up(&logits)?;
                let (gradient, sum) = (on.empty(b * k)?, gpu.upload(&random(b * k, 26))?);
                let (score, scratch) = (gpu.upload(&[10.0, 3.0])?, on.floats(ops::loss_scratch(b * k, b))?);
                let on_gpu = integers(gpu, &labels)?;
                ops::cross_entropy(gpu, &x, &on_gpu, Some(&gradient), Some(&sum), &score, &scratch)?;
                let t = tensor(&logits, &[b, 1, 1, k])?;
                let (mean, g) = loss::cross_entropy(&t, &labels)?;
                let what = format!("cross-entropy of {b} x {k}, {padded} padded");
                on.same(&what, &gradient, &g);
                let flat = t.flatten_all()?;
                on.sums(&what, &sum, &(flat + tensor(&random(b * k, 26), &[b * k])?)?);
                let counted = (b - padded) as f64;
                let expected = Tensor::new(&[10.0 + mean * counted, 3.0 + counted], &Device::Cpu)?;
                on.sums(&what, &score, &expected);
                ops::cross_entropy(gpu, &x, &on_gpu, None, None, &score, &scratch)?;
                on.sums(
                    &what,
                    &score,
                    &Tensor::new(&[10.0 + 2.0 * mean * counted, 3.0 + 2.0 * counted], &Device::Cpu)?,
                );
            }
        }
        // What is not finite, and a label that is no class, must show.
        for (logits, label) in [([0.0, f32::NAN, 1.0], 0), ([0.0, 1.0, 2.0], 3), ([f32::INFINITY, 0.0, 0.0], 1)] {
            let (score, scratch) = (gpu.zeros(2, Element::F32)?, on.floats(ops::loss_scratch(3, 1))?);
            ops::cross_entropy(gpu, &on.up(&logits)?, &integers(gpu, &[label])?, None, None, &score, &scratch)?;
            assert!(!gpu.download(&score)?[0].is_finite());
        }
        Ok(())
    })
}

#[test]
fn pixel_losses() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in [[4, 5, 7, 3], [3, 8, 8, 8], [2, 50, 50, 16]] {
            let (n, b) = (dims.iter().product::<usize>(), dims[0]);
            let output = on.random(n, 27);
            let wide = random(n, 28);
            for (kind, narrow) in
                [(PixelLoss::Squared, false), (PixelLoss::Absolute, false), (PixelLoss::Squared, true)]
            {
                let mut target = if narrow { on.rounded(wide.clone()) } else { wide.clone() };
                target[5] = output[5];
                // The last sample is left out by its target, the one before by its label.
                let mut labels = vec![0; b];
                labels[b - 2] = -1;
                let mut masked = target.clone();
                masked[n / b * (b - 1)] = f32::NAN;
                let on_gpu = integers(gpu, &labels)?;
                labels[b - 1] = -1;
                let goal = if narrow { on.up(&masked)? } else { gpu.upload(&masked)? };
                let (gradient, x) = (on.empty(n)?, on.up(&output)?);
                let (score, scratch) = (gpu.zeros(2, Element::F32)?, on.floats(ops::loss_scratch(n, b))?);
                ops::pixel(gpu, kind, &x, &goal, &on_gpu, Some(&gradient), &score, &scratch)?;
                let (mean, g) = loss::pixel(kind, &tensor(&output, &dims)?, &tensor(&target, &dims)?, &labels)?;
                let what = format!("{kind:?} loss of {dims:?}");
                on.same(&what, &gradient, &g);
                let counted = (b - 2) as f64;
                on.sums(&what, &score, &Tensor::new(&[mean * counted, counted], &Device::Cpu)?);
                let left: Vec<i32> = gpu.download(&on_gpu)?.iter().map(|v| v.to_bits() as i32).collect();
                assert_eq!(left, labels, "{what}");
            }
        }
        Ok(())
    })
}

fn rule(text: &str) -> OptimizerSpec {
    toml::from_str(&text.replace(", ", "\n")).expect("a valid optimiser")
}

/// Rules with every option; three steps with a schedule, a divisor, and clipping (first the norm is too large, then near
/// enough), on parameters below, at and above a block's share.
#[test]
fn updates_are_the_cpus() -> Result<()> {
    let gpu = Gpu::open(0, false).expect("these tests need a GPU, or the emulator (tests/cuda-emulator/README.md)");
    gpu.bind()?;
    let sizes = [3, 4096, 10_007];
    for text in [
        r#"kind = "sgd", lr = 0.1, weight_decay = 0.05"#,
        r#"kind = "sgd", lr = 0.1, momentum = 0.9"#,
        r#"kind = "sgd", lr = 0.1, momentum = 0.9, weight_decay = 0.05, nesterov = true"#,
        r#"kind = "adamw", lr = 0.01, weight_decay = 0.2"#,
        r#"kind = "rmsprop", lr = 0.01"#,
        r#"kind = "rmsprop", lr = 0.01, momentum = 0.7, weight_decay = 0.1"#,
    ] {
        let spec = rule(text);
        let mut host = Optimizer::new(spec);
        let mut params: Vec<Param> = Vec::new();
        let (mut values, mut gradients, mut buffers, mut rounded) = (vec![], vec![], vec![], vec![]);
        let number = if text.contains("adamw") || text.contains("rmsprop") && text.contains("momentum") {
            2
        } else if text.contains("momentum") || text.contains("rmsprop") {
            1
        } else {
            0
        };
        for (i, &n) in sizes.iter().enumerate() {
            let value = random(n, 30 + i as u64);
            let t = Tensor::from_vec(value.clone(), n, &Device::Cpu)?;
            params.push(Param { name: format!("p{i}"), value: t, grad: None, trainable: true });
            values.push(gpu.upload(&value)?);
            gradients.push(gpu.zeros(n, Element::F32)?);
            buffers.push((0..number).map(|_| gpu.zeros(n, Element::F32)).collect::<Result<Vec<_>>>()?);
            rounded.push(gpu.zeros(n, Element::Bf16)?);
        }
        let of: Vec<Vec<&Array>> = buffers.iter().map(|b| b.iter().collect()).collect();
        let parameters: Vec<Parameter> = (0..sizes.len())
            .map(|i| Parameter {
                value: &values[i],
                gradient: &gradients[i],
                buffers: &of[i],
                rounded: (i != 1).then_some(&rounded[i]),
            })
            .collect();
        let table = Parameters::new(&gpu, &spec, &parameters)?;
        let check = |params: &[Param], what: &str| -> Result<()> {
            for (i, p) in params.iter().enumerate() {
                let found = gpu.download(&values[i])?;
                close(&format!("{text}, {what}, parameter {i}"), &found, &p.value, Element::F32);
                let copy = gpu.array(sizes[i], Element::F32)?;
                ops::to_f32(&gpu, &rounded[i], &copy)?;
                let expected: Vec<f32> = found.iter().map(|&v| if i == 1 { 0.0 } else { bf16(v) }).collect();
                assert_eq!(bits(&gpu.download(&copy)?), bits(&expected), "{text}: rounded copies");
            }
            Ok(())
        };
        for (step, (scale, divisor, clip)) in
            [(1.0, 1.0, None), (0.5, 4.0, Some(10.0)), (0.25, 2.0, Some(80.0))].iter().enumerate()
        {
            for (i, p) in params.iter_mut().enumerate() {
                let g = random(sizes[i], 100 + (10 * step + i) as u64);
                gpu.write(&gradients[i], &g)?;
                p.accumulate(Tensor::from_vec(g, sizes[i], &Device::Cpu)?)?;
            }
            table.norm(&gpu, *divisor, *clip)?;
            table.step(&gpu, &spec, *scale, step as u64 + 1)?;
            let stats = host.step(&mut |f| params.iter_mut().try_for_each(&mut *f), *scale, *divisor, *clip)?;
            let state = gpu.download(table.state())?;
            assert!((f64::from(state[0]) / stats.grad_norm - 1.0).abs() < 1e-6 && state[2] == 1.0, "{state:?}");
            check(&params, &format!("step {step}"))?;
            for g in &gradients {
                assert!(gpu.download(g)?.iter().all(|&v| v == 0.0), "gradients are cleared");
            }
        }
        for ((_, host), device) in host.state()?.iter().filter(|(n, _)| !n.ends_with(".step")).zip(of.iter().flatten())
        {
            close(&format!("{text}: buffers"), &gpu.download(device)?, host, Element::F32);
        }
        // A gradient that is not finite changes nothing.
        let mut bad = vec![1.0; sizes[2]];
        bad[sizes[2] - 1] = f32::INFINITY;
        gpu.write(&gradients[0], &[1.0; 3])?;
        gpu.write(&gradients[2], &bad)?;
        let before: Vec<_> = values.iter().map(|v| gpu.download(v)).collect::<Result<_>>()?;
        table.norm(&gpu, 1.0, Some(1.0))?;
        table.step(&gpu, &spec, 1.0, 4)?;
        assert_eq!(gpu.download(table.state())?[2], 0.0);
        for (v, before) in values.iter().zip(&before) {
            assert_eq!(bits(&gpu.download(v)?), bits(before), "{text}: nothing changes");
        }
        assert_eq!(bits(&gpu.download(&gradients[2])?), bits(&bad));
    }
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_are_refused() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        let (a, b, c) = (on.empty(12)?, on.empty(11)?, on.floats(3)?);
        let scratch = on.floats(1)?;
        let dims = [1, 2, 2, 3];
        let shape = NormShape { samples: 1, rows: 4, channels: 3 };
        let kind = GroupNorm { groups: 2, epsilon: EPSILON, relu: false };
        let errors = [
            ops::relu(gpu, &a, &b).unwrap_err(),
            ops::add(gpu, &a, &b, &a).unwrap_err(),
            ops::add_to(gpu, &b, &a).unwrap_err(),
            ops::from_f32(gpu, &c, &a).unwrap_err(),
            ops::Accumulation::new(gpu, &[(a.clone(), c.clone())]).unwrap_err(),
            ops::bias(gpu, &b, &c, 3).unwrap_err(),
            ops::bias(gpu, &a, &c, 4).unwrap_err(),
            ops::group_norm(gpu, &shape, &kind, &a, &c, &c, &a, &c, &scratch).unwrap_err(),
            ops::max_pool(gpu, dims, &Window::square(3, 1, 0), &a, &b, &c).unwrap_err(),
            ops::average_pool(gpu, dims, &Window::square(2, 1, 0), &a, &b).unwrap_err(),
            ops::global_average(gpu, dims, &a, &b).unwrap_err(),
            ops::upsample(gpu, dims, 0, &a, &a).unwrap_err(),
            ops::cross_entropy(gpu, &b, &c, None, None, &c, &scratch).unwrap_err(),
            ops::set_words(gpu, &c, 0, &[1, 2]).unwrap_err(),
        ];
        assert!(errors.iter().all(|e| !e.to_string().is_empty()));
        Ok(())
    })
}
