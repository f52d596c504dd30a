//! Every vector–Jacobian product against central differences in f64, and its properties: linear in the cotangent, the
//! same parameter gradients whether or not the input's cotangent is wanted.
//!
//! Each subject is a module, so that one test helper serves layers (a module of one) and fused inputs alike.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::loss::{PixelLoss, cross_entropy, pixel};
use sideways::nn::module::{Fuse, Module, SkipInput, pool_for_edge, pool_for_edge_vjp};
use sideways::nn::param::Init;
use sideways::nn::spec::LayerSpec;

use crate::common::numbers::{close, flat as values, random_f64 as random};

const TRAINING: Pass = Pass { training: true, key: 11, again: false };
/// Step of the central differences: their error is about STEP squared plus rounding over STEP, both near 1e-10.
const STEP: f64 = 1e-5;
/// What differences and products may differ by, relative to the largest element.
const CLOSE: f64 = 2e-7;

fn init() -> Init {
    Init { seed: 3, dtype: DType::F64, device: Device::Cpu, last_layer: None }
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    Ok(values(a)?.iter().zip(values(b)?).map(|(a, b)| a * b).sum())
}

#[track_caller]
fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    close(what, found, expected, CLOSE);
}

/// The gradient of `f` at `x` by central differences.
fn differences(x: &Tensor, mut f: impl FnMut(&Tensor) -> Result<f64>) -> Result<Vec<f64>> {
    let base = values(x)?;
    let mut at = |i: usize, shift: f64| {
        let mut moved = base.clone();
        moved[i] += shift;
        f(&Tensor::from_vec(moved, x.dims(), &Device::Cpu)?)
    };
    (0..base.len()).map(|i| Ok((at(i, STEP)? - at(i, -STEP)?) / (2.0 * STEP))).collect()
}

/// Names and values of the learned parameters.
fn parameters(module: &mut Module) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    module.visit(&mut |p| {
        if p.trainable {
            all.push((p.name.clone(), p.value.clone()));
        }
        Ok(())
    })?;
    Ok(all)
}

fn set(module: &mut Module, name: &str, value: &Tensor) -> Result<()> {
    module.visit(&mut |p| if p.name == name { p.set(value) } else { Ok(()) })
}

/// Input cotangents, then parameter gradients in order (taken, so that the next call starts from none).
fn gradients(
    module: &mut Module,
    inputs: &[Tensor],
    gy: &Tensor,
    pass: &Pass,
    wanted: bool,
) -> Result<(Vec<Option<Tensor>>, Vec<Tensor>)> {
    let mut tape = Tape::new();
    module.forward(inputs, pass, &mut tape)?;
    let cotangents = module.vjp(gy, pass, &mut tape, &vec![wanted; inputs.len()])?;
    assert_eq!(tape.bytes(), 0, "the tape is left empty");
    let mut of_params = Vec::new();
    module.visit(&mut |p| {
        of_params.extend(p.grad.take());
        Ok(())
    })?;
    Ok((cotangents, of_params))
}

