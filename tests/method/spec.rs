//! Layers as configured: shapes, costs, names and the errors for what does not fit; the presets.

use candle_core::{DType, Device, Tensor};
use sideways::Result;
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::module::{Fuse, Module, SkipInput};
use sideways::nn::param::Init;
use sideways::nn::presets::{PRESETS, preset};
use sideways::nn::spec::LayerSpec;
use sideways::nn::tape_size::tape_elements;

fn init() -> Init {
    Init { seed: 1, dtype: DType::F32, device: Device::Cpu, last_layer: None }
}

fn parse(text: &str) -> std::result::Result<LayerSpec, toml::de::Error> {
    toml::from_str(&text.replace(", ", "\n"))
}

#[test]
fn layers_read_and_write_as_toml() -> Result<()> {
    let conv = parse(r#"kind = "conv2d", out = 8, kernel = 3"#).expect("valid");
    assert_eq!(conv, LayerSpec::Conv2d { out: 8, kernel: 3, stride: 1, padding: 0, groups: 1, bias: true });
    for name in PRESETS.map(|(name, _)| name) {
        let layers = preset(name, 5)?;
        assert!(layers.len() > 3, "{name}");
        for layer in layers {
            let text = toml::to_string(&layer).expect("serialisable");
            assert!(text.starts_with(&format!("kind = \"{}\"", layer.kind())), "{text}");
            assert_eq!(toml::from_str::<LayerSpec>(&text).expect("its own output"), layer);
        }
    }
    for (wrong, why) in [
        (r#"kind = "conv2d", out = 8"#, "missing field `kernel`"),
        (r#"kind = "conv2d", out = 8, kernel = 3, strid = 2"#, "unknown field `strid`"),
        (r#"kind = "relu", slope = 1"#, "unknown field `slope`"),
        (r#"kind = "residual", out = 8, norn = "batch""#, "unknown field `norn`"),
        (r#"kind = "conv3d", out = 8"#, "unknown variant `conv3d`"),
    ] {
        let error = parse(wrong).expect_err(wrong).to_string();
        assert!(error.contains(why), "{wrong}: {error}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_with_its_shape() {
    for (text, input, expected) in [
        (r#"kind = "conv2d", out = 8, kernel = 5"#, [4, 4, 3], "4x4x3"),
        (r#"kind = "conv2d", out = 8, kernel = 3, stride = 0"#, [4, 4, 3], "stride"),
        (r#"kind = "conv2d", out = 8, kernel = 1, groups = 2"#, [4, 4, 3], "groups = 2"),
        (r#"kind = "group-norm", groups = 5"#, [4, 4, 8], "groups = 5"),
        (r#"kind = "group-norm""#, [4, 4, 8], "groups = 32"),
        (r#"kind = "max-pool", kernel = 2, padding = 2"#, [4, 4, 8], "padding"),
        (r#"kind = "residual", out = 6, block = "bottleneck", groups = 1"#, [4, 4, 8], "multiple of 4"),
        (r#"kind = "residual", out = 6"#, [4, 4, 8], "groups = 32"),
        (r#"kind = "upsample", factor = 0"#, [4, 4, 8], "factor"),
        (r#"kind = "dropout", rate = 1.0"#, [4, 4, 8], "rate = 1"),
        (r#"kind = "linear", out = 0"#, [4, 4, 8], "out"),
    ] {
        let layer = parse(text).expect("readable");
        let error = layer.output_shape(input).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error}");
        let built = layer.build(0, input, &init()).err().expect("it does not fit").to_string();
        assert!(built.contains(expected), "{built}");
    }
    for shape in [[5, 4, 8], [2, 5, 8]] {
        let skip = SkipInput { from: 1, shape };
        let error = Module::new(3, &[], [4, 4, 8], &[skip], Fuse::Sum, &init()).err().expect("the skip is larger");
        let text = error.to_string();
        assert!(error.exit_code() == 2 && text.contains("from module 1 to 3") && text.contains("at most"), "{text}");
    }
}

/// The shapes a preset promises, and costs against what the network really does.
#[test]
fn presets_are_what_they_say() -> Result<()> {
    // Parameters as torchvision has them, with group norms (the same count as batch norms).
    for (name, side, out, params) in [
        ("motion-small", 32, [1, 1, 10], None),
        ("vgg8", 32, [1, 1, 10], None),
        ("resnet18", 64, [1, 1, 1000], Some(11_689_512)),
        ("resnet50", 32, [1, 1, 1000], Some(25_557_032)),
        // torchvision's resnet152 without eight blocks of 1 117 184 parameters.
        ("resnet128", 32, [1, 1, 1000], Some(60_192_808 - 8 * 1_117_184)),
        ("autoencoder", 32, [32, 32, 3], None),
    ] {
        let layers = preset(name, out[2])?;
        let (mut shape, mut count) = ([side, side, 3], 0);
        for layer in &layers {
            count += layer.params(shape);
            shape = layer.output_shape(shape)?;
        }
        assert_eq!(shape, out, "{name}");
        assert_eq!(params.unwrap_or(count), count, "{name}");

        // Two samples: a batch norm behind a global pool has nothing to go by with one.
        let promised = 4 * tape_elements(&layers.iter().collect::<Vec<_>>(), [side, side, 3], 2);
        let numbered: Vec<(usize, LayerSpec)> = layers.into_iter().enumerate().collect();
        let mut module = Module::new(1, &numbered, [side, side, 3], &[], Fuse::Sum, &init())?;
        let mut elements = 0;
        module.visit(&mut |p| {
            elements += if p.trainable { p.value.elem_count() as u64 } else { 0 };
            Ok(())
        })?;
        assert_eq!(elements, count, "{name}");
        let mut tape = Tape::new();
        let x = Tensor::ones((2, side, side, 3), DType::F32, &Device::Cpu)?;
        module.forward(&[x], &Pass { training: true, key: 0, again: false }, &mut tape)?;
        let found = tape.bytes() as u64;
        assert!(found.abs_diff(promised) * 1000 <= found, "{name}: {found} bytes on the tape, {promised} promised");
    }
    let error = preset("resnet-18", 10).unwrap_err().to_string();
    assert!(error.contains("did you mean \"resnet18\"?"), "{error}");
    Ok(())
}

#[test]
fn flops_count_multiply_adds_twice() {
    let conv = parse(r#"kind = "conv2d", out = 8, kernel = 3, padding = 1, groups = 2"#).expect("valid");
    assert_eq!(conv.flops([4, 5, 6]), 2 * 4 * 5 * 8 * 3 * 9);
    assert_eq!(parse(r#"kind = "linear", out = 8"#).expect("valid").flops([2, 2, 3]), 2 * 12 * 8);
    let block = parse(r#"kind = "residual", out = 8, stride = 2, groups = 1"#).expect("valid");
    let pixels = 2 * 2;
    assert_eq!(block.flops([4, 4, 4]), 2 * pixels * (4 * 9 * 8 + 8 * 9 * 8 + 4 * 8));
}

#[test]
fn parameters_are_named_by_their_place() -> Result<()> {
    let block = parse(r#"kind = "residual", out = 8, groups = 2"#).expect("valid");
    let mut module = Module::new(2, &[(3, block)], [4, 4, 4], &[], Fuse::Sum, &init())?;
    let mut names = Vec::new();
    module.visit(&mut |p| {
        names.push(p.name.clone());
        Ok(())
    })?;
    let parts = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias"];
    let projection = ["projection.weight", "projection-norm.weight", "projection-norm.bias"];
    let expected: Vec<String> = parts.iter().chain(&projection).map(|p| format!("layers.3.residual.{p}")).collect();
    assert_eq!(names, expected);
    Ok(())
}
