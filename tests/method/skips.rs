//! Skips between modules of other heights and widths: values and products against literals (`tests/reference/skips.py`), the ratios of
//! before to the bit, any number of threads, and networks that have such skips.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::backend::cpu::{Window, pool, resample, with_threads};
use sideways::config::Config;
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::module::{Fuse, Module, SkipInput, pool_for_edge, pool_for_edge_vjp, sent_shape};
use sideways::nn::param::Init;

use sideways::setup::{Purpose, Setup};

use crate::common::numbers::{close, flat, random_f32};
use crate::common::runs::{UNEVEN, config, shard, shard_of_side, train};

const PASS: Pass = Pass { training: true, key: 0, again: false };

/// The reference's numbers: quarters.
fn quarters(shape: &[usize], start: usize) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|i| (((7 * (i + start) + 3) % 11) as f64 - 5.0) / 4.0).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn same(what: &str, found: &Tensor, expected: &[f64]) -> Result<()> {
    close(what, &flat(found)?, expected, 1e-14);
    Ok(())
}

#[test]
fn averages_to_any_size() -> Result<()> {
    for (from, to, values, vjp) in [
        (
            [7, 5],
            [4, 3],
            &[
                0.3125,
                -0.0416666666666667,
                0.0625,
                -0.0833333333333333,
                -0.0555555555555556,
                -0.333333333333333,
                0.0,
                0.0277777777777778,
                -0.25,
                0.0625,
                0.166666666666667,
                0.5,
            ][..],
            &[
                0.25,
                0.25,
                0.0,
                -0.25,
                -0.25,
                0.375,
                0.347222222222222,
                -0.0277777777777778,
                -0.486111111111111,
                -0.458333333333333,
                0.125,
                0.0972222222222222,
                -0.0277777777777778,
                -0.236111111111111,
                -0.208333333333333,
                0.208333333333333,
                0.125,
                -0.0833333333333333,
                -0.0833333333333333,
                0.0,
                0.0833333333333333,
                0.0277777777777778,
                -0.0555555555555556,
                0.152777777777778,
                0.208333333333333,
                0.145833333333333,
                -0.0347222222222222,
                -0.180555555555556,
                0.277777777777778,
                0.458333333333333,
                0.0625,
                -0.0625,
                -0.125,
                0.125,
                0.25,
            ][..],
        ),
        (
            [4, 5],
            [2, 3],
            &[0.3125, -0.0416666666666667, 0.0625, -0.0625, 0.0416666666666667, -0.3125][..],
            &[
                0.25,
                0.25,
                0.0,
                -0.25,
                -0.25,
                0.25,
                0.25,
                0.0,
                -0.25,
                -0.25,
                0.1875,
                0.145833333333333,
                -0.0416666666666667,
                -0.354166666666667,
                -0.3125,
                0.1875,
                0.145833333333333,
                -0.0416666666666667,
                -0.354166666666667,
                -0.3125,
            ][..],
        ),
    ] {
        let what = format!("{from:?} to {to:?}");
        same(&what, &pool_for_edge(&quarters(&[1, from[0], from[1], 1], 1)?, to)?, values)?;
        same(&what, &pool_for_edge_vjp(&quarters(&[1, to[0], to[1], 1], 4)?, from)?, vjp)?;
    }
    Ok(())
}

#[test]
fn spreads_to_any_size() -> Result<()> {
    for (from, to, values, vjp) in [
        (
            [3, 2],
            [5, 5],
            &[
                1.25, 1.25, 1.25, 0.25, 0.25, 1.25, 1.25, 1.25, 0.25, 0.25, -0.75, -0.75, -0.75, 1.0, 1.0, -0.75,
                -0.75, -0.75, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, -1.0,
            ][..],
            &[-1.25, 2.0, -0.75, 0.5, 0.5, -1.0][..],
        ),
        (
            [2, 3],
            [4, 3],
            &[1.25, 0.25, -0.75, 1.25, 0.25, -0.75, 1.0, 0.0, -1.0, 1.0, 0.0, -1.0][..],
            &[1.75, -0.25, -2.25, 0.75, -1.25, 2.25][..],
        ),
    ] {
        let what = format!("{from:?} to {to:?}");
        same(&what, &resample::spread(&quarters(&[1, from[0], from[1], 1], 1)?, to)?, values)?;
        same(&what, &resample::spread_vjp(from, &quarters(&[1, to[0], to[1], 1], 4)?)?, vjp)?;
    }
    Ok(())
}