/// All the checks on one module; inputs and parameters are random.
fn check(mut module: Module, shapes: &[&[usize]], pass: Pass) -> Result<()> {
    let inputs = (1..).zip(shapes).map(|(i, s)| random(s, i)).collect::<Result<Vec<_>>>()?;
    for (i, (name, value)) in (50..).zip(parameters(&mut module)?) {
        set(&mut module, &name, &random(value.dims(), i)?)?;
    }
    let y = module.forward(&inputs, &pass, &mut Tape::new())?;
    let [h, w, c] = module.output_shape();
    assert_eq!(y.dims(), [shapes[0][0], h, w, c]);
    let (gy, other) = (random(y.dims(), 100)?, random(y.dims(), 101)?);
    let (cotangents, of_params) = gradients(&mut module, &inputs, &gy, &pass, true)?;

    assert_eq!(cotangents.len(), inputs.len());
    for (k, cotangent) in cotangents.iter().enumerate() {
        let cotangent = cotangent.as_ref().expect("wanted");
        assert_eq!(cotangent.dims(), inputs[k].dims());
        let expected = differences(&inputs[k], |x| {
            let mut moved = inputs.clone();
            moved[k] = x.clone();
            dot(&module.forward(&moved, &pass, &mut Tape::new())?, &gy)
        })?;
        assert_close(&format!("input {k}"), &values(cotangent)?, &expected);
    }
    let named = parameters(&mut module)?;
    assert_eq!(named.len(), of_params.len(), "every parameter has a gradient");
    for ((name, value), grad) in named.iter().zip(&of_params) {
        let expected = differences(value, |v| {
            set(&mut module, name, v)?;
            dot(&module.forward(&inputs, &pass, &mut Tape::new())?, &gy)
        })?;
        set(&mut module, name, value)?;
        assert_close(name, &values(grad)?, &expected);
    }

    let (nothing, alone) = gradients(&mut module, &inputs, &gy, &pass, false)?;
    assert!(nothing.len() == inputs.len() && nothing.iter().all(Option::is_none));
    assert_eq!(alone.len(), of_params.len());
    for ((name, _), (a, b)) in named.iter().zip(alone.iter().zip(&of_params)) {
        assert_eq!(values(a)?, values(b)?, "{name} with the input's cotangent not wanted");
    }

    let mix = ((&gy * 2.0)? + (&other * -3.0)?)?;
    let (cotangents_other, params_other) = gradients(&mut module, &inputs, &other, &pass, true)?;
    let (cotangents_mix, params_mix) = gradients(&mut module, &inputs, &mix, &pass, true)?;
    let flat =
        |list: Vec<Option<Tensor>>, params: Vec<Tensor>| list.into_iter().flatten().chain(params).collect::<Vec<_>>();
    let (a, b) = (flat(cotangents, of_params), flat(cotangents_other, params_other));
    let mix = flat(cotangents_mix, params_mix);
    assert!(a.len() == inputs.len() + named.len() && b.len() == a.len() && mix.len() == a.len());
    for ((a, b), m) in a.iter().zip(&b).zip(mix) {
        assert_close("linearity", &values(&m)?, &values(&((a * 2.0)? + (b * -3.0)?)?)?);
    }
    Ok(())
}

/// Checks one layer, written as in a configuration file, on an input `[B, H, W, C]`.
fn layer(text: &str, input: [usize; 4]) -> Result<()> {
    check(one(text, input)?, &[&input], TRAINING)
}

fn spec(text: &str) -> LayerSpec {
    let table = toml::from_str::<toml::Table>(&format!("layer = {{ {text} }}")).expect("valid TOML");
    table["layer"].clone().try_into().expect("a valid layer")
}

fn one(text: &str, [_, h, w, c]: [usize; 4]) -> Result<Module> {
    Module::new(1, &[(0, spec(text))], [h, w, c], &[], Fuse::Sum, &init())
}

