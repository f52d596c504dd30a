//! Settings that never take effect, contradict the data or are on the wrong scale: refused or warned of before training, by `train`,
//! `train --dry-run` and `doctor` alike.

use std::path::Path;

use crate::common::jobs::Run;
use crate::common::mpirun::text;
use crate::common::program::alone;
use crate::common::runs::{shard, shard_of_side};

/// What the three commands say with these settings, which all must contain `words`; or none of them, without.
fn told(run: &Run, sets: &[&str], words: &str) {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    for command in [
        &["train", &run.config, "--stop-after", "1"][..],
        &["train", &run.config, "--dry-run"],
        &["doctor", &run.config],
    ] {
        let output = alone(&[command, &sets].concat());
        let said = text(&output);
        assert!(matches!(output.status.code(), Some(0 | 75)), "{said}");
        assert!(said.contains(words), "{command:?} does not say {words:?}: {said}");
        // The next one begins anew.
        let _ = std::fs::remove_dir_all(run.folder());
    }
}

fn refused(config: &str, sets: &[&str], words: &str) {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    for command in [&["train", config][..], &["train", config, "--dry-run"], &["doctor", config]] {
        let output = alone(&[command, &sets].concat());
        let said = text(&output);
        assert!(output.status.code() == Some(2) && said.contains(words), "{command:?} does not say {words:?}: {said}");
    }
}

#[test]
fn what_never_happens_in_a_run_is_said_at_its_start() {
    // Six batches of two clips, of 14 frames: five modules, of which the first has 14 - 8 backward passes a clip.
    let run = Run::new(&["train.batches=6", "model.skip={}", "run.checkpoint_every=6"]);
    told(&run, &["train.update_every=100000"], "no parameter ever changes");
    told(&run, &["train.update_every=50"], "the parameters of modules 1, 2 never change");
    told(
        &run,
        &["train.lr_schedule={ kind = 'constant', warmup = 7 }"],
        "warmup = 7 batches is longer than the run, which has 6",
    );
    told(&run, &["train.lr_schedule={ kind = 'step', every = 6 }"], "in a run of 6 the learning rate never drops");
    told(&run, &["train.optimizer.lr=0"], "lr = 0: no parameter ever changes");
    told(&run, &["run.trace=6..9"], "run.trace = \"6..9\": nothing is recorded, the run has 6 batches");
    told(&run, &["train.ema=0.999"], "the moving average, which evaluation uses, is still 99 % initial values");
    told(&run, &["data.crop_ratio=[0.5, 2.0]"], "data.crop_ratio has no effect without data.crop_scale");
    told(&run, &["model.horizon=3"], "model.horizon = 3 has no effect in recognition");
    told(&run, &["data.std=[0.01, 0.2, 0.2]"], "is much smaller than pictures have");
    let validation = format!("data.validation={}/train.h5", run.dir.path().display());
    told(&run, &[&validation], "data.validation is not looked at");
    // None of these with settings that do take effect.
    let sets = ["train.update_every=5", "train.lr_schedule={ kind = 'cosine', warmup = 2 }", "train.ema=0.5"];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let output = alone(&[&["train", &run.config][..], &sets].concat());
    let said = text(&output);
    assert!(output.status.success() && !said.contains("never") && !said.contains("no effect"), "{said}");
}

#[test]
fn data_that_contradict_each_other_are_told() {
    let run = Run::new(&["train.batches=6", "model.skip={}", "train.validate_every=3"]);
    let train = run.dir.path().join("train.h5");
    told(
        &run,
        &[&format!("data.validation={}", train.display())],
        "24 of 24 videos to validate on are also trained on",
    );
    // Six pixels of thirty-two are another part of the picture than six of eight.
    let other = run.dir.path().join("other.h5");
    shard_of_side(&other, 4, 14, false, 32);
    let sets = [&format!("data.validation={}", other.display())[..], "data.crop=6"];
    told(&run, &sets, "the shards to validate on have frames of 32x32 pixels (height x width), those trained on 8x8");
    // A class that only a folder's name stands for.
    let few = run.dir.path().join("few.h5");
    shard(&few, 3, 14, false);
    told(
        &run,
        &[&format!("data.train={}", few.display()), &format!("data.validation={}", train.display())],
        "data.train has no video of 1 of 4 classes: class 3",
    );
}

#[test]
fn means_on_the_scale_of_bytes_are_refused() {
    let run = Run::new(&["train.batches=6"]);
    let wrong = "they are of pixel values divided by 255, which lie between 0 and 1";
    refused(&run.config, &["data.mean=[123.675, 116.28, 103.53]", "data.std=[58.395, 57.12, 57.375]"], wrong);
    refused(&run.config, &["data.mean=[110.0, 98.0, 96.0]"], wrong);
    refused(&run.config, &["data.std=[1.0, 1.0, 2.0]"], wrong);
    refused(&run.config, &["data.mean=[-0.1, 0.5, 0.5]"], wrong);
    let plain = ["train", &run.config, "--dry-run", "--set", "data.mean=[0, 0, 0]", "--set", "data.std=[1, 1, 1]"];
    assert!(alone(&plain).status.success());
}

/// What the first tick would find, a plan finds.
#[test]
fn a_plan_finds_what_training_would() {
    let run = Run::new(&["train.batches=6", "model.skip={}"]);
    refused(&run.config, &["data.batch=25"], "24 videos are fewer than one batch of 25");
    refused(&run.config, &["train.init=/nowhere"], "/nowhere: there is no such folder");
    refused(&run.config, &["data.crop=9"], "data.crop = 9");
    assert!(alone(&["train", &run.config]).status.success());
    let layers = "model.layers=[{ kind = 'conv2d', out = 8, kernel = 3 }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    refused(&run.config, &[layers, "model.modules=2"], "holds another run");
}

/// An initial head that was trained on other classes has their weights: it is said, since nothing else tells.
#[test]
fn a_head_of_other_classes_is_told() {
    let run = Run::new(&["train.batches=2", "model.skip={}"]);
    assert!(alone(&["train", &run.config]).status.success());
    let init = run.dir.path().join("init");
    std::fs::rename(run.folder(), &init).unwrap();
    let path = init.join("checkpoints/step-00000002/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"class 1\"", "\"other\"")).unwrap();
    told(&run, &[&format!("train.init={}", Path::new(&init).display())], "trained on other classes, as many");
}
