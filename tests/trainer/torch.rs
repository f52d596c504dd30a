//! To and from PyTorch: what is exported computes what is trained here, and weights come back to the bit, or it is said why not.
//! Where there is PyTorch, `tests/reference/torch_export.py` compares the numbers.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::common::jobs::Run;
use crate::common::mpirun::text;
use crate::common::numbers::flat;
use crate::common::program::alone;
use crate::common::runs::{UNEVEN, config, shard, tensors, train};
use crate::common::skip_unless_ci;
use sideways::checkpoint::Checkpoint;
use sideways::config::Config;
use sideways::method::Schedule;
use sideways::setup::{Purpose, Setup};
use sideways::torch::export;

/// The tensors of a safetensors file.
fn file(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn shapes(tensors: &HashMap<String, Tensor>) -> BTreeMap<String, Vec<usize>> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect()
}

/// What an exported program says of itself: its tensors' shapes, and what reached the last module at each of its steps.
fn asked(program: &Path, frames: usize) -> Option<Value> {
    let stub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/torch_stub.py");
    let output = match Command::new("python3").arg(stub).arg(program).arg(frames.to_string()).output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            skip_unless_ci("there is no python3 to read an exported model.py");
            return None;
        }
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{}", text(&output));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// What reaches module D at its steps in evaluation, by the schedule: registers keep what came last.
fn scheduled(setup: &Setup) -> Vec<String> {
    let schedule: &Schedule = &setup.schedule;
    let mut outputs: Vec<Vec<String>> = Vec::new();
    for i in 1..=setup.grid.modules {
        let inputs: Vec<usize> = setup.network.inputs(i).iter().map(|edge| edge.edge.from).collect();
        let mut registers = vec![String::new(); inputs.len()];
        let made = schedule.forwards(i).map(|forward| {
            for ((register, from), arrives) in registers.iter_mut().zip(&inputs).zip(&forward.receive) {
                if let Some(step) = arrives {
                    *register = outputs[from - 1][*step].clone();
                }
            }
            let frame = format!("x{}", forward.step);
            format!("{i}({})", if i == 1 { frame } else { registers.join(" ") })
        });
        let made = made.collect();
        outputs.push(made);
    }
    outputs.pop().unwrap()
}

/// A run of one batch, exported: the program's folder.
fn exported(config: &Config, raw: bool) -> PathBuf {
    train(config, None);
    let run = Path::new(&config.run.dir);
    // As `eval` has it: cut as it was trained.
    export(&Checkpoint::open(run).unwrap(), config, raw, &run.join("torch")).unwrap();
    run.join("torch")
}

const RESIDUAL: &str = "model.layers=[{ kind = 'conv2d', out = 8, kernel = 3, padding = 1, bias = false }, { kind = 'batch-norm' }, \
     { kind = 'relu' }, { kind = 'max-pool', kernel = 3, stride = 2, padding = 2 }, \
     { kind = 'residual', out = 8, norm = 'batch' }, { kind = 'residual', out = 16, stride = 2, block = 'bottleneck', groups = 4 }, \
     { kind = 'dropout', rate = 0.25 }, { kind = 'avg-pool', kernel = 2 }, { kind = 'linear', out = 6, bias = false }, \
     { kind = 'gelu' }, { kind = 'linear', out = 4 }]";
