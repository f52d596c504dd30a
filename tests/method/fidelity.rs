//! `sideways fidelity`: gradients beside the exact ones.

use crate::common::runs::{config, shard, train};
use sideways::checkpoint::Checkpoint;
use sideways::trainer::fidelity::{Compared, Comparison, Fidelity, fidelity};

fn rows(still: bool, sets: &[&str], rules: &[Compared]) -> Vec<Fidelity> {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 6, 24, still);
    let comparison = Comparison { rules: rules.to_vec(), strides: vec![1], batches: 3 };
    let rows = fidelity(&config(dir.path(), sets), None, &comparison, &mut |_, _| ()).unwrap();
    assert_eq!(rows.len(), 5 * rules.len());
    assert!(rows.iter().all(|row| row.batches == 3 && (still || row.norm_ratio.deviation > 0.0)));
    rows
}

/// Where nothing is cut off (the last module), `stash` is back-propagation; below, a part of it, which pseudo-gradients are not.
#[test]
fn stash_is_nearer_than_fresh_pseudo_gradients() {
    let rows = rows(false, &["model.skip={ spans = [2] }"], &[Compared::SkipSideways, Compared::Stash]);
    let (fresh, stash) = rows.split_at(5);
    for row in [&fresh[4], &stash[4]] {
        assert!(row.cosine.mean > 1.0 - 1e-9 && row.relative_error.mean < 1e-5, "{row:?}");
        assert!((row.norm_ratio.mean - 1.0).abs() < 1e-5, "{row:?}");
    }
    // The farther from the loss, the staler what a fresh pseudo-gradient is made of.
    for k in [0, 1] {
        assert!(fresh[k].cosine.mean < stash[k].cosine.mean, "{:?} {:?}", fresh[k], stash[k]);
    }
    for row in fresh[..4].iter().chain(&stash[..4]) {
        assert!(row.cosine.mean < 0.9999 && row.relative_error.mean > 1e-3, "{row:?}");
    }
}

/// On identical frames every rule has the true gradient's direction.
#[test]
fn identical_frames_have_the_exact_gradient() {
    for row in rows(true, &[], &[Compared::Sideways, Compared::Stash]) {
        assert!(row.cosine.mean > 1.0 - 1e-6 && row.relative_error.mean < 1e-3, "{row:?}");
    }
}

/// What is compared does not depend on what else is, and parameters stay.
#[test]
fn a_comparison_changes_nothing() {
    let skip = ["model.skip={ spans = [2, 3], fuse = 'concat' }"];
    let both = rows(false, &skip, &[Compared::Stash, Compared::SkipSideways]);
    assert_eq!(both[..5], rows(false, &skip, &[Compared::Stash])[..]);
    assert_ne!(both[0].cosine, both[5].cosine);
}

/// Of a checkpoint the weights count alone: not an unfinished sum of gradients, nor an optimiser's memory.
#[test]
fn weights_alone_count() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 6, 24, false);
    let comparison = Comparison { rules: vec![Compared::Stash], strides: vec![1], batches: 1 };
    let start = config(dir.path(), &["train.update_every=1000000", "train.batches=1"]);
    train(&start, None);
    let unfinished = Checkpoint::open(&start.run.dir.join("checkpoints/step-00000001")).unwrap();
    let other = config(
        dir.path(),
        &["train.optimizer={ kind = 'adamw' }", "train.validate_every=3", "train.until={ top1 = 0.5 }", "data.test=[]"],
    );
    let rows = fidelity(&other, Some(&unfinished), &comparison, &mut |_, _| ()).unwrap();
    assert_eq!(rows, fidelity(&start, None, &comparison, &mut |_, _| ()).unwrap());
    assert_eq!(rows.len(), 5);
}
