//! A network's first layers computed in one pass over lines, against the same layers in f64, one after the other.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::backend::cpu::conv::{Algorithm, Conv, Convolution};
use sideways::backend::cpu::{Window, with_threads};
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::module::{Fuse, Module};
use sideways::nn::param::Init;
use sideways::nn::spec::LayerSpec;

use crate::common::numbers::{close, flat as values, random_f32 as random};
use crate::common::skip_unless_ci;

const TRAINING: Pass = Pass { training: true, key: 1 };

const INPUT: &str = "input's cotangent";

/// What a module of one element type makes of one input.
struct Outcome {
    /// Output, the input's cotangent where wanted, then parameters' gradients.
    all: Vec<(String, Tensor)>,
    /// Elements kept for the vjp.
    kept: usize,
}

/// Layers with random parameters (norm weights of both signs, one of them 0), run forward and back.
fn outcome(layers: &[LayerSpec], x: &Tensor, dtype: DType, need_input: bool) -> Result<Outcome> {
    let init = Init { seed: 1, dtype, device: Device::Cpu };
    let layers: Vec<_> = layers.iter().cloned().enumerate().collect();
    let (_, h, w, c) = x.dims4()?;
    let mut module = Module::new(1, &layers, [h, w, c], &[], Fuse::Sum, &init)?;
    let mut seed = 10;
    module.visit(&mut |p| {
        seed += 1;
        let mut value = random(p.value.dims(), seed)?;
        if p.name.ends_with("group-norm.weight") {
            let mut weights = value.to_vec1::<f32>()?;
            weights[1] = 0.0;
            value = Tensor::new(weights, &Device::Cpu)?;
        }
        p.set(&value.to_dtype(dtype)?)
    })?;
    let mut tape = Tape::new();
    let y = module.forward(&[x.to_dtype(dtype)?], &TRAINING, &mut tape)?;
    let kept = tape.bytes() / dtype.size_in_bytes();
    let gy = random(y.dims(), 5)?.to_dtype(dtype)?;
    let mut all = vec![("output".to_string(), y)];
    let cotangent = module.vjp(&gy, &TRAINING, &mut tape, &[need_input])?.remove(0);
    assert_eq!((tape.bytes(), cotangent.is_some()), (0, need_input));
    all.extend(cotangent.map(|g| (INPUT.into(), g)));
    module.visit(&mut |p| {
        all.push((p.name.clone(), p.grad.take().expect("a gradient")));
        Ok(())
    })?;
    Ok(Outcome { all, kept })
}

impl Outcome {
    /// Fails unless these are the tensors of `expected`, each to 3e-5 of its largest element.
    fn is_close_to(&self, expected: &Outcome, what: &str) -> Result<()> {
        assert_eq!(self.names(), expected.names(), "{what}");
        for ((name, found), (_, expected)) in self.all.iter().zip(&expected.all) {
            assert_eq!(found.dims(), expected.dims(), "{what}: {name}");
            close(&format!("{what}: {name}"), &values(found)?, &values(expected)?, 3e-5);
        }
        Ok(())
    }

    /// Fails unless these are the tensors of `expected` to the bit.
    fn is(&self, expected: &Outcome, what: &str) -> Result<()> {
        assert_eq!(self.names(), expected.names(), "{what}");
        for ((name, found), (_, expected)) in self.all.iter().zip(&expected.all) {
            assert_eq!(values(found)?, values(expected)?, "{what}: {name}");
        }
        Ok(())
    }

    /// Without the input's cotangent.
    fn without_input(mut self) -> Outcome {
        self.all.retain(|(name, _)| name != INPUT);
        self
    }

    fn names(&self) -> Vec<&str> {
        self.all.iter().map(|(name, _)| name.as_str()).collect()
    }
}

fn layers(out: usize, kernel: usize, padding: usize, bias: bool, groups: usize, pool: usize) -> Vec<LayerSpec> {
    vec![
        LayerSpec::Conv2d { out, kernel, stride: 1, padding, groups: 1, bias },
        LayerSpec::GroupNorm { groups },
        LayerSpec::Relu {},
        LayerSpec::MaxPool { kernel: pool, stride: None, padding: 0 },
    ]
}