const FRAMES: &str = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = 'relu' }, \
     { kind = 'conv2d', out = 6, kernel = 3, stride = 2, padding = 1 }, { kind = 'upsample', factor = 2 }, \
     { kind = 'conv2d', out = 4, kernel = 3, padding = 1, groups = 2 }, { kind = 'upsample', factor = 2 }, \
     { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";

/// For networks of all kinds of layers and skips: the program's tensors are those of its file, and at every tick the same step's
/// output reaches the same module as by the schedule.
#[test]
fn an_exported_program_follows_the_schedule() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 6, 14, false);
    for (n, sets) in [
        &["model.skip={}"][..],
        &["model.modules=1"],
        &["model.skip={ spans = [2, 3] }"],
        &["model.skip={ spans = [2, 3], fuse = 'concat' }"],
        &["model.skip={ spans = [2], delay = 'aligned' }"],
        &["model.skip={ edges = [{ from = 1, to = 5, delay = 3 }, { from = 2, to = 4, delay = 2 }, [1, 3]] }"],
        &["model.skip={ spans = [2, 3] }", "train.boundary='cut'"],
        &["model.skip={ edges = [[1, 5], [1, 4]], fuse = 'concat' }", "train.rule='gpipe'", "data.frames=2"],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }"],
        &[RESIDUAL, "model.modules=4", "model.skip={ spans = [2] }"],
        &[FRAMES, "model.task='future-frames'", "model.modules=4", "model.skip={ edges = [[1, 4]], delay = 2 }"],
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run.dir='{}/run-{n}'", dir.path().display());
        let config = config(dir.path(), &[&["train.batches=1", &run], sets].concat());
        let folder = exported(&config, false);
        let setup = Setup::new(&config, 1, Purpose::Evaluate).unwrap();
        let found = shapes(&file(&folder.join("model.safetensors")));
        let all = (1..=setup.grid.modules).flat_map(|i| setup.network.tensors(i));
        assert_eq!(found, all.map(|tensor| (tensor.name, tensor.shape)).collect(), "{sets:?}");
        let program = std::fs::read_to_string(folder.join("model.py")).unwrap();
        assert!(!program.contains('@') && !program.contains("#if") && !program.contains("#end"), "{program}");
        let Some(said) = asked(&folder.join("model.py"), config.data.frames) else { return };
        assert_eq!(said["tensors"], serde_json::to_value(&found).unwrap(), "{sets:?}");
        let expected = scheduled(&setup);
        assert!(expected.len() >= 2 && expected[0] != expected[1], "{expected:?}");
        assert_eq!(said["steps"], serde_json::to_value(&expected).unwrap(), "{sets:?}");
        if let Some(ahead) = setup.ahead {
            assert!(program.contains(&format!("\nAHEAD = {ahead} ")), "{program}");
        }
    }
}

