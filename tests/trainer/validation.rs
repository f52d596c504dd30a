//! Validation while training: it changes no parameter, says what `eval` says, and is made once, whatever happens to the run.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::jobs::{Job, Run};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, alone, wait_for};
use crate::common::runs::{SIDE, config, shard, tensors, train};
use sideways::checkpoint::{self, Checkpoint, best::Best};

/// The validations in a run folder's metrics.
fn validations(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get("kind").is_some_and(|kind| kind == "validation")).collect()
}

/// What of them does not depend on the clock.
fn scores(run: &Path) -> Vec<Value> {
    let strip = |mut line: Value| {
        for key in ["seconds", "elapsed"] {
            line.as_object_mut().unwrap().remove(key).expect(key);
        }
        line
    };
    validations(run).into_iter().map(strip).collect()
}

fn batches(run: &Path) -> Vec<u64> {
    validations(run).iter().map(|line| line["batches"].as_u64().unwrap()).collect()
}

const BATCH_NORM: &str = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, stride = 2 }, { kind = 'batch-norm' }, \
    { kind = 'relu' }, { kind = 'conv2d', out = 6, kernel = 3 }, { kind = 'dropout', rate = 0.5 }, { kind = 'gelu' }, \
    { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
const FRAMES: &str = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
    { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'batch-norm' }, \
    { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";

/// By every rule, across boundaries, with sums of gradients that go on over a validation: the bits are those without, and the
/// scores those of `eval` on the checkpoints.
#[test]
fn a_validation_changes_nothing_and_says_what_eval_says() {
    for sets in [
        &["model.skip={ spans = [2, 3] }"][..],
        &["train.boundary=cut", "train.update_every=5"],
        &[BATCH_NORM, "model.modules=3", "train.rule=sideways"],
        &["train.rule=bp"],
        &["train.rule=1f1b", "train.ema=0.9", "model.skip={ spans = [2, 3] }"],
        &[
            "train.stash=inputs",
            "train.ema=0.9",
            "train.label_smoothing=0.2",
            "data.mixup=0.5",
            "model.skip={ spans = [2] }",
        ],
        &["train.replicas=2", "data.batch=1"],
        &["model.modules=1", "train.rule=sideways"],
        &[FRAMES, "model.task=future-frames", "model.modules=3", "train.rule=sideways"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 12, 14, false);
        shard(&dir.path().join("held-out.h5"), 7, 20, false);
        let with = |more: &[&str]| config(dir.path(), &[sets, more].concat());
        let held_out = dir.path().join("held-out.h5").display().to_string();
        let (plain, validated) = (dir.path().join("plain"), dir.path().join("validated"));
        train(&with(&[&format!("run.dir={}", plain.display())]), None);
        let at = [format!("run.dir={}", validated.display()), format!("data.validation={held_out}")];
        let totals = train(&with(&[&at[0], &at[1], "train.validate_every=3"]), None);
        assert!(tensors(&plain, 4) == tensors(&validated, 4), "{sets:?}");
        // After three batches of four, and at the end.
        assert_eq!(batches(&validated), [3, 4], "{sets:?}");
        assert!(totals.validations.iter().all(|v| v.clips == 7 && v.skipped == 0), "{:?}", totals.validations);
        assert!(totals.time.iter().all(|time| time.validation > 0.0));
        for line in validations(&validated) {
            let step = validated.join(format!("checkpoints/step-{:08}", line["batches"].as_u64().unwrap()));
            let output = alone(&["eval", step.to_str().unwrap(), "--data", &held_out, "--json"]);
            let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
            for key in ["clips", "loss", "top1", "top5", "mse", "copy_mse"] {
                assert_eq!(line.get(key), said.get(key), "{key} {sets:?}");
            }
        }
    }
}

/// On any number of ranks: the same scores and parameters.
#[test]
fn a_validation_does_not_depend_on_ranks() {
    for (sets, rank_counts) in [
        (&["model.skip={ spans = [2] }"][..], &[3, 5][..]),
        (&["train.replicas=2"], &[4, 10]),
        (&["train.rule=1f1b", "model.skip={ spans = [2] }"], &[5]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 12, 14, false);
        let path = dir.path().join("config.toml");
        let sets = [sets, &["train.validate_every=1"]].concat();
        std::fs::write(&path, config(dir.path(), &sets).to_toml().unwrap()).unwrap();
        let run = |name: &str, ranks: usize| {
            let folder = dir.path().join(name);
            let at = format!("run.dir={}", folder.display());
            let args = ["train", path.to_str().unwrap(), "--set", &at];
            let output = mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE);
            assert!(output.status.success(), "{}", text(&output));
            assert!(text(&output).contains("validation after 4 batches: loss "), "{}", text(&output));
            folder
        };
        let one = run("one", 1);
        assert_eq!(batches(&one), [1, 2, 3, 4]);
        for &ranks in rank_counts {
            let other = run(&format!("ranks{ranks}"), ranks);
            assert_eq!(scores(&other), scores(&one), "{sets:?} on {ranks} ranks");
            assert!(tensors(&other, 4) == tensors(&one, 4), "{sets:?} on {ranks} ranks");
        }
    }
}

/// Stopped at any batch and resumed: no validation twice, none lost, the same lines.
#[test]
fn resuming_neither_repeats_nor_loses_a_validation() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let of = |name: &str| {
        let at = format!("run.dir={}", dir.path().join(name).display());
        config(dir.path(), &[&at, "train.batches=9", "train.validate_every=2", "run.keep=1"])
    };
    train(&of("through"), None);
    let folder = |name: &str| dir.path().join(name);
    assert_eq!(batches(&folder("through")), [2, 4, 6, 8, 9]);
    for stop in [1, 2, 3] {
        let name = format!("by{stop}");
        while train(&of(&name), Some(stop)).batches > 0 {}
        assert_eq!(scores(&folder(&name)), scores(&folder("through")), "{stop} at a time");
        assert!(tensors(&folder(&name), 9) == tensors(&folder("through"), 9));
    }
    // Killed in a validation: its line is not there, nor what came after it.
    let metrics = folder("by1").join("metrics.jsonl");
    let all = std::fs::read_to_string(&metrics).unwrap();
    let cut: Vec<&str> = all.lines().filter(|line| !line.contains("\"batches\":9,\"clips\"")).collect();
    std::fs::write(&metrics, cut.join("\n") + "\n").unwrap();
    assert_eq!(train(&of("by1"), None).validations.len(), 1, "the last validation, of a run that is through");
    assert_eq!(scores(&folder("by1")), scores(&folder("through")));
    assert_eq!(train(&of("by1"), None).validations.len(), 0);
}

