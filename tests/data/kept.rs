//! What is kept from an earlier run was made of the same files, labels and options.

use std::path::{Path, PathBuf};

use crate::common::mpirun::text;
use crate::common::program::alone;
use crate::prepare::film;
use sideways::data::ShardReader;

const A: &str = "aaaaaaaaaa0_000012_000022";
const B: &str = "aaaaaaaaaa1_000012_000022";

/// Two clips, whose labels are rewritten.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        for id in [A, B] {
            film(&place.path(&format!("videos/{id}.mkv")), "testsrc=size=32x24:rate=10", "1");
        }
        place.label("run", "walk");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn label(&self, a: &str, b: &str) {
        let header = "label,youtube_id,time_start,time_end";
        std::fs::write(self.path("train.csv"), format!("{header}\n{a},{},12,22\n{b},{},12,22\n", &A[..11], &B[..11]))
            .unwrap();
    }

    /// The report and messages, and the labels by id.
    fn prepare(&self) -> (String, Vec<(String, String)>) {
        let [videos, list, out] = ["videos", "train.csv", "out"].map(|name| self.path(name).display().to_string());
        let args =
            ["data", "prepare", "--layout", "kinetics", "--videos", &videos, "--annotations", &list, "--out", &out];
        let output = alone(&[&args[..], &["--min-frames", "1", "--short-side", "24", "--encoding", "raw"]].concat());
        assert!(output.status.success(), "{}", text(&output));
        let shard = ShardReader::open(&self.path("out/train-00000.h5")).unwrap();
        let name = |label: i32| shard.header.class_names[label as usize].clone();
        let mut labels: Vec<_> = shard.ids.iter().cloned().zip(shard.labels.iter().map(|l| name(*l))).collect();
        labels.sort();
        (text(&output), labels)
    }
}

fn labels(a: &str, b: &str) -> Vec<(String, String)> {
    vec![(A.into(), a.into()), (B.into(), b.into())]
}

fn edit_record(out: &Path, change: impl Fn(&mut serde_json::Value)) {
    let path = out.join(".prepare/train/00000.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    std::fs::write(path, record.to_string()).unwrap();
}

#[test]
fn a_corrected_label_reaches_the_shard() {
    let place = Place::new();
    assert_eq!(place.prepare().1, labels("run", "walk"));
    let (said, same) = place.prepare();
    assert!(same == labels("run", "walk") && said.contains("(1 made earlier)"), "{said}");
    place.label("walk", "run");
    let (said, now) = place.prepare();
    assert_eq!(now, labels("walk", "run"));
    assert!(said.contains("shard 0 is made again: ") && said.contains("now, not"), "{said}");
    // Records of earlier versions have no labels: those in the shard count.
    let forget = |record: &mut serde_json::Value| {
        for entry in record["videos"].as_array_mut().unwrap() {
            for key in ["label", "path", "modified", "content"] {
                entry.as_object_mut().unwrap().remove(key);
            }
        }
    };
    edit_record(&place.path("out"), forget);
    assert!(place.prepare().0.contains("(1 made earlier)"));
    edit_record(&place.path("out"), forget);
    place.label("run", "walk");
    assert_eq!(place.prepare().1, labels("run", "walk"));
}

#[test]
fn a_file_of_the_same_size_with_another_content_is_read_again() {
    let place = Place::new();
    place.prepare();
    let path = place.path(&format!("videos/{A}.mkv"));
    let content = std::fs::read(&path).unwrap();
    // Copied anew, with another time: nothing to do, and the next time it is not even read.
    std::fs::write(&path, &content).unwrap();
    assert!(place.prepare().0.contains("(1 made earlier)"));
    let mut other = content;
    let last = other.len() - 40;
    other[last] ^= 1;
    std::fs::write(&path, &other).unwrap();
    let (said, _) = place.prepare();
    assert!(said.contains(&format!("shard 0 is made again: the file of {A} has changed")), "{said}");
    // A file that was taken for another entry's, as before files were told by their folders.
    edit_record(&place.path("out"), |record| record["videos"][0]["content"] = 7.into());
    assert!(place.prepare().0.contains("(1 made earlier)"), "path and time are the same");
    edit_record(&place.path("out"), |record| {
        (record["videos"][0]["content"], record["videos"][0]["path"]) = (7.into(), "elsewhere.mkv".into());
    });
    assert!(place.prepare().0.contains("has changed"));
}

#[test]
fn what_an_earlier_version_may_have_taken_for_a_video_is_made_again() {
    let place = Place::new();
    place.prepare();
    let old = |frames: u64| {
        edit_record(&place.path("out"), |record| {
            record["recipe"] = 0.into();
            record["videos"][0]["outcome"]["written"]["frames"] = frames.into();
        });
        place.prepare().0
    };
    assert!(old(25).contains("(1 made earlier)"));
    assert!(old(1).contains("may have been taken for its cover picture"));
}

/// Splits made by commands of their own are told from each other as those of one command.
#[test]
fn a_split_with_the_videos_of_an_earlier_one_is_refused() {
    let place = Place::new();
    let videos = place.path("classes");
    for name in ["a/1.mkv", "a/2.mkv", "b/3.mkv", "b/4.mkv"] {
        film(&videos.join(name), "testsrc=size=32x24:rate=10", "1");
    }
    let run = |split: &str, more: &[&str]| {
        let (videos, out) = (videos.display().to_string(), place.path("o").display().to_string());
        let args = ["data", "prepare", "--videos", &videos, "--out", &out, "--split", split, "--short-side", "24"];
        alone(&[&args[..], more].concat())
    };
    assert!(run("train", &[]).status.success());
    let refused = run("test", &[]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(text(&refused).contains("test and train have 4 videos in common"), "{}", text(&refused));
    assert!(run("train", &["--overwrite", "--test-fraction", "0.5"]).status.success());
    assert!(run("train", &["--test-fraction", "0.5"]).status.success());
    // Spaces around the comma are no part of a name; and a name is no path.
    let spaces = run("train, test", &["--overwrite"]);
    assert!(text(&spaces).contains("test and train have 4 videos in common"), "{}", text(&spaces));
    assert!(text(&run("a\tb", &[])).contains("cannot name a split"));
}
