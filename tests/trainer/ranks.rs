//! The program under mpirun: the same parameters wherever modules run, and what happens when something is wrong.

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, alone};
use crate::common::runs::{UNEVEN, assert_close, config, shard, shard_of_side, tensors};

/// Writes shards and a configuration file; returns the latter.
fn prepare(dir: &Path, sets: &[&str]) -> String {
    shard(&dir.join("train.h5"), 12, 14, false);
    let path = dir.join("config.toml");
    std::fs::write(&path, config(dir, sets).to_toml().unwrap()).unwrap();
    path.display().to_string()
}

fn set(key: &str, path: &Path) -> String {
    format!("{key}={}", path.display())
}

/// Threads of one process, one rank, several modules a rank, one module a rank; skips, delays, replicas: the same bits.
#[test]
fn the_result_does_not_depend_on_where_modules_run() {
    for (sets, rank_counts) in [
        (&["model.skip={ spans = [2, 3] }"][..], &[1, 2, 3, 5][..]),
        (&["model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }", "train.boundary=cut"], &[4, 5]),
        (&["model.skip={ spans = [2], delay = 'aligned' }", "train.replicas=2"], &[3, 9]),
        (&["model.modules=3", "train.rule=sideways", "train.replicas=3"], &[2, 9]),
        (&["model.skip={ spans = [2, 3] }", "train.stash=activations"], &[2, 5]),
        (
            &["model.skip={ spans = [2, 4], delay = 2, fuse = 'concat' }", "train.stash=inputs", "train.replicas=2"],
            &[9],
        ),
        (&["model.skip={ spans = [2, 3] }", "train.freeze=[1]", "data.mixup=0.5", "train.ema=0.9"], &[2, 5]),
        (
            &["train.freeze=[1, 2, 4]", "train.replicas=2", "data.mixup=0.5", "train.lr_depth=0.5", "train.scale_lr=2"],
            &[5, 10],
        ),
        (&[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }"], &[2, 5]),
        (&["train.rule=1f1b", "model.skip={ spans = [2, 3] }"], &[2, 3, 5]),
        (&["train.rule=1f1b", "train.stash=inputs", "train.boundary=cut", "train.freeze=[1]"], &[5]),
        (
            &["train.rule=1f1b", "model.skip={ spans = [2], delay = 'aligned', fuse = 'concat' }", "train.replicas=2"],
            &[3, 10],
        ),
        (&["train.rule=gpipe", "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }"], &[4, 5]),
        (&["train.rule=gpipe", UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }", "train.replicas=2"], &[9]),
        (&[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }"], &[3]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = prepare(dir.path(), sets);
        let threads = dir.path().join("threads");
        let output = alone(&["train", &config, "--set", &set("run.dir", &threads)]);
        assert!(output.status.success(), "{}", text(&output));
        for &ranks in rank_counts {
            let run = dir.path().join(format!("ranks{ranks}"));
            let args = ["train", &config, "--set", &set("run.dir", &run)];
            let output = mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE);
            assert!(output.status.success(), "{}", text(&output));
            assert!(tensors(&run, 4) == tensors(&threads, 4), "{sets:?} on {ranks} ranks");
            // The last module's loss reaches rank 0's terminal.
            assert!(text(&output).contains("batch 4/4  loss "), "{}", text(&output));
        }
    }
}

/// One module a rank on far more ranks than there are cores: 4 modules x 16 replicas, which exchange in two levels, and whose first
/// modules hear of decisions from one another. The same bits as on threads and on a few ranks.
#[test]
fn sixty_four_ranks_train() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 32, 8, false);
    let sets = ["model.modules=4", "train.replicas=16", "train.rule=sideways", "data.frames=8", "train.batches=2"];
    let path = dir.path().join("config.toml");
    std::fs::write(&path, config(dir.path(), &sets).to_toml().unwrap()).unwrap();
    let config = path.display().to_string();
    let threads = dir.path().join("threads");
    let output = alone(&["train", &config, "--set", &set("run.dir", &threads)]);
    assert!(output.status.success(), "{}", text(&output));
    for ranks in [6, 64] {
        let run = dir.path().join(format!("ranks{ranks}"));
        let output =
            mpirun(ranks, Path::new(PROGRAM), &["train", &config, "--set", &set("run.dir", &run)], &[], MINUTE);
        assert!(output.status.success(), "{}", text(&output));
        assert!(tensors(&run, 2) == tensors(&threads, 2), "{ranks} ranks");
        let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(metrics.lines().next_back().unwrap()).unwrap();
        assert_eq!(line["workers"].as_array().unwrap().len(), 64);
    }
}