/// A signal within a validation that would go on for long: the checkpoint of what was trained, and the validation after resuming.
#[test]
fn a_signal_does_not_wait_for_a_validation_to_end() {
    for sets in [&[][..], &["train.replicas=2", "data.batch=1"]] {
        let run = Run::new(&[&["train.validate_every=5", "run.checkpoint_every=5"], sets].concat());
        let long = run.dir.path().join("long.h5");
        shard(&long, 2000, 14, false);
        let held_out = format!("data.validation={}", long.display());
        let mut job = Job::alone(&run, &["--set", &held_out]);
        wait_for("five batches", || run.lines_of_metrics().len() >= 5);
        std::thread::sleep(std::time::Duration::from_millis(100));
        job.signal(libc::SIGTERM);
        assert_eq!(job.exit_code(), Some(75));
        assert_eq!((run.newest(), batches(&run.folder()).len()), (5, 0), "{sets:?}");
        let short = format!("data.validation={}", run.dir.path().join("train.h5").display());
        let args = ["train", &run.config, "--stop-after", "3", "--set", &short];
        let output = Command::new(PROGRAM).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", text(&output));
        assert_eq!(batches(&run.folder()), [5]);
        assert_eq!(run.lines_of_metrics(), [1, 2, 3, 4, 5, 5, 6, 7, 8]);
        run.assert_same_as_uninterrupted(8);
    }
}

/// Validation clips that cannot be read end the run with a checkpoint of all that was trained; so does a damaged video.
#[test]
fn validation_clips_that_cannot_be_read_cost_no_training() {
    let run = Run::new(&["train.validate_every=5"]);
    let held_out = run.dir.path().join("held-out.h5");
    shard(&held_out, 6, 14, false);
    let bytes = std::fs::read(&held_out).unwrap();
    let mut damaged = bytes.clone();
    // Frame 2 of video 3 of `shard`.
    let pixel = |n: usize| (128.0 + 100.0 * ((n * 6) as f64 * 0.37 + 1.8).sin()) as u8;
    let frame: Vec<u8> = (0..SIDE * SIDE * 3).map(pixel).collect();
    let at = bytes.windows(frame.len()).position(|window| window == frame).unwrap();
    damaged[at + 5] ^= 1;
    let set = format!("data.validation={}", held_out.display());
    let start = || {
        let args = ["train", &run.config, "--stop-after", "8", "--set", &set];
        mpirun(3, Path::new(PROGRAM), &args, &[], MINUTE)
    };
    std::fs::write(&held_out, damaged).unwrap();
    let output = start();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for part in
        ["is damaged: its checksum is", "validation after 5 batches", "step-00000005", "the same command goes on"]
    {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert_eq!((run.newest(), batches(&run.folder())), (5, vec![]));
    std::fs::write(&held_out, bytes).unwrap();
    assert_eq!(start().status.code(), Some(75));
    assert_eq!(batches(&run.folder()), [5, 10]);
    run.assert_same_as_uninterrupted(13);
}

/// The best checkpoint outlives `run.keep`, is named with its score, and is found by its name.
#[test]
fn the_best_checkpoint_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let sets = ["train.batches=30", "train.validate_every=1", "run.keep=1", "train.optimizer={ kind='sgd', lr=0.3 }"];
    let config = config(dir.path(), &sets);
    let folder = &config.run.dir;
    let checkpoints = folder.join("checkpoints");
    while train(&config, Some(7)).batches > 0 {
        let lines = validations(folder);
        let top1 = |line: &Value| line["top1"].as_f64().unwrap();
        let best = lines.iter().map(top1).fold(f64::MIN, f64::max);
        let first = lines.iter().find(|line| top1(line) == best).unwrap();
        assert_eq!(first["best"], true);
        let kept = Best::read(&checkpoints).unwrap();
        assert_eq!((kept.batches, kept.value), (first["batches"].as_u64().unwrap(), best));
        let named = Checkpoint::open(&checkpoints.join("best")).unwrap();
        assert_eq!(named.manifest().batches, kept.batches);
        let left: Vec<u64> = checkpoint::list(&checkpoints).unwrap().into_iter().map(|(batches, _)| batches).collect();
        let mut expected = vec![0, kept.batches, lines.len() as u64];
        expected.dedup();
        assert_eq!(left, expected, "the start, the best and the newest");
    }
    let best = Best::read(&checkpoints).unwrap();
    let output = alone(&["eval", folder.join("best").to_str().unwrap(), "--json"]);
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    assert_eq!(said["top1"].as_f64(), Some(best.value));
}