/// Sides that are and are not whole blocks, every number of channels, kernels and borders of several sizes, samples alone and
/// together, inputs far from zero.
#[test]
fn computed_together_is_computed_apart() -> Result<()> {
    for (shape, out, kernel, padding, bias, groups, pool, offset) in [
        ([2, 16, 28, 3], 64, 3, 1, false, 8, 2, 0.0),
        ([1, 6, 6, 3], 16, 3, 1, true, 4, 3, 0.0),
        ([3, 11, 9, 1], 48, 3, 0, true, 16, 1, 0.0),
        ([2, 14, 10, 4], 32, 3, 2, false, 2, 2, 1.0),
        ([2, 13, 15, 2], 16, 4, 1, true, 1, 2, 0.0),
        ([1, 5, 7, 2], 80, 1, 0, false, 5, 1, 3.0),
        ([4, 12, 12, 1], 96, 5, 2, true, 96, 4, 0.0),
        ([2, 5, 3, 3], 16, 3, 1, false, 4, 1, 0.0),
        ([2, 28, 28, 3], 16, 3, 0, false, 4, 2, 20.0),
    ] {
        let what = format!("{shape:?} -> {out}, {kernel}x{kernel}, padding {padding}, {groups} groups, pool {pool}");
        let layers = layers(out, kernel, padding, bias, groups, pool);
        let x = random(&shape, 2)?.affine(1.0, offset)?;
        let conv = Conv { window: Window::square(kernel, 1, padding), groups: 1 };
        let algorithm = Convolution::new(conv).algorithm(x.dims(), &[out, shape[3], kernel, kernel])?;
        if algorithm != Algorithm::Few {
            skip_unless_ci(&format!("{what}: a processor without fused multiply-adds convolves by {algorithm:?}"));
            return Ok(());
        }
        let (alone, wanted) = (outcome(&layers, &x, DType::F32, false)?, outcome(&layers, &x, DType::F32, true)?);
        let exact = outcome(&layers, &x, DType::F64, true)?;
        if pool > 1 {
            // Sums over each sample's patches, of twice the size, are kept only if computed together.
            let patch = kernel * kernel * shape[3];
            let outputs = alone.kept.saturating_sub(2 * shape[0] * patch * (patch + 1));
            assert!(0 < outputs && outputs < exact.kept / 2, "{what}: not together: {outputs} of {}", exact.kept);
        }
        wanted.is_close_to(&exact, &what)?;
        for threads in [2, 5] {
            let several = with_threads(threads, || outcome(&layers, &x, DType::F32, true))??;
            several.is(&wanted, &format!("{what}, {threads} threads"))?;
        }
        // Whether the input's cotangent is wanted changes nothing else.
        alone.is(&wanted.without_input(), &what)?;
    }
    Ok(())
}

/// One pixel that is no number spoils its sample, as it does layer by layer, and no other.
#[test]
fn what_is_no_number_stays_visible() -> Result<()> {
    let layers = layers(16, 3, 1, true, 4, 2);
    let mut values = values(&random(&[2, 12, 12, 3], 2)?)?.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
    for bad in [f32::NAN, f32::INFINITY] {
        values[3 * 40] = bad;
        let x = Tensor::from_slice(&values, (2, 12, 12, 3), &Device::Cpu)?;
        let found = outcome(&layers, &x, DType::F32, false)?;
        let y = found.all[0].1.flatten_all()?.to_vec1::<f32>()?;
        let (spoilt, whole) = y.split_at(y.len() / 2);
        assert!(
            !spoilt.is_empty() && spoilt.iter().all(|v| v.is_nan()) && whole.iter().all(|v| v.is_finite()),
            "{bad}"
        );
        let weight = &found.all.iter().find(|(name, _)| name.ends_with("conv2d.weight")).expect("a gradient").1;
        assert!(weight.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| v.is_nan()), "{bad}");
    }
    Ok(())
}

/// What the kernel has not: other strides and windows that overlap, a sum of both, and no pool at all.
#[test]
fn other_layers_stay_apart() -> Result<()> {
    let x = random(&[2, 12, 12, 3], 2)?;
    let mut strided = layers(16, 3, 1, false, 4, 2);
    strided[0] = LayerSpec::Conv2d { out: 16, kernel: 3, stride: 2, padding: 1, groups: 1, bias: false };
    let mut overlapping = layers(16, 3, 1, true, 4, 2);
    overlapping[3] = LayerSpec::MaxPool { kernel: 3, stride: Some(2), padding: 1 };
    let mut unpooled = layers(16, 3, 1, false, 4, 2);
    unpooled.truncate(3);
    let norm_alone = unpooled[..2].to_vec();
    for layers in [strided, overlapping, unpooled, norm_alone] {
        let (found, exact) = (outcome(&layers, &x, DType::F32, true)?, outcome(&layers, &x, DType::F64, true)?);
        found.is_close_to(&exact, &format!("{layers:?}"))?;
    }
    Ok(())
}
