//! A network as a Python program: `model.py`, a template filled in.

use crate::backend::cpu::conv::Conv;
use crate::config::{Config, Task};
use crate::method::Boundary;
use crate::network::{ModuleSpec, Network};
use crate::nn::module::Fuse;
use crate::nn::spec::{LayerSpec, NormKind, ResidualSpec, Shape};

/// Lines from `#if WORD` to `#end` are for networks that have what the word says; `@WORD@` is filled in.
const TEMPLATE: &str = include_str!("model.py");

/// The program of `network`, trained by `config` for `classes`; `source` says where its weights are from.
pub fn program(network: &Network, config: &Config, classes: &[String], source: &str) -> String {
    let modules_of = 1..=network.graph.modules();
    let layers: Vec<(usize, LayerSpec, Shape)> = modules_of.flat_map(|i| network.layers_with_inputs(i)).collect();
    let has = |test: fn(&LayerSpec) -> bool| layers.iter().any(|(_, layer, _)| test(layer));
    let skips = network.modules.iter().any(|module| !module.skips.is_empty());
    let adapters = adapters(network);
    let (residual, sum) = (has(|layer| matches!(layer, LayerSpec::Residual(_))), network.fuse == Fuse::Sum);
    let recognition = config.model.task == Task::Recognition;
    let holds = |word: &str| match word {
        "recognition" => recognition,
        "future-frames" => !recognition,
        "functional" => residual || skips,
        "residual" => residual,
        "linear" => has(|layer| matches!(layer, LayerSpec::Linear { .. })),
        "upsample" => has(|layer| matches!(layer, LayerSpec::Upsample { .. })),
        "skips" => skips,
        "sum" => skips && sum,
        "concat" => skips && !sum,
        "adapters" | "sum-adapters" => !adapters.is_empty(),
        "flow" => config.train.boundary == Boundary::Flow,
        "cut" => config.train.boundary == Boundary::Cut,
        _ => false,
    };
    let [height, width, _] = network.input;
    let triple = |values: [f32; 3]| format!("({}, {}, {})", values[0], values[1], values[2]);
    let layer =
        |(n, layer, input): &(usize, LayerSpec, Shape)| format!("            \"{n}\": {},", written(layer, *input));
    let values = [
        ("SOURCE", source.replace('\\', "\\\\").replace('"', "\\\"")),
        ("FRAMES", config.data.frames.to_string()),
        ("STRIDE", config.data.stride.to_string()),
        ("HEIGHT", height.to_string()),
        ("WIDTH", width.to_string()),
        ("MEAN", triple(config.data.mean)),
        ("STD", triple(config.data.std)),
        // A list of strings in JSON is one in Python.
        ("CLASSES", serde_json::json!(classes).to_string()),
        ("HORIZON", config.model.horizon.to_string()),
        ("AHEAD", (network.graph.newest_lead() + config.model.horizon).to_string()),
        ("MODULES", modules(network)),
        ("LAYERS", layers.iter().map(layer).collect::<Vec<_>>().join("\n")),
        ("ADAPTERS", adapters.join("\n")),
    ];
    fill(&holds, &values)
}

fn fill(holds: &dyn Fn(&str) -> bool, values: &[(&str, String)]) -> String {
    let (mut text, mut shown) = (String::new(), true);
    for line in TEMPLATE.lines() {
        match line.strip_prefix("#if ") {
            Some(word) => shown = holds(word),
            None if line == "#end" => shown = true,
            None if shown => {
                // A value is not looked at again: it may have the sign in it.
                for (n, part) in line.split('@').enumerate() {
                    let value = values.iter().find(|(word, _)| n % 2 == 1 && *word == part);
                    text += value.map_or(part, |(_, value)| value);
                }
                text.push('\n');
            }
            None => {}
        }
    }
    text
}

fn modules(network: &Network) -> String {
    let module = |(i, module): (usize, &ModuleSpec)| {
        let skips = network.graph.inputs(i).filter(|edge| !edge.is_main());
        let skips: Vec<String> = skips.map(|edge| format!("({}, {})", edge.from, edge.delay)).collect();
        let ([h, w, c], [oh, ow, oc]) = (module.main, module.output);
        format!(
            "    (range({}, {}), [{}]),  # {i}: {c} channels of {h}x{w} pixels to {oc} of {oh}x{ow}",
            module.layers.start,
            module.layers.end,
            skips.join(", ")
        )
    };
    (1..).zip(&network.modules).map(module).collect::<Vec<_>>().join("\n")
}