/// From the command line: exported weights are initial weights to the bit; a network cut elsewhere takes what fits and says what not.
#[test]
fn exported_weights_come_back_to_the_bit() {
    let run = Run::new(&["train.batches=2", "train.ema=0.5"]);
    let output = alone(&["train", &run.config]);
    assert!(output.status.success(), "{}", text(&output));
    let (of, out) = (run.folder().display().to_string(), run.dir.path().join("torch"));
    let export = |more: &[&str], out: &Path| {
        let out = out.display().to_string();
        let output = alone(&[&["export", &of, "--torch", "--out", &out], more].concat());
        (output.status.code(), text(&output))
    };
    let (code, said) = export(&[], &out);
    assert!(code == Some(0) && said.contains("step-00000002, after 2 batches"), "{said}");
    assert!(said.contains("torch/model.safetensors") && said.contains("torch/model.py"), "{said}");
    // What is there stays; without a word for which program, there is none.
    let (code, said) = export(&[], &out);
    assert!(code == Some(2) && said.contains("model.safetensors: it is there already"), "{said}");
    let output = alone(&["export", &of, "--out", &of]);
    assert!(output.status.code() == Some(2) && text(&output).contains("--torch"), "{}", text(&output));
    let (code, said) = export(&["--raw"], &run.dir.path().join("raw"));
    assert!(code == Some(0), "{said}");
    let (averaged, raw) = (file(&out.join("model.safetensors")), file(&run.dir.path().join("raw/model.safetensors")));
    let trained = tensors(&run.folder(), 2);
    for (name, tensor) in &averaged {
        assert_eq!(flat(tensor).unwrap(), trained[&format!("ema.{name}")], "{name}");
        assert_eq!(flat(&raw[name]).unwrap(), trained[name], "{name}");
    }
    assert!(averaged.iter().any(|(name, tensor)| flat(tensor).unwrap() != trained[name]));

    let begins = |to: &str, sets: &[&str]| {
        let folder = run.dir.path().join(to);
        let fixed = [
            format!("train.init='{}'", out.join("model.safetensors").display()),
            format!("run.dir='{}'", folder.display()),
        ];
        let mut args = vec!["train", &run.config, "--stop-after", "1"];
        args.extend(fixed.iter().map(String::as_str).chain(sets.iter().copied()).flat_map(|set| ["--set", set]));
        let output = alone(&args);
        assert_eq!(output.status.code(), Some(75), "{}", text(&output));
        (tensors(&folder, 0), text(&output))
    };
    let (start, said) = begins("whole", &[]);
    for (name, tensor) in &averaged {
        assert_eq!(start[name], flat(tensor).unwrap(), "{name}");
    }
    assert!(
        said.contains(&format!("model.safetensors: {} tensors taken: layers.0.conv2d.bias, ", averaged.len())),
        "{said}"
    );
    assert!(!said.contains("not taken") && !said.contains("initial values"), "{said}");
    // Of three modules one skip is left, with other channels; another kernel in layer 2.
    let layers = r"model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = 'relu' },
        { kind = 'conv2d', out = 6, kernel = 5, padding = 2 }, { kind = 'group-norm', groups = 2 }, { kind = 'relu' },
        { kind = 'conv2d', out = 6, kernel = 3, padding = 1 }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let (start, said) = begins("other", &[&layers.replace('\n', " "), "model.modules=3"]);
    assert_eq!(start["layers.0.conv2d.weight"], flat(&averaged["layers.0.conv2d.weight"]).unwrap());
    for line in [
        "1 not taken, of shape [6, 4, 3, 3], while the network needs [6, 4, 5, 5]: layers.2.conv2d.weight",
        "not taken, that the network has no place for: layers.10.linear.bias, layers.10.linear.weight, layers.7.conv2d.bias,",
        "of the network keep their initial values: layers.2.conv2d.weight, ",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

/// Weights as torchvision calls a ResNet's: convolutions and the head go where they fit, batch norms into batch norms.
#[test]
fn a_resnet_of_torchvision_is_taken_where_it_fits() {
    let run = Run::new(&["train.batches=1", "model.skip={}", "model.modules=2"]);
    // A stem, a block as wide as it, a wider one with a projection; the head is of a thousand classes.
    let mut theirs: Vec<(String, Tensor)> = Vec::new();
    let mut add = |name: &str, shape: &[usize]| {
        let first = theirs.len() as f32;
        let values = Tensor::arange(first, first + shape.iter().product::<usize>() as f32, &Device::Cpu).unwrap();
        theirs.push((name.to_string(), values.reshape(shape).unwrap()));
    };
    let mut pair = |conv: &str, norm: &str, shape: &[usize]| {
        add(&format!("{conv}.weight"), shape);
        for part in ["weight", "bias", "running_mean", "running_var"] {
            add(&format!("{norm}.{part}"), &shape[..1]);
        }
        add(&format!("{norm}.num_batches_tracked"), &[]);
    };
    pair("conv1", "bn1", &[4, 3, 3, 3]);
    pair("layer1.0.conv1", "layer1.0.bn1", &[4, 4, 3, 3]);
    pair("layer1.0.conv2", "layer1.0.bn2", &[4, 4, 3, 3]);
    pair("layer2.0.conv1", "layer2.0.bn1", &[8, 4, 3, 3]);
    pair("layer2.0.conv2", "layer2.0.bn2", &[8, 8, 3, 3]);
    pair("layer2.0.downsample.0", "layer2.0.downsample.1", &[8, 4, 1, 1]);
    add("fc.weight", &[1000, 8]);
    add("fc.bias", &[1000]);
    let path = run.dir.path().join("resnet.safetensors");
    let content = safetensors::serialize(theirs.iter().map(|(name, tensor)| (name, tensor)), None).unwrap();
    std::fs::write(&path, content).unwrap();

    let layers = |norm: &str| {
        let groups = if norm == "group" { ", groups = 2" } else { "" };
        format!(
            "model.layers=[{{ kind = 'conv2d', out = 4, kernel = 3, padding = 1, bias = false }}, {{ kind = '{norm}-norm'{groups} }}, \
             {{ kind = 'relu' }}, {{ kind = 'residual', out = 4, norm = '{norm}', groups = 2 }}, \
             {{ kind = 'residual', out = 8, stride = 2, norm = '{norm}', groups = 2 }}, {{ kind = 'global-avg-pool' }}, \
             {{ kind = 'linear', out = 4 }}]"
        )
    };
    let begins = |to: &str, norm: &str| {
        let (layers, folder) = (layers(norm), run.dir.path().join(to));
        let (dir, init) = (format!("run.dir='{}'", folder.display()), format!("train.init='{}'", path.display()));
        let output = alone(&["train", &run.config, "--set", &dir, "--set", &init, "--set", &layers]);
        assert!(output.status.success(), "{}", text(&output));
        (tensors(&folder, 0), text(&output))
    };
    let of = |name: &str| flat(&theirs.iter().find(|(theirs, _)| theirs == name).unwrap().1).unwrap();
    let convolutions = [
        ("layers.0.conv2d.weight", "conv1.weight"),
        ("layers.3.residual.conv2.weight", "layer1.0.conv2.weight"),
        ("layers.4.residual.conv1.weight", "layer2.0.conv1.weight"),
        ("layers.4.residual.projection.weight", "layer2.0.downsample.0.weight"),
    ];
    let norms = [
        ("layers.1.batch-norm.running_mean", "bn1.running_mean"),
        ("layers.3.residual.norm1.weight", "layer1.0.bn1.weight"),
        ("layers.4.residual.norm2.running_var", "layer2.0.bn2.running_var"),
        ("layers.4.residual.projection-norm.bias", "layer2.0.downsample.1.bias"),
    ];
    let (start, said) = begins("batch", "batch");
    for (ours, theirs) in convolutions.into_iter().chain(norms) {
        assert_eq!(start[ours], of(theirs), "{ours}");
    }
    for line in [
        "30 tensors taken: conv1.weight as layers.0.conv2d.weight, ",
        "1 not taken, of shape [1000, 8], while the network needs [4, 8]: fc.weight",
        "1 not taken, of shape [1000], while the network needs [4]: fc.bias",
        "6 not taken, counts of batches, which nothing here needs: bn1.num_batches_tracked, ",
        "2 of the network keep their initial values: layers.6.linear.weight, layers.6.linear.bias",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
    let (start, said) = begins("group", "group");
    for (ours, theirs) in convolutions {
        assert_eq!(start[ours], of(theirs), "{ours}");
    }
    assert!(start["layers.3.residual.norm1.weight"].iter().all(|scale| *scale == 1.0));
    for line in [
        "6 tensors taken: ",
        "24 not taken, of batch norms, while the network has group norms there, ",
        "14 of the network keep their initial values: layers.1.group-norm.weight, ",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

/// Other files are refused, in a plan too, and say why.
#[test]
fn files_without_such_weights_are_refused() {
    let run = Run::new(&["train.batches=1", "model.skip={}"]);
    let refused = |content: &[u8], why: &str| {
        let path = run.dir.path().join("weights.safetensors");
        std::fs::write(&path, content).unwrap();
        let init = format!("train.init='{}'", path.display());
        let output = alone(&["train", &run.config, "--dry-run", "--set", &init]);
        let said = text(&output);
        assert!(
            output.status.code() == Some(2) && said.contains("weights.safetensors: ") && said.contains(why),
            "{said}"
        );
    };
    refused(b"\x80\x02}q\x00.", "it is no safetensors file");
    let one = |name: &str, tensor: Tensor| safetensors::serialize([(name, &tensor)], None).unwrap();
    let ones = Tensor::ones((4, 3, 7, 7), candle_core::DType::F32, &Device::Cpu).unwrap();
    refused(&one("encoder.weight", ones.clone()), "its tensors (encoder.weight) are called neither as here");
    refused(
        &one("layers.0.conv2d.weight", ones.clone()),
        "of shape [4, 3, 7, 7], while the network needs [4, 3, 3, 3]",
    );
    let whole = Tensor::ones((4, 3, 3, 3), candle_core::DType::U32, &Device::Cpu).unwrap();
    refused(&one("layers.0.conv2d.weight", whole), "of type U32, which are no weights");
    let narrow = Tensor::ones((4, 3, 3, 3), candle_core::DType::BF16, &Device::Cpu).unwrap();
    let path = run.dir.path().join("narrow.safetensors");
    std::fs::write(&path, one("layers.0.conv2d.weight", narrow)).unwrap();
    let output = alone(&["train", &run.config, "--set", &format!("train.init='{}'", path.display())]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(tensors(&run.folder(), 0)["layers.0.conv2d.weight"].iter().all(|weight| *weight == 1.0));
}
