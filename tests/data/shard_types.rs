//! Shards that other programs wrote: in whatever types of HDF5's they are, they are read as they are meant, or refused with what is
//! wrong.

use std::path::Path;
use std::process::Command;

use hdf5::types::{FixedAscii, FixedUnicode, VarLenAscii, VarLenUnicode};

use crate::support::{header, pixels, shard};
use sideways::data::inspect::inspect;
use sideways::data::{Encoding, ShardHeader, ShardReader, ShardWriter, jpeg};

/// A small shard, opened for changes.
fn changed(encoding: Encoding, change: impl FnOnce(&hdf5::File) -> hdf5::Result<()>) -> sideways::Result<ShardReader> {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("shard.h5"), encoding, [8, 8], 0, &[3, 2]);
    let file = hdf5::File::open_rw(&path).unwrap();
    change(&file).unwrap();
    drop(file);
    let opened = ShardReader::open(&path)?;
    (0..opened.videos()).try_for_each(|v| opened.verify(v))?;
    Ok(opened)
}

fn refused(encoding: Encoding, change: impl FnOnce(&hdf5::File) -> hdf5::Result<()>) -> String {
    let error = changed(encoding, change).err().expect("it was not refused");
    assert!(error.exit_code() == 2 && error.to_string().contains("shard.h5"), "{error}");
    error.to_string()
}

fn list<T: hdf5::H5Type>(name: &'static str, data: &[T]) -> impl FnOnce(&hdf5::File) -> hdf5::Result<()> {
    move |file| {
        file.unlink(name)?;
        file.new_dataset_builder().with_data(data).create(name).map(drop)
    }
}

fn attribute<T: hdf5::H5Type>(name: &'static str, data: &[T]) -> impl FnOnce(&hdf5::File) -> hdf5::Result<()> {
    move |file| {
        file.delete_attr(name)?;
        file.new_attr_builder().with_data(data).create(name).map(drop)
    }
}

const RAW: Encoding = Encoding::Raw;

#[test]
fn strings_of_fixed_length_and_ascii_are_read() {
    let format = FixedAscii::<14>::from_ascii("sideways-shard").unwrap();
    assert!(changed(RAW, attribute("format", &[format])).is_ok());
    // As numpy, MATLAB and R write lists of names.
    let names = ["a", "höher", "c"].map(|name| name.parse::<FixedUnicode<9>>().unwrap());
    let read = changed(RAW, attribute("class_names", &names)).unwrap();
    assert_eq!(read.header.class_names, ["a", "höher", "c"]);
    let ids = ["v0", "v1  "].map(|id| FixedAscii::<6>::from_ascii(id).unwrap());
    assert_eq!(changed(RAW, list("video_ids", &ids)).unwrap().ids, ["v0", "v1"], "filled with spaces");
    let ids = ["v0", "v1"].map(|id| VarLenAscii::from_ascii(id).unwrap());
    assert_eq!(changed(RAW, list("video_ids", &ids)).unwrap().ids, ["v0", "v1"]);
    let bytes = |file: &hdf5::File| {
        file.delete_attr("split")?;
        let attr = file.new_attr::<FixedAscii<4>>().create("split")?;
        // SAFETY: four bytes that are no UTF-8, for a test of just that.
        attr.write_scalar(&unsafe { std::mem::transmute::<[u8; 4], FixedAscii<4>>([0xff, 0xfe, 1, 2]) })
    };
    assert!(refused(RAW, bytes).contains("root attribute `split` entry 0 holds text that is not UTF-8"));
    assert!(refused(RAW, attribute("split", &[7i32])).contains("`split` holds int32, not strings"));
    let two = ["a", "b"].map(|text| text.parse::<VarLenUnicode>().unwrap());
    assert!(refused(RAW, attribute("split", &two)).contains("`split` has 2 entries [2], not one"));
}

