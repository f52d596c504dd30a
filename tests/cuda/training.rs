//! Modules on a GPU: the CPU's results, wherever they run; what a tick may not do; and what happens when something is wrong.
//!
//! Without a GPU the program runs on an emulator of CUDA's libraries (tests/cuda-emulator), which the first test builds;
//! with `SIDEWAYS_TEST_GPU=1` on the libraries and the GPU that are there.

use std::collections::HashMap;
use std::process::Command;

use crate::common::cuda::{Place, counters, program, real};
use crate::common::mpirun::text;
use crate::common::runs::{UNEVEN, assert_close, tensors};

const CUDA: &str = "run.device=cuda";
const CPU: &str = "run.device=cpu";
const SKIPS: &str = "model.skip={ spans = [2, 3] }";
/// Every kind of layer, and adapters; the dropout's masks are the CPU's.
const ALL_KINDS: &str = "model.layers=[{ kind = 'conv2d', out = 8, kernel = 3, padding = 1, bias = false }, \
    { kind = 'batch-norm', momentum = 0.05 }, { kind = 'relu' }, { kind = 'max-pool', kernel = 3, stride = 2, padding = 1 }, \
    { kind = 'residual', out = 8, groups = 2 }, { kind = 'residual', out = 16, stride = 2, block = 'bottleneck', norm = 'batch' }, \
    { kind = 'dropout', rate = 0.2 }, { kind = 'conv2d', out = 8, kernel = 3, padding = 1, groups = 4 }, { kind = 'gelu' }, \
    { kind = 'upsample', factor = 2 }, { kind = 'avg-pool', kernel = 2 }, { kind = 'conv2d', out = 6, kernel = 1 }, \
    { kind = 'relu' }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
const EMA: &str = "train.ema=0.9";
const MIXUP: &str = "data.mixup=0.5";
const SMOOTHING: &str = "train.label_smoothing=0.1";
const FUTURE: [&str; 3] = [
    "model.task=future-frames",
    "model.layers=[{ kind = 'conv2d', out = 6, kernel = 3, padding = 1 }, { kind = 'relu' }, \
     { kind = 'conv2d', out = 6, kernel = 3, padding = 1 }, { kind = 'relu' }, { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]",
    "model.modules=3",
];

/// Twenty batches: parameters, running statistics and the optimiser's memory agree to 1e-3 of their norms, though
/// every product is summed in another order.
#[test]
fn twenty_clips_end_where_the_cpus_do() {
    let adamw = "train.optimizer={ kind = 'adamw', lr = 0.001 }";
    let rmsprop = "train.optimizer={ kind = 'rmsprop', lr = 0.0005, momentum = 0.5 }";
    let sparing = "train.optimizer={ kind = 'adamw', lr = 0.001, weight_decay = 0.1, no_decay = true }";
    let gentle = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9, weight_decay = 0.001, nesterov = true }";
    for sets in [
        &[SKIPS, "train.clip_norm=0.5"][..],
        &[ALL_KINDS, "model.skip={ spans = [2], fuse = 'concat' }", gentle],
        &[ALL_KINDS, "model.skip={ spans = [2] }", adamw, "train.update_every=3"],
        &[FUTURE[0], FUTURE[1], FUTURE[2], "train.rule=sideways", rmsprop],
        &["train.replicas=2", "train.rule=sideways", gentle],
        &[
            ALL_KINDS,
            "model.skip={ spans = [2] }",
            "train.freeze=[2, 'layers.1.*', '*.conv2.weight', 'layers.11.*']",
            sparing,
            EMA,
        ],
        &[SKIPS, "train.freeze=[1, 'skips.*', '*.bias']", MIXUP, SMOOTHING, EMA, "train.lr_depth=0.5"],
        &[UNEVEN[0], UNEVEN[1], SKIPS, gentle],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }", gentle],
    ] {
        let place = Place::new(&[sets, &["train.batches=20", "run.checkpoint_every=20"]].concat());
        let cpu = place.trained("cpu", 0, &[CPU], &[]);
        let gpu = place.trained("gpu", 0, &[CUDA], &[]);
        assert_close(&cpu, &gpu, 1e-3, &format!("{sets:?}"));
        assert!(cpu != gpu, "{sets:?}: it did not compute on the GPU");
    }
}

