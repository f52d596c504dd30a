//! The tutorial, walked: each command of `docs/tutorial.md` as it is written, with fewer videos.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::common::mpirun::text;
use crate::common::program::PROGRAM;

/// The indented lines of the page.
fn lines(page: &str) -> impl Iterator<Item = &str> {
    page.lines().filter_map(|line| line.strip_prefix("    "))
}

/// The bytes of every file of the newest checkpoint in a run's folder, but for the manifest, which has the run's name.
fn parameters(run: &Path) -> Vec<(String, Vec<u8>)> {
    let newest = std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(newest)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "safetensors"))
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn every_command_of_the_tutorial_works() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/tutorial.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("target/release")).unwrap();
    symlink(PROGRAM, at("target/release/sideways")).unwrap();
    symlink(root.join("datasets"), at("datasets")).unwrap();
    // A video in each of two folders.
    for class in ["jump", "run"] {
        std::fs::create_dir_all(at("VIDEOS").join(class)).unwrap();
        let made = Command::new("ffmpeg")
            .args(["-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=1"])
            .arg(at("VIDEOS").join(class).join("a.mp4"))
            .status();
        assert!(made.expect("ffmpeg").success());
    }
    let mut walked = 0;
    let is_command = |line: &&str| line.starts_with("target/release/sideways ") || line.starts_with("mpirun ");
    for command in lines(&page).filter(is_command) {
        let command = command.replace("--videos 4096 --test-videos 800", "--videos 128 --test-videos 32");
        let output = Command::new("timeout")
            .args(["100", "bash", "-c", &command])
            .current_dir(dir.path())
            .env("SIDEWAYS_CACHE", "off")
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_orte_tmpdir_base", dir.path())
            .env("OMPI_MCA_mpi_yield_when_idle", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{command}: {}", text(&output));
        let said = String::from_utf8_lossy(&output.stdout);
        if command.contains("--ticks") {
            let shown: Vec<&str> =
                lines(&page).filter(|line| line.starts_with("tick ") || line.starts_with("module ")).collect();
            assert_eq!(shown.len(), 4);
            for line in shown {
                assert!(said.contains(line), "the page shows {line:?}, but {said}");
            }
        }
        if command.contains("data inspect") {
            assert!(said.trim_end().ends_with("all sound"), "{said}");
        }
        walked += 1;
    }
    assert!(walked >= 10, "{walked} commands");
    let (alone, on_ranks) = (parameters(&at("runs/try")), parameters(&at("runs/try-mpi")));
    assert!(!alone.is_empty() && alone == on_ranks, "the two runs write identical parameters");
    for file in ["report.html", "trace.json", "runs/try/confusion.csv", "data/mine/train-00000.h5"] {
        assert!(at(file).is_file(), "{file}");
    }
}
