//! Kernels against loops written from the definitions, literals for the rules at kinks and ties, and bit-equality for any
//! number of threads.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::backend::cpu::conv::{self, Algorithm, Conv, Convolution, InputCotangent};
use sideways::backend::cpu::norm::GroupNorm;
use sideways::backend::cpu::{Window, activation, batch_norm, norm, norm_pool, pool, resample, with_threads};
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::loss::topk_correct;
use sideways::nn::module::{Fuse, Module};
use sideways::nn::param::Init;
use sideways::nn::spec::LayerSpec;

use crate::common::numbers::{self, flat, random_f32 as random};

fn values(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

fn image(rows: &[&[f32]]) -> Result<Tensor> {
    Ok(Tensor::from_vec(rows.concat(), (1, rows.len(), rows[0].len(), 1), &Device::Cpu)?)
}

/// The convolution as PyTorch's documentation defines it, by loops: with `visit(x index, w index, y index)` for every
/// product in the sum.
fn products(conv: &Conv, x: &[usize], w: &[usize], y: &[usize], mut visit: impl FnMut(usize, usize, usize)) {
    let (og, cg) = (y[3] / conv.groups, w[1]);
    for b in 0..y[0] {
        for (oy, ox) in (0..y[1]).flat_map(|i| (0..y[2]).map(move |j| (i, j))) {
            for o in 0..y[3] {
                for (ky, kx) in (0..w[2]).flat_map(|i| (0..w[3]).map(move |j| (i, j))) {
                    let iy = (oy * conv.window.stride[0] + ky) as isize - conv.window.padding[0] as isize;
                    let ix = (ox * conv.window.stride[1] + kx) as isize - conv.window.padding[1] as isize;
                    if iy < 0 || ix < 0 || iy >= x[1] as isize || ix >= x[2] as isize {
                        continue;
                    }
                    for c in 0..cg {
                        let at = ((b * x[1] + iy as usize) * x[2] + ix as usize) * x[3] + o / og * cg + c;
                        let weight = ((o * cg + c) * w[2] + ky) * w[3] + kx;
                        visit(at, weight, ((b * y[1] + oy) * y[2] + ox) * y[3] + o);
                    }
                }
            }
        }
    }
}

fn close(what: &str, found: &Tensor, expected: &[f64], tolerance: f64) -> Result<()> {
    numbers::close(what, &flat(found)?, expected, tolerance);
    Ok(())
}

/// Forward and gradients against loops, in both element types; in f32 by `algorithm`. Of the largest element, f32 may be
/// off by 1e-5, by Winograd 2e-5 (its transforms add and subtract numbers a few times larger than the result).
fn check_convolution(conv: Conv, [b, h, w, c]: [usize; 4], o: usize, algorithm: Algorithm) -> Result<()> {
    let [kh, kw] = conv.window.kernel;
    let (x, weight) = (random(&[b, h, w, c], 1)?, random(&[o, c / conv.groups, kh, kw], 2)?);
    let bias = random(&[o], 3)?;
    let (xs, ws) = (values(&x)?, values(&weight)?);
    let [oh, ow] = conv.window.output(h, w)?;
    let gy = random(&[b, oh, ow, o], 4)?;
    let gs = values(&gy)?;
    let mut y = values(&bias)?.iter().map(|&b| f64::from(b)).cycle().take(gs.len()).collect::<Vec<_>>();
    // A gradient is added to what there is.
    let (mut gx, mut gw) = (vec![0.0; xs.len()], ws.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    products(&conv, x.dims(), weight.dims(), gy.dims(), |i, j, k| {
        y[k] += f64::from(xs[i]) * f64::from(ws[j]);
        gx[i] += f64::from(ws[j]) * f64::from(gs[k]);
        gw[j] += f64::from(xs[i]) * f64::from(gs[k]);
    });
    let with_x: Vec<f64> = gx.iter().zip(&xs).map(|(&g, &x)| g + f64::from(x)).collect();
    let gb: Vec<f64> = (0..o).map(|n| gs.iter().skip(n).step_by(o).map(|&g| f64::from(g)).sum()).collect();
    let found = Convolution::new(conv).algorithm(x.dims(), weight.dims())?;
    assert_eq!(found, algorithm, "{conv:?} of {:?}", x.dims());
    for (dtype, tolerance) in
        [(DType::F32, if algorithm == Algorithm::Winograd { 2e-5 } else { 1e-5 }), (DType::F64, 1e-13)]
    {
        let [x, weight, bias, gy] = [&x, &weight, &bias, &gy].map(|t| t.to_dtype(dtype));
        let (x, weight, bias, gy) = (x?, weight?, bias?, gy?);
        let mut convolution = Convolution::new(conv);
        // Twice: the second call finds everything ready.
        for _ in 0..2 {
            let (found, kept) = convolution.forward(&x, &weight, Some(&bias))?;
            close("forward", &found, &y, tolerance)?;
            let sum = Some(weight.copy()?);
            let (sum, input) = convolution.vjp(x.dims(), kept.clone(), &weight, &gy, sum, InputCotangent::Compute)?;
            close("input gradient", &input.unwrap(), &gx, tolerance)?;
            close("weight gradient", &sum, &gw, tolerance)?;
            let onto = InputCotangent::AddTo(x.copy()?);
            let (_, sum) = convolution.vjp(x.dims(), kept, &weight, &gy, None, onto)?;
            close("input gradient added to another", &sum.unwrap(), &with_x, tolerance)?;
        }
        close("bias gradient", &conv::bias_gradient(&gy)?, &gb, tolerance)?;
    }
    Ok(())
}

/// What is chosen where Winograd does not apply.
fn direct() -> Algorithm {
    if sideways::backend::cpu::has_onednn() { Algorithm::OneDnn } else { Algorithm::Patches }
}

#[test]
fn convolution_is_its_definition() -> Result<()> {
    for (kernel, stride, padding, groups, [h, w]) in [
        ([3, 3], [1, 1], [1, 1], 1, [9, 7]),
        ([3, 2], [2, 1], [0, 1], 1, [8, 6]),
        ([1, 5], [1, 2], [0, 2], 2, [5, 9]),
        ([7, 7], [2, 2], [3, 3], 1, [16, 16]),
        ([3, 3], [3, 3], [4, 2], 4, [7, 7]),
        ([1, 1], [1, 1], [0, 0], 2, [6, 6]),
        ([1, 1], [2, 2], [0, 0], 1, [6, 6]),
        ([3, 3], [1, 1], [1, 1], 1, [40, 40]),
    ] {
        let conv = Conv { window: Window { kernel, stride, padding }, groups };
        check_convolution(conv, [2, h, w, 4], 8, direct())?;
    }
    // More weights than activations.
    let conv = Conv { window: Window::square(3, 2, 1), groups: 1 };
    check_convolution(conv, [2, 5, 4, 32], 28, direct())
}

/// Channels that are and are not whole blocks, strides, borders, and a linear layer.
#[test]
fn weights_as_they_lie_give_the_definition() -> Result<()> {
    for (window, [b, h, w, c], o) in [
        (Window::square(3, 2, 1), [2, 5, 4, 32], 160),
        (Window { kernel: [2, 3], stride: [1, 2], padding: [0, 2] }, [3, 4, 3, 70], 150),
        (Window::square(3, 1, 1), [1, 3, 3, 9], 17),
        (Window::square(1, 1, 0), [3, 1, 1, 40], 260),
    ] {
        check_convolution(Conv { window, groups: 1 }, [b, h, w, c], o, Algorithm::LargeWeights)?;
    }
    Ok(())
}

/// Sides that are and are not whole tiles, every padding, more samples than one group of tiles holds, and more input
/// channels than one block of the weight's gradient.
#[test]
fn winograd_is_the_definition() -> Result<()> {
    for (padding, [b, h, w, c], o) in [
        ([1, 1], [2, 16, 16, 16], 32),
        ([1, 1], [3, 15, 18, 48], 16),
        ([0, 2], [2, 18, 13, 16], 16),
        ([2, 0], [1, 22, 26, 32], 16),
        ([1, 1], [5, 60, 62, 16], 16),
    ] {
        let conv = Conv { window: Window { kernel: [3, 3], stride: [1, 1], padding }, groups: 1 };
        check_convolution(conv, [b, h, w, c], o, Algorithm::Winograd)?;
    }
    // Not worth it: few tiles, or much of them outside.
    let conv = Conv { window: Window::square(3, 1, 1), groups: 1 };
    check_convolution(conv, [2, 8, 8, 16], 16, direct())?;
    check_convolution(conv, [9, 9, 9, 16], 16, direct())
}

/// A relu done in the norm's passes gives what the two give apart, to the bit; a norm far from 0 loses no digits.
#[test]
fn a_norm_takes_over_the_relu_behind_it() -> Result<()> {
    let x = random(&[2, 5, 6, 8], 1)?.affine(1.0, 1000.0)?;
    let (scale, shift, gy) = (random(&[8], 2)?, random(&[8], 3)?, random(&[2, 5, 6, 8], 4)?);
    let apart = GroupNorm { groups: 2, epsilon: 1e-5, relu: false };
    let together = GroupNorm { relu: true, ..apart };
    let (normal, statistics) = norm::group(&x, &scale, &shift, &apart)?;
    let y = activation::relu(&normal)?;
    let g = activation::relu_vjp(&y, &gy)?;
    let (gx, gw, gb) = norm::group_vjp(&x, &scale, &shift, &statistics, &g, &apart, true)?;
    let (found, found_statistics) = norm::group(&x, &scale, &shift, &together)?;
    let (found_gx, found_gw, found_gb) = norm::group_vjp(&x, &scale, &shift, &found_statistics, &gy, &together, true)?;
    for (a, b) in [(&y, &found), (&gw, &found_gw), (&gb, &found_gb), (&gx.unwrap(), &found_gx.unwrap())] {
        assert_eq!(a.dims(), b.dims());
        assert_eq!(values(a)?, values(b)?);
    }
    let exact = x.to_dtype(DType::F64)?;
    let (scale, shift) = (scale.to_dtype(DType::F64)?, shift.to_dtype(DType::F64)?);
    close("norm", &normal, &flat(&norm::group(&exact, &scale, &shift, &apart)?.0)?, 1e-4)
}

/// A relu and a max pool done in the norm's passes give what the three give apart but for the order of their sums. Windows side
/// by side, windows that leave a border out, and windows that overlap.
#[test]
fn a_norm_takes_over_the_pool_behind_its_relu() -> Result<()> {
    let x = random(&[3, 8, 10, 24], 1)?;
    let (scale, shift) = (random(&[24], 2)?, random(&[24], 3)?);
    let norm = GroupNorm { groups: 4, epsilon: 1e-5, relu: true };
    for window in [Window::square(2, 2, 0), Window::square(3, 3, 0), Window::square(3, 2, 1)] {
        let (normal, statistics) = norm::group(&x, &scale, &shift, &norm)?;
        let (y, winners) = pool::max(&normal, &window)?;
        let gy = random(y.dims(), 4)?;
        let g = pool::max_vjp(x.dims(), &window, &winners, &gy)?;
        let (gx, gw, gb) = norm::group_vjp(&x, &scale, &shift, &statistics, &g, &norm, true)?;
        let (found, kept) = norm_pool::forward(&x, &scale, &shift, &norm, &window)?;
        close("y", &found, &flat(&y)?, 1e-6)?;
        // Where the relu leaves nothing, all are equal.
        assert_eq!(kept.winners.dims(), winners.dims());
        assert_eq!(winners.dims(), y.dims());
        let both =
            kept.winners.flatten_all()?.to_vec1::<u8>()?.into_iter().zip(winners.flatten_all()?.to_vec1::<u8>()?);
        for ((found, expected), y) in both.zip(values(&y)?) {
            assert!(found == expected || y == 0.0, "{window:?}: {found} where the pool alone gives {expected}");
        }
        let vjp = |need_input| norm_pool::vjp(&x, [&scale, &shift], &kept, &gy, &norm, &window, need_input);
        let (found_gx, found_gw, found_gb) = vjp(true)?;
        for (name, found, expected) in
            [("gx", &found_gx.unwrap(), &gx.unwrap()), ("gw", &found_gw, &gw), ("gb", &found_gb, &gb)]
        {
            close(name, found, &flat(expected)?, 1e-5)?;
        }
        let (none, alone_gw, alone_gb) = vjp(false)?;
        assert!(none.is_none() && values(&alone_gw)? == values(&found_gw)? && values(&alone_gb)? == values(&found_gb)?);
    }
    // A value that is not a number is noticed.
    let broken = (x * f64::NAN)?;
    let (y, _) = norm_pool::forward(&broken, &scale, &shift, &norm, &Window::square(2, 2, 0))?;
    assert!(values(&y)?.iter().all(|v| v.is_nan()));
    Ok(())
}

/// One thread and several give the same bits, on sizes that need several pieces each.
#[test]
fn threads_do_not_change_a_bit() -> Result<()> {
    let conv = Conv { window: Window::square(3, 1, 1), groups: 1 };
    let strided = Conv { window: Window::square(3, 2, 1), groups: 2 };
    let x = random(&[4, 33, 31, 16], 1)?;
    let w = random(&[48, 16, 3, 3], 2)?;
    let half = random(&[24, 8, 3, 3], 3)?;
    let point = random(&[24, 16, 1, 1], 4)?;
    let (scale, shift) = (random(&[16], 5)?, random(&[16], 6)?);
    let window = Window::square(3, 2, 1);
    let all = || -> Result<Vec<Vec<f32>>> {
        let mut found = Vec::new();
        for (conv, w) in [(&conv, &w), (&strided, &half), (&Conv::pointwise(), &point)] {
            let mut convolution = Convolution::new(*conv);
            let (y, kept) = convolution.forward(&x, w, None)?;
            let (gw, gx) = convolution.vjp(x.dims(), kept, w, &y, None, InputCotangent::Compute)?;
            found.extend(gx.into_iter().chain([gw, conv::bias_gradient(&y)?, y]));
        }
        let group = GroupNorm { groups: 4, epsilon: 1e-5, relu: true };
        let (y, statistics) = norm::group(&x, &scale, &shift, &group)?;
        let (gx, gw, gb) = norm::group_vjp(&x, &scale, &shift, &statistics, &y, &group, true)?;
        found.extend(gx.into_iter().chain([y.clone(), gw, gb]));
        let statistics = batch_norm::statistics(&x)?;
        let (gx, gw, gb) = batch_norm::vjp(&x, &scale, &statistics, &y, 1e-5, true, true)?;
        found.extend(gx.into_iter().chain([batch_norm::apply(&x, &scale, &shift, &statistics, 1e-5)?, gw, gb]));
        let (y, kept) = norm_pool::forward(&x, &scale, &shift, &group, &window)?;
        let (gx, gw, gb) = norm_pool::vjp(&x, [&scale, &shift], &kept, &y, &group, &window, true)?;
        found.extend(gx.into_iter().chain([y, gw, gb]));
        let (y, winners) = pool::max(&x, &window)?;
        found.push(pool::max_vjp(x.dims(), &window, &winners, &y)?);
        found.push(pool::average_vjp(x.dims(), &window, &y)?);
        found.push(pool::average(&x, &window)?);
        found.push(activation::dropout(&activation::gelu(&x)?, 0.3, 9)?);
        found.push(resample::upsample_vjp(&resample::upsample(&x, 2)?, 2)?);
        found.iter().map(values).collect()
    };
    let alone = all()?;
    for n in [2, 3, 7] {
        assert!(with_threads(n, all)?? == alone, "{n} threads");
    }
    Ok(())
}

#[test]
fn relu_has_derivative_zero_at_zero() -> Result<()> {
    let x = image(&[&[-1.0, 0.0, -0.0, 2.0]])?;
    let y = activation::relu(&x)?;
    assert_eq!(values(&activation::relu_vjp(&y, &x.ones_like()?)?)?, [0.0, 0.0, 0.0, 1.0]);
    Ok(())
}

#[test]
fn max_pool_gives_a_tie_to_the_first() -> Result<()> {
    let window = Window::square(2, 1, 0);
    let x = image(&[&[1.0, 1.0, 0.0], &[1.0, 1.0, 2.0]])?;
    let (y, winners) = pool::max(&x, &window)?;
    assert_eq!(values(&y)?, [1.0, 2.0]);
    let gx = pool::max_vjp(x.dims(), &window, &winners, &image(&[&[3.0, 5.0]])?)?;
    assert_eq!(values(&gx)?, [3.0, 0.0, 0.0, 0.0, 0.0, 5.0]);
    // The border is never chosen, even by inputs lower than any number.
    let low = image(&[&[f32::NEG_INFINITY; 2], &[-3.0; 2]])?;
    let (y, winners) = pool::max(&low, &Window::square(3, 2, 1))?;
    assert_eq!(values(&y)?, [-3.0]);
    let gx = pool::max_vjp(low.dims(), &Window::square(3, 2, 1), &winners, &image(&[&[1.0]])?)?;
    assert_eq!(values(&gx)?, [0.0, 0.0, 1.0, 0.0]);
    Ok(())
}

#[test]
fn average_pool_counts_its_border() -> Result<()> {
    let y = pool::average(&image(&[&[9.0, 18.0], &[27.0, 36.0]])?, &Window::square(3, 2, 1))?;
    assert_eq!(values(&y)?, [10.0]);
    Ok(())
}

#[test]
fn values_that_are_not_numbers_stay_visible() -> Result<()> {
    let x = image(&[&[f32::NAN, 1.0], &[2.0, 3.0]])?;
    assert!(values(&activation::relu(&x)?)?[0].is_nan());
    assert!(values(&pool::max(&x, &Window::square(2, 2, 0))?.0)?[0].is_nan());
    Ok(())
}

#[test]
fn running_statistics_follow_pytorch() -> Result<()> {
    let init = Init { seed: 1, dtype: DType::F32, device: Device::Cpu, last_layer: None };
    let mut module = Module::new(1, &[(0, LayerSpec::BatchNorm { momentum: 0.1 })], [1, 2, 1], &[], Fuse::Sum, &init)?;
    let x = image(&[&[1.0, 5.0]])?;
    module.forward(std::slice::from_ref(&x), &Pass { training: true, key: 0, again: false }, &mut Tape::new())?;
    let mut found = Vec::new();
    module.visit(&mut |p| {
        found.push((p.name.clone(), p.trainable, values(&p.value)?[0]));
        Ok(())
    })?;
    // Mean 3 and unbiased variance 8, a tenth of each beside nine tenths of 0 and 1.
    assert_eq!(found[2].0, "layers.0.batch-norm.running_mean");
    assert!(!found[2].1 && !found[3].1 && found[0].1 && found[1].1);
    assert!((found[2].2 - 0.3).abs() < 1e-6 && (found[3].2 - 1.7).abs() < 1e-6);
    let single = x.narrow(2, 0, 1)?.contiguous()?;
    let error =
        module.forward(&[single], &Pass { training: true, key: 0, again: false }, &mut Tape::new()).unwrap_err();
    assert!(error.to_string().contains("more than one value a channel"));
    Ok(())
}

#[test]
fn dropout_keeps_the_mean_and_depends_on_key_alone() -> Result<()> {
    let x = Tensor::ones((1, 100, 100, 10), DType::F32, &Device::Cpu)?;
    let y = activation::dropout(&x, 0.25, 7)?;
    let mean = values(&y)?.iter().sum::<f32>() / 1e5;
    assert!((mean - 1.0).abs() < 0.01, "mean {mean}");
    assert_eq!(values(&y)?, values(&activation::dropout(&x, 0.25, 7)?)?);
    assert_ne!(values(&y)?, values(&activation::dropout(&x, 0.25, 8)?)?);
    Ok(())
}

#[test]
fn ties_count_against_the_network() {
    assert!(topk_correct(&[0.0, 2.0, 1.0], 1, 1));
    assert!(topk_correct(&[0.0, 2.0, 1.0], 2, 2) && !topk_correct(&[0.0, 2.0, 1.0], 2, 1));
    assert!(!topk_correct(&[1.0; 10], 0, 5) && topk_correct(&[1.0; 5], 0, 5));
    assert!(!topk_correct(&[f32::NAN; 3], 0, 5) && !topk_correct(&[0.0, 1.0], -1, 5) && !topk_correct(&[0.0], 3, 1));
}