/// A skip of 2x3 pixels into 3x4: the adapter works before it is spread, and the result is that of the other order.
#[test]
fn a_smaller_skip_joins_as_if_spread_first() -> Result<()> {
    let init = Init { seed: 1, dtype: DType::F64, device: Device::Cpu, last_layer: None };
    let skips = [SkipInput { from: 1, shape: [2, 3, 3] }];
    let inputs = [quarters(&[1, 3, 4, 2], 1)?, quarters(&[1, 2, 3, 3], 2)?];
    let mut module = Module::new(3, &[], [3, 4, 2], &skips, Fuse::Sum, &init)?;
    module.visit(&mut |p| match p.name.as_str() {
        "skips.1_3.weight" => p.set(&quarters(&[2, 3, 1, 1], 3)?),
        _ => p.set(&quarters(&[2], 5)?),
    })?;
    let mut tape = Tape::new();
    let y = module.forward(&inputs, &PASS, &mut tape)?;
    same(
        "sum",
        &y,
        &[
            0.3125, -1.8125, -1.6875, -1.0625, -1.0, -2.9375, -0.3125, -2.0625, -2.1875, -1.5625, -1.4375, -0.8125,
            -0.75, -2.6875, -0.0625, -1.8125, 0.625, 1.125, 1.375, -0.875, 2.0625, 0.0, 2.75, 0.875,
        ],
    )?;
    let g = quarters(&[1, 3, 4, 2], 6)?;
    let mut cotangents = module.vjp(&g, &PASS, &mut tape, &[true, true])?;
    let skip = cotangents.pop().flatten().expect("wanted");
    same(
        "sum, skip's cotangent",
        &skip,
        &[
            2.0, -2.375, 0.125, -0.1875, 0.6875, 0.1875, -0.75, 0.5625, -0.1875, -0.3125, 0.125, -0.125, -0.75, 1.0,
            0.0, 0.0, -0.4375, -0.1875,
        ],
    )?;
    assert_eq!(flat(&cotangents.pop().flatten().expect("wanted"))?, flat(&g)?);
    let mut gradients = Vec::new();
    module.visit(&mut |p| {
        gradients.extend(p.grad.take());
        Ok(())
    })?;
    same("weight", &gradients[0], &[-0.125, 0.1875, -0.875, -1.3125, 1.375, -0.75])?;
    same("bias", &gradients[1], &[-1.0, 0.75])?;

    let mut module = Module::new(3, &[], [3, 4, 2], &skips, Fuse::Concat, &init)?;
    let y = module.forward(&inputs, &PASS, &mut tape)?;
    let wide = resample::spread(&inputs[1], [3, 4])?;
    assert_eq!(flat(&y)?, flat(&Tensor::cat(&[&inputs[0], &wide], 3)?)?);
    let g = quarters(&[1, 3, 4, 5], 6)?;
    let skip = module.vjp(&g, &PASS, &mut tape, &[false, true])?.pop().flatten().expect("wanted");
    same(
        "concat, skip's cotangent",
        &skip,
        &[-1.5, 0.0, 1.5, 0.75, -1.25, -0.5, 1.75, -0.25, 0.5, -0.25, 0.5, -1.5, -0.75, 1.0, 0.0, -0.25, -1.25, 0.5],
    )
}

/// What travels is the smaller of the two, and has no more bytes than either way.
#[test]
fn the_smaller_size_travels() {
    for (sent, main, expected) in [
        ([8, 6, 5], [8, 6, 2], Some([8, 6, 5])),
        ([8, 6, 5], [3, 6, 2], Some([3, 6, 5])),
        ([7, 7, 5], [4, 4, 2], Some([4, 4, 5])),
        ([3, 6, 5], [8, 6, 2], Some([3, 6, 5])),
        ([4, 4, 5], [7, 7, 2], Some([4, 4, 5])),
        ([4, 8, 5], [5, 7, 2], None),
        ([5, 7, 5], [4, 8, 2], None),
    ] {
        assert_eq!(sent_shape(sent, main), expected, "{sent:?} to {main:?}");
    }
}