#[test]
fn numbers_are_read_as_they_are_or_refused() {
    // Whatever the size, and whole numbers that MATLAB keeps as floats.
    assert_eq!(changed(RAW, list("labels", &[2u8, 1])).unwrap().labels, [2, 1]);
    assert_eq!(changed(RAW, list("labels", &[2i64, 1])).unwrap().labels, [2, 1]);
    assert_eq!(changed(RAW, list("labels", &[2.0f32, 1.0])).unwrap().labels, [2, 1]);
    assert_eq!(changed(RAW, list("video_offsets", &[0i16, 3, 5])).unwrap().offsets, [0, 3, 5]);
    assert_eq!(changed(RAW, attribute("fps", &[25i32])).unwrap().header.fps, 25.0);
    assert_eq!(changed(RAW, attribute("height", &[8.0f64])).unwrap().header.height, 8);
    // 64 bits, of which half the numbers are negative as signed ones.
    let signed = |file: &hdf5::File| {
        let sums: Vec<u64> = file.dataset("video_checksums")?.read_raw()?;
        let sums: Vec<i64> = sums.into_iter().map(|sum| sum as i64).collect();
        list("video_checksums", &sums)(file)
    };
    assert!(changed(RAW, signed).is_ok());

    let cut = refused(RAW, list("labels", &[0.7f32, 1.2]));
    assert!(cut.contains("dataset /labels entry 0 is 0.69999") && cut.contains("whole numbers are expected"), "{cut}");
    assert!(refused(RAW, list("labels", &[0i64, 1 << 32])).contains("/labels entry 1 is 4294967296, which is no i32"));
    assert!(refused(RAW, list("labels", &[0u64, u64::MAX])).contains("/labels entry 1 is 18446744073709551615"));
    assert!(refused(RAW, list("labels", &[f64::NAN, 0.0])).contains("entry 0 is NaN"));
    assert!(
        refused(RAW, list("video_offsets", &[0i64, -3, 5])).contains("/video_offsets entry 1 is -3, which is no u64")
    );
    assert!(refused(RAW, list("video_checksums", &[1.0f64, 2.0])).contains("/video_checksums holds floats"));
    assert!(refused(RAW, attribute("version", &[1.5f64])).contains("`version` entry 0 is 1.5"));
    let frames = |file: &hdf5::File| {
        file.unlink("frames")?;
        file.new_dataset::<i8>().shape([5, 8, 8, 3]).create("frames").map(drop)
    };
    assert!(refused(RAW, frames).contains("/frames: its elements are Integer(U1), not unsigned bytes"));
    let floats = |file: &hdf5::File| {
        let offsets: Vec<u64> = file.dataset("frame_offsets")?.read_raw()?;
        list("frame_offsets", &offsets.iter().map(|n| *n as f64).collect::<Vec<_>>())(file)
    };
    assert!(refused(Encoding::Jpeg, floats).contains("/frame_offsets holds float64, not whole numbers"));
}

#[test]
fn what_is_missing_is_named_all_at_once() {
    let bare = |file: &hdf5::File| {
        for name in file.attr_names()? {
            file.delete_attr(&name)?;
        }
        file.unlink("video_checksums")
    };
    let said = refused(RAW, bare);
    for part in ["`format`", "`version`", "`encoding`", "`fps`", "`class_names`", "/video_checksums", "docs/data.md"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!said.contains("/labels"), "{said}");
    let one = refused(Encoding::Jpeg, |file| file.unlink("frame_offsets"));
    assert!(one.contains("dataset /frame_offsets is missing from this shard"), "{one}");
    let names = ["a", "b", "a"].map(|name| name.parse::<VarLenUnicode>().unwrap());
    assert!(refused(RAW, attribute("class_names", &names)).contains("class_names has \"a\" twice"));
}

/// Another machine may have filters that this one has not: here, one whose number is changed to Zstandard's.
#[test]
fn a_filter_that_is_not_installed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("shard.h5"), RAW, [8, 8], 0, &[3, 2]);
    let file = hdf5::File::open_rw(&path).unwrap();
    let frames: Vec<u8> = file.dataset("frames").unwrap().read_raw().unwrap();
    file.unlink("frames").unwrap();
    let frames = ndarray::Array4::from_shape_vec((5, 8, 8, 3), frames).unwrap();
    file.new_dataset_builder().with_data(&frames).chunk((5, 8, 8, 3)).shuffle().create("frames").unwrap();
    drop(file);
    // It is read through a filter that is there.
    ShardReader::open(&path).unwrap().verify(1).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let name = bytes.windows(8).position(|w| w == b"shuffle\0").expect("the filter's name is in the file");
    assert_eq!(bytes[name - 8..name - 6], [2, 0]);
    bytes[name - 8..name - 6].copy_from_slice(&32015u16.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = ShardReader::open(&path).err().expect("it was not refused");
    let said = error.to_string();
    assert!(
        said.contains("/frames is stored through the HDF5 filter 32015 (Zstandard), which is not installed"),
        "{said}"
    );
}

/// In another file there may be a pipe that nobody writes to.
#[test]
fn what_lies_in_other_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe").display().to_string();
    nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let outside = |file: &hdf5::File| {
        file.unlink("frames")?;
        file.new_dataset::<u8>().shape([5, 8, 8, 3]).external(&pipe, 0, 960).create("frames").map(drop)
    };
    assert!(refused(RAW, outside).contains("dataset /frames lies in another file"));
    let linked = |file: &hdf5::File| {
        file.unlink("labels")?;
        file.link_external(&pipe, "/labels", "labels")
    };
    assert!(refused(RAW, linked).contains("dataset /labels lies in another file"));
}

/// HDF5 1.10 never comes back from a list of strings whose free space has no size.
#[test]
fn damaged_lists_of_strings_are_not_read_without_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("shard.h5"), RAW, [8, 8], 0, &[3, 2]);
    let mut bytes = std::fs::read(&path).unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let mut at = bytes.windows(8).position(|w| w == b"GCOL\x01\0\0\0").expect("strings lie in a collection") + 16;
    while bytes[at..at + 2] != [0, 0] {
        at += 16 + number(&bytes, at + 8).next_multiple_of(8);
    }
    assert!(number(&bytes, at + 8) > 16, "free space");
    bytes[at + 8..at + 16].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let error = ShardReader::open(&path).err().expect("it was not refused").to_string();
    assert!(error.contains("shard.h5: its names or strings are damaged"), "{error}");
}