/// After four batches every rank's parameters are those of exact back-propagation in one process.
#[test]
fn pipelines_on_ranks_are_back_propagation() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["model.skip={ spans = [2, 3] }"]);
    let bp = dir.path().join("bp");
    let sets = |run: &Path, rule: &str| [set("run.dir", run), format!("train.rule={rule}")];
    let [at, rule] = sets(&bp, "bp");
    let args = ["train", &config, "--set", &at, "--set", &rule];
    let output = alone(&args);
    assert!(output.status.success(), "{}", text(&output));
    for (rule, ranks) in [("1f1b", 5), ("gpipe", 5), ("1f1b", 2)] {
        let run = dir.path().join(format!("{rule}-{ranks}"));
        let [at, rule_key] = sets(&run, rule);
        let args = ["train", &config, "--set", &at, "--set", &rule_key];
        let output = mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE);
        assert!(output.status.success(), "{}", text(&output));
        assert_close(&tensors(&run, 4), &tensors(&bp, 4), 1e-5, &format!("{rule} on {ranks} ranks"));
    }
    // In one process alone.
    let output = mpirun(2, Path::new(PROGRAM), &args, &[], MINUTE);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("\"1f1b\" or \"gpipe\""), "{}", text(&output));
}

/// Future frames of 1 MiB a message and more, with skips, on ranks that are fewer, as many and more than the cores: cotangents
/// that wait in sums for their step keep nobody waiting, with stash and by the exact rules.
#[test]
fn large_messages_never_deadlock() {
    const LAYERS: &str = "model.layers=[
        { kind = 'conv2d', out = 64, kernel = 1 }, { kind = 'relu' }, { kind = 'conv2d', out = 64, kernel = 1 },
        { kind = 'relu' }, { kind = 'conv2d', out = 64, kernel = 1 }, { kind = 'relu' },
        { kind = 'conv2d', out = 64, kernel = 1 }, { kind = 'relu' }, { kind = 'conv2d', out = 3, kernel = 1 },
    ]";
    let dir = tempfile::tempdir().unwrap();
    shard_of_side(&dir.path().join("train.h5"), 4, 14, false, 64);
    let layers = LAYERS.replace('\n', " ");
    for (n, (skip, rule)) in [
        ("{ spans = [2, 3] }", "train.stash=activations"),
        ("{ spans = [2, 4], delay = 2 }", "train.stash=activations"),
        ("{ spans = [2, 3] }", "train.rule=1f1b"),
        ("{ spans = [2, 4], delay = 2 }", "train.rule=gpipe"),
    ]
    .into_iter()
    .enumerate()
    {
        let skip = format!("model.skip={skip}");
        let sets = ["model.task=future-frames", &layers, &skip, "train.batches=2", "data.batch=4", rule];
        let path = dir.path().join("large.toml");
        std::fs::write(&path, config(dir.path(), &sets).to_toml().unwrap()).unwrap();
        let path = path.display().to_string();
        let threads = dir.path().join(format!("threads{n}"));
        let output = alone(&["train", &path, "--set", &set("run.dir", &threads)]);
        assert!(output.status.success(), "{}", text(&output));
        for ranks in [2, 5] {
            let run = dir.path().join(format!("ranks{n}-{ranks}"));
            let args = ["train", &path, "--set", &set("run.dir", &run)];
            let output = mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE);
            assert!(output.status.success(), "{}", text(&output));
            assert!(tensors(&run, 2) == tensors(&threads, 2), "{skip}, {rule}, on {ranks} ranks");
        }
    }
}

