//! Shards: read by the program in a process of its own, which has little memory and little time, since HDF5 is C.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::mpirun::text;
use crate::common::program::PROGRAM;
use crate::mutate::{Mutator, go_on};
use sideways::data::{Encoding, ShardHeader, ShardWriter, jpeg};

fn shard(path: &Path, encoding: Encoding) -> Vec<u8> {
    let header = ShardHeader {
        encoding,
        fps: 25.0,
        height: 8,
        width: 8,
        dataset: "fuzz".into(),
        split: "train".into(),
        class_names: vec!["a".into(), "b".into()],
    };
    let mut writer = ShardWriter::create(path, header).unwrap();
    for v in 0..3 {
        let frame = |t: usize| vec![(v * 50 + t) as u8; 8 * 8 * 3];
        let stored = (0..4).map(|t| match encoding {
            Encoding::Raw => frame(t),
            Encoding::Jpeg => jpeg::encode(&frame(t), 8, 8, 90).unwrap(),
        });
        writer.append(&format!("video {v}"), (v % 2) as i32, stored).unwrap();
    }
    std::fs::read(writer.finish().unwrap()).unwrap()
}

/// Inspects these files with at most 2 GiB of addresses, in at most twenty seconds.
fn inspect(files: &[PathBuf]) -> Result<(), String> {
    let script = "ulimit -v 2097152; exec timeout -s KILL 20 \"$0\" data inspect \"$@\"";
    let output = Command::new("sh").args(["-c", script, PROGRAM]).args(files).output().unwrap();
    let said = text(&output);
    match output.status.code() {
        Some(0 | 2) if !said.contains("panicked") => Ok(()),
        _ => Err(said),
    }
}

#[test]
fn mutated_shards_are_read_or_refused() {
    const FILES: u64 = 16;
    let dir = tempfile::tempdir().unwrap();
    let corpus = [Encoding::Raw, Encoding::Jpeg].map(|e| shard(&dir.path().join("corpus.h5"), e));
    let mut failures = Vec::new();
    // What once ended in no end, in an abort, and in strings that are not there (of a dataset, of an attribute).
    for seed in [2344, 17_149, 62_966, 72_594, 105_811] {
        let path = dir.path().join(format!("{seed}.h5"));
        std::fs::write(&path, Mutator::new(seed).changed(&corpus)).unwrap();
        failures.extend(inspect(&[path]).err().map(|said| format!("seed {seed}: {said}")));
    }
    go_on(24, |round| {
        let files: Vec<PathBuf> = (0..FILES)
            .map(|n| {
                let seed = round * FILES + n;
                let path = dir.path().join(format!("{seed}.h5"));
                std::fs::write(&path, Mutator::new(seed).changed(&corpus)).unwrap();
                path
            })
            .collect();
        if inspect(&files).is_err() {
            for file in &files {
                if let Err(said) = inspect(std::slice::from_ref(file)) {
                    // Kept to be looked at.
                    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file.file_name().unwrap());
                    std::fs::copy(file, &kept).unwrap();
                    failures.push(format!("{}: {said}", kept.display()));
                }
            }
        }
        files.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    });
    assert!(failures.is_empty(), "{} shards:\n{}", failures.len(), failures.join("\n"));
}