#[test]
fn a_frame_that_ends_early_is_no_sound_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.h5");
    let mut writer = ShardWriter::create(&path, header(Encoding::Jpeg, 16, 20)).unwrap();
    let whole = jpeg::encode(&pixels(0, 0, 16, 20), 16, 20, 95).unwrap();
    let cut = whole[..whole.len() * 3 / 4].to_vec();
    // The checksum is of what is stored: it is right.
    writer.append("good", 0, [&whole, &whole]).unwrap();
    writer.append("cut", 1, [&whole, &cut]).unwrap();
    let path = writer.finish().unwrap();
    let damage = inspect(&[path], &|_| {}).damage;
    assert!(damage.len() == 1 && damage[0].contains("video cut, frame 1: damaged JPEG"), "{damage:?}");
}

#[test]
fn a_video_in_two_splits_and_a_lost_shard_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let write = |split: &str, first: usize| {
        let header = ShardHeader { split: split.into(), ..header(RAW, 8, 8) };
        let mut writer = ShardWriter::create(&dir.path().join(format!("{split}-00000.h5")), header).unwrap();
        for v in first..first + 3 {
            writer.append(&format!("video-{v}"), 0, [pixels(v, 0, 8, 8)]).unwrap();
        }
        writer.finish().unwrap()
    };
    let files = [write("train", 0), write("test", 2)];
    let shared = inspect(&files, &|_| {}).shared;
    assert_eq!(shared, [("video-2".to_string(), ["train".to_string(), "test".to_string()])]);
    let folds = [write("train1", 0), write("test2", 0)];
    assert!(inspect(&folds, &|_| {}).shared.is_empty(), "folds share videos");

    let inspect = |path: &Path| crate::common::program::alone(&["data", "inspect", path.to_str().unwrap()]);
    let told = |path: &Path, words: &str| {
        let output = inspect(path);
        let said = crate::common::mpirun::text(&output);
        assert!(output.status.code() == Some(2) && said.contains(words), "{said}");
        assert!(!said.contains("all sound"), "{said}");
    };
    told(dir.path(), "1 videos are in two splits, the first is video-2, in test and train");
    told(&dir.path().join("none.h5"), "none.h5: there is no such file or folder");
    // One that `data prepare` has not made, for want of a good video, is not lost.
    let part = dir.path().join("part");
    std::fs::create_dir_all(part.join(".prepare/train")).unwrap();
    shard(&part.join("train-00001.h5"), RAW, [8, 8], 0, &[1]);
    told(&part, "1 shards are not there, though later ones are");
    std::fs::write(part.join(".prepare/train/00000.json"), r#"{"bytes":0,"videos":[]}"#).unwrap();
    assert!(inspect(&part).status.success());
    let bracket = sideways::data::Dataset::open(&["/nowhere/a[1]/*.h5"]).unwrap_err().to_string();
    assert!(bracket.contains("a [ in a name is written [[]"), "{bracket}");
}

/// The documents, where they describe the format; what is tested below follows them alone.
fn described() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/data.md");
    let text = std::fs::read_to_string(path).unwrap();
    text.split_once("## The format of a shard").expect("the format is described").1.to_string()
}

/// A shard by the tables of the documents: each line that begins with a name in backquotes is an attribute or a dataset.
#[test]
fn the_documents_name_all_that_a_shard_has() {
    let dir = tempfile::tempdir().unwrap();
    let text = described();
    let first = |line: &str| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name.to_string());
    let mut named: Vec<String> = text.lines().filter_map(first).collect();
    named.sort();
    for encoding in [Encoding::Raw, Encoding::Jpeg] {
        let path = shard(&dir.path().join("a.h5"), encoding, [8, 8], 0, &[2]);
        let file = hdf5::File::open(&path).unwrap();
        let members = file.member_names().unwrap().into_iter().map(|name| format!("/{name}"));
        for name in file.attr_names().unwrap().into_iter().chain(members) {
            assert!(named.contains(&name), "{name} is not in the documents: {named:?}");
        }
    }
    assert_eq!(named.len(), 9 + 7, "{named:?}");
}

/// The writer in the documents, where this machine has what it needs.
#[test]
fn the_writer_in_the_documents_writes_shards() {
    let text = described();
    let code =
        text.split_once("```python\n").and_then(|(_, rest)| rest.split_once("```")).expect("there is a writer").0;
    let has = Command::new("python3").args(["-c", "import h5py, numpy, xxhash"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no Python with h5py and xxhash");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("python3").args(["-c", code]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", crate::common::mpirun::text(&output));
    let mut files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let found = inspect(&files, &|_| {});
    assert!(!files.is_empty() && found.damage.is_empty() && found.videos() > 1, "{found:?}");
}