/// Stopped on some number of ranks, resumed on another.
#[test]
fn a_run_resumes_on_another_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["model.skip={ spans = [2] }"]);
    let (through, stopped) = (dir.path().join("through"), dir.path().join("stopped"));
    assert!(alone(&["train", &config, "--set", &set("run.dir", &through)]).status.success());
    let (at, args) = (set("run.dir", &stopped), ["train", config.as_str(), "--set"]);
    let first = mpirun(5, Path::new(PROGRAM), &[&args[..], &[&at, "--stop-after", "1"]].concat(), &[], MINUTE);
    assert_eq!(first.status.code(), Some(75), "{}", text(&first));
    let second = mpirun(2, Path::new(PROGRAM), &[&args[..], &[&at, "--stop-after", "2"]].concat(), &[], MINUTE);
    assert_eq!(second.status.code(), Some(75), "{}", text(&second));
    let last = alone(&[&args[..], &[&at]].concat());
    assert!(last.status.success(), "{}", text(&last));
    assert!(tensors(&stopped, 4) == tensors(&through, 4));
}

/// Evaluation says the same alone and on ranks.
#[test]
fn evaluation_does_not_depend_on_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["data.batch=5"]);
    let run = dir.path().join("run");
    assert!(alone(&["train", &config]).status.success());
    let args = ["eval", run.to_str().unwrap(), "--json"];
    let (one, three) = (alone(&args), mpirun(3, Path::new(PROGRAM), &args, &[], MINUTE));
    assert!(one.status.success() && three.status.success(), "{}\n{}", text(&one), text(&three));
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&three.stdout));
    // 12 videos in batches of 5: padding does not count.
    assert!(String::from_utf8_lossy(&one.stdout).contains("\"clips\":12"), "{}", text(&one));
}

/// More ranks than modules are pipelines that share the clips; ranks that are left over have nothing to do. The same result to the
/// last bit, whatever is asked for; views and scores of videos as well.
#[test]
fn evaluation_takes_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["model.modules=2", "data.batch=5", "data.frames=9", "train.rule=sideways"]);
    assert!(alone(&["train", &config]).status.success());
    let run = dir.path().join("run");
    for (n, more) in
        [&["--json", "--per-class"][..], &["--views", "3x1"], &["--views", "2x1", "--json"]].iter().enumerate()
    {
        let eval = |ranks: usize| {
            let path = dir.path().join(format!("scores-{n}-{ranks}.{}", if n == 0 { "jsonl" } else { "csv" }));
            let args = [&["eval", run.to_str().unwrap(), "--scores", path.to_str().unwrap()], *more].concat();
            let output = match ranks {
                0 => alone(&args),
                _ => mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE),
            };
            assert!(output.status.success(), "{}", text(&output));
            let idle = text(&output).contains("1 of 5 ranks have nothing to do");
            assert_eq!(idle, ranks == 5, "{}", text(&output));
            (String::from_utf8(output.stdout).unwrap(), std::fs::read_to_string(path).unwrap())
        };
        let one = eval(0);
        for ranks in [2, 4, 5] {
            assert_eq!(eval(ranks), one, "{more:?} on {ranks} ranks");
        }
        let (said, scores) = one;
        match n {
            0 => {
                assert!(said.contains("\"clips\":12") && said.contains("\"views\":[1,1]"), "{said}");
                let lines = scores.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
                let lines: Vec<_> = lines.collect();
                let right = lines.iter().filter(|line| line["label"] == line["predicted"]).count();
                let said: serde_json::Value = serde_json::from_str(&said).unwrap();
                assert_eq!((lines.len(), said["top1"].as_f64()), (12, Some(right as f64 / 12.0)));
                assert_eq!((&lines[7]["video"], &lines[7]["label"]), (&"video 7".into(), &3.into()));
                let classes = said["classes"].as_array().unwrap();
                assert_eq!(classes.iter().map(|class| class["videos"].as_u64().unwrap()).sum::<u64>(), 12);
            }
            1 => {
                assert!(said.starts_with("videos 12  loss ") && said.contains("mean class accuracy"), "{said}");
                assert!(said.contains("T = 9 frames, stride 1; 3x1 views") && said.contains("8x8 of 8x8"), "{said}");
                assert!(scores.starts_with("video,label,predicted,\"class 0\","), "{scores}");
                assert!(scores.lines().nth(12).unwrap().starts_with("\"video 11\",3,"), "{scores}");
            }
            _ => assert!(said.contains("\"clips\":24") && said.contains("\"videos\":12"), "{said}"),
        }
    }
    for (more, expected) in [
        (["--views", "3x2"], "crops 1 or 3"),
        (["--views", "1x3"], "set data.crop to less than the longer side"),
        (["--scores", "scores.txt"], "ends in .csv or .jsonl"),
    ] {
        let output = alone(&[&["eval", run.to_str().unwrap()][..], &more].concat());
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(expected), "{expected}: {}", text(&output));
    }
}