/// Passes of evaluation between those of training: no parameter changes, with graphs or without, and the scores are those of the
/// same parameters on the CPU.
#[test]
fn validation_changes_nothing_and_scores_as_the_cpu_does() {
    let gentle = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9 }";
    for sets in [
        &[
            ALL_KINDS,
            "model.skip={ spans = [2], fuse = 'concat' }",
            gentle,
            EMA,
            SMOOTHING,
            MIXUP,
            "train.stash=inputs",
        ][..],
        &[FUTURE[0], FUTURE[1], FUTURE[2], "train.rule=sideways", gentle],
    ] {
        let place = Place::new(&[sets, &["train.batches=6", "run.checkpoint_every=6", CUDA]].concat());
        let plain = place.trained("plain", 0, &[], &[]);
        let validates = "train.validate_every=2";
        assert!(place.trained("validated", 0, &[validates], &[]) == plain, "{sets:?}");
        assert!(
            place.trained("launches", 0, &[validates, "run.graphs=false"], &[]) == plain,
            "{sets:?} without graphs"
        );
        let lines = |name: &str| -> Vec<serde_json::Value> {
            let text = std::fs::read_to_string(place.at(name).join("metrics.jsonl")).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            lines.filter(|line| line["kind"] == "validation").collect()
        };
        let (graphs, launches) = (lines("validated"), lines("launches"));
        assert_eq!(graphs.len(), 3);
        let run = place.at("validated");
        let output = place.run(0, &["eval", run.to_str().unwrap(), "--json", "--set", CPU], &[]);
        let cpu: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
        for key in ["loss", "mse", "copy_mse"] {
            let of = |line: &serde_json::Value| line[key].as_f64();
            assert!(graphs.iter().map(of).eq(launches.iter().map(of)), "{key} {sets:?}");
            if let (Some(gpu), Some(cpu)) = (of(&graphs[2]), of(&cpu)) {
                assert!((gpu - cpu).abs() < 1e-3 * cpu, "{key} {sets:?}: {gpu} on the GPU, {cpu} on the CPU");
            } else {
                assert!(key != "loss" && of(&cpu).is_none(), "{key} {sets:?}");
            }
        }
    }
}

/// One process or ranks that share a GPU, graphs or none, copies that take their time: the same bits.
#[test]
fn the_result_does_not_depend_on_where_modules_run() {
    for (sets, rank_counts) in [
        (&[SKIPS][..], &[2, 5][..]),
        (&[ALL_KINDS, "model.skip={ spans = [2], fuse = 'concat' }", "run.precision=bf16"], &[5]),
        (&["train.replicas=2", "model.modules=2", "train.rule=sideways", EMA], &[4]),
        (&[SKIPS, MIXUP, SMOOTHING, EMA, "train.freeze=[1]", "train.stash=activations"], &[5]),
        (&[ALL_KINDS, "model.skip={ spans = [2, 3] }", "train.stash=inputs"], &[2]),
        (&[UNEVEN[0], UNEVEN[1], SKIPS], &[5]),
        (&[UNEVEN[0], UNEVEN[1], SKIPS, "train.stash=inputs"], &[5]),
        (&[SKIPS, "train.rule=1f1b"], &[5]),
        (&[ALL_KINDS, "model.skip={ spans = [2, 3] }", "train.rule=gpipe", "train.stash=inputs"], &[2]),
    ] {
        let place = Place::new(&[sets, &[CUDA]].concat());
        let threads = place.trained("threads", 0, &[], &[]);
        assert!(place.trained("launches", 0, &["run.graphs=false"], &[]) == threads, "{sets:?} without graphs");
        for &ranks in rank_counts {
            let late = [("SIDEWAYS_EMULATOR_COPY_DELAY_US", "300"), ("SIDEWAYS_EMULATOR_JITTER_US", "500")];
            let run = place.trained(&format!("ranks{ranks}"), ranks, &[], &late);
            assert!(run == threads, "{sets:?} on {ranks} ranks");
        }
    }
}

