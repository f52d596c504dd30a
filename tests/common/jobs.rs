//! Training runs as a user starts them, to be disturbed.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sideways::checkpoint;

use super::mpirun::text;
use super::program::{MINUTE, alone, program};
use super::runs::{config, shard, tensors};

/// A configuration that trains for so long that it must be stopped.
pub struct Run {
    pub dir: tempfile::TempDir,
    pub config: String,
}

impl Run {
    pub fn new(sets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 24, 14, false);
        let path = dir.path().join("config.toml");
        let always = [
            "train.batches=1000000",
            "run.checkpoint_every=1000000",
            "model.skip={ spans = [2] }",
            // So little that it does not diverge in the thousands of clips of the long drills.
            "train.optimizer={ kind = 'sgd', lr = 0.00001, momentum = 0.9 }",
        ];
        std::fs::write(&path, config(dir.path(), &[&always[..], sets].concat()).to_toml().unwrap()).unwrap();
        Run { config: path.display().to_string(), dir }
    }

    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Batches of the newest checkpoint.
    pub fn newest(&self) -> u64 {
        checkpoint::latest(&self.folder().join("checkpoints")).unwrap().unwrap().manifest().batches
    }

    /// Trains `clips` batches in one piece and compares the parameters with those of `folder`.
    pub fn assert_same_as_uninterrupted(&self, clips: u64) {
        let through = self.dir.path().join(format!("through-{clips}"));
        let (dir, stop) = (format!("run.dir={}", through.display()), clips.to_string());
        let args = ["train", &self.config, "--set", &dir, "--stop-after", &stop];
        let output = alone(&args);
        assert_eq!(output.status.code(), Some(75), "{}", text(&output));
        assert!(tensors(&through, clips) == tensors(&self.folder(), clips), "parameters differ after {clips} clips");
    }

    pub fn lines_of_metrics(&self) -> Vec<u64> {
        let text = std::fs::read_to_string(self.folder().join("metrics.jsonl")).unwrap_or_default();
        let clips = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line)
                .ok()
                .and_then(|v| v.get("batches").or(v.get("clips"))?.as_u64())
        };
        text.lines().filter_map(clips).collect()
    }
}

/// A child that is killed with its group if the test fails.
pub struct Job(pub Child);

impl Job {
    pub fn alone(run: &Run, args: &[&str]) -> Self {
        let mut command = Command::new(program());
        command.args(["train", &run.config]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Job(command.spawn().unwrap())
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to a process this test started.
        unsafe { libc::kill(self.0.id() as i32, signal) };
    }

    /// Waits for its end. A job that ends by a signal (as where it crashes) fails the test.
    #[track_caller]
    pub fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.code().is_some(), "the job did not end by itself: {status}");
                return status.code();
            }
            assert!(start.elapsed() < MINUTE, "the job does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // SAFETY: a signal to the group of a process this test started.
        unsafe { libc::kill(-(self.0.id() as i32), libc::SIGKILL) };
        let _ = self.0.wait();
    }
}
