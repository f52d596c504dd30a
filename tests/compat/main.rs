//! Files that earlier versions wrote are still read.

#[path = "../common/mod.rs"]
mod common;

use std::path::Path;

use common::runs::{config, shard, train};
use sideways::checkpoint::{Checkpoint, newest_manifest};
use sideways::config::{Config, NamedPeriod, UpdateEvery};
use sideways::nn::optim::LrSchedule;

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat");

#[test]
fn a_configuration_with_former_names() {
    let config = Config::load(&Path::new(FILES).join("config.toml"), &[]).unwrap();
    config.validate().unwrap();
    assert_eq!(config.train.batches, Some(512));
    assert_eq!(config.train.lr_schedule, LrSchedule::Cosine { warmup: 25, floor: 0.0 });
    assert_eq!(config.train.update_every, UpdateEvery::Named(NamedPeriod::Batch));
}

#[test]
fn a_manifest_that_counts_clips() {
    let checkpoints = Path::new(FILES).join("checkpoints");
    let manifest = newest_manifest(&checkpoints).unwrap().unwrap();
    assert_eq!(manifest.batches, 2);
    assert_eq!(Checkpoint::trusted(&checkpoints.join("step-00000002")).unwrap().manifest().batches, 2);
    let config = Config::parse(&manifest.config, "manifest", &[]).unwrap();
    assert_eq!(config.train.batches, Some(512));
}

/// What was beyond the checkpoint is dropped from the metrics, what was before it stays as it is.
#[test]
fn a_run_folder_with_former_names_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 8, 14, false);
    let config = config(dir.path(), &["train.lr_schedule={ kind = 'cosine' }"]);
    train(&config, Some(2));
    let manifest = config.run.dir.join("checkpoints/step-00000002/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let former = text.replace("\"batches\"", "\"clips\"").replace("batches = 4", "clips = 4");
    let former = former.replace("[train.lr_schedule]", "[train.schedule]");
    for name in ["\"clips\": 2", "clips = 4", "[train.schedule]"] {
        assert!(former.contains(name), "{name} is not in {former}");
    }
    std::fs::write(&manifest, former).unwrap();
    let before = std::fs::read_to_string(Path::new(FILES).join("metrics.jsonl")).unwrap();
    let metrics = config.run.dir.join("metrics.jsonl");
    std::fs::write(&metrics, &before).unwrap();
    train(&config, None);
    let after = std::fs::read_to_string(&metrics).unwrap();
    assert!(after.lines().take(2).eq(before.lines().take(2)), "{after}");
    let count = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.get("batches").or(line.get("clips")).and_then(|n| n.as_u64())
    };
    assert!(after.lines().filter_map(count).eq(1..=4), "{after}");
}
