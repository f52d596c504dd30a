//! Training and its data: shards that go away, damaged videos, and what must not depend on how frames are read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::jobs::{Job, Run};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, wait_for};
use crate::common::runs::{SIDE, config, shard, tensors, train};
use sideways::comm::{Orders, World};
use sideways::trainer::Trainer;

/// A run over two shards, and the second's path.
fn two_shards(sets: &[&str]) -> (Run, PathBuf) {
    let run = Run::new(sets);
    let second = run.dir.path().join("train2.h5");
    shard(&second, 20, 14, false);
    (run, second)
}

fn log(run: &Run) -> String {
    std::fs::read_to_string(run.folder().join("log.txt")).unwrap()
}

fn resume(run: &Run, clips: u64) {
    let args = ["train", &run.config, "--stop-after", &clips.to_string()];
    let output = Command::new(PROGRAM).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
}

/// Makes a shard unreadable and gives back what mends it.
fn lose(path: &Path, cut: bool) -> impl Fn() + use<> {
    let (path, aside) = (path.to_path_buf(), path.with_extension("aside"));
    if cut {
        std::fs::copy(&path, &aside).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 3).unwrap();
    } else {
        std::fs::rename(&path, &aside).unwrap();
    }
    move || std::fs::rename(&aside, &path).unwrap()
}

/// The error says what and where; all clips before it are in a checkpoint; mended, the run goes on to the same bits.
fn assert_ends_with_all_that_was_done(run: &Run, lost: &Path, cut: bool, mend: impl Fn()) {
    let clips = run.newest();
    assert!(run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>() && clips >= 5, "{clips} clips");
    let (said, checkpoint) = (log(run), format!("step-{clips:08}"));
    let why = if cut { "truncated while in use" } else { "No such file" };
    for part in [why, &lost.display().to_string(), "batch ", &checkpoint, "the same command goes on"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    mend();
    resume(run, 3);
    run.assert_same_as_uninterrupted(clips + 3);
}

#[test]
fn a_shard_that_goes_away_ends_the_run_with_a_checkpoint_of_all_clips_before() {
    for (cut, sets) in [
        (false, &[][..]),
        (true, &["train.update_every=5"]),
        (true, &["train.boundary=cut", "run.checkpoint_every=1"]),
        (false, &["train.rule=bp", "model.skip={}"]),
        (true, &["train.replicas=2", "data.batch=1"]),
        (false, &["model.modules=1", "train.rule=sideways", "model.skip={}"]),
    ] {
        let (run, second) = two_shards(sets);
        let mut job = Job::alone(&run, &[]);
        wait_for("five clips", || run.lines_of_metrics().len() >= 5);
        let mend = lose(&second, cut);
        assert_eq!(job.exit_code(), Some(2), "{sets:?}: {}", log(&run));
        if sets.contains(&"train.replicas=2") && !log(&run).contains("the same command goes on") {
            // Replica 1 met it first: see the next test.
            continue;
        }
        assert_ends_with_all_that_was_done(&run, &second, cut, mend);
    }
}

/// The checkpoint that a run goes on from is not written anew where not even its first clip can be read: it would be lost if
/// the run were killed then, or the disk full.
#[test]
fn a_clip_that_cannot_be_read_first_leaves_the_checkpoint_alone() {
    for sets in [&[][..], &["train.rule=bp", "model.skip={}"]] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("train.h5");
        shard(&data, 8, 14, false);
        let config = config(dir.path(), sets);
        train(&config, Some(2));
        let checkpoint = config.run.dir.join("checkpoints/step-00000002");
        let before = std::fs::metadata(&checkpoint).unwrap().ino();
        let trainer = Trainer::new(&World::Alone, &config, None).unwrap();
        std::fs::remove_file(data).unwrap();
        let totals = trainer.run(&mut |_| ()).unwrap();
        assert!(totals.decision.contains(Orders::UNDO) && totals.batches == 0);
        let error = trainer.conclude(&totals).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("the same command goes on"), "{error}");
        assert_eq!(std::fs::metadata(&checkpoint).unwrap().ino(), before, "{sets:?}");
    }
}

/// On five ranks, whose modules are at different clips when module 1 finds out; future frames, whose targets are missing too.
#[test]
fn all_ranks_undo_the_clip_that_cannot_be_read() {
    let layers = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'batch-norm' }, \
                  { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";
    let frames = ["model.task=future-frames", layers, "model.modules=3", "model.skip={}", "train.rule=sideways"];
    for (ranks, sets) in [(5, &[][..]), (3, &frames), (5, &["train.rule=1f1b"]), (4, &["train.rule=gpipe"])] {
        let (run, second) = two_shards(sets);
        let (config, lost) = (run.config.clone(), second.clone());
        let job = std::thread::spawn(move || mpirun(ranks, Path::new(PROGRAM), &["train", &config], &[], MINUTE));
        wait_for("five clips", || run.lines_of_metrics().len() >= 5);
        let mend = lose(&lost, true);
        let output = job.join().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert_ends_with_all_that_was_done(&run, &second, true, mend);
    }
}