#[test]
fn conv2d() -> Result<()> {
    layer(r#"kind = "conv2d", out = 3, kernel = 3, padding = 1"#, [2, 4, 5, 2])?;
    layer(r#"kind = "conv2d", out = 3, kernel = 3, stride = 2, padding = 1"#, [2, 5, 4, 2])?;
    layer(r#"kind = "conv2d", out = 4, kernel = 3, padding = 1, groups = 2, bias = false"#, [2, 4, 3, 6])?;
    layer(r#"kind = "conv2d", out = 4, kernel = 3, stride = 2, groups = 4"#, [1, 5, 5, 4])?;
    layer(r#"kind = "conv2d", out = 2, kernel = 1, bias = false"#, [2, 3, 3, 4])?;
    layer(r#"kind = "conv2d", out = 4, kernel = 1, groups = 2"#, [2, 3, 3, 4])?;
    layer(r#"kind = "conv2d", out = 2, kernel = 1, stride = 2"#, [2, 4, 3, 3])?;
    layer(r#"kind = "conv2d", out = 2, kernel = 2, padding = 3"#, [1, 3, 2, 2])
}

#[test]
fn linear() -> Result<()> {
    layer(r#"kind = "linear", out = 3"#, [2, 2, 3, 2])?;
    layer(r#"kind = "linear", out = 2, bias = false"#, [3, 1, 1, 4])
}

#[test]
fn norms() -> Result<()> {
    layer(r#"kind = "group-norm", groups = 2"#, [2, 3, 2, 4])?;
    layer(r#"kind = "group-norm", groups = 1"#, [2, 2, 2, 3])?;
    layer(r#"kind = "group-norm", groups = 3"#, [2, 2, 2, 3])?;
    layer(r#"kind = "batch-norm""#, [3, 2, 2, 3])?;
    check(
        one(r#"kind = "batch-norm""#, [2, 2, 2, 3])?,
        &[&[2, 2, 2, 3]],
        Pass { training: false, key: 0, again: false },
    )
}

#[test]
fn activations_and_dropout() -> Result<()> {
    layer(r#"kind = "relu""#, [2, 3, 2, 4])?;
    layer(r#"kind = "gelu""#, [2, 3, 2, 4])?;
    layer(r#"kind = "dropout", rate = 0.4"#, [2, 3, 2, 4])?;
    check(
        one(r#"kind = "dropout", rate = 0.4"#, [2, 3, 2, 4])?,
        &[&[2, 3, 2, 4]],
        Pass { training: false, key: 1, again: false },
    )
}

#[test]
fn pools_and_upsampling() -> Result<()> {
    layer(r#"kind = "max-pool", kernel = 2"#, [2, 4, 6, 3])?;
    layer(r#"kind = "max-pool", kernel = 3, stride = 2, padding = 1"#, [2, 5, 4, 2])?;
    layer(r#"kind = "avg-pool", kernel = 2"#, [2, 4, 6, 3])?;
    layer(r#"kind = "avg-pool", kernel = 3, stride = 2, padding = 1"#, [2, 5, 4, 2])?;
    layer(r#"kind = "avg-pool", kernel = 3, stride = 1"#, [1, 4, 5, 2])?;
    layer(r#"kind = "global-avg-pool""#, [2, 3, 2, 4])?;
    layer(r#"kind = "upsample", factor = 3"#, [2, 2, 3, 2])
}

#[test]
fn residual_blocks() -> Result<()> {
    layer(r#"kind = "residual", out = 4, groups = 2"#, [2, 3, 4, 4])?;
    layer(r#"kind = "residual", out = 4, stride = 2, groups = 2"#, [2, 5, 4, 2])?;
    layer(r#"kind = "residual", out = 8, block = "bottleneck", norm = "batch""#, [2, 3, 3, 8])?;
    layer(r#"kind = "residual", out = 8, stride = 2, block = "bottleneck", groups = 2"#, [2, 4, 3, 4])
}

/// Sizes at which the first convolution changes the shortcut's cotangent in place: the derivative in one direction, and nothing that
/// others hold is changed.
#[test]
fn residual_blocks_in_place() -> Result<()> {
    for text in [r#"out = 32"#, r#"out = 64"#, r#"out = 64, stride = 2"#, r#"out = 32, norm = "batch""#] {
        let mut block = one(&format!(r#"kind = "residual", groups = 8, {text}"#), [2, 20, 20, 32])?;
        let [x, direction] = [random(&[2, 20, 20, 32], 1)?, random(&[2, 20, 20, 32], 2)?];
        let mut tape = Tape::new();
        let y = block.forward(std::slice::from_ref(&x), &TRAINING, &mut tape)?;
        let gy = random(y.dims(), 3)?;
        let before = [values(&x)?, values(&gy)?, values(&y)?];
        let gx = block.vjp(&gy, &TRAINING, &mut tape, &[true])?.remove(0).expect("a cotangent");
        assert_eq!(before, [values(&x)?, values(&gy)?, values(&y)?], "{text}");
        // Short, so that hardly a relu of so many is passed.
        let step = 1e-8;
        let mut at = |step: f64| {
            let moved = (&x + (&direction * step)?)?;
            dot(&block.forward(&[moved], &TRAINING, &mut Tape::new())?, &gy)
        };
        let (found, expected) = (dot(&gx, &direction)?, (at(step)? - at(-step)?) / (2.0 * step));
        assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{text}: {found} for {expected}");
    }
    Ok(())
}

fn fused(fuse: Fuse, spec_texts: &[&str]) -> Result<()> {
    let layers: Vec<(usize, LayerSpec)> = (4..).zip(spec_texts.iter().map(|t| spec(t))).collect();
    // Skips from modules 3 (the main input's channels: no adapter in a sum) and 1 (others: an adapter).
    for [[h, w], [h1, w1]] in [[[4, 3], [4, 3]], [[2, 3], [3, 2]], [[1, 2], [4, 3]], [[4, 3], [2, 1]]] {
        let skips = [SkipInput { from: 3, shape: [h, w, 2] }, SkipInput { from: 1, shape: [h1, w1, 5] }];
        fused_with(fuse, &layers, &skips)?;
    }
    Ok(())
}

fn fused_with(fuse: Fuse, layers: &[(usize, LayerSpec)], skips: &[SkipInput; 2]) -> Result<()> {
    let mut module = Module::new(5, layers, [4, 3, 2], skips, fuse, &init())?;
    let adapters: Vec<String> =
        parameters(&mut module)?.into_iter().map(|(n, _)| n).filter(|n| n.starts_with("skips")).collect();
    match fuse {
        Fuse::Sum => assert_eq!(adapters, ["skips.1_5.weight", "skips.1_5.bias"]),
        Fuse::Concat => assert!(adapters.is_empty()),
    }
    let [a, b] = skips.map(|skip| [2, skip.shape[0], skip.shape[1], skip.shape[2]]);
    check(module, &[&[2, 4, 3, 2], &a, &b], TRAINING)
}

#[test]
fn module_with_skips() -> Result<()> {
    let conv = r#"kind = "conv2d", out = 3, kernel = 3, padding = 1"#;
    for fuse in [Fuse::Sum, Fuse::Concat] {
        fused(fuse, &[conv, r#"kind = "relu""#, r#"kind = "max-pool", kernel = 2, stride = 1"#])?;
        fused(fuse, &[r#"kind = "gelu""#, conv])?;
        fused(fuse, &[])?;
    }
    Ok(())
}

/// Only some inputs' cotangents wanted: those come, and are the same.
#[test]
fn module_with_some_cotangents_wanted() -> Result<()> {
    let skips = [SkipInput { from: 1, shape: [2, 2, 3] }];
    for fuse in [Fuse::Sum, Fuse::Concat] {
        let mut module = Module::new(3, &[(2, spec(r#"kind = "linear", out = 4"#))], [2, 2, 2], &skips, fuse, &init())?;
        let inputs = [random(&[1, 2, 2, 2], 1)?, random(&[1, 2, 2, 3], 2)?];
        let gy = random(&[1, 1, 1, 4], 3)?;
        let mut run = |wanted: &[bool]| {
            let mut tape = Tape::new();
            module.forward(&inputs, &TRAINING, &mut tape)?;
            module.vjp(&gy, &TRAINING, &mut tape, wanted)
        };
        let both = run(&[true, true])?;
        for wanted in [[true, false], [false, true], [false, false]] {
            let some = run(&wanted)?;
            assert_eq!((some.len(), both.iter().flatten().count()), (2, 2));
            for (k, (found, all)) in some.iter().zip(&both).enumerate() {
                let expected = if wanted[k] { all.as_ref() } else { None };
                assert_eq!(found.as_ref().map(values).transpose()?, expected.map(values).transpose()?);
            }
        }
    }
    Ok(())
}

#[test]
fn pooling_on_an_edge() -> Result<()> {
    let y = random(&[2, 4, 6, 3], 1)?;
    for size in [[4, 6], [2, 2], [1, 6], [3, 4], [3, 6], [4, 5], [1, 1]] {
        let g = random(pool_for_edge(&y, size)?.dims(), 2)?;
        let expected = differences(&y, |y| dot(&pool_for_edge(y, size)?, &g))?;
        assert_close("edge", &values(&pool_for_edge_vjp(&g, [4, 6])?)?, &expected);
    }
    Ok(())
}

#[test]
fn losses() -> Result<()> {
    let logits = (random(&[3, 1, 1, 5], 1)? * 3.0)?;
    for labels in [[4, 0, 2], [1, -1, 3]] {
        let expected = differences(&logits, |l| Ok(cross_entropy(l, &labels)?.0))?;
        assert_close("cross-entropy", &values(&cross_entropy(&logits, &labels)?.1)?, &expected);
    }
    let target = random(&[3, 1, 1, 5], 2)?;
    for kind in [PixelLoss::Squared, PixelLoss::Absolute] {
        for labels in [[0, 0, 0], [0, 0, -1]] {
            let expected = differences(&logits, |l| Ok(pixel(kind, l, &target, &labels)?.0))?;
            assert_close("pixel", &values(&pixel(kind, &logits, &target, &labels)?.1)?, &expected);
        }
        // Padding counts neither in the sum nor in the number.
        let two = |t: &Tensor| t.narrow(0, 0, 2);
        let padded = pixel(kind, &logits, &target, &[0, 0, -1])?.0;
        assert!((padded - pixel(kind, &two(&logits)?, &two(&target)?, &[0, 0])?.0).abs() < 1e-12);
    }
    assert!(cross_entropy(&logits, &[0, 5, 1]).unwrap_err().to_string().contains("label 5"));
    // Even logits: the loss is ln 5 whatever the labels; large ones must not overflow.
    let even = Tensor::full(1e4f64, (1, 1, 1, 5), &Device::Cpu)?;
    assert!((cross_entropy(&even, &[2])?.0 - 5f64.ln()).abs() < 1e-12);
    Ok(())
}
