//! What must hold of the method whatever the implementation: equalities with exact back-propagation, between
//! placements, replicas, and across a stop.
//!
//! With an update period longer than the run, a checkpoint holds the sum of the pseudo-gradients (`gradient.…`), so
//! gradients are compared and not only what an optimiser makes of them.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};

use crate::common::reference;
use crate::common::runs::{UNEVEN, assert_close, config, shard, tensors, train, with_prefix};
use sideways::config::Config;
use sideways::data::FrameStream;
use sideways::nn::head::{Head, Labels};
use sideways::nn::layers::Pass;
use sideways::nn::param::Init;
use sideways::setup::{Purpose, Setup};

/// Never update within a run: gradients pile up.
const PILE_UP: &str = "train.update_every=1000000";

/// Exact gradient of the sum of the losses at the steps `counted` says, for the first clip.
fn exact(config: &Config, counted: impl Fn(usize, usize) -> bool) -> HashMap<String, Vec<f64>> {
    exact_parts(config, counted, &|_, _| true)
}

/// The same, of which each module i counts only the parts of its own steps t that `parts(i, t)` says.
fn exact_parts(
    config: &Config,
    counted: impl Fn(usize, usize) -> bool,
    parts: &dyn Fn(usize, usize) -> bool,
) -> HashMap<String, Vec<f64>> {
    let setup = Setup::new(config, 1, Purpose::Train).unwrap();
    let mut modules = reference::modules(&setup, |seed, last_layer| Init {
        seed,
        dtype: DType::F32,
        device: Device::Cpu,
        last_layer,
    });
    let mut stream = FrameStream::open(setup.dataset.clone().unwrap(), setup.stream(0, 0, 1)).unwrap();
    let mut head = Head::new(setup.head(), config.data.batch);
    head.begin(&Labels { own: stream.begin(0).unwrap().labels, mixed: None }, true);
    let mut frame = |t: usize| stream.frame(t);
    // No layer of these networks is random.
    let passes = |_: usize| Pass { training: true, key: 0, again: false };
    let run = reference::forward(&mut modules, &setup.network, &setup.schedule, &passes, &mut frame).unwrap();
    let steps = run.last().len();
    let gradients = run.last().iter().enumerate().map(|(t, y)| match counted(t, steps) {
        true => Some(head.loss(y, None).unwrap()),
        false => None,
    });
    let gradients = gradients.collect();
    reference::backward(&mut modules, &setup.network, &setup.schedule, &passes, run, gradients, parts).unwrap();
    let mut all = HashMap::new();
    for module in &mut modules {
        module
            .visit(&mut |p| {
                if let Some(grad) = &p.grad {
                    let values = grad.flatten_all()?.to_vec1::<f32>()?;
                    all.insert(p.name.clone(), values.into_iter().map(f64::from).collect());
                }
                Ok(())
            })
            .unwrap();
    }
    all
}

fn sum_of_pseudo_gradients(dir: &Path, name: &str, sets: &[&str]) -> HashMap<String, Vec<f64>> {
    let run = format!("run.dir={}", dir.join(name).display());
    let sets: Vec<&str> = sets.iter().copied().chain([run.as_str(), PILE_UP, "train.batches=1"]).collect();
    train(&config(dir, &sets), None);
    with_prefix(&tensors(&dir.join(name), 1), "gradient.")
}

/// One module: the pseudo-gradient is the gradient.
#[test]
fn one_module_is_back_propagation() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    let one = ["model.modules=1", "train.rule=sideways"];
    let sideways = sum_of_pseudo_gradients(dir.path(), "one", &one);
    let exact = exact(&config(dir.path(), &one), |_, _| true);
    assert_close(&sideways, &exact, 1e-5, "D = 1");
}

/// The loop under rule = "bp": one update of plain SGD is the mean of the gradients, whatever the edges, held ones among them, and
/// whatever the heights and widths they join.
#[test]
fn the_loop_under_bp_is_back_propagation() {
    for (skip, network) in [
        ("", &[][..]),
        ("model.skip={ spans = [2, 3] }", &[]),
        ("model.skip={ spans = [2], edges = [[1, 5]], fuse = 'concat' }", &[]),
        ("model.skip={ spans = [3], delay = 2 }", &[]),
        ("model.skip={ spans = [2], delay = 'aligned', fuse = 'concat' }", &[]),
        ("model.skip={ spans = [2, 3] }", &UNEVEN),
        ("model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }", &UNEVEN),
    ] {
        for boundary in ["train.boundary=flow", "train.boundary=cut"] {
            let dir = tempfile::tempdir().unwrap();
            shard(&dir.path().join("train.h5"), 4, 14, false);
            let plain = "train.optimizer={ kind = 'sgd', lr = 1.0, momentum = 0.0 }";
            let sets: Vec<&str> = ["train.rule=bp", "train.batches=1", plain, skip, boundary]
                .iter()
                .chain(network)
                .copied()
                .filter(|s| !s.is_empty())
                .collect();
            let config = config(dir.path(), &sets);
            train(&config, None);
            let [before, after] = [0, 1].map(|batches| tensors(&config.run.dir, batches));
            let exact = exact(&config, |_, _| true);
            let steps = Setup::new(&config, 1, Purpose::Train).unwrap().schedule.steps(5) as f64;
            let moved = exact.keys().map(|name| {
                assert_eq!(before[name].len(), after[name].len(), "{name}");
                let moved = before[name].iter().zip(&after[name]).map(|(b, a)| (b - a) * steps);
                (name.clone(), moved.collect())
            });
            // A parameter of size 1 is known to 1e-7, and moves by some 1e-3.
            assert_close(&moved.collect(), &exact, 2e-3, &format!("{skip} {boundary}"));
        }
    }
}