/// Errors of predicted pixels and of the copy, by `eval` and by `predict`, against frames put side by side here.
#[test]
fn predicted_frames_are_measured_beside_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let layers = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";
    let sets = ["model.task=future-frames", layers, "model.modules=2", "train.rule=sideways", "data.batch=5"];
    prepare(dir.path(), &[&sets[..], &["model.horizon=2"]].concat());
    let config = dir.path().join("config.toml").display().to_string();
    assert!(alone(&["train", &config]).status.success());
    let (run, out) = (dir.path().join("run"), dir.path().join("pictures"));
    let eval = alone(&["eval", run.to_str().unwrap(), "--json"]);
    let said: serde_json::Value = serde_json::from_slice(&eval.stdout).unwrap_or_else(|_| panic!("{}", text(&eval)));
    // Frames t + 2 and t of `shard`, at every step with a target.
    let pixel = |v: usize, n: usize, t: usize| {
        f64::from((128.0 + 100.0 * ((n * (v + 3)) as f64 * 0.37 + t as f64 * 0.9).sin()) as u8) / 255.0
    };
    let of =
        |v: usize, t: usize| (0..8 * 8 * 3).map(|n| (pixel(v, n, t + 2) - pixel(v, n, t)).powi(2)).sum::<f64>() / 192.0;
    let errors: Vec<f64> = (0..12).flat_map(|v| (0..12).map(move |t| (v, t))).map(|(v, t)| of(v, t)).collect();
    let copy = errors.iter().sum::<f64>() / errors.len() as f64;
    assert!((said["copy_mse"].as_f64().unwrap() / copy - 1.0).abs() < 1e-5, "{said} {copy}");
    // The loss is the same error, of values that are pixels over a deviation of some 0.22, where none is clamped.
    let (loss, mse) = (said["loss"].as_f64().unwrap(), said["mse"].as_f64().unwrap());
    assert!(mse < loss * 0.0521 && mse > loss * 0.02, "{said}");
    let args = ["predict", run.to_str().unwrap(), "--clips", "2", "--out", out.to_str().unwrap()];
    for output in [alone(&args), mpirun(5, Path::new(PROGRAM), &args, &[], MINUTE)] {
        assert!(output.status.success(), "{}", text(&output));
        let text = text(&output);
        for part in ["12 clips; pixels in 0..1; pictures of 2 in", &format!("MSE {mse:.6}"), &format!("MSE {copy:.6}")]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    assert_eq!(std::fs::read_dir(out).unwrap().count(), 4);
}

