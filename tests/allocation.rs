//! Steady training asks the system for no memory of an activation's size: what a tick needs was made in earlier ones.

mod common;

use common::runs::{config, shard};
use sideways::backend::cpu::Recycling;
use sideways::comm::World;
use sideways::trainer::Trainer;

#[global_allocator]
static HEAP: Recycling = Recycling::new();

/// Every kind of convolution, norm and pool, in four modules with skips; activations of 0.5 MiB and more.
const LAYERS: &str = "[
    { kind = 'conv2d', out = 32, kernel = 3, padding = 1, bias = false }, { kind = 'group-norm', groups = 4 }, { kind = 'relu' },
    { kind = 'max-pool', kernel = 2 }, { kind = 'upsample', factor = 2 },
    { kind = 'conv2d', out = 32, kernel = 3, padding = 1, bias = false }, { kind = 'batch-norm' }, { kind = 'gelu' },
    { kind = 'max-pool', kernel = 2 }, { kind = 'upsample', factor = 2 }, { kind = 'dropout', rate = 0.1 },
    { kind = 'residual', out = 32, groups = 4 }, { kind = 'avg-pool', kernel = 2 },
    { kind = 'residual', out = 64, stride = 2, block = 'bottleneck', groups = 4 }, { kind = 'global-avg-pool' },
    { kind = 'linear', out = 4 },
]";

#[test]
fn a_steady_tick_takes_no_new_memory() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 64, 14, false);
    let layers = format!("model.layers={}", LAYERS.replace('\n', " "));
    let sets = ["data.batch=64", "model.modules=4", "model.skip={ spans = [2] }", "train.batches=8", &layers];
    for (rule, stash) in [
        ("skip-sideways", "none"),
        ("skip-sideways", "activations"),
        ("skip-sideways", "inputs"),
        ("1f1b", "activations"),
        ("gpipe", "inputs"),
    ] {
        let run = format!("run.dir={}/{rule}-{stash}", dir.path().display());
        let keys = [format!("train.stash={stash}"), format!("train.rule={rule}")];
        let keys = ["run.checkpoint_every=1000", &run, &keys[0], &keys[1]];
        let config = config(dir.path(), &[&sets[..], &keys].concat());
        let trainer = Trainer::new(&World::Alone, &config, None).unwrap();
        let mut fresh = Vec::new();
        trainer.run(&mut |_| fresh.push(HEAP.fresh())).unwrap();
        assert!(fresh[0] > 50, "the allocator is not in use: {fresh:?}");
        // The first clips find how much is alive at once; which modules run at the same time varies a little from clip to
        // clip. The last clip writes a checkpoint.
        let (warm, steady) = (fresh[3], fresh[6]);
        assert!(
            steady - warm <= 3,
            "{rule}, {stash}: {} new blocks in three clips of 14 ticks: {fresh:?}",
            steady - warm
        );
    }
}
