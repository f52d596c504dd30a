//! Options of training, on whole runs: each does what it says and no more, survives a stop to the bit, and is refused where it cannot
//! work.

use std::collections::HashMap;
use std::path::Path;

use crate::common::numbers::close_each;
use crate::common::runs::{config, shard, tensors, train, with_prefix};
use candle_core::{Device, Tensor};
use sideways::backend::cpu::mix::mix;
use sideways::backend::stage::CpuStage;
use sideways::checkpoint::Checkpoint;
use sideways::comm::World;
use sideways::data::{FrameStream, Mixup, Views};
use sideways::nn::loss::{Mixed, cross_entropy, soft_cross_entropy};
use sideways::nn::presets::{PRESETS, preset};
use sideways::nn::spec::{LayerSpec, NormKind};
use sideways::nn::tensors::TensorSpec;
use sideways::setup::footprint::memory;
use sideways::setup::{Purpose, Setup};
use sideways::trainer::{Evaluator, Trainer};

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
        (&["train.rule=1f1b"], probe),
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
        let edges = 0..setup.network.edges.len();
        assert!(edges.into_iter().all(|k| setup.wiring.cotangents(0, k).is_none()), "{rule:?}");
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

/// What `Network::tensors` says before a tensor is made is what modules have.
#[test]
fn tensors_are_known_beforehand() {
    let dir = place(4);
    let preset = |name: &str| preset(name, 4).unwrap();
    let batch_norms = |mut layers: Vec<LayerSpec>| {
        for layer in &mut layers {
            if let LayerSpec::Residual(block) = layer {
                block.norm = NormKind::Batch;
            }
        }
        layers
    };
    let names = PRESETS.map(|(name, _)| name).into_iter().filter(|name| *name != "autoencoder");
    let networks = names.map(|name| (name, preset(name))).chain([("batch norms", batch_norms(preset("resnet18")))]);
    for (name, layers) in networks {
        let layers = format!("model.layers={}", toml::Value::try_from(layers).unwrap());
        for fuse in ["sum", "concat"] {
            let skip = format!("model.skip={{ spans = [2], fuse = '{fuse}' }}");
            let sets = [layers.as_str(), "model.modules=3", &skip];
            let setup = Setup::new(&config(dir.path(), &sets), 1, Purpose::Train).unwrap();
            for i in 1..=3 {
                let mut stage = CpuStage::new(setup.stage_spec(i)).unwrap();
                let mut found = Vec::new();
                let visited = stage.module().visit(&mut |p| {
                    found.push(TensorSpec {
                        name: p.name.clone(),
                        shape: p.value.dims().to_vec(),
                        learned: p.trainable,
                    });
                    Ok(())
                });
                visited.unwrap();
                assert_eq!(setup.network.tensors(i), found, "{name}, module {i}");
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

/// Against PyTorch's definitions, by hand: of label smoothing, `(1 - e) nll + e / K sum of -log p`, and of mixup, a weighted mean of two
/// losses; gradients by differences.
#[test]
fn soft_labels_are_as_defined() {
    let values = [0.3, -1.2, 2.0, 0.7, 0.0, 1.5, -0.4, 0.9];
    let logits = |values: &[f64]| Tensor::from_slice(values, (2, 1, 1, 4), &Device::Cpu).unwrap();
    let log_p = |row: &[f64], k: usize| row[k] - row.iter().map(|v| v.exp()).sum::<f64>().ln();
    let mixed = Mixed { partners: vec![0, 2], weight: 0.25 };
    for (smoothing, mixed) in [(0.0, None), (0.1, None), (0.0, Some(&mixed)), (0.3, Some(&mixed))] {
        let (labels, others) = ([2, 0], [0, 2]);
        let weight = if mixed.is_some() { 0.25 } else { 1.0 };
        let expected = values.chunks(4).zip(labels).zip(others).map(|((row, label), other)| {
            let nll = -weight * log_p(row, label) - (1.0 - weight) * log_p(row, other);
            let even: f64 = (0..4).map(|k| -log_p(row, k)).sum();
            (1.0 - smoothing) * nll + smoothing / 4.0 * even
        });
        let expected = expected.sum::<f64>() / 2.0;
        let loss = |values: &[f64]| soft_cross_entropy(&logits(values), &[2, 0], mixed, smoothing).unwrap();
        let (found, gradient) = loss(&values);
        assert!((found - expected).abs() < 1e-12, "{smoothing} {mixed:?}: {found} is not {expected}");
        let differences: Vec<f64> = (0..8)
            .map(|n| {
                let [up, down] = [1e-6, -1e-6].map(|d| {
                    let mut values = values;
                    values[n] += d;
                    loss(&values).0
                });
                (up - down) / 2e-6
            })
            .collect();
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        close_each("the gradient", &gradient, &differences, |_| 1e-8);
    }
    // A sample that does not count has neither.
    let padded = soft_cross_entropy(&logits(&values), &[2, -1], Some(&mixed), 0.1).unwrap();
    assert_eq!(padded.1.flatten_all().unwrap().to_vec1::<f64>().unwrap()[4..], [0.0; 4]);
    let alone = Tensor::from_slice(&values[..4], (1, 1, 1, 4), &Device::Cpu).unwrap();
    let first = soft_cross_entropy(&alone, &[2], Some(&Mixed { partners: vec![0], weight: 0.25 }), 0.1).unwrap();
    assert!((padded.0 - first.0).abs() < 1e-12);
    let plain = cross_entropy(&logits(&values), &[2, 0]).unwrap();
    let spelled = Mixed { partners: vec![2, 0], weight: 1.0 };
    let same = soft_cross_entropy(&logits(&values), &[2, 0], Some(&spelled), 0.0).unwrap();
    assert_eq!(plain.0.to_bits(), same.0.to_bits());
    assert!(
        soft_cross_entropy(&logits(&values), &[2, 0], Some(&Mixed { partners: vec![0, 4], weight: 0.5 }), 0.0).is_err()
    );
}

/// The mixture depends on seed, batch and replica alone; partners are a permutation of the clips that count; frames are what the
/// weight makes of them.
#[test]
fn mixtures_are_drawn_and_made() {
    let mixup = Mixup { alpha: 0.4, seed: 3, replica: 1 };
    let labels = [0, 1, -1, 3, 2, 1];
    let mixture = mixup.draw(7, &labels).unwrap();
    assert_eq!(mixup.draw(7, &labels).unwrap(), mixture);
    let others = [
        mixup.draw(8, &labels),
        Mixup { seed: 4, ..mixup }.draw(7, &labels),
        Mixup { replica: 0, ..mixup }.draw(7, &labels),
    ];
    assert!(others.into_iter().all(|other| other.unwrap() != mixture));
    let mut partners = mixture.partners.clone();
    assert_eq!(partners[2], 2, "what does not count is mixed with nothing");
    partners.sort();
    assert_eq!(partners, [0, 1, 2, 3, 4, 5]);
    let frame = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((6, 2, 1, 2)).unwrap();
    let mixed = mix(&frame, &mixture.mixing()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (n, value) in mixed.into_iter().enumerate() {
        let other = (mixture.partners[n / 4] * 4 + n % 4) as f32;
        assert!((value - (mixture.weight * n as f32 + (1.0 - mixture.weight) * other)).abs() < 1e-5);
    }
    // Beta(a, a): mean 1/2, variance 1 / (8 a + 4).
    for alpha in [0.2, 1.0, 4.0] {
        let weights: Vec<f64> =
            (0..4000).map(|batch| f64::from(Mixup { alpha, ..mixup }.draw(batch, &[0]).unwrap().weight)).collect();
        let mean = weights.iter().sum::<f64>() / 4000.0;
        let variance = weights.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.03, "alpha {alpha}: mean {mean}");
        assert!((variance * (8.0 * alpha + 4.0) - 1.0).abs() < 0.08, "alpha {alpha}: variance {variance}");
    }
}

/// Plain SGD for one batch under exact back-propagation, one module: each loss is a sum over labels, so the update by soft labels is
/// the same mixture of updates by hard ones. Here: by mixup, of a network that sees mixed frames with either label.
#[test]
fn a_batch_is_mixed_frames_and_labels_alike() {
    let dir = place(6);
    let one =
        ["model.modules=1", "train.rule=sideways", "data.batch=4", "train.update_every=1000000", "train.batches=1"];
    let mixed = [&one[..], &["data.mixup=4"]].concat();
    let found = with_prefix(&run(dir.path(), "mixed", &mixed, &[], 1), "gradient.");
    let setup = Setup::new(&config(dir.path(), &mixed), 1, Purpose::Train).unwrap();
    let mut stage = CpuStage::new(setup.stage_spec(1)).unwrap();
    let mut stream = FrameStream::open(setup.dataset.clone().unwrap(), setup.stream(0, 0, 1)).unwrap();
    let labels = stream.begin(0).unwrap().labels;
    let mixture = setup.mixup(0).unwrap().draw(0, &labels).unwrap();
    let partners: Vec<i32> = mixture.partners.iter().map(|&n| labels[n]).collect();
    assert!(partners != labels && (0.01..0.99).contains(&mixture.weight), "{mixture:?} of {labels:?} proves nothing");
    let weight = f64::from(mixture.weight);
    for t in 0..14 {
        let frame = stream.frame(t).unwrap();
        let other =
            Tensor::cat(&mixture.partners.iter().map(|&n| frame.narrow(0, n, 1).unwrap()).collect::<Vec<_>>(), 0);
        let frame = ((frame * weight).unwrap() + (other.unwrap() * (1.0 - weight)).unwrap()).unwrap();
        let pass = sideways::nn::layers::Pass { training: true, key: 0, again: false };
        let mut tape = sideways::nn::layers::Tape::new();
        let y = stage.module().forward(&[frame], &pass, &mut tape).unwrap();
        let [a, b] = [&labels, &partners].map(|labels| cross_entropy(&y, labels).unwrap().1);
        let g = ((a * weight).unwrap() + (b * (1.0 - weight)).unwrap()).unwrap();
        stage.module().vjp(&g, &pass, &mut tape, &[false]).unwrap();
    }
    let mut expected = Tensors::new();
    let visited = stage.module().visit(&mut |p| {
        let grad = p.grad.as_ref().unwrap().flatten_all()?.to_vec1::<f32>()?;
        expected.insert(p.name.clone(), grad.into_iter().map(f64::from).collect());
        Ok(())
    });
    visited.unwrap();
    crate::common::runs::assert_close(&found, &expected, 1e-5, "mixup");
}

/// Labels that are not plain, a moving average, everything at once: the same bits after a stop, and of each other where replicas allow.
#[test]
fn options_survive_a_stop() {
    let dir = place(12);
    let adamw = "train.optimizer={ kind = 'adamw', lr = 0.01, weight_decay = 0.1, no_decay = true }";
    for (case, sets) in [
        &["data.mixup=0.5", "train.ema=0.9", "train.label_smoothing=0.1"][..],
        &["data.mixup=0.5", "train.ema=0.9", "train.replicas=2", "train.scale_lr=2", adamw],
        &["data.mixup=0.5", "train.ema=0.9", "train.update_every=5"],
        &["train.ema=0.5", "train.rule=bp", "data.mixup=2", "train.lr_depth=0.5", "train.clip_norm=0.5", adamw],
        &["train.ema=0.5", "train.freeze=[2]", "train.replicas=2", "model.skip={ spans = [2, 3] }"],
    ]
    .into_iter()
    .enumerate()
    {
        let through = run(dir.path(), &format!("through{case}"), sets, &[], 4);
        assert!(through == run(dir.path(), &format!("stopped{case}"), sets, &[1, 2], 4), "{sets:?}");
        assert!(through == run(dir.path(), &format!("again{case}"), sets, &[3], 4), "{sets:?}");
    }
}

/// The average after each update is decay times the one before plus the rest of the parameters; evaluation is of it, unless it is
/// asked for the parameters; training from a checkpoint begins with these.
#[test]
fn the_moving_average_follows_and_is_evaluated() {
    let dir = place(6);
    let end = run(dir.path(), "run", &["train.ema=0.75", "train.freeze=[1]"], &[1, 1, 1], 4);
    let at = |batches| tensors(&dir.path().join("run"), batches);
    for batches in 0..4 {
        let [before, after] = [batches, batches + 1].map(at);
        let averages = with_prefix(&after, "ema.");
        assert!(
            averages.len() > 4 && averages.keys().all(|name| !name.starts_with("layers.0.")),
            "{:?}",
            averages.keys()
        );
        for (name, average) in averages {
            let was = &before[&format!("ema.{name}")];
            let expected: Vec<f64> = was.iter().zip(&after[&name]).map(|(e, p)| 0.75 * e + 0.25 * p).collect();
            close_each(&name, &average, &expected, |_| 1e-6);
            assert!(batches > 0 || *was == before[&name], "it begins at the initial values");
        }
    }
    // With the averages for parameters, the same run evaluates as the one that has them beside.
    let score = |evaluator: Evaluator| evaluator.run(&mut |_| ()).unwrap().score;
    let config = config(dir.path(), &["train.ema=0.75"]);
    let open = || Checkpoint::open(&dir.path().join("run")).unwrap();
    let evaluator = || Evaluator::new(&World::Alone, &config, open(), Purpose::Evaluate, Views::ONE, None).unwrap();
    let (averaged, raw) = (score(evaluator()), score(evaluator().raw()));
    let setup = Setup::new(&config, 1, Purpose::Train).unwrap();
    let all = open().load(|_| true).unwrap();
    let folder = dir.path().join("swapped/checkpoints");
    for i in 1..=5 {
        let mut stage = CpuStage::new(setup.stage_spec(i)).unwrap();
        let mut own = Vec::new();
        let visited = stage.module().visit(&mut |p| {
            own.push((p.name.clone(), all.get(&format!("ema.{}", p.name)).unwrap_or(&all[&p.name]).clone()));
            Ok(())
        });
        visited.unwrap();
        sideways::checkpoint::write_module(&folder, 4, i, own).unwrap();
    }
    let manifest = open().manifest().clone();
    sideways::checkpoint::finish(&folder, 4, 5, manifest, (1, None)).unwrap();
    let swapped = Checkpoint::open(&dir.path().join("swapped")).unwrap();
    let swapped = score(Evaluator::new(&World::Alone, &config, swapped, Purpose::Evaluate, Views::ONE, None).unwrap());
    assert_eq!(averaged, swapped);
    assert_ne!(averaged.loss(), raw.loss());
    // Initial weights are the parameters; the average begins with them.
    let init = format!("train.init={}", dir.path().join("run").display());
    run(dir.path(), "next", &[&init, "train.ema=0.75"], &[], 4);
    let start = tensors(&dir.path().join("next"), 0);
    for (name, value) in with_prefix(&start, "ema.") {
        assert!(value == end[&name] && start[&name] == end[&name], "{name}");
    }
}

/// The linear scaling rule: the learning rate, in proportion to the global batch.
#[test]
fn the_rate_follows_the_global_batch() {
    let dir = place(12);
    for (sets, factor) in [
        (&["train.scale_lr=2"][..], 1.0),
        (&["train.scale_lr=1", "train.replicas=3"], 6.0),
        (&["train.scale_lr=16", "data.batch=4"], 0.25),
        (&["train.scale_lr=4", "train.lr_depth=0.5"], 0.5),
    ] {
        let config = config(dir.path(), sets);
        assert_eq!(config.lr_factor(5, 5), factor, "{sets:?}");
        assert_eq!(config.lr_factor(3, 5), factor * config.lr_depth().powi(2), "{sets:?}");
    }
    let sets = ["data.batch=4", "train.optimizer={ kind = 'sgd', lr = 0.05 }", "train.batches=2"];
    let scaled = run(dir.path(), "scaled", &[&sets[..], &["train.scale_lr=2"]].concat(), &[], 2);
    let spelled = ["data.batch=4", "train.optimizer={ kind = 'sgd', lr = 0.1 }", "train.batches=2"];
    assert!(scaled == run(dir.path(), "spelled", &spelled, &[], 2));
}

/// Options that are named and change nothing leave the bits as they are.
#[test]
fn options_at_their_defaults_change_no_bit() {
    let dir = place(6);
    let plain = run(dir.path(), "plain", &[], &[], 4);
    let off =
        ["train.clip_norm=none", "train.lr_depth=1", "train.freeze=[]", "train.label_smoothing=0", "train.scale_lr=2"];
    assert!(plain == run(dir.path(), "off", &[&off[..], &["train.optimizer.no_decay=false"]].concat(), &[], 4));
    let beside = run(dir.path(), "beside", &["train.ema=0.9"], &[], 4);
    let without: Tensors = beside.into_iter().filter(|(name, _)| !name.starts_with("ema.")).collect();
    assert!(plain == without, "a moving average is only looked at");
}