/// By the exact rules: the CPU's results; `gpipe` and `bp` the same bits, `1f1b` the same to rounding, and the forward pass once more the
/// bits of activations that were kept.
#[test]
fn exact_rules_agree_with_the_cpu_and_each_other() {
    for sets in [
        &[SKIPS, "run.device=auto"][..],
        &[ALL_KINDS, "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }", CUDA],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }", CUDA],
        &[FUTURE[0], FUTURE[1], FUTURE[2], "model.skip={ spans = [2], delay = 'aligned' }", CUDA],
    ] {
        let gentle = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9 }";
        let place = Place::new(&[sets, &[gentle, "train.batches=5", "run.checkpoint_every=5"]].concat());
        let run = |name: &str, keys: &[&str]| place.trained(name, 0, keys, &[]);
        let cpu = run("cpu", &[CPU, "train.rule=bp"]);
        let bp = run("bp", &["train.rule=bp"]);
        assert_close(&cpu, &bp, 1e-3, &format!("{sets:?}"));
        assert!(cpu != bp, "{sets:?}: bp did not compute on the GPU");
        assert!(run("gpipe", &["train.rule=gpipe", "train.stash=inputs"]) == bp, "{sets:?}");
        let alternating = run("1f1b", &["train.rule=1f1b"]);
        assert_close(&alternating, &bp, 1e-4, &format!("{sets:?}: 1f1b"));
        assert!(run("again", &["train.rule=1f1b", "train.stash=inputs"]) == alternating, "{sets:?}");
    }
}

/// With `stash`, both kinds: the CPU's results; the forward pass once more gives the bits of activations that were kept.
#[test]
fn stash_agrees_with_the_cpu() {
    for sets in [
        &[SKIPS][..],
        &[ALL_KINDS, "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }"],
        &[ALL_KINDS, "model.skip={ spans = [2, 3], delay = 'aligned' }"],
        &[FUTURE[0], FUTURE[1], FUTURE[2], "model.skip={ spans = [2] }"],
    ] {
        let gentle = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9 }";
        let place = Place::new(&[sets, &[gentle, "train.batches=8", "run.checkpoint_every=8"]].concat());
        let cpu = place.trained("cpu", 0, &[CPU, "train.stash=activations"], &[]);
        let activations = place.trained("activations", 0, &[CUDA, "train.stash=activations"], &[]);
        assert_close(&cpu, &activations, 1e-3, &format!("{sets:?}"));
        assert!(cpu != activations, "{sets:?}: it did not compute on the GPU");
        let inputs = place.trained("inputs", 0, &[CUDA, "train.stash=inputs"], &[]);
        assert!(inputs == activations, "{sets:?}: the forward pass once more gives other bits");
        let half = ["run.precision=bf16", CUDA];
        let [kept, again] = ["activations", "inputs"].map(|stash| {
            let stash_key = format!("train.stash={stash}");
            place.trained(&format!("half-{stash}"), 0, &[&half[..], &[stash_key.as_str()]].concat(), &[])
        });
        assert!(kept == again, "{sets:?}: in bfloat16");
        let fresh = place.trained("fresh", 0, &[CUDA], &[]);
        assert!(fresh != activations, "{sets:?}: nothing is compared");
    }
}

/// Frames of 150 KB, each in memory of its own that is gone soon after, arrive as what they are.
#[test]
fn large_frames_arrive_whole() {
    let layers = "model.layers=[{ kind = 'conv2d', out = 8, kernel = 5, stride = 4, padding = 2 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 8, kernel = 3, stride = 2, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let sets = [layers, "model.modules=2", "train.rule=sideways", "train.batches=8", "run.checkpoint_every=8"];
    let place = Place::of_side(80, &sets);
    let cpu = place.trained("cpu", 0, &[CPU], &[]);
    assert_close(&cpu, &place.trained("gpu", 0, &[CUDA], &[]), 1e-3, "large frames");
    assert_close(&cpu, &place.trained("ranks", 2, &[CUDA, "run.exchange=staged"], &[]), 1e-3, "on two ranks");
}

/// Messages beyond MPI's eager limit, which wait for their receivers.
#[test]
fn large_messages_between_ranks_on_a_gpu() {
    let layers = "model.layers=[{ kind = 'conv2d', out = 512, kernel = 3, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let sets = [layers, "model.modules=2", "train.rule=sideways", "data.batch=8", "train.batches=2", CUDA];
    let place = Place::new(&sets);
    let threads = place.trained("threads", 0, &[], &[]);
    assert!(place.trained("ranks", 2, &[], &[("SIDEWAYS_EMULATOR_JITTER_US", "500")]) == threads);
}

