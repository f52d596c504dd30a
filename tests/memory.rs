//! Peak resident memory of a training process: flat in the clip's length under Skip-Sideways, with stash and under 1f1b too, not
//! under exact back-propagation; and of a dry run, whatever the number of workers. A program of its own: the peak of a child counts
//! that of the process that starts it, whose memory it has
//! until it runs another program.

mod common;

use std::path::Path;
use std::process::Command;

use common::runs::{config, shard};

/// Peak resident memory of `sideways train`, in KiB, whose standard output goes into a file.
fn peak(config: &Path, args: &[&str]) -> i64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sideways"))
        .args(["train".as_ref(), config.as_os_str()])
        .args(args)
        .stdout(std::fs::File::create(config.with_extension("out")).unwrap())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut status = 0;
    // SAFETY: both are plain values the call fills in; the process is our child and is waited for only here.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::wait4(child.id() as i32, &mut status, 0, &mut usage), child.id() as i32);
        usage
    };
    assert_eq!(status, 0, "training failed");
    let _ = child.try_wait();
    usage.ru_maxrss
}

#[test]
fn memory_does_not_grow_with_the_clip_except_under_exact_back_propagation() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 32, 64, false);
    let measure = |rule: &str, frames: usize| {
        let path = dir.path().join(format!("{rule}-{frames}.toml"));
        let sets = [
            format!("data.frames={frames}"),
            format!("train.rule={}", if rule == "stash" { "skip-sideways" } else { rule }),
            format!("train.stash={}", if rule == "stash" { "activations" } else { "none" }),
            format!("run.dir={}/{rule}-{frames}", dir.path().display()),
            "model.skip={ spans = [2] }".into(),
            "data.batch=32".into(),
            "train.batches=6".into(),
        ];
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        std::fs::write(&path, config(dir.path(), &sets).to_toml().unwrap()).unwrap();
        peak(&path, &[]) as f64
    };
    let (short, long) = (measure("skip-sideways", 16), measure("skip-sideways", 64));
    assert!(long < 1.03 * short, "skip-sideways: {short} KiB at T = 16, {long} KiB at T = 64");
    // A clip must be longer than the way back, or fewer steps are kept.
    let (stash_short, stash_long) = (measure("stash", 24), measure("stash", 64));
    assert!(stash_long < 1.03 * stash_short, "stash: {stash_short} KiB at T = 24, {stash_long} KiB at T = 64");
    let (one_short, one_long) = (measure("1f1b", 24), measure("1f1b", 64));
    assert!(one_long < 1.03 * one_short, "1f1b: {one_short} KiB at T = 24, {one_long} KiB at T = 64");
    let (bp_short, bp_long) = (measure("bp", 16), measure("bp", 64));
    assert!(bp_long > 1.10 * bp_short, "bp: {bp_short} KiB at T = 16, {bp_long} KiB at T = 64");
}

/// 16 modules x 256 replicas: a row a module, as with one replica, and memory for the links of one worker at a time.
#[test]
fn a_dry_run_of_thousands_of_workers_is_small() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.toml");
    let config = "[data]\ntrain = 'none/*.h5'\nframes = 32\nbatch = 4\ncrop = 112\n\
        [model]\npreset = 'resnet50'\nmodules = 16\nclasses = 400\nskip = { spans = [2, 3] }\n\
        [train]\nbatches = 1\nreplicas = 256\n[run]\ndevice = 'cpu'\n";
    std::fs::write(&path, config).unwrap();
    let peak = peak(&path, &["--dry-run"]);
    assert!(peak < 50_000, "{peak} KiB");
    let said = std::fs::read_to_string(path.with_extension("out")).unwrap();
    let rows: Vec<&str> = said.lines().filter(|line| line.contains("0-255")).collect();
    assert_eq!(rows.len(), 16, "{said}");
    assert!(rows[15].starts_with("15, 31 … 4095"), "{said}");
    assert!(said.lines().count() <= 24, "{said}");
}
