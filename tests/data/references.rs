//! Damaged references to strings of variable length, each of them, in the forms that a shard comes in: refused, before HDF5 follows one.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::shard;
use sideways::data::{Encoding, ShardReader};

const VIDEOS: usize = 2;
/// The root's strings (`format`, `encoding`, `dataset`, `split`), and the names of three classes.
const OF_ATTRIBUTES: usize = 4 + 3;

/// A shard as `h5repack` writes it with these options.
fn repacked(dir: &Path, options: &[&str]) -> PathBuf {
    let from = shard(&dir.join("shard.h5"), Encoding::Raw, [8, 8], 0, &[3; VIDEOS]);
    let to = dir.join("repacked.h5");
    let output = Command::new("h5repack").args(options).args([&from, &to]).output().expect("hdf5-tools");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    to
}

/// Where the references lie: a length, the address of a collection in the file, a number; addresses count from `base` on.
fn references(bytes: &[u8], base: usize) -> Vec<usize> {
    let is_collection = |at: &usize| bytes[*at..].starts_with(b"GCOL\x01\0\0\0");
    let collections: Vec<[u8; 8]> =
        (base..bytes.len()).filter(is_collection).map(|at| ((at - base) as u64).to_le_bytes()).collect();
    (4..bytes.len() - 12)
        .filter(|at| {
            let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            collections.iter().any(|c| bytes[*at..].starts_with(c))
                && (1..64).contains(&number(at - 4))
                && number(at + 8) > 0
        })
        .map(|at| at - 4)
        .collect()
}

/// Each of the `expected` references damaged in turn: of another length, and to an object that is not there.
fn each_is_refused(path: &Path, base: usize, expected: usize) {
    assert_eq!(ShardReader::open(path).unwrap().ids, ["video-0", "video-1"], "undamaged");
    let sound = std::fs::read(path).unwrap();
    let found = references(&sound, base);
    assert_eq!(found.len(), expected, "{found:?}");
    for at in found {
        for field in [at, at + 12] {
            let mut bytes = sound.clone();
            bytes[field] ^= 0x40;
            std::fs::write(path, bytes).unwrap();
            let error = ShardReader::open(path).err().unwrap_or_else(|| panic!("byte {field} was not refused"));
            assert!(error.exit_code() == 2 && error.to_string().contains("names or strings are damaged"), "{error}");
        }
    }
}

#[test]
fn damaged_references_to_strings_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("shard.h5"), Encoding::Raw, [8, 8], 0, &[3; VIDEOS]);
    let sound = std::fs::read(&path).unwrap();
    each_is_refused(&path, 0, OF_ATTRIBUTES + VIDEOS);
    std::fs::write(&path, sound).unwrap();
    each_is_refused(&repacked(dir.path(), &["-l", "video_ids:CHUNK=1"]), 0, OF_ATTRIBUTES + VIDEOS);
    // Behind 700 bytes of something else, as MATLAB has them.
    let (block, behind) = (dir.path().join("block"), dir.path().join("behind.h5"));
    std::fs::write(&block, [b'#'; 700]).unwrap();
    let output =
        Command::new("h5jam").arg("-u").arg(&block).arg("-i").arg(&path).arg("-o").arg(&behind).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    each_is_refused(&behind, 1024, OF_ATTRIBUTES + VIDEOS);
}

/// Of the newest form HDF5 guards headers by checksums, attributes lie apart, and only the list of videos is looked at.
#[test]
fn shards_of_the_newest_form_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = repacked(dir.path(), &["--latest"]);
    assert_eq!(ShardReader::open(&path).unwrap().ids, ["video-0", "video-1"]);
}

/// HDF5 1.10 writes past its memory for a heap of names of as many bytes as there are.
#[test]
fn a_damaged_heap_of_names_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("shard.h5"), Encoding::Raw, [8, 8], 0, &[3; VIDEOS]);
    let mut bytes = std::fs::read(&path).unwrap();
    let heap = bytes.windows(8).position(|w| w == b"HEAP\0\0\0\0").expect("the root has a heap of names");
    bytes[heap + 8..heap + 16].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let error = ShardReader::open(&path).err().expect("it was not refused").to_string();
    assert!(error.contains("shard.h5: its names or strings are damaged"), "{error}");
}
