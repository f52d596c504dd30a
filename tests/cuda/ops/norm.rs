//! Group norms and batch norms.

use candle_core::Tensor;
use sideways::Result;
use sideways::backend::cpu::norm::GroupNorm;
use sideways::backend::cpu::{activation, batch_norm, norm as host};
use sideways::backend::cuda::ops::{self, Norm, NormShape, Over};
use sideways::backend::cuda::{Array, Element};

use super::{EPSILON, On, SHAPES, bits, random, tensor};

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

    fn norm<'a>(
        &self,
        over: Over<'a>,
        relu: bool,
        [weight, bias]: [&'a Array; 2],
        statistics: &'a Array,
        scratch: &'a Array,
    ) -> Norm<'a> {
        Norm { shape: self.shape, over, epsilon: EPSILON, relu, weight, bias, statistics, scratch }
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
        let norm = case.norm(Over::Groups(groups), relu, [&dw, &db], &statistics, &scratch);
        norm.forward(gpu, &dx, &y)?;
        let (expected, stats) = host::group(&x, &weight, &bias, &kind)?;
        on.same(&what, &y, &expected);
        on.sums(&what, &statistics, &stats);
        let (gx, gw, gb) = host::group_vjp(&x, &weight, &bias, &stats, &gy, &kind, true)?;
        let backward = |gx: Option<&Array>| -> Result<[Array; 2]> {
            let sums = [gpu.upload(&random(c, 14))?, gpu.upload(&random(c, 15))?];
            norm.vjp(gpu, &dx, &dg, gx, sums.each_ref())?;
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
                let what = format!("batch norm of {dims:?}, relu {relu}");
                let (dx, dw, db) = (on.up(&case.x)?, gpu.upload(&case.weight)?, gpu.upload(&case.bias)?);
                let (y, statistics) = (on.empty(case.x.len())?, on.floats(2 * c)?);
                let scratch = on.floats(ops::norm_scratch(&case.shape))?;
                let old = [random(c, 16), random(c, 17).into_iter().map(|v| v * v + 0.5).collect()];
                let running = [gpu.upload(&old[0])?, gpu.upload(&old[1])?];
                let [mean, variance] = &running;
                let over = Over::Batch { running: [mean, variance], momentum: 0.1 };
                let of_batch = case.norm(over, relu, [&dw, &db], &statistics, &scratch);
                of_batch.forward(gpu, &dx, &y)?;
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
                of_batch.vjp(gpu, &dx, &gx, Some(&gx), sums.each_ref())?;
                check(&what, &gx, &sums, &stats, &plain, true)?;

                let what = format!("{what}, by running statistics");
                let found = [gpu.download(mean)?, gpu.download(variance)?];
                let by_running = Norm { over: Over::Running([mean, variance]), ..of_batch };
                by_running.forward(gpu, &dx, &y)?;
                assert_eq!(bits(&gpu.download(mean)?), bits(&found[0]));
                let stats = tensor(&found.concat(), &[2, c])?;
                let plain = batch_norm::apply(&x, &weight, &bias, &stats, EPSILON)?;
                on.same(&what, &y, &rectified(&plain)?);
                let (gx, sums) = (on.up(&case.gy)?, zeros()?);
                by_running.vjp(gpu, &dx, &gx, Some(&gx), sums.each_ref())?;
                check(&what, &gx, &sums, &stats, &plain, false)?;
            }
        }
        let one = NormShape { samples: 1, rows: 1, channels: 4 };
        let case = NormCase::new(on, [1, 1, 1, 4]);
        let (x, c, statistics) = (on.empty(4)?, on.floats(4)?, on.floats(8)?);
        let scratch = on.floats(ops::norm_scratch(&one))?;
        let over = Over::Batch { running: [&c, &c], momentum: 0.1 };
        let error = case.norm(over, false, [&c, &c], &statistics, &scratch).forward(gpu, &x, &x).unwrap_err();
        assert!(error.to_string().contains("more than one value"), "{error}");
        Ok(())
    })
}