/// Whole ratios are pooled as ever, to the bit, and larger ones than a window may have by the same sum; threads change nothing.
#[test]
fn the_bits_are_those_of_windows_and_of_any_number_of_threads() -> Result<()> {
    let bits = |t: &Tensor| -> Result<Vec<u32>> {
        Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    let x = random_f32(&[2, 12, 8, 5], 1)?;
    for [h, w] in [[6, 8], [4, 4], [3, 1], [1, 1]] {
        let kernel = [12 / h, 8 / w];
        let window = Window { kernel, stride: kernel, padding: [0, 0] };
        assert_eq!(bits(&pool_for_edge(&x, [h, w])?)?, bits(&pool::average(&x, &window)?)?);
        let g = random_f32(&[2, h, w, 5], 2)?;
        assert_eq!(bits(&pool_for_edge_vjp(&g, [12, 8])?)?, bits(&pool::average_vjp(&[2, 12, 8, 5], &window, &g)?)?);
    }
    let large = random_f32(&[1, 40, 34, 3], 3)?;
    close(
        "40x34 to 2x2",
        &flat(&pool_for_edge(&large, [2, 2])?)?,
        &flat(&pool_for_edge(&pool_for_edge(&large, [4, 2])?, [2, 2])?)?,
        1e-6,
    );
    let all = || -> Result<Vec<Vec<u32>>> {
        let (small, large) = ([7, 5], [12, 8]);
        let g = random_f32(&[2, 7, 5, 5], 4)?;
        let results = [
            pool_for_edge(&x, small)?,
            pool_for_edge_vjp(&g, large)?,
            resample::spread(&g, large)?,
            resample::spread_vjp(small, &x)?,
        ];
        results.iter().map(bits).collect()
    };
    assert_eq!(all()?, with_threads(3, all)??);
    for refused in [pool_for_edge(&x, [13, 8]), pool_for_edge(&x, [0, 8]), resample::spread(&x, [13, 7])] {
        assert!(refused.unwrap_err().to_string().contains("12x8 pixels cannot be"));
    }
    Ok(())
}

/// The network that tests of training have such skips with: what travels, what links and adapters are counted with.
#[test]
fn edges_links_and_costs_are_of_the_smaller_size() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    let sets = [UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }"];
    let setup = Setup::new(&config(dir.path(), &sets), 1, Purpose::Train).unwrap();
    let expected = [
        ((1, 3), [4, 4, 4], true),
        ((1, 4), [7, 7, 4], false),
        ((2, 4), [4, 4, 6], false),
        ((2, 5), [1, 1, 6], true),
        ((3, 5), [1, 1, 6], true),
    ];
    for (edge, shape, pooled) in expected {
        let k = setup.network.edges.iter().position(|e| (e.edge.from, e.edge.to) == edge).unwrap();
        let found = &setup.network.edges[k];
        assert_eq!((found.shape, found.pooled), (shape, pooled), "{edge:?}");
        let words = 2 * shape.iter().product::<usize>();
        assert!(setup.wiring.of_edge(0, k).all(|link| link.words == words), "{edge:?}");
    }
    // Module 4: a convolution on 8x8, and the adapter of module 1's 7x7 pixels from 4 to 6 channels.
    let module = &setup.network.modules[3];
    assert_eq!(module.flops, 2 * (8 * 8 * 4 * 6 * 9 + 7 * 7 * (4 + 1) * 6));
}

/// The encoder and decoder of future frames, joined level by level as a U: each skip is spread by a factor of 2, and the network learns.
#[test]
fn an_autoencoder_with_a_u_of_skips_learns() {
    let dir = tempfile::tempdir().unwrap();
    // Still: the pseudo-gradients of these tests' moving frames, of which each is another noise, lead nowhere.
    shard_of_side(&dir.path().join("train.h5"), 4, 16, true, 16);
    let text = format!(
        "[data]\ntrain = '{0}/train.h5'\nframes = 15\nbatch = 2\n\
         [model]\npreset = 'autoencoder'\ntask = 'future-frames'\nmodules = 8\nskip = {{ edges = [[1, 7], [2, 6], [3, 5]] }}\n\
         [train]\noptimizer = {{ kind = 'adamw', lr = 0.003 }}\nbatches = 24\n\
         [run]\ndir = '{0}/run'\ncheckpoint_every = 100\n",
        dir.path().display()
    );
    let config = Config::parse(&text, "test", &[]).unwrap();
    let setup = Setup::new(&config, 1, Purpose::Train).unwrap();
    for i in [5, 6, 7] {
        let module = &setup.network.modules[i - 1];
        let ([h, w, _], [high, wide, _]) = (module.skips[0].shape, module.main);
        assert_eq!([2 * h, 2 * w], [high, wide], "module {i}");
    }
    train(&config, None);
    let lines = std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).unwrap();
    let losses =
        lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap());
    let losses: Vec<f64> = losses.collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert_eq!(losses.len(), 24);
    assert!(mean(&losses[20..]) < 0.7 * mean(&losses[..4]), "{losses:?}");
}