/// Checkpoints of one are the other's: started on the CPU, continued on a GPU, ended on the CPU; and all on the GPU with the
/// unfinished mean of an update that is not due at a clip's end.
#[test]
fn checkpoints_move_between_cpu_and_gpu() {
    let place = Place::new(&[SKIPS, EMA, MIXUP, "train.update_every=3", "train.batches=6"]);
    let through = place.trained("through", 0, &[CPU], &[]);
    let all_gpu = place.trained("gpu", 0, &[CUDA], &[]);
    let (run, part) = (format!("run.dir={}", place.at("parts").display()), place.config.as_str());
    for (device, stop) in [(CPU, "2"), (CUDA, "2"), (CPU, "9")] {
        let args = ["train", part, "--set", &run, "--set", device, "--stop-after", stop];
        let output = place.run(0, &args, &[]);
        assert!(matches!(output.status.code(), Some(0 | 75)), "{}", text(&output));
    }
    assert_close(&through, &tensors(&place.at("parts"), 6), 1e-3, "in parts");
    let run = format!("run.dir={}", place.at("stopped").display());
    for stop in ["2", "1", "9"] {
        let output = place.run(0, &["train", part, "--set", &run, "--set", CUDA, "--stop-after", stop], &[]);
        assert!(matches!(output.status.code(), Some(0 | 75)), "{}", text(&output));
    }
    assert!(tensors(&place.at("stopped"), 6) == all_gpu, "a run on the GPU that was stopped is another");
}

