//! The program on a GPU, or on the emulator of CUDA's libraries (tests/cuda-emulator), which the first test builds; with
//! `SIDEWAYS_TEST_GPU=1` on the libraries and the GPU that are there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::mpirun::{mpirun, text};
use super::program::MINUTE;
pub use super::program::program;
use super::runs::{SIDE, config, shard_of_side, tensors};

/// Whether a real GPU is to be used.
pub fn real() -> bool {
    std::env::var("SIDEWAYS_TEST_GPU").is_ok_and(|value| value == "1")
}

/// The folder of the emulator's libraries, built when first asked for.
pub fn emulator() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = root.join("target/cuda-emulator");
        let built = Command::new(root.join("tests/cuda-emulator/build.sh")).arg(&folder).output().unwrap();
        assert!(built.status.success(), "{}", text(&built));
        folder
    })
}

/// The environment in which the program finds CUDA.
pub fn environment(more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = more.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    if !real() {
        all.push(("LD_LIBRARY_PATH".into(), emulator().display().to_string()));
    }
    all
}

/// The emulator's counters, as it has written them to `file`; none where there is no such file.
pub fn counters(file: &Path) -> HashMap<String, u64> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let words = text.lines().filter_map(|line| line.split_once(' '));
    words.map(|(name, value)| (name.to_string(), value.parse().unwrap())).collect()
}

/// A folder with shards and a configuration.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub config: String,
}

impl Place {
    pub fn new(sets: &[&str]) -> Self {
        Place::of_side(SIDE, sets)
    }

    /// With frames of `side` x `side`.
    pub fn of_side(side: usize, sets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        shard_of_side(&dir.path().join("train.h5"), 12, 14, false, side);
        let path = dir.path().join("config.toml");
        std::fs::write(&path, config(dir.path(), sets).to_toml().unwrap()).unwrap();
        let config = path.display().to_string();
        Place { dir, config }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Trains into the run folder `name` on `ranks` ranks (0: without mpirun).
    pub fn train(&self, name: &str, ranks: usize, sets: &[&str], env: &[(&str, &str)]) -> Output {
        let run = format!("run.dir={}", self.at(name).display());
        let mut args = vec!["train", self.config.as_str(), "--set", run.as_str()];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        self.run(ranks, &args, env)
    }

    pub fn run(&self, ranks: usize, args: &[&str], env: &[(&str, &str)]) -> Output {
        let env = environment(env);
        if ranks == 0 {
            return Command::new(program()).args(args).envs(env).output().unwrap();
        }
        let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        mpirun(ranks, Path::new(program()), args, &env, MINUTE)
    }

    /// As [`Place::run`], in one process: it must succeed. What it printed as JSON, and what it logged.
    pub fn json(&self, args: &[&str], env: &[(&str, &str)]) -> (serde_json::Value, String) {
        let output = self.run(0, args, env);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output))), log)
    }

    /// The same, and how often the emulator did what.
    pub fn counted(&self, args: &[&str]) -> (serde_json::Value, String, HashMap<String, u64>) {
        let file = self.at("counts");
        // A program that never loads CUDA writes none.
        let _ = std::fs::remove_file(&file);
        let (said, log) = self.json(args, &[("SIDEWAYS_EMULATOR_COUNTERS", file.to_str().unwrap())]);
        (said, log, counters(&file))
    }

    /// As [`Place::train`]: it must succeed; the parameters and the optimiser's memory after the last batch.
    pub fn trained(&self, name: &str, ranks: usize, sets: &[&str], env: &[(&str, &str)]) -> HashMap<String, Vec<f64>> {
        let output = self.train(name, ranks, sets, env);
        assert!(output.status.success(), "{name}: {}", text(&output));
        let run = self.at(name);
        let last = sideways::checkpoint::newest_manifest(&run.join("checkpoints")).unwrap().unwrap().batches;
        tensors(&run, last)
    }
}