/// With `stash` each module's sum is that of the exact parts of the steps whose cotangents come back within its window, whatever
/// joins the modules (METHOD §8, property 10).
#[test]
fn stash_gives_the_exact_parts() {
    for skip in [
        "",
        "model.skip={ spans = [2] }",
        "model.skip={ spans = [2, 3] }",
        "model.skip={ spans = [2], edges = [[1, 5]], fuse = 'concat' }",
        "model.skip={ spans = [3], delay = 2 }",
        "model.skip={ spans = [2, 4], delay = 'aligned', fuse = 'concat' }",
    ] {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 4, 14, false);
        let sets: Vec<&str> = [skip].into_iter().filter(|s| !s.is_empty()).collect();
        let of = |stash: &str| {
            let stash_key = format!("train.stash={stash}");
            let sets: Vec<&str> = sets.iter().copied().chain([stash_key.as_str()]).collect();
            sum_of_pseudo_gradients(dir.path(), stash, &sets)
        };
        let activations = of("activations");
        let in_time = |i: usize, t: usize| t + 2 * (5 - i) < 14;
        let exact = exact_parts(&config(dir.path(), &sets), |_, _| true, &in_time);
        assert_close(&activations, &exact, 1e-5, &format!("stash {skip}"));
        assert!(of("inputs") == activations, "{skip}: the forward pass once more gives other bits");
        // The test could not fail if fresh pseudo-gradients were the same.
        let fresh = &of("none")["layers.0.conv2d.weight"];
        assert!(fresh != &activations["layers.0.conv2d.weight"], "{skip}");
    }
}

/// Dropout and batch norm see the same key and statistics in both passes, and running statistics move once a step.
#[test]
fn the_forward_pass_once_more_is_the_same() {
    const LAYERS: &str = "model.layers=[
        { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'batch-norm' }, { kind = 'relu' },
        { kind = 'dropout', rate = 0.3 }, { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'batch-norm' },
        { kind = 'dropout', rate = 0.3 }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 },
    ]";
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    let layers = LAYERS.replace('\n', " ");
    let run = |stash: &str| {
        let (run, stash) = (format!("run.dir={}", dir.path().join(stash).display()), format!("train.stash={stash}"));
        let skip = "model.skip={ spans = [2], fuse = 'concat' }";
        let config = config(dir.path(), &[&run, &stash, &layers, "model.modules=3", skip]);
        train(&config, None);
        tensors(&config.run.dir, 4)
    };
    let (inputs, activations, fresh) = (run("inputs"), run("activations"), run("none"));
    assert!(inputs.keys().any(|name| name.ends_with("running_var")));
    assert!(inputs == activations, "parameters or statistics differ");
    assert!(inputs != fresh, "nothing is compared");
}

/// Several modules on moving frames: they must differ, or the tests of equality would prove nothing.
#[test]
fn five_modules_on_moving_frames_are_not_back_propagation() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    let sideways = sum_of_pseudo_gradients(dir.path(), "five", &["train.rule=sideways"]);
    let exact = exact(&config(dir.path(), &["train.rule=sideways"]), |_, _| true);
    let first = "layers.0.conv2d.weight";
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (a, b) = (&sideways[first], &exact[first]);
    assert_eq!(a.len(), b.len());
    let cosine = a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>() / norm(a) / norm(b);
    assert!(cosine < 0.999, "cosine {cosine}");
}

/// Identical frames: once every edge has delivered, a step's pseudo-gradient is the true gradient of the steady
/// state's loss. One more frame adds one more steady step, so it is the difference of the sums of two clips.
#[test]
fn identical_frames_give_the_true_gradient() {
    for (n, (skip, network)) in [
        ("", &[][..]),
        ("model.skip={ spans = [2] }", &[]),
        ("model.skip={ spans = [2, 3] }", &[]),
        ("model.skip={ spans = [2], edges = [[1, 5]], fuse = 'concat' }", &[]),
        ("model.skip={ spans = [3], delay = 2 }", &[]),
        ("model.skip={ spans = [2], delay = 'aligned', fuse = 'concat' }", &[]),
        ("model.skip={ spans = [2, 3] }", &UNEVEN),
        ("model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }", &UNEVEN),
    ]
    .into_iter()
    .enumerate()
    {
        for boundary in ["train.boundary=flow", "train.boundary=cut"] {
            let dir = tempfile::tempdir().unwrap();
            shard(&dir.path().join("train.h5"), 2, 24, true);
            let sets: Vec<&str> = [skip, boundary].iter().chain(network).copied().filter(|s| !s.is_empty()).collect();
            let sum = |name: &str, frames: &str| {
                let sets: Vec<&str> = sets.iter().copied().chain([frames]).collect();
                sum_of_pseudo_gradients(dir.path(), name, &sets)
            };
            let (short, long) = (sum("short", "data.frames=19"), sum("long", "data.frames=20"));
            let added = long
                .iter()
                .map(|(name, v)| {
                    assert_eq!(v.len(), short[name].len(), "{name}");
                    (name.clone(), v.iter().zip(&short[name]).map(|(l, s)| l - s).collect())
                })
                .collect();
            let sets: Vec<&str> = sets.iter().copied().chain(["data.frames=20"]).collect();
            let exact = exact(&config(dir.path(), &sets), |t, steps| t + 1 == steps);
            assert_close(&added, &exact, 2e-4, &format!("case {n} {skip} {boundary}"));
        }
    }
}

