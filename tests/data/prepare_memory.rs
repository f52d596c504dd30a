//! What a long list costs `sideways data prepare`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::program::PROGRAM;
use crate::prepare::film;

/// A list of `clips` of which one in `one_in` is there, prepared: how it ended, and the largest memory of the program, in MiB.
fn largest_memory(folder: &Path, clips: usize, one_in: usize) -> (Option<i32>, f64) {
    let place = folder.join(format!("{clips}-{one_in}"));
    let path = |name: &str| place.join(name);
    std::fs::create_dir_all(path("videos")).unwrap();
    let mut list = String::from("label,youtube_id,time_start,time_end\n");
    for n in 0..clips {
        let (start, end) = (n % 500, n % 500 + 10);
        list += &format!("class {},{n:011},{start},{end}\n", n % 600);
        if n % one_in == 0 {
            std::fs::hard_link(folder.join("one.mkv"), path(&format!("videos/{n:011}_{start:06}_{end:06}.mkv")))
                .unwrap();
        }
    }
    std::fs::write(path("train.csv"), list).unwrap();
    let [videos, list, out] = ["videos", "train.csv", "out"].map(|name| path(name).display().to_string());
    let args = ["data", "prepare", "--layout", "kinetics", "--videos", &videos, "--annotations", &list, "--out", &out];
    let mut run = Command::new(PROGRAM)
        .args(args)
        .args(["--short-side", "24", "--jobs", "1", "--quiet"])
        .env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH").unwrap()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (status, mut largest) = (format!("/proc/{}/status", run.id()), 0.0);
    let ended = loop {
        // The kernel's own account of the peak, of which the last one that is seen counts.
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        largest = peak.unwrap_or(largest);
        if let Some(ended) = run.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    (ended.code(), largest / 1024.0)
}

/// Clips that are listed and not there are kept in no memory, from the list to the report.
#[test]
fn memory_does_not_grow_with_the_list() {
    let folder = tempfile::tempdir().unwrap();
    film(&folder.path().join("one.mkv"), "testsrc=size=32x24:rate=10", "1");
    let [short, long] = [2_000, 300_000].map(|clips| {
        let (code, memory) = largest_memory(folder.path(), clips, clips / 5);
        assert_eq!(code, Some(0));
        let list = format!("{clips}-{}/out/missing-train.tsv", clips / 5);
        let missing = std::fs::read_to_string(folder.path().join(list)).unwrap();
        assert_eq!(missing.lines().count(), 1 + clips - 5);
        memory
    });
    assert!(short > 10.0 && long < short + 16.0, "{short:.0} MiB for 2 000 clips, {long:.0} MiB for 300 000");
}

/// Nor are those that are there: until the first shard, whose videos an ffmpeg that decodes nothing fails on.
#[test]
fn memory_does_not_grow_with_the_videos() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("one.mkv"), "no video").unwrap();
    let ffmpeg = folder.path().join("ffmpeg");
    // It is asked what it can do before anything else.
    let real = std::env::var("PATH").unwrap();
    let script = format!("#!/bin/sh\ncase \"$*\" in *file:*) exit 1;; esac\nPATH='{real}' exec ffmpeg \"$@\"\n");
    std::fs::write(&ffmpeg, script).unwrap();
    std::fs::set_permissions(&ffmpeg, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let [few, many] = [1_000, 40_000].map(|clips| {
        let (code, memory) = largest_memory(folder.path(), clips, 1);
        assert_eq!(code, Some(2), "no video can be decoded");
        memory
    });
    assert!(few > 10.0 && many < few + 14.0, "{few:.0} MiB for 1 000 videos, {many:.0} MiB for 40 000");
}
