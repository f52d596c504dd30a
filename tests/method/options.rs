//! Options of training, on whole runs: each does what it says and no more, survives a stop to the bit, and is refused where it cannot
//! work.

use std::collections::HashMap;
use std::path::Path;

use crate::common::runs::{config, shard, tensors, train};
use sideways::backend::stage::CpuStage;
use sideways::comm::World;
use sideways::nn::presets::{PRESETS, preset};
use sideways::setup::footprint::memory;
use sideways::setup::{Purpose, Setup};
use sideways::trainer::Trainer;

type Tensors = HashMap<String, Vec<f64>>;

/// Trains under `sets` into the folder `name` of `dir`, stopped after each of `stops` batches before it goes on; all tensors of the
/// checkpoint after `batches`.
fn run(dir: &Path, name: &str, sets: &[&str], stops: &[u64], batches: u64) -> Tensors {
    let run = format!("run.dir={}", dir.join(name).display());
    let config = config(dir, &[&[run.as_str()], sets].concat());
    for &stop in stops {
        train(&config, Some(stop));
    }
    train(&config, None);
    tensors(&dir.join(name), batches)
}

/// A folder with a shard of `videos` videos.
fn place(videos: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), videos, 14, false);
    dir
}

/// The error of planning a run under `sets`.
fn refused(dir: &Path, sets: &[&str]) -> String {
    let error = Trainer::new(&World::Alone, &config(dir, sets), None).err().expect("it cannot work");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

/// The module of `LAYERS`, cut in five, that has the parameter `name`.
fn module_of(name: &str) -> i32 {
    let layer: usize = name.split('.').nth(1).unwrap().parse().unwrap();
    [0, 2, 5, 7, 10].iter().filter(|&&first| first <= layer).count() as i32
}

/// One update of plain SGD: module i's parameters move by beta^(D - i) of what they move by without.
#[test]
fn damping_scales_each_modules_rate() {
    let dir = place(4);
    let sets = ["train.optimizer={ kind = 'sgd', lr = 1.0 }", "train.batches=1", "model.cuts=[2, 5, 7, 10]"];
    let sets = [&sets[..], &["model.modules=5"]].concat();
    let even = run(dir.path(), "even", &sets, &[], 1);
    let damped = run(dir.path(), "damped", &[&sets[..], &["train.lr_depth=0.5"]].concat(), &[], 1);
    let start = tensors(&dir.path().join("even"), 0);
    let mut seen = 0;
    for (name, start) in &start {
        let factor = 0.5f64.powi(5 - module_of(name));
        for ((s, e), d) in start.iter().zip(&even[name]).zip(&damped[name]) {
            assert!((factor * (e - s) - (d - s)).abs() < 1e-6, "{name}: {s} goes to {e}, damped to {d}");
            seen += i32::from(e != s);
        }
    }
    assert!(seen > 500, "{seen} values moved");
}

/// Cuts of `LAYERS` before every layer with weights.
const CUTS: &str = "model.cuts=[2, 5, 7, 10]";

fn moved(before: &Tensors, after: &Tensors) -> Vec<String> {
    let mut names: Vec<String> = before.keys().filter(|name| before[*name] != after[*name]).cloned().collect();
    names.sort();
    names
}

/// One line makes a linear probe: nothing but the last layer moves, nothing but it has an optimiser's memory, no cotangent
/// travels, and it moves as it would in the first batch of ordinary training; by every rule, resumed at every batch.
#[test]
fn a_linear_probe_is_one_line() {
    let dir = place(6);
    let probe = "train.freeze=['layers.?']";
    let with_skips = "train.freeze=['layers.?', 'skips.*']";
    for (case, (rule, probe)) in [
        (&["train.rule=sideways"][..], probe),
        (&["train.rule=bp"], probe),
        (&["model.skip={ spans = [2, 3] }"], with_skips),
    ]
    .into_iter()
    .enumerate()
    {
        let sets = [&[CUTS, "model.modules=5"][..], rule].concat();
        let frozen = [&sets[..], &[probe]].concat();
        let all = run(dir.path(), &format!("all{case}"), &sets, &[1], 1);
        let name = format!("probe{case}");
        let through = run(dir.path(), &name, &frozen, &[1], 4);
        let [start, first] = [0, 1].map(|batches| tensors(&dir.path().join(&name), batches));
        let last = ["layers.10.linear.bias", "layers.10.linear.weight"];
        assert_eq!(moved(&start, &through), last, "{rule:?}");
        for name in last {
            assert!(first[name] == all[name], "{rule:?}: {name}");
        }
        let kept: Vec<&String> = through.keys().filter(|n| n.starts_with("optimizer.")).collect();
        assert!(kept.iter().all(|n| n.starts_with("optimizer.layers.10.")) && kept.len() == 4, "{kept:?}");
        assert!(run(dir.path(), &format!("stopped{case}"), &frozen, &[2, 1], 4) == through, "{rule:?}: resumed");
        let setup = Setup::new(&config(dir.path(), &frozen), 1, Purpose::Train).unwrap();
        assert!(setup.wiring.cotangents.iter().flatten().all(Option::is_none), "{rule:?}");
        assert!((1..5).all(|i| setup.schedule.backwards(i).count() == 0) && setup.frozen.lowest() == 5);
        let whole = Setup::new(&config(dir.path(), &sets), 1, Purpose::Train).unwrap();
        assert!((0..5).all(|w| memory(&setup, w) < memory(&whole, w)), "neither cotangents nor gradients");
    }
    // One frame is enough for the last module, and clips too short for module 1 are for module 4.
    for (freeze, frames) in [(probe, "1"), ("train.freeze=[1, 2, 3]", "3")] {
        let sets = [CUTS, "model.modules=5", freeze, &format!("data.frames={frames}"), "train.batches=1"];
        run(dir.path(), &format!("short{frames}"), &sets, &[], 1);
    }
}

/// Cotangents pass through what is frozen: in the first batch everything else moves, to the bit, as without.
#[test]
fn cotangents_pass_through_what_is_frozen() {
    let dir = place(6);
    let wide = "model.layers=[{ kind = 'conv2d', out = 16, kernel = 3, padding = 1 }, { kind = 'batch-norm' }, { kind = 'relu' }, \
        { kind = 'residual', out = 16, groups = 4 }, { kind = 'residual', out = 32, stride = 2, norm = 'batch' }, \
        { kind = 'conv2d', out = 8, kernel = 1, bias = false }, { kind = 'group-norm', groups = 2 }, { kind = 'gelu' }, \
        { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let skip = "model.skip={ spans = [2] }";
    for (case, (sets, freeze, learn)) in [
        (&[CUTS, "model.modules=5", skip][..], "[2, 'layers.10']", &["layers.0", "layers.7", "skips.1_3"][..]),
        (&[CUTS, "model.modules=5", "train.replicas=2"], "[3]", &["layers.0", "layers.3", "layers.10"]),
        (
            &[wide, "model.cuts=[3, 4, 5]", "model.modules=4", skip],
            "['layers.*.residual.conv?.weight', 'layers.4.residual.projection*', 'layers.1.*', 'skips.2_4']",
            &["layers.0", "layers.3.residual.norm1", "layers.5"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let freeze = format!("train.freeze={freeze}");
        let frozen = [sets, &[freeze.as_str()]].concat();
        let all = run(dir.path(), &format!("all{case}"), sets, &[1], 1);
        let name = format!("frozen{case}");
        let end = run(dir.path(), &name, &frozen, &[1], 4);
        let [start, first] = [0, 1].map(|batches| tensors(&dir.path().join(&name), batches));
        let setup = Setup::new(&config(dir.path(), &frozen), 1, Purpose::Train).unwrap();
        for name in setup.frozen.names() {
            assert!(start[name] == end[name], "{name} moved");
        }
        // A frozen batch norm is another function than one that follows the batch: nothing is the same then.
        let follows = freeze.contains("layers.1.*");
        for (name, value) in first.iter().filter(|(name, _)| !setup.frozen.names().contains(*name)) {
            assert!(follows || all[name] == *value, "case {case}: {name}");
        }
        for beginning in learn {
            let moves = moved(&start, &end);
            assert!(moves.iter().any(|name| name.starts_with(beginning)), "case {case}: {beginning} of {moves:?}");
        }
        if follows {
            let statistics = "layers.1.batch-norm.running_mean";
            assert!(start[statistics] == end[statistics] && all[statistics] != start[statistics]);
            let others = "layers.4.residual.norm1.running_var";
            assert!(start[others] != end[others], "a norm that learns follows the batch");
        }
    }
}

/// What `Network::learned` says before a tensor is made is what modules have.
#[test]
fn learned_parameters_are_known_beforehand() {
    let dir = place(4);
    let preset = |name: &str| format!("model.layers={}", toml::Value::try_from(preset(name, 4).unwrap()).unwrap());
    for name in PRESETS.map(|(name, _)| name).into_iter().filter(|name| *name != "autoencoder") {
        let layers = preset(name);
        for fuse in ["sum", "concat"] {
            let skip = format!("model.skip={{ spans = [2], fuse = '{fuse}' }}");
            let sets = [layers.as_str(), "model.modules=3", &skip];
            let setup = Setup::new(&config(dir.path(), &sets), 1, Purpose::Train).unwrap();
            for i in 1..=3 {
                let mut stage = CpuStage::new(setup.stage_spec(i)).unwrap();
                let mut found = Vec::new();
                let visited = stage.module().visit(&mut |p| {
                    found.extend(p.trainable.then(|| (p.name.clone(), p.value.elem_count() as u64)));
                    Ok(())
                });
                visited.unwrap();
                assert_eq!(setup.network.learned(i), found, "{name}, module {i}");
                assert_eq!(setup.frozen.learned(i), setup.network.modules[i - 1].params, "{name}, module {i}");
            }
        }
    }
}

#[test]
fn what_cannot_be_frozen_is_refused() {
    let dir = place(4);
    for (freeze, words) in [
        ("['layers.12.*']", &["\"layers.12.*\" matches no layer", "nearest are layers.", "layers.2.conv2d.weight"][..]),
        ("['layers.0.conv3d.weight']", &["the nearest are layers.0.conv2d.weight"]),
        ("['layers.[0']", &["no pattern of layer names"]),
        ("[6]", &["no module 6", "modules 1 to 5"]),
        ("[0]", &["no module 0"]),
        ("['*']", &["leaves nothing to learn"]),
        ("[1, 2, 3, 4, 5]", &["leaves nothing to learn"]),
    ] {
        let error = refused(dir.path(), &[&format!("train.freeze={freeze}")]);
        assert!(words.iter().all(|word| error.contains(word)), "{freeze}: {error}");
    }
    let error =
        refused(dir.path(), &["train.freeze=[1]", "model.cuts=[2, 5, 7, 10]", "model.modules=5", "data.frames=6"]);
    assert!(error.contains("no cotangent reaches module 2"), "{error}");
}
