//! `sideways fidelity`: gradients beside the exact ones.

use crate::common::runs::{config, shard};
use sideways::trainer::fidelity::{Compared, Comparison, Fidelity, fidelity};

fn rows(still: bool, sets: &[&str], rules: &[Compared]) -> Vec<Fidelity> {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 6, 24, still);
    let comparison = Comparison { rules: rules.to_vec(), strides: vec![1], batches: 3 };
    let rows = fidelity(&config(dir.path(), sets), None, &comparison).unwrap();
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
    for (fresh, stash) in fresh[..4].iter().zip(&stash[..4]) {
        assert_eq!(fresh.module, stash.module);
        assert!(fresh.cosine.mean < 0.999 && fresh.cosine.mean < stash.cosine.mean, "{fresh:?} {stash:?}");
        assert!(stash.cosine.mean > 0.7 && stash.relative_error.mean > 1e-3, "{stash:?}");
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
