//! Updates of parameters.

use candle_core::{Device, Tensor};
use sideways::Result;
use sideways::backend::cuda::ops::{self, Parameter, Parameters};
use sideways::backend::cuda::{Array, Element, Gpu};
use sideways::nn::optim::{Average, Optimizer, OptimizerSpec};
use sideways::nn::param::Param;

use super::{bf16, bits, close, random};

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
        r#"kind = "sgd", lr = 0.1, momentum = 0.9, weight_decay = 0.05, no_decay = true"#,
        r#"kind = "adamw", lr = 0.01, weight_decay = 0.2, no_decay = true"#,
        r#"kind = "rmsprop", lr = 0.01, weight_decay = 0.1, no_decay = true"#,
    ] {
        let spec = rule(text);
        let mut host = Optimizer::new(spec);
        let mut params: Vec<Param> = Vec::new();
        let (mut values, mut gradients, mut buffers, mut rounded, mut averages) =
            (vec![], vec![], vec![], vec![], vec![]);
        let number = if text.contains("adamw") || text.contains("rmsprop") && text.contains("momentum") {
            2
        } else if text.contains("momentum") || text.contains("rmsprop") {
            1
        } else {
            0
        };
        for (i, &n) in sizes.iter().enumerate() {
            let value = random(n, 30 + i as u64);
            // The first is a matrix, the others are vectors.
            let dims = if i == 0 { vec![n, 1] } else { vec![n] };
            let t = Tensor::from_vec(value.clone(), dims, &Device::Cpu)?;
            params.push(Param { name: format!("p{i}"), value: t, grad: None, trainable: true });
            averages.push(gpu.upload(&value)?);
            values.push(gpu.upload(&value)?);
            gradients.push(gpu.zeros(n, Element::F32)?);
            buffers.push((0..number).map(|_| gpu.zeros(n, Element::F32)).collect::<Result<Vec<_>>>()?);
            rounded.push(gpu.zeros(n, Element::Bf16)?);
        }
        let mut average = Average::new(0.75, &mut |f| params.iter_mut().try_for_each(&mut *f))?;
        let of: Vec<Vec<&Array>> = buffers.iter().map(|b| b.iter().collect()).collect();
        let parameters: Vec<Parameter> = (0..sizes.len())
            .map(|i| Parameter {
                value: &values[i],
                gradient: &gradients[i],
                buffers: &of[i],
                rounded: (i != 1).then_some(&rounded[i]),
                decays: spec.decays(if i == 0 { 2 } else { 1 }),
                average: Some(&averages[i]),
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
                p.accumulate(Tensor::from_vec(g, p.value.shape(), &Device::Cpu)?)?;
            }
            table.norm(&gpu, *divisor, *clip)?;
            table.step(&gpu, &spec, *scale, step as u64 + 1)?;
            let stats = host.step(&mut |f| params.iter_mut().try_for_each(&mut *f), *scale, *divisor, *clip)?;
            table.average(&gpu, 0.75)?;
            average.update(&mut |f| params.iter_mut().try_for_each(&mut *f))?;
            for (i, average) in average.values().values().enumerate() {
                close(&format!("{text}: averages"), &gpu.download(&averages[i])?, average, Element::F32);
            }
            let state = gpu.download(table.state())?;
            assert!((f64::from(state[0]) / stats.grad_norm - 1.0).abs() < 1e-6 && state[2] == 1.0, "{state:?}");
            check(&params, &format!("step {step}"))?;
            for g in &gradients {
                assert!(gpu.download(g)?.iter().all(|&v| v == 0.0), "gradients are cleared");
            }
        }
        let state = host.state()?;
        let memory: Vec<&Tensor> = state.iter().filter(|(n, _)| !n.ends_with(".step")).map(|(_, t)| t).collect();
        assert_eq!(memory.len(), number * sizes.len(), "{text}");
        for (host, device) in memory.into_iter().zip(of.iter().flatten()) {
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
        let average = gpu.download(&averages[1])?;
        table.average(&gpu, 0.75)?;
        assert_eq!(bits(&gpu.download(&averages[1])?), bits(&average), "{text}: no average moves");
        assert_eq!(gpu.download(table.state())?[2], 0.0);
        for (v, before) in values.iter().zip(&before) {
            assert_eq!(bits(&gpu.download(v)?), bits(before), "{text}: nothing changes");
        }
        assert_eq!(bits(&gpu.download(&gradients[2])?), bits(&bad));
    }
    Ok(())
}