/// Another replica than the one that decides has no way to tell in time: the last checkpoint is the one that resumes.
#[test]
fn where_others_cannot_be_told_the_last_checkpoint_resumes() {
    let (run, second) = two_shards(&["train.replicas=2", "data.shuffle=false", "run.checkpoint_every=3"]);
    // Two videos in each shard: replica 1 alone reads the second.
    shard(&run.dir.path().join("train.h5"), 2, 14, false);
    shard(&second, 2, 14, false);
    let mut job = Job::alone(&run, &[]);
    wait_for("a checkpoint", || run.lines_of_metrics().len() >= 5 && run.newest() >= 3);
    let mend = lose(&second, true);
    assert_eq!(job.exit_code(), Some(2));
    let (said, clips) = (log(&run), run.newest());
    assert!(said.contains("truncated while in use") && said.contains(&second.display().to_string()), "{said}");
    assert!(clips >= 3 && clips % 3 == 0, "{clips}");
    mend();
    resume(&run, 2);
    run.assert_same_as_uninterrupted(clips + 2);
    assert!(run.lines_of_metrics() == (1..=clips + 2).collect::<Vec<_>>());
}

#[test]
fn damaged_videos_are_skipped_and_counted() {
    for rule in ["skip-sideways", "bp"] {
        let run =
            Run::new(&["train.batches=24", &format!("train.rule={rule}"), "model.skip={}", "run.checkpoint_every=24"]);
        let path = run.dir.path().join("train.h5");
        let mut bytes = std::fs::read(&path).unwrap();
        let frame = |t: usize| -> Vec<u8> {
            // Video 3 of `shard`.
            let pixel = |n: usize| (128.0 + 100.0 * ((n * 6) as f64 * 0.37 + t as f64 * 0.9).sin()) as u8;
            (0..SIDE * SIDE * 3).map(pixel).collect()
        };
        let at = bytes.windows(SIDE * SIDE * 3).position(|w| w == frame(2)).unwrap();
        bytes[at + 5] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let output = Command::new(PROGRAM).args(["train", &run.config]).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(0), "{said}");
        let warnings = said.matches("video 3 is damaged: its checksum is").count();
        assert!(warnings == 1 && said.contains("damaged videos were skipped 2 times"), "{said}");
        // Two epochs of twelve batches: it is met once in each.
        let metrics = std::fs::read_to_string(run.folder().join("metrics.jsonl")).unwrap();
        let skipped =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["videos_skipped"].as_u64().unwrap();
        assert_eq!(metrics.lines().map(skipped).sum::<u64>(), 2);
    }
}

/// What a user may not have meant is said when training starts: videos shorter than a clip, a shard lost from a copy, settings
/// that are not the checkpoint's.
#[test]
fn doubtful_data_and_changed_settings_are_named_at_the_start() {
    let run = Run::new(&["data.frames=15", "train.batches=9"]);
    let lost = run.dir.path().join("part-00000.h5");
    shard(&run.dir.path().join("part-00001.h5"), 4, 20, false);
    let start = |sets: &[&str]| {
        let glob = format!("data.train=['{0}/train.h5', '{0}/part-*.h5']", run.dir.path().display());
        let sets = [&[glob.as_str()], sets].concat();
        let sets = sets.into_iter().flat_map(|set| ["--set", set]);
        let output =
            Command::new(PROGRAM).args(["train", &run.config, "--stop-after", "1"]).args(sets).output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", text(&output));
        text(&output)
    };
    let first = start(&[]);
    assert!(first.contains("videos have fewer than the 15 frames of a clip (data.frames = 15"), "{first}");
    assert!(first.contains(&format!("the first is {}: was a part", lost.display())), "{first}");
    assert!(!first.contains("other settings"), "{first}");
    let second = start(&["data.flip=true", "train.epochs=3"]);
    for part in ["data.flip was false, is true", "train.batches was 9, is not set", "train.epochs was 10, is 3"] {
        assert!(second.contains(part), "{part:?} is not in {second}");
    }
    assert!(!second.contains("other data"), "{second}");
    shard(&run.dir.path().join("part-00002.h5"), 4, 20, false);
    let third = start(&[]);
    assert!(third.contains("was written on other data"), "{third}");
}

/// Training ends with the same bits however frames are read, and on however many ranks.
#[test]
fn decode_threads_reading_ahead_and_ranks_change_nothing() {
    let augmented = "data.crop_scale=[0.4, 1.0]";
    let sets = [
        "data.crop=8",
        augmented,
        "data.flip=true",
        "data.brightness=0.3",
        "train.batches=6",
        "run.checkpoint_every=6",
    ];
    let run = Run::new(&sets);
    let of = |name: &str, more: &[&str], ranks: usize| {
        let dir = format!("run.dir={}", run.dir.path().join(name).display());
        let mut args = vec!["train", &run.config, "--set", &dir];
        more.iter().for_each(|set| args.extend(["--set", set]));
        let output = mpirun(ranks, Path::new(PROGRAM), &args, &[], MINUTE);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        tensors(&run.dir.path().join(name), 6)
    };
    let one = of("one", &["data.decode_threads=1"], 1);
    assert!(one == of("three", &["data.decode_threads=3", "data.prefetch=1"], 1));
    assert!(one == of("ranks", &["data.decode_threads=2", "data.prefetch=30", "data.verify=false"], 5));
    assert!(one != of("plain", &["data.flip=false"], 1), "augmentation is at work");
}