/// What is validated on must be like what is trained on.
#[test]
fn what_cannot_be_validated_on_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    crate::common::runs::shard_of_side(&dir.path().join("larger.h5"), 4, 14, false, 16);
    let path = dir.path().join("config.toml");
    std::fs::write(&path, config(dir.path(), &["train.validate_every=2"]).to_toml().unwrap()).unwrap();
    let larger = format!("data.validation={}", dir.path().join("larger.h5").display());
    for (sets, expected) in [
        (vec!["data.test=[]"], "give shards as data.validation or data.test"),
        (vec!["data.validation=nowhere-*.h5"], "data.validation: "),
        (vec![&larger], "16x16 (height x width), those of data.train 8x8"),
    ] {
        let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
        let output = alone(&[&["train", path.to_str().unwrap()], &sets[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(expected), "{expected}: {}", text(&output));
    }
}

/// A run ends where a validation comes to `train.until`, keeps those parameters, and has nothing left to do; asked for more, it goes on.
#[test]
fn training_goes_on_until_a_validation_is_good_enough() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let run = dir.path().join("run");
    let at = format!("run.dir={}", run.display());
    let of = |until: &str| {
        let until = format!("train.until={until}");
        config(dir.path(), &[&at, "train.batches=300", "train.validate_every=2", "run.keep=1", &until])
    };
    // One of four classes comes first, however little was learnt.
    let totals = train(&of("{ top1 = 0.01 }"), None);
    assert!(totals.validations[0].top1.unwrap() >= 0.01, "{:?}", totals.validations);
    assert!(totals.batches < 300, "{}", totals.batches);
    let first = &validations(&run)[0];
    assert!(first["batches"] == 2 && first["elapsed"].as_f64() >= first["seconds"].as_f64(), "{first}");
    assert_eq!(Best::read(&run.join("checkpoints")).unwrap().batches, 2);
    let newest = checkpoint::latest(&run.join("checkpoints")).unwrap().unwrap().manifest().batches;
    assert_eq!(newest, totals.batches);
    assert_eq!(train(&of("{ top1 = 0.01 }"), None).batches, 0);
    // A validation can be reached in no other task, nor where there is none.
    let path = dir.path().join("config.toml");
    std::fs::write(&path, config(dir.path(), &[]).to_toml().unwrap()).unwrap();
    for (until, says) in [
        ("{ top1 = 0.95 }", "set train.validate_every"),
        ("{ mse = 0.1 }", "give { top1 = SHARE }"),
        ("{ top1 = 95 }", "above 0 and at most 1"),
        ("{ top5 = 0.9 }", "expected `top1` or `mse`"),
    ] {
        let output = alone(&["train", path.to_str().unwrap(), "--set", &format!("train.until={until}")]);
        assert!(output.status.code() == Some(2) && text(&output).contains(says), "{until}: {}", text(&output));
    }
    // It says so where all batches were not enough.
    let other = format!("run.dir={}", dir.path().join("other").display());
    let sets = [&other, "train.batches=4", "train.validate_every=2", "train.until={ top1 = 1.0 }"];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let output = alone(&["train", path.to_str().unwrap()].into_iter().chain(sets).collect::<Vec<_>>());
    let said = text(&output);
    assert!(output.status.success() && said.contains("was not reached in 4 batches"), "{said}");
}
