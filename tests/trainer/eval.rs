//! What `eval` scores, and on what: the newest checkpoint, on shards like those trained on, or it says so.

use crate::common::jobs::Run;
use crate::common::mpirun::text;
use crate::common::program::alone;
use crate::common::runs::{SIDE, shard, shard_of_side};
use sideways::data::{Encoding, ShardHeader, ShardWriter};

/// A run of four batches, with checkpoints of two and four.
fn trained(sets: &[&str]) -> Run {
    let run = Run::new(&[&["train.batches=4", "model.skip={}", "run.checkpoint_every=2"], sets].concat());
    shard(&run.dir.path().join("test.h5"), 6, 14, false);
    // In two parts: on the way a checkpoint may be overtaken by the next one.
    let output = alone(&["train", &run.config, "--stop-after", "2"]);
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    let output = alone(&["train", &run.config]);
    assert!(output.status.success(), "{}", text(&output));
    run
}

fn eval(run: &Run, of: &str, shards: &str) -> (Option<i32>, String) {
    let (what, data) = (run.folder().join(of).display().to_string(), run.dir.path().join(shards).display().to_string());
    let output = alone(&["eval", &what, "--data", &data]);
    (output.status.code(), text(&output))
}

#[test]
fn the_newest_checkpoint_is_scored_or_none() {
    let run = trained(&[]);
    let (code, said) = eval(&run, "", "test.h5");
    assert!(code == Some(0) && said.contains("step-00000004, after 4 batches"), "{said}");
    let newest = run.folder().join("checkpoints/step-00000004");
    std::fs::rename(newest.join("manifest.json"), run.dir.path().join("aside")).unwrap();
    let (code, said) = eval(&run, "", "test.h5");
    assert!(code == Some(2) && !said.contains("top-1"), "{said}");
    assert!(said.contains("step-00000004/manifest.json") && said.contains("is not whole"), "{said}");
    // Named, an older one is scored, and it says so.
    let (code, said) = eval(&run, "checkpoints/step-00000002", "test.h5");
    assert!(code == Some(0) && said.contains("step-00000002, after 2 batches"), "{said}");
    // Training goes on from it, and says why.
    let output = alone(&["train", &run.config, "--set", "train.batches=6"]);
    let said = text(&output);
    assert!(output.status.success() && said.contains("trying the checkpoint before it"), "{said}");
    assert!(said.contains("from ") && said.contains("step-00000002"), "{said}");
}

#[test]
fn shards_unlike_those_trained_on_are_told() {
    let run = trained(&["data.crop=6"]);
    let (_, said) = eval(&run, "", "test.h5");
    assert!(!said.contains("the shards have"), "{said}");
    shard_of_side(&run.dir.path().join("large.h5"), 6, 14, false, 2 * SIDE);
    let (code, said) = eval(&run, "", "large.h5");
    let sizes = format!(
        "the shards have frames of {0}x{0} pixels (height x width), what the network was trained on {SIDE}x{SIDE}",
        2 * SIDE
    );
    assert!(code == Some(0) && said.contains(&sizes), "{said}");

    let write = |name: &str, fps: f64, classes: usize| {
        let header = ShardHeader {
            encoding: Encoding::Raw,
            fps,
            height: SIDE,
            width: SIDE,
            dataset: "test".into(),
            split: "test".into(),
            class_names: (0..classes).map(|k| format!("class {k}")).collect(),
        };
        let mut writer = ShardWriter::create(&run.dir.path().join(name), header).unwrap();
        for v in 0..4 {
            writer.append(&format!("v{v}"), v, (0..14).map(|t| vec![(v * 40 + t) as u8; SIDE * SIDE * 3])).unwrap();
        }
        writer.finish().unwrap();
    };
    write("slow.h5", 10.0, 4);
    let (code, said) = eval(&run, "", "slow.h5");
    assert!(
        code == Some(0) && said.contains("the shards have 10 frames a second, what the network was trained on 25"),
        "{said}"
    );
    // Another number of classes is about the shards, not about the network's last layer.
    write("five.h5", 25.0, 5);
    let (code, said) = eval(&run, "", "five.h5");
    assert!(code == Some(2) && said.contains("the shards have 5 classes (class 0, class 1,"), "{said}");
    assert!(said.contains("step-00000004 was trained on 4 classes") && !said.contains("global-avg-pool"), "{said}");
}