/// Skip-Sideways without skips is Sideways, to the bit.
#[test]
fn skip_sideways_without_skips_is_sideways() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 8, 14, false);
    for rule in ["sideways", "skip-sideways"] {
        let run = format!("run.dir={}", dir.path().join(rule).display());
        train(&config(dir.path(), &[&run, &format!("train.rule={rule}")]), None);
    }
    assert!(tensors(&dir.path().join("sideways"), 4) == tensors(&dir.path().join("skip-sideways"), 4));
}

/// Replicas on the parts of a batch are one replica on the whole batch, to rounding; and the same bits every time.
#[test]
fn replicas_on_a_split_batch_are_one_on_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let run = |name: &str, sets: &[&str]| {
        let run = format!("run.dir={}", dir.path().join(name).display());
        let skip = "model.skip={ spans = [2] }";
        train(&config(dir.path(), &[&[run.as_str(), skip, "train.batches=2"], sets].concat()), None);
        tensors(&dir.path().join(name), 2)
    };
    let whole = run("whole", &["data.batch=6"]);
    for replicas in [2, 3] {
        let sets = [format!("train.replicas={replicas}"), format!("data.batch={}", 6 / replicas)];
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let split = run(&format!("split{replicas}"), &sets);
        assert_close(&split, &whole, 1e-4, &format!("{replicas} replicas"));
        assert!(split == run(&format!("again{replicas}"), &sets), "{replicas} replicas: not the same bits twice");
    }
}

/// Two replicas on the same clips are one replica.
#[test]
fn replicas_on_the_same_clips_are_one() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train-a.h5"), 2, 14, false);
    std::fs::copy(dir.path().join("train-a.h5"), dir.path().join("train-b.h5")).unwrap();
    let run = |name: &str, sets: &[&str]| {
        let run = format!("run.dir={}", dir.path().join(name).display());
        train(&config(dir.path(), &[&[run.as_str(), "data.shuffle=false", "train.batches=2"], sets].concat()), None);
        tensors(&dir.path().join(name), 2)
    };
    let first = format!("data.train={}/train-a.h5", dir.path().display());
    let one = run("one", &[&first]);
    let two = run("two", &["train.replicas=2"]);
    assert_close(&two, &one, 1e-6, "the same clips twice");
}

/// Stopped after any clip and resumed: to the bit what an uninterrupted run gives; with updates that do not fall on
/// clips' ends too.
#[test]
fn a_stopped_and_resumed_run_is_bit_identical() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 6, 20, false);
    for (case, sets) in [
        &["model.skip={ spans = [2, 3] }"][..],
        &["train.update_every=5"],
        &["train.update_every=5", "train.replicas=2", "data.batch=1"],
        &["train.optimizer={ kind = 'adamw', lr = 0.01 }", "train.lr_schedule={ kind = 'cosine', warmup = 2 }"],
        &["train.rule=bp", "model.skip={ spans = [2] }"],
        &["train.rule=1f1b", "model.skip={ spans = [2, 3] }", "train.replicas=2", "data.batch=1"],
        &["train.rule=gpipe", "train.stash=inputs", "model.skip={ spans = [2] }"],
        &["train.stash=activations", "model.skip={ spans = [2] }"],
        &["train.stash=inputs", "train.update_every=5"],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }"],
    ]
    .into_iter()
    .enumerate()
    {
        let through = dir.path().join(format!("through{case}"));
        let run = |to: &Path| format!("run.dir={}", to.display());
        train(&config(dir.path(), &[&[run(&through).as_str()], sets].concat()), None);
        for stop in 1..4 {
            let stopped = dir.path().join(format!("stopped{case}-{stop}"));
            let config = config(dir.path(), &[&[run(&stopped).as_str()], sets].concat());
            train(&config, Some(stop));
            assert!(!stopped.join("checkpoints/step-00000004").exists());
            train(&config, None);
            assert!(tensors(&stopped, 4) == tensors(&through, 4), "case {case}: stopped after {stop}");
            let lines = std::fs::read_to_string(stopped.join("metrics.jsonl")).unwrap();
            assert_eq!(lines.lines().count(), 4, "one line a batch");
        }
    }
}