/// bfloat16 activations: the loss of a run is that of 32-bit floats to a few per cent.
#[test]
fn bfloat16_learns_the_same() {
    let place = Place::new(&[SKIPS, "train.batches=20", "run.checkpoint_every=20", CUDA]);
    let loss = |name: &str, sets: &[&str]| -> f64 {
        let output = place.train(name, 0, sets, &[]);
        assert!(output.status.success(), "{}", text(&output));
        let line = text(&output).lines().find(|l| l.contains("last quarter: loss")).unwrap().to_string();
        line.split("loss ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap()
    };
    let (float, half) = (loss("f32", &[]), loss("bf16", &["run.precision=bf16"]));
    assert!((float - half).abs() < 0.05 * float, "{float} {half}");
    assert!(tensors(&place.at("f32"), 20) != tensors(&place.at("bf16"), 20), "nothing was rounded");
}

/// One update in each of the smaller number formats is that of 32-bit floats, every parameter's to a few per cent of its norm:
/// of a first convolution of 3 channels, which tensor cores take filled up, of others, and of norms. Nothing in the network
/// has a kink, at which rounding would decide.
#[test]
fn an_update_is_the_same_in_every_precision() {
    let layers = "model.layers=[{ kind = 'conv2d', out = 8, kernel = 3, padding = 1 }, { kind = 'gelu' }, \
        { kind = 'conv2d', out = 12, kernel = 3, stride = 2, padding = 1, bias = false }, { kind = 'batch-norm' }, \
        { kind = 'gelu' }, { kind = 'conv2d', out = 16, kernel = 3, groups = 2, padding = 1 }, { kind = 'group-norm', groups = 4 }, \
        { kind = 'gelu' }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let one = "train.optimizer={ kind = 'sgd', lr = 0.1, momentum = 0.0 }";
    let place = Place::new(&[layers, "model.modules=3", "train.rule=sideways", one, "train.batches=1", CUDA]);
    let change = |precision: &str| {
        let after = place.trained(precision, 0, &[&format!("run.precision={precision}")], &[]);
        let before = tensors(&place.at(precision), 0);
        let change = |(name, values): (String, Vec<f64>)| {
            assert_eq!(values.len(), before[&name].len(), "{name}");
            let moved = values.iter().zip(&before[&name]).map(|(a, b)| a - b).collect();
            (name, moved)
        };
        after.into_iter().filter(|(name, _)| name.starts_with("layers.")).map(change).collect::<HashMap<_, Vec<f64>>>()
    };
    let exact = change("f32");
    let moved = exact.iter().filter(|(_, v)| v.iter().any(|&x| x != 0.0)).count();
    assert!(moved >= 11, "{moved} of {:?}", exact.keys());
    for (precision, tolerance) in [("tf32", 0.01), ("bf16", 0.08)] {
        let rounded = change(precision);
        assert_close(&exact, &rounded, tolerance, precision);
        assert!(exact != rounded, "{precision}: nothing was rounded");
    }
}

/// Once under way, a clip allocates nothing on the device, and waits for the GPU a fixed number of times, whatever its length.
#[test]
fn a_steady_tick_allocates_nothing_and_memory_is_flat_in_t() {
    if real() {
        eprintln!("not on a real GPU: the emulator counts");
        return;
    }
    // Left open, the exchange of an edge is settled by times, and staged messages take other memory than put ones.
    let sets = [SKIPS, "run.checkpoint_every=100", "train.boundary=cut", "run.exchange=peer", CUDA];
    let counts = |place: &Place, name: &str, clips: usize, frames: usize| -> HashMap<String, u64> {
        let file = place.at(name).with_extension("counts");
        let (clips, frames) = (format!("train.batches={clips}"), format!("data.frames={frames}"));
        let env = [("SIDEWAYS_EMULATOR_COUNTERS", file.to_str().unwrap())];
        let output = place.train(name, 0, &[&clips, &frames], &env);
        assert!(output.status.success(), "{}", text(&output));
        counters(&file)
    };
    let place = Place::new(&sets);
    let (short, long) = (counts(&place, "short", 4, 14), counts(&place, "long", 12, 14));
    assert_eq!(short["alloc"], long["alloc"], "allocations grow with clips");
    assert_eq!(short["graph_instantiate"], long["graph_instantiate"]);
    assert!(long["graph_launch"] > short["graph_launch"] && short["graph_launch"] > 0);
    let (few, many) = (counts(&place, "few", 12, 8), long);
    assert_eq!(few["alloc"], many["alloc"], "memory grows with frames");
    for wait in ["sync", "blocking_copy"] {
        assert_eq!(few[wait], many[wait], "ticks wait for the GPU: {wait}");
    }
    // Frames of more than PINNED_FROM bytes: their memory comes and goes, and must not be locked where it lies.
    let alone = ["model.modules=1", "train.rule=sideways", CUDA];
    let place = Place::of_side(80, &alone);
    let (few, many) = (counts(&place, "few", 2, 8), counts(&place, "many", 4, 14));
    for counts in [&few, &many] {
        assert!(counts["host_alloc"] == few["host_alloc"] && !counts.contains_key("host_register"), "{counts:?}");
    }
    assert_eq!(few["alloc"], many["alloc"]);
}

/// A worker whose part is done gives its GPU back while others of its process still capture their graphs.
#[test]
fn workers_may_end_while_others_capture() {
    let place = Place::new(&[SKIPS, "train.batches=2", CUDA]);
    let whole = place.trained("whole", 0, &["run.graphs=false"], &[]);
    for n in 0..5 {
        let slow = [("SIDEWAYS_EMULATOR_CAPTURE_DELAY_US", "5000")];
        assert!(place.trained(&format!("run {n}"), 0, &[], &slow) == whole);
    }
}

/// What cannot work is said before training, with exit code 2.
#[test]
fn clear_errors() {
    let place = Place::new(&[CUDA]);
    let without =
        Command::new(program()).args(["train", &place.config]).env_remove("LD_LIBRARY_PATH").output().unwrap();
    if !real() {
        assert_eq!(without.status.code(), Some(2), "{}", text(&without));
        assert!(text(&without).contains("libcuda"), "{}", text(&without));
        let small = place.train("small", 0, &["data.batch=12"], &[("SIDEWAYS_EMULATOR_MEMORY", "40000")]);
        assert_eq!(small.status.code(), Some(2), "{}", text(&small));
        assert!(text(&small).contains("of GPU memory") && text(&small).contains("data.batch"), "{}", text(&small));
        let none = place.train("none", 2, &[], &[("SIDEWAYS_EMULATOR_DEVICES", "0")]);
        assert_eq!(none.status.code(), Some(2), "{}", text(&none));
        assert!(text(&none).contains("the driver shows this process none"), "{}", text(&none));
        let cpu = place.train("auto", 0, &["run.device=auto"], &[("SIDEWAYS_EMULATOR_DEVICES", "0")]);
        assert!(cpu.status.success() && !text(&cpu).contains("computes on GPU"), "{}", text(&cpu));
    }
    let shared = place.train("shared", 2, &[], &[]);
    assert!(shared.status.success() && text(&shared).contains("share GPU 0"), "{}", text(&shared));
}

/// A run that diverges ends with exit code 1 and says so; or leaves out what is not finite, and counts it.
#[test]
fn what_is_not_finite_stops_the_run_or_is_left_out() {
    let place = Place::new(&["train.optimizer={ kind = 'sgd', lr = 1e30 }", "train.batches=6", CUDA]);
    let stopped = place.train("stop", 2, &[], &[]);
    assert_eq!(stopped.status.code(), Some(1), "{}", text(&stopped));
    assert!(text(&stopped).contains("not finite") || text(&stopped).contains("diverged"), "{}", text(&stopped));
    let skipped = place.train("skip", 2, &["run.on_nonfinite=skip"], &[]);
    assert!(skipped.status.success() && text(&skipped).contains("left out"), "{}", text(&skipped));
}
