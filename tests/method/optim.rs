//! Update rules against literals printed by `tests/reference/optim.py`, which states PyTorch's documented formulas in
//! numpy; schedules; and saving an optimiser's memory half-way.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::nn::optim::{LrSchedule, Optimizer, OptimizerSpec};
use sideways::nn::param::{Init, Param};

use crate::common::numbers::{close, close_each};

const GRADS: [[f64; 3]; 3] = [[0.5, -1.0, 0.0], [-0.25, 0.75, 1.5], [2.0, 0.125, -0.5]];

fn vector(values: &[f64]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

fn param() -> Result<Param> {
    Ok(Param { name: "p".into(), value: vector(&[1.0, -2.0, 0.5])?, grad: None, trainable: true })
}

fn spec(text: &str) -> OptimizerSpec {
    toml::from_str(&text.replace(", ", "\n")).expect("a valid optimiser")
}

/// One update by the sum of `divisor` gradients of `grad`.
fn step(optimizer: &mut Optimizer, p: &mut Param, grad: &[f64], divisor: usize, clip: Option<f64>) -> Result<f64> {
    for _ in 0..divisor {
        p.accumulate(vector(grad)?)?;
    }
    let stats = optimizer.step(&mut |f| f(p), 1.0, divisor as f64, clip)?;
    assert!(p.grad.is_none(), "the gradient is cleared");
    Ok(stats.grad_norm)
}

#[track_caller]
fn assert_close(p: &Param, expected: &[f64]) {
    let found = p.value.to_vec1::<f64>().expect("a vector of f64");
    close_each("the parameter", &found, expected, |_| 1e-13);
}

#[test]
fn rules_are_pytorchs() -> Result<()> {
    for (text, expected) in [
        (r#"kind = "sgd", lr = 0.1"#, [0.775, -1.9875, 0.4]),
        (r#"kind = "sgd", lr = 0.1, weight_decay = 0.05"#, [0.760448625, -1.95827225, 0.3932874375]),
        (r#"kind = "sgd", lr = 0.1, momentum = 0.9, weight_decay = 0.05"#, [0.684893625, -1.82966225, 0.2517849375]),
        (
            r#"kind = "sgd", lr = 0.1, momentum = 0.9, weight_decay = 0.05, nesterov = true"#,
            [0.478016518875, -1.80708178775, 0.1712584213125],
        ),
        (r#"kind = "adamw""#, [0.99803303830856, -1.99884560721856, 0.498897298120433]),
        (
            "kind = \"adamw\"\nlr = 0.1\nbetas = [0.8,0.95]\neps = 1e-3\nweight_decay = 0.2",
            [0.753743689931579, -1.78822750291441, 0.363315349630439],
        ),
        (r#"kind = "rmsprop""#, [0.848530067796975, -1.97022476224953, 0.431766051547993]),
        (
            r#"kind = "rmsprop", lr = 0.05, alpha = 0.9, eps = 1e-3, momentum = 0.7, weight_decay = 0.1"#,
            [0.577891005220907, -1.76675789833429, -0.0433923820084086],
        ),
    ] {
        // A sum of several equal gradients over their number is the same update; and so is one resumed before the last.
        for divisor in [1, 4] {
            let (mut p, mut optimizer) = (param()?, Optimizer::new(spec(text)));
            for (i, grad) in GRADS.iter().enumerate() {
                if i == 2 && divisor == 4 {
                    let state = optimizer.state()?;
                    optimizer = Optimizer::new(spec(text));
                    let mut get = |name: &str| state.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
                    optimizer.load_state(&mut |f| f(&mut p), &mut get)?;
                }
                step(&mut optimizer, &mut p, grad, divisor, None)?;
            }
            assert_close(&p, &expected);
        }
    }
    Ok(())
}

/// With `no_decay`, a vector (a bias, a norm's scale or shift) goes where it would without decay, and a matrix where it would without
/// `no_decay`: to the bit.
#[test]
fn no_decay_spares_biases_and_norms() -> Result<()> {
    let ends = |text: &str, dims: &[usize]| -> Result<Vec<f64>> {
        let (mut p, mut optimizer) = (param()?, Optimizer::new(spec(text)));
        p.value = p.value.reshape(dims)?;
        for grad in &GRADS {
            p.accumulate(vector(grad)?.reshape(dims)?)?;
            optimizer.step(&mut |f| f(&mut p), 1.0, 1.0, None)?;
        }
        Ok(p.value.flatten_all()?.to_vec1()?)
    };
    for rule in ["kind = \"sgd\", momentum = 0.9", "kind = \"sgd\"", "kind = \"adamw\"", "kind = \"rmsprop\""] {
        let with = |rest: &str| format!("{rule}, lr = 0.1, weight_decay = {rest}");
        let (plain, decayed, spared) = (with("0.0"), with("0.3"), with("0.3, no_decay = true"));
        for (dims, same) in [(&[3][..], &plain), (&[3, 1], &decayed), (&[1, 3, 1, 1], &decayed)] {
            assert_eq!(ends(&spared, dims)?, ends(same, dims)?, "{rule}, {dims:?}");
        }
        assert_ne!(ends(&plain, &[3])?, ends(&decayed, &[3])?, "{rule}");
    }
    Ok(())
}

#[test]
fn clipping_is_by_the_norm_of_the_mean_gradient() -> Result<()> {
    let (mut p, mut optimizer) = (param()?, Optimizer::new(spec(r#"kind = "sgd", lr = 0.1"#)));
    for grad in &GRADS {
        let norm = step(&mut optimizer, &mut p, grad, 2, Some(1.0))?;
        assert!((norm - grad.iter().map(|g| g * g).sum::<f64>().sqrt()).abs() < 1e-12);
    }
    assert_close(&p, &[0.873186509029227, -1.96084219405575, 0.43574396806609]);
    Ok(())
}

#[test]
fn what_has_no_gradient_or_is_a_buffer_stays() -> Result<()> {
    let mut optimizer = Optimizer::new(spec(r#"kind = "adamw""#));
    let mut p = param()?;
    assert_eq!(optimizer.step(&mut |f| f(&mut p), 1.0, 1.0, None)?.grad_norm, 0.0);
    p.trainable = false;
    step(&mut optimizer, &mut p, &[1.0; 3], 1, None)?;
    assert_close(&p, &[1.0, -2.0, 0.5]);
    assert!(optimizer.state()?.is_empty());
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    let mut optimizer = Optimizer::new(spec(r#"kind = "sgd", lr = 0.1"#));
    let mut p = param()?;
    let error = step(&mut optimizer, &mut p, &[0.0, f64::NAN, 0.0], 1, None).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert_close(&p, &[1.0, -2.0, 0.5]);
    Ok(())
}

#[test]
fn state_is_named_by_parameter_and_checked() -> Result<()> {
    let mut optimizer = Optimizer::new(spec(r#"kind = "adamw""#));
    let mut p = param()?;
    step(&mut optimizer, &mut p, &GRADS[0], 1, None)?;
    let names: Vec<String> = optimizer.state()?.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["p.step", "p.mean", "p.square"]);
    let mut other = Optimizer::new(spec(r#"kind = "sgd", momentum = 0.9"#));
    let steps = optimizer.state()?[0].1.clone();
    let mut get = |name: &str| (name == "p.step").then(|| steps.clone());
    let error = other.load_state(&mut |f| f(&mut p), &mut get).unwrap_err();
    assert!(error.to_string().contains("p.momentum"), "{error}");
    Ok(())
}

#[test]
fn schedules() -> Result<()> {
    let factors = |s: LrSchedule, clips: &[u64]| clips.iter().map(|&c| s.factor(c, 10)).collect::<Vec<_>>();
    assert_eq!(factors(LrSchedule::default(), &[0, 9]), [1.0, 1.0]);
    assert_eq!(factors(LrSchedule::Constant { warmup: 4 }, &[0, 1, 3, 4]), [0.25, 0.5, 1.0, 1.0]);
    assert_eq!(factors(LrSchedule::Step { warmup: 0, every: 3, gamma: 0.5 }, &[0, 2, 3, 6]), [1.0, 1.0, 0.5, 0.25]);
    let cosine = factors(LrSchedule::Cosine { warmup: 2, floor: 0.2 }, &[0, 2, 6, 10, 11]);
    close("cosine", &cosine, &[0.5, 1.0, 0.6, 0.2, 0.2], 1e-12);
    let never = LrSchedule::Step { warmup: 0, every: 0, gamma: 0.5 }.validate().unwrap_err();
    assert!(never.to_string().contains("every should be at least 1"), "{never}");
    for (wrong, why) in [
        (r#"kind = "sgd", lr = -1"#, "lr = -1 should be at least 0"),
        (r#"kind = "sgd", nesterov = true"#, "needs a momentum above 0"),
        (r#"kind = "adamw", betas = [0.9,1.0]"#, "betas[1] = 1 should be from 0 to below 1"),
    ] {
        let error = spec(wrong).validate().unwrap_err().to_string();
        assert!(error.contains(why), "{wrong}: {error}");
    }
    let misspelt = toml::from_str::<OptimizerSpec>("kind = \"sgd\"\nmomentun = 0.9").unwrap_err().to_string();
    assert!(misspelt.contains("unknown field `momentun`"), "{misspelt}");
    Ok(())
}

/// Initial values: Kaiming's deviation, a function of seed and name alone, equal to rounding in both types.
#[test]
fn initial_values() -> Result<()> {
    let init = |seed, dtype| Init { seed, dtype, device: Device::Cpu, last_layer: None };
    let draw = |i: Init, name: &str| -> Result<Vec<f64>> {
        let p = i.weight(name.into(), &[32, 16, 3, 3])?;
        Ok(p.value.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
    };
    let a = draw(init(1, DType::F64), "a")?;
    let deviation = (a.iter().map(|v| v * v).sum::<f64>() / a.len() as f64).sqrt();
    assert!((deviation / (2.0f64 / (32.0 * 9.0)).sqrt() - 1.0).abs() < 0.03, "{deviation}");
    close("in f32", &draw(init(1, DType::F32), "a")?, &a, 1e-7);
    assert_ne!(a, draw(init(2, DType::F64), "a")?);
    assert_ne!(a, draw(init(1, DType::F64), "b")?);
    // The last layer's are a third as large as fan-in allows, and as many draws: 16 x 9 inputs.
    let last = Init { last_layer: Some(7), ..init(1, DType::F64) };
    let [inner, output] =
        [draw(last.clone(), "layers.7.residual.conv1.weight")?, draw(last, "layers.7.conv2d.weight")?];
    let deviation = |v: &[f64]| (v.iter().map(|v| v * v).sum::<f64>() / v.len() as f64).sqrt();
    assert!((deviation(&output) / (1.0f64 / (3.0 * 144.0)).sqrt() - 1.0).abs() < 0.03, "{}", deviation(&output));
    assert!((deviation(&inner) / (2.0f64 / (32.0 * 9.0)).sqrt() - 1.0).abs() < 0.03, "{}", deviation(&inner));
    Ok(())
}