/// The 1x1 convolutions of skips that are added to other channels, an entry each.
fn adapters(network: &Network) -> Vec<String> {
    let mut all = Vec::new();
    for (i, module) in (1..).zip(&network.modules).filter(|_| network.fuse == Fuse::Sum) {
        for skip in module.skips.iter().filter(|skip| skip.shape[2] != module.main[2]) {
            let (from, [_, _, channels], [_, _, out]) = (skip.from, skip.shape, module.main);
            all.push(format!("            \"{from}_{i}\": nn.Conv2d({channels}, {out}, 1),"));
        }
    }
    all
}

/// A layer as a Python expression.
fn written(layer: &LayerSpec, [h, w, c]: Shape) -> String {
    let named = |module: String| format!("named(\"{}\", {module})", layer.kind());
    match *layer {
        LayerSpec::Conv2d { out, kernel, stride, padding, groups, bias } => {
            let mut text = format!("nn.Conv2d({c}, {out}, {kernel}");
            for (name, value, default) in [("stride", stride, 1), ("padding", padding, 0), ("groups", groups, 1)] {
                if value != default {
                    text += &format!(", {name}={value}");
                }
            }
            named(text + if bias { ")" } else { ", bias=False)" })
        }
        LayerSpec::Linear { out, bias } => {
            named(format!("Linear({}, {out}{})", h * w * c, if bias { "" } else { ", bias=False" }))
        }
        LayerSpec::GroupNorm { groups } => named(format!("nn.GroupNorm({groups}, {c})")),
        LayerSpec::BatchNorm { momentum } => named(format!("nn.BatchNorm2d({c}, momentum={momentum})")),
        LayerSpec::Relu {} => "nn.ReLU()".into(),
        LayerSpec::Gelu {} => "nn.GELU()".into(),
        LayerSpec::MaxPool { kernel, stride, padding } => {
            pool("nn.MaxPool2d", "float(\"-inf\")", kernel, stride.unwrap_or(kernel), padding)
        }
        LayerSpec::AvgPool { kernel, stride, padding } => {
            pool("nn.AvgPool2d", "0.0", kernel, stride.unwrap_or(kernel), padding)
        }
        LayerSpec::GlobalAvgPool {} => "nn.AdaptiveAvgPool2d(1)".into(),
        LayerSpec::Residual(ref block) => named(residual(block, c)),
        LayerSpec::Upsample { factor } => format!("Upsample({factor})"),
        LayerSpec::Dropout { rate } => format!("nn.Dropout({rate})"),
    }
}

/// PyTorch takes a border of up to half the window; a wider one is a layer of its own.
fn pool(kind: &str, border: &str, kernel: usize, stride: usize, padding: usize) -> String {
    match padding {
        0 => format!("{kind}({kernel}, {stride})"),
        _ if padding <= kernel / 2 => format!("{kind}({kernel}, {stride}, {padding})"),
        _ => format!("nn.Sequential(nn.ConstantPad2d({padding}, {border}), {kind}({kernel}, {stride}))"),
    }
}

fn residual(block: &ResidualSpec, channels: usize) -> String {
    let convolution = |(conv, from, to): &(Conv, usize, usize)| {
        format!("({from}, {to}, {}, {})", conv.window.kernel[0], conv.window.stride[0])
    };
    let branch: Vec<String> = block.convolutions(channels).iter().map(convolution).collect();
    let shortcut = match block.projection(channels) {
        Some(_) => format!("({channels}, {}, {})", block.out, block.stride),
        None => "None".into(),
    };
    let norm = match block.norm {
        NormKind::Group => format!("lambda c: nn.GroupNorm({}, c)", block.groups),
        NormKind::Batch => "nn.BatchNorm2d".into(),
    };
    format!("Residual([{}], {shortcut}, {norm})", branch.join(", "))
}