/// The loss of future frames is a mean over clips: ranks and the padding of the last batch do not matter.
#[test]
fn evaluation_of_future_frames_counts_no_padding() {
    let dir = tempfile::tempdir().unwrap();
    let layers = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";
    let sets = ["model.task=future-frames", layers, "model.modules=2", "train.rule=sideways", "data.batch=5"];
    prepare(dir.path(), &sets);
    let config = dir.path().join("config.toml").display().to_string();
    assert!(alone(&["train", &config]).status.success());
    let run = dir.path().join("run");
    let args = ["eval", run.to_str().unwrap(), "--set"];
    let padded = [&args[..], &["data.batch=5"]].concat();
    let (one, two) = (alone(&padded), mpirun(2, Path::new(PROGRAM), &padded, &[], MINUTE));
    let whole = alone(&[&args[..], &["data.batch=4"]].concat());
    let loss = |output: &Output| {
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(line.starts_with("loss ") && line.contains("over 12 clips"), "{}", text(output));
        line.split(' ').nth(1).unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(loss(&one), loss(&two));
    assert!((loss(&one) - loss(&whole)).abs() < 2e-6, "{} {}", loss(&one), loss(&whole));
}

#[test]
fn more_ranks_than_workers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["model.modules=2"]);
    let output = mpirun(3, Path::new(PROGRAM), &["train", &config], &[], MINUTE);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("at most 2 can be used"), "{}", text(&output));
}

/// Ranks with different configurations stop before a tensor moves, and the ranks that differ are named.
#[test]
fn different_configurations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &[]);
    let script = format!("exec {PROGRAM} train {config} --set train.seed=${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}");
    let output = mpirun(2, Path::new("sh"), &["-c", &script], &[], MINUTE);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("not the same on all ranks: rank 1"), "{}", text(&output));
}

/// A rank that is killed, and one whose loss is no number, end the whole job within seconds.
#[test]
fn a_rank_that_fails_ends_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &["train.batches=1000000", "run.checkpoint_every=1000000"]);
    let kill = format!(
        "if [ ${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} = 1 ]; then (sleep 2; kill -9 $$) & fi; exec {PROGRAM} train {config}"
    );
    let begun = Instant::now();
    let output = mpirun(3, Path::new("sh"), &["-c", &kill], &[], MINUTE);
    assert!(!output.status.success() && begun.elapsed() < Duration::from_secs(15), "{}", text(&output));
    assert!(text(&output).contains("signal 9"), "{}", text(&output));

    let config = prepare(dir.path(), &["train.batches=1000000", "train.optimizer={ kind = 'sgd', lr = 1e30 }"]);
    let begun = Instant::now();
    let run = set("run.dir", &dir.path().join("diverges"));
    let output = mpirun(5, Path::new(PROGRAM), &["train", &config, "--set", &run], &[], MINUTE);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(begun.elapsed() < Duration::from_secs(15), "{}", text(&output));
    assert!(text(&output).contains("error: rank "), "{}", text(&output));
    assert!(text(&output).contains("learning rate") || text(&output).contains("diverged"), "{}", text(&output));
}

/// What `doctor` finds is what training then meets, and its exit code says so.
#[test]
fn doctor_finds_what_would_fail() {
    let dir = tempfile::tempdir().unwrap();
    let config = prepare(dir.path(), &[]);
    let doctor = |ranks: usize, more: &[&str]| {
        let args = [&["doctor", &config][..], more].concat();
        mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE)
    };
    let fine = doctor(3, &[]);
    let said = text(&fine);
    assert!(fine.status.success() && !said.contains("WILL FAIL"), "{said}");
    for part in ["3 rank(s)", "the same on all ranks", "ranks by host: ", "seen by all ranks", "a new run of 4 batches"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    let nowhere = ["--set", "run.dir=/proc/nowhere"];
    for (ranks, more, expected) in [
        (6, &[][..], "WILL FAIL        configuration  6 ranks for 5 modules"),
        (2, &["--set", "data.train=missing-*.h5"], "WILL FAIL        configuration  data.train: "),
        (2, &nowhere, "WILL FAIL        run folder     /proc/nowhere: "),
    ] {
        let output = doctor(ranks, more);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(expected), "{expected}: {}", text(&output));
    }
    let output = mpirun(2, Path::new(PROGRAM), &[&["train", &config][..], &nowhere].concat(), &[], MINUTE);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("choose a run.dir that can be written to"), "{}", text(&output));
}
