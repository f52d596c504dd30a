//! Small datasets and whole training runs in this process.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sideways::checkpoint::Checkpoint;
use sideways::comm::World;
use sideways::config::Config;
use sideways::data::{Encoding, ShardHeader, ShardWriter};
use sideways::trainer::{Totals, Trainer};

use super::numbers::flat;

/// Side of the frames.
pub const SIDE: usize = 8;

/// Writes a shard of `videos` videos of `frames` frames and 4 classes; pixel values are a closed formula of their place.
/// With `still`, all frames of a video are its first.
pub fn shard(path: &Path, videos: usize, frames: usize, still: bool) {
    shard_of_side(path, videos, frames, still, SIDE);
}

/// The same with frames of `side` x `side`.
pub fn shard_of_side(path: &Path, videos: usize, frames: usize, still: bool, side: usize) {
    let header = ShardHeader {
        encoding: Encoding::Raw,
        fps: 25.0,
        height: side,
        width: side,
        dataset: "test".into(),
        split: "train".into(),
        class_names: (0..4).map(|k| format!("class {k}")).collect(),
    };
    let mut writer = ShardWriter::create(path, header).unwrap();
    for v in 0..videos {
        let frame = |t: usize| -> Vec<u8> {
            let t = if still { 0 } else { t };
            let pixel = |n: usize| (128.0 + 100.0 * ((n * (v + 3)) as f64 * 0.37 + t as f64 * 0.9).sin()) as u8;
            (0..side * side * 3).map(pixel).collect()
        };
        writer.append(&format!("video {v}"), (v % 4) as i32, (0..frames).map(frame)).unwrap();
    }
    writer.finish().unwrap();
}

/// Five layers with weights, cut in as many modules; no dropout, group norm once, channel counts that differ.
pub const LAYERS: &str = r#"[
    { kind = "conv2d", out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = "relu" },
    { kind = "conv2d", out = 6, kernel = 3, padding = 1 }, { kind = "group-norm", groups = 2 }, { kind = "relu" },
    { kind = "conv2d", out = 6, kernel = 3, padding = 1 }, { kind = "gelu" },
    { kind = "conv2d", out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = "relu" },
    { kind = "global-avg-pool" }, { kind = "linear", out = 4 },
]"#;

/// Other frames and layers: five modules whose outputs are 7x7, 4x4, 8x8, 8x8 pixels and one, so that skips are averaged by ratios that are
/// no whole numbers (7 to 4), spread (4 to 8, 7 to 8), and with the channels' adapters or without.
pub const UNEVEN: [&str; 2] = [
    "data.crop=7",
    "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
     { kind = 'conv2d', out = 6, kernel = 3, stride = 2, padding = 1 }, { kind = 'group-norm', groups = 2 }, { kind = 'relu' }, \
     { kind = 'conv2d', out = 6, kernel = 3, stride = 2, padding = 1 }, { kind = 'gelu' }, { kind = 'upsample', factor = 4 }, \
     { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
     { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]",
];

/// A configuration on the shards of `dir`, with `sets` applied.
pub fn config(dir: &Path, sets: &[&str]) -> Config {
    let text = format!(
        "[data]\ntrain = '{0}/train*.h5'\ntest = '{0}/train*.h5'\nframes = 14\nbatch = 2\n\
         [model]\nlayers = {1}\nmodules = 5\n\
         [train]\noptimizer = {{ kind = 'sgd', lr = 0.05, momentum = 0.9 }}\nbatches = 4\n\
         clip_norm = 'none'\nlr_depth = 1\n\
         [run]\ndir = '{0}/run'\ncheckpoint_every = 1\nkeep = 9\ntimeout = 60\n",
        dir.display(),
        LAYERS.replace('\n', " "),
    );
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    Config::parse(&text, "test", &sets).unwrap()
}

/// Trains in this process.
pub fn train(config: &Config, stop_after: Option<u64>) -> Totals {
    Trainer::new(&World::Alone, config, stop_after).unwrap().run(&mut |_| ()).unwrap()
}

/// All tensors of a run's checkpoint after `batches` batches, flattened.
pub fn tensors(run: &Path, batches: u64) -> HashMap<String, Vec<f64>> {
    let at: PathBuf = run.join(format!("checkpoints/step-{batches:08}"));
    let loaded = Checkpoint::open(&at).unwrap().load(|_| true).unwrap();
    let all: HashMap<_, _> = loaded.into_iter().map(|(name, t)| (name, flat(&t).unwrap())).collect();
    assert!(!all.is_empty() && all.values().flatten().any(|v| *v != 0.0), "{}: nothing in it", at.display());
    all
}

/// The entries whose names begin with `prefix`, without it.
pub fn with_prefix(all: &HashMap<String, Vec<f64>>, prefix: &str) -> HashMap<String, Vec<f64>> {
    all.iter().filter_map(|(n, v)| n.strip_prefix(prefix).map(|n| (n.to_string(), v.clone()))).collect()
}

/// Asserts that two sets of tensors agree: each to `tolerance` of its norm.
pub fn assert_close(a: &HashMap<String, Vec<f64>>, b: &HashMap<String, Vec<f64>>, tolerance: f64, what: &str) {
    let names = |m: &HashMap<String, Vec<f64>>| {
        let mut names: Vec<String> = m.keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b), "{what}: not the same tensors");
    assert!(a.values().flatten().any(|x| *x != 0.0), "{what}: nothing to compare");
    for (name, x) in a {
        let y = &b[name];
        assert_eq!(x.len(), y.len(), "{what}: {name} has not as many elements");
        let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let difference: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
        let (off, size) = (norm(&difference), norm(x).max(norm(y)));
        assert!(size > 0.0 || off == 0.0);
        assert!(off <= tolerance * size, "{what}: {name} is off by {off:.3e} at a norm of {size:.3e}");
    }
}
