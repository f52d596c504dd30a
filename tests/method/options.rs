//! Options of training, on whole runs: each does what it says and no more, survives a stop to the bit, and is refused where it cannot
//! work.

use std::collections::HashMap;
use std::path::Path;

use crate::common::runs::{config, shard, tensors, train};

type Tensors = HashMap<String, Vec<f64>>;

/// Trains under `sets` into the folder `name` of `dir`, stopped after each of `stops` batches before it goes on; all tensors of the
/// checkpoint after `batches`.
fn run(dir: &Path, name: &str, sets: &[&str], stops: &[u64], batches: u64) -> Tensors {
    let run = format!("run.dir={}", dir.join(name).display());
    let config = config(dir, &[&[run.as_str()], sets].concat());
    for &stop in stops {
        train(&config, Some(stop));
    }
    train(&config, None);
    tensors(&dir.join(name), batches)
}

/// A folder with a shard of `videos` videos.
fn place(videos: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), videos, 14, false);
    dir
}

/// The module of `LAYERS`, cut in five, that has the parameter `name`.
fn module_of(name: &str) -> i32 {
    let layer: usize = name.split('.').nth(1).unwrap().parse().unwrap();
    [0, 2, 5, 7, 10].iter().filter(|&&first| first <= layer).count() as i32
}

/// One update of plain SGD: module i's parameters move by beta^(D - i) of what they move by without.
#[test]
fn damping_scales_each_modules_rate() {
    let dir = place(4);
    let sets = ["train.optimizer={ kind = 'sgd', lr = 1.0 }", "train.batches=1", "model.cuts=[2, 5, 7, 10]"];
    let sets = [&sets[..], &["model.modules=5"]].concat();
    let even = run(dir.path(), "even", &sets, &[], 1);
    let damped = run(dir.path(), "damped", &[&sets[..], &["train.lr_depth=0.5"]].concat(), &[], 1);
    let start = tensors(&dir.path().join("even"), 0);
    let mut seen = 0;
    for (name, start) in &start {
        let factor = 0.5f64.powi(5 - module_of(name));
        for ((s, e), d) in start.iter().zip(&even[name]).zip(&damped[name]) {
            assert!((factor * (e - s) - (d - s)).abs() < 1e-6, "{name}: {s} goes to {e}, damped to {d}");
            seen += i32::from(e != s);
        }
    }
    assert!(seen > 500, "{seen} values moved");
}
