//! Shards: what is written comes back, and every malformed file is told by name and by what is wrong with it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::common::tmpfs::Tmpfs;
use crate::support::{CLASSES, header, pixels, shard};
use rand_chacha::rand_core::{Rng, SeedableRng};
use sideways::data::inspect::{contact_sheet, find, inspect};
use sideways::data::{Dataset, Encoding, ShardHeader, ShardReader, ShardWriter, jpeg, missing_shards};

#[test]
fn what_is_written_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    for encoding in [Encoding::Raw, Encoding::Jpeg] {
        let path = shard(&dir.path().join(encoding.name()), encoding, [16, 20], 5, &[3, 1, 40]);
        let r = ShardReader::open(&path).unwrap();
        assert_eq!(r.header, header(encoding, 16, 20));
        assert_eq!((&r.labels[..], &r.offsets[..]), (&[2, 0, 1][..], &[0, 3, 4, 44][..]));
        assert_eq!(r.ids, ["video-5", "video-6", "video-7"]);
        for v in 0..3 {
            r.verify(v).unwrap();
            let (bytes, spans) = r.read(r.frames_of(v)).unwrap();
            assert_eq!(spans.len(), [3, 1, 40][v]);
            for (t, span) in spans.into_iter().enumerate() {
                let rgb = pixels(5 + v, t, 16, 20);
                match encoding {
                    Encoding::Raw => assert_eq!(bytes[span], rgb),
                    Encoding::Jpeg => assert_eq!(bytes[span], jpeg::encode(&rgb, 16, 20, 95).unwrap()),
                }
            }
        }
    }
}

#[test]
fn a_shard_larger_than_the_write_buffer_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    // 3 x 40 frames of 48 kB: more than the 4 MiB that are collected before a write, and frames across chunks.
    let path = shard(&dir.path().join("x.h5"), Encoding::Raw, [120, 133], 0, &[40, 40, 40]);
    let r = ShardReader::open(&path).unwrap();
    (0..3).for_each(|v| r.verify(v).unwrap());
    assert_eq!(r.read(77..79).unwrap().0, [pixels(1, 37, 120, 133), pixels(1, 38, 120, 133)].concat());
    // JPEG files are of any length: what is written ends within a chunk.
    let noise = |v: u64, t: u64| {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(100 * v + t);
        let mut rgb = vec![0; 120 * 133 * 3];
        random.fill_bytes(&mut rgb);
        jpeg::encode(&rgb, 120, 133, 95).unwrap()
    };
    let mut writer = ShardWriter::create(&dir.path().join("y.h5"), header(Encoding::Jpeg, 120, 133)).unwrap();
    (0..3).for_each(|v| writer.append(&format!("{v}"), 0, (0..90).map(|t| noise(v, t))).unwrap());
    let path = writer.finish().unwrap();
    assert!(path.metadata().unwrap().len() > 9 << 20, "{}", path.metadata().unwrap().len());
    let r = ShardReader::open(&path).unwrap();
    (0..3).for_each(|v| r.verify(v).unwrap());
    let (bytes, spans) = r.read(178..182).unwrap();
    let found: Vec<&[u8]> = spans.into_iter().map(|span| &bytes[span]).collect();
    assert_eq!(found, [noise(1, 88), noise(1, 89), noise(2, 0), noise(2, 1)]);
}

#[test]
fn an_unfinished_shard_leaves_nothing_and_bad_videos_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.h5");
    let mut w = ShardWriter::create(&path, header(Encoding::Raw, 4, 4)).unwrap();
    w.append("a", 0, [[0u8; 48]]).unwrap();
    assert!(!path.exists() && dir.path().join("x.h5.partial").exists());
    let text = |e: sideways::Error| e.to_string();
    assert!(text(w.append("b", 3, [[0u8; 48]]).unwrap_err()).contains("label 3, out of range for 3 classes"));
    assert!(text(w.append("b", -1, [[0u8; 48]]).unwrap_err()).contains("label -1"));
    assert!(text(w.append("b", 0, [[0u8; 47]]).unwrap_err()).contains("47 bytes, not 48"));
    assert!(text(w.append("b", 0, Vec::<Vec<u8>>::new()).unwrap_err()).contains("no frames"));
    drop(w);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let w = ShardWriter::create(&path, header(Encoding::Raw, 4, 4)).unwrap();
    assert!(text(w.finish().unwrap_err()).contains("at least one video"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let refused = |h: ShardHeader| text(ShardWriter::create(&path, h).err().unwrap());
    assert!(refused(ShardHeader { fps: 0.0, ..header(Encoding::Raw, 4, 4) }).contains("fps"));
    assert!(refused(ShardHeader { class_names: vec![], ..header(Encoding::Raw, 4, 4) }).contains("class_names"));
    assert!(refused(header(Encoding::Raw, 4, 0)).contains("4x0"));
    assert!(
        text(ShardWriter::create(&dir.path().join("no/x.h5"), header(Encoding::Raw, 4, 4)).err().unwrap())
            .contains("no/x.h5")
    );
}

/// Where the disk is full for a moment only (another process was there, and has tidied up), a shard is complete or given up:
/// HDF5 writes the lists when datasets are closed, and a failure there must not be lost.
#[test]
fn a_moment_without_room_ends_a_shard_or_does_it_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Tmpfs::mount(dir.path(), "1m") else { return };
    let (mut complete, mut given_up) = (0, 0);
    for round in 0..100 {
        let path = disk.0.join(format!("{round}.h5"));
        let encoding = [Encoding::Raw, Encoding::Jpeg][round % 2];
        let mut writer = ShardWriter::create(&path, header(encoding, 40, 40)).unwrap();
        let frames = (0..30).map(|t| pixels(0, t, 40, 40));
        let stored =
            frames.map(|rgb| if encoding == Encoding::Raw { rgb } else { jpeg::encode(&rgb, 40, 40, 95).unwrap() });
        writer.append("video", 0, stored).unwrap();
        let filler = disk.fill();
        // Room for less than the frames (36 pages of RGB, fewer of JPEG), for that and some of the lists, or for all of it.
        let room = std::fs::metadata(&filler).unwrap().len() - ((round as u64 / 2 * 7) % 50 + 5) * 4096;
        std::fs::File::options().write(true).open(&filler).unwrap().set_len(room).unwrap();
        let done = AtomicBool::new(false);
        let finished = std::thread::scope(|scope| {
            scope.spawn(|| {
                // For the first two shards there is no room until they are given up.
                while !done.load(Relaxed) && (round < 2 || disk.free() > 0) {
                    std::hint::spin_loop();
                }
                std::fs::remove_file(filler).unwrap();
            });
            let finished = writer.finish();
            done.store(true, Relaxed);
            finished
        });
        match finished {
            Ok(path) => {
                assert!(round >= 2, "there was no room for {}", path.display());
                ShardReader::open(&path).unwrap().verify(0).unwrap();
                std::fs::remove_file(path).unwrap();
                complete += 1;
            }
            Err(e) => {
                assert!(e.to_string().contains("No space left on device"), "{e}");
                given_up += 1;
            }
        }
        assert_eq!(std::fs::read_dir(&disk.0).unwrap().count(), 0);
    }
    eprintln!("{complete} shards complete, {given_up} given up");
    assert!(complete > 0 && given_up >= 2, "{complete} shards complete, {given_up} given up");
}

/// The error of opening a good shard that `damage` was done to.
fn opened(encoding: Encoding, damage: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("bad.h5"), encoding, [16, 20], 0, &[3, 2, 5]);
    damage(&path);
    let error = ShardReader::open(&path).err().expect("the damage was not noticed");
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains("bad.h5"), "the error does not name the file: {text}");
    text
}

fn edit(path: &Path, change: impl FnOnce(&hdf5::File) -> hdf5::Result<()>) {
    change(&hdf5::File::open_rw(path).unwrap()).unwrap();
}

/// Puts other data in a dataset's place.
fn replace<T: hdf5::H5Type>(name: &'static str, data: Vec<T>) -> impl FnOnce(&Path) {
    move |path| {
        edit(path, |f| {
            f.unlink(name)?;
            f.new_dataset_builder().with_data(&data[..]).create(name).map(|_| ())
        })
    }
}

fn attribute<T: hdf5::H5Type>(name: &'static str, value: T) -> impl FnOnce(&Path) {
    move |path| {
        edit(path, |f| {
            f.delete_attr(name)?;
            f.new_attr::<T>().create(name)?.write_scalar(&value)
        })
    }
}

fn string(s: &str) -> hdf5::types::VarLenUnicode {
    s.parse().unwrap()
}

#[test]
fn files_that_are_no_shards() {
    use Encoding::Raw;
    assert!(opened(Raw, |p| std::fs::write(p, "").unwrap()).contains("empty file"));
    assert!(opened(Raw, |p| std::fs::write(p, "hello world").unwrap()).contains("not a readable HDF5 file"));
    assert!(opened(Raw, |p| std::fs::remove_file(p).unwrap()).contains("No such file"));
    assert!(opened(Raw, |p| drop((std::fs::remove_file(p), std::fs::create_dir(p)))).contains("not a file"));
    let cut = |part: f64| {
        move |p: &Path| {
            let file = std::fs::OpenOptions::new().write(true).open(p).unwrap();
            file.set_len((file.metadata().unwrap().len() as f64 * part) as u64).unwrap();
        }
    };
    for part in [0.001, 0.5, 0.999] {
        assert!(opened(Raw, cut(part)).contains("truncated"), "cut to {part}");
    }
    let plain = opened(Raw, |p| drop(hdf5::File::create(p).unwrap()));
    assert!(plain.contains("not a shard"), "{plain}");
}

#[test]
fn attributes_that_make_no_sense() {
    use Encoding::Raw;
    assert!(opened(Raw, attribute("format", string("other"))).contains("not a shard"));
    assert!(opened(Raw, attribute("version", 2i64)).contains("shard version 2"));
    assert!(opened(Raw, attribute("version", string("one"))).contains("`version`"));
    assert!(opened(Raw, attribute("encoding", string("png"))).contains("encoding \"png\" is neither"));
    assert!(opened(Raw, attribute("fps", -1.0f64)).contains("fps is -1"));
    assert!(opened(Raw, attribute("height", -16i64)).contains("`height` is -16"));
    assert!(opened(Raw, attribute("width", 1i64 << 40)).contains("a side must be"));
    assert!(opened(Raw, |p| edit(p, |f| f.delete_attr("class_names"))).contains("class_names"));
    assert!(opened(Raw, |p| edit(p, |f| f.delete_attr("split"))).contains("`split`"));
    // Another integer type is no reason to refuse.
    let dir = tempfile::tempdir().unwrap();
    let path = shard(&dir.path().join("ok.h5"), Raw, [16, 20], 0, &[2]);
    attribute("height", 16u16)(&path);
    assert_eq!(ShardReader::open(&path).unwrap().header.height, 16);
}

#[test]
fn lists_that_do_not_fit() {
    use Encoding::{Jpeg, Raw};
    assert!(opened(Raw, replace("labels", vec![0i32, 1, 3])).contains("label 3, out of range for 3 classes"));
    assert!(opened(Raw, replace("labels", vec![0i32, -1, 2])).contains("label -1"));
    assert!(opened(Raw, replace("labels", vec![0i32, 1])).contains("/video_ids has 3 entries, not 2"));
    assert!(opened(Raw, replace("labels", Vec::<i32>::new())).contains("no videos"));
    assert!(opened(Raw, replace("labels", vec![string("a")])).contains("/labels"));
    assert!(
        opened(Raw, replace("video_offsets", vec![0u64, 3, 2, 10])).contains("does not grow: entry 2 is 2 after 3")
    );
    assert!(opened(Raw, replace("video_offsets", vec![0u64, 3, 3, 10])).contains("video-1 (number 1) has no frames"));
    assert!(opened(Raw, replace("video_offsets", vec![1u64, 3, 5, 10])).contains("begins with 1"));
    assert!(opened(Raw, replace("video_offsets", vec![0u64, 3, 5, 11])).contains("/frames has 10 frames"));
    assert!(opened(Raw, replace("video_offsets", vec![0u64, 3, 5, u64::MAX])).contains("/frames has 10 frames"));
    assert!(opened(Raw, replace("video_checksums", vec![0u64])).contains("/video_checksums has 1"));
    assert!(opened(Raw, |p| edit(p, |f| f.unlink("video_ids"))).contains("/video_ids is missing"));
    assert!(opened(Raw, |p| edit(p, |f| f.unlink("frames"))).contains("/frames is missing"));
    let shaped = |shape: [usize; 4]| {
        move |p: &Path| {
            edit(p, |f| {
                f.unlink("frames")?;
                f.new_dataset::<u8>().shape(shape).create("frames").map(|_| ())
            })
        }
    };
    assert!(opened(Raw, shaped([10, 16, 20, 4])).contains("wrong channel count"));
    assert!(opened(Raw, shaped([10, 20, 16, 3])).contains("[10, 20, 16, 3], not [frames, 16, 20, 3]"));
    assert!(opened(Raw, replace("frames", vec![0u8; 100])).contains("/frames has shape [100]"));

    let offsets = |change: fn(&mut Vec<u64>)| {
        move |p: &Path| {
            let mut list = hdf5::File::open(p).unwrap().dataset("frame_offsets").unwrap().read_raw().unwrap();
            change(&mut list);
            replace("frame_offsets", list)(p);
        }
    };
    assert!(opened(Jpeg, offsets(|o| o.swap(3, 4))).contains("/frame_offsets does not grow: entry 4"));
    assert!(opened(Jpeg, offsets(|o| o[10] += 1)).contains("/frame_offsets ends at"));
    assert!(opened(Jpeg, offsets(|o| o[0] = 1)).contains("/frame_offsets begins with 1"));
    assert!(opened(Jpeg, offsets(|o| o.truncate(10))).contains("/frame_offsets has shape [10]"));
}

#[test]
fn shards_of_a_dataset_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let a = shard(&at("a.h5"), Encoding::Raw, [16, 20], 0, &[2]);
    let refused = |b: PathBuf| {
        let error = Dataset::from_files(&[a.clone(), b.clone()]).unwrap_err().to_string();
        assert!(error.contains("a.h5") && error.contains(b.file_name().unwrap().to_str().unwrap()), "{error}");
        error
    };
    assert!(refused(shard(&at("b.h5"), Encoding::Raw, [20, 16], 0, &[2])).contains("frame size"));
    let other = |name: &str, change: fn(&mut ShardHeader)| {
        let mut h = header(Encoding::Raw, 16, 20);
        change(&mut h);
        let mut w = ShardWriter::create(&at(name), h).unwrap();
        w.append("v", 0, [vec![0; 16 * 20 * 3]]).unwrap();
        w.finish().unwrap()
    };
    assert!(refused(other("c.h5", |h| h.fps = 30.0)).contains("frame rate"));
    assert!(refused(other("d.h5", |h| drop(h.class_names.pop()))).contains("number of classes"));
    assert!(refused(other("e.h5", |h| h.class_names[1] = "leap".into())).contains("name of class 1"));
    // Raw and JPEG shards may be mixed.
    let mixed = Dataset::from_files(&[a, shard(&at("f.h5"), Encoding::Jpeg, [16, 20], 1, &[4])]).unwrap();
    assert_eq!((mixed.frames(), mixed.videos[1].label), (6, 1));
    assert_eq!(mixed.class_names, CLASSES);

    let none = Dataset::open(&[format!("{}/none-*.h5", dir.path().display())]).unwrap_err();
    assert!(none.exit_code() == 2 && none.to_string().contains("none-*.h5"));
    assert!(Dataset::open::<&str>(&[]).unwrap_err().to_string().contains("no shards"));
    assert!(Dataset::open(&["a[*.h5"]).unwrap_err().to_string().contains("bad pattern"));
    // A shard that two patterns match counts once.
    let pattern = format!("{}/[af].h5", dir.path().display());
    assert_eq!(Dataset::open(&[&pattern, &pattern]).unwrap().videos.len(), 2);
}

#[test]
fn inspect_counts_what_is_sound_and_names_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    shard(&at("a.h5"), Encoding::Raw, [16, 20], 0, &[3, 2, 5]);
    let b = shard(&at("b.h5"), Encoding::Jpeg, [16, 20], 3, &[4, 1]);
    let files = find(&[dir.path().display().to_string()]).unwrap();
    let good = inspect(&files, &|_| {});
    assert_eq!((good.videos(), &good.per_class[..], good.frames), (5, &[2, 2, 1][..], (1, 5, 15)));
    assert!(good.damage.is_empty(), "{:?}", good.damage);
    let sheet = contact_sheet(&files, &at("sheet.png"), 4, 3).unwrap();
    assert_eq!(sheet.rows.iter().map(|r| r.1.as_str()).collect::<Vec<_>>(), ["run", "jump", "fall", "run"]);
    let png = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(at("sheet.png")).unwrap()));
    let reader = png.read_info().unwrap();
    assert_eq!((reader.info().width, reader.info().height), (3 * 22 - 2, 4 * 18 - 2));

    // One flipped bit in the pixels of video 1 of the first shard, and one JPEG's beginning in the second.
    let flip = |path: &Path, find: &[u8], which: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        let found: Vec<usize> = (0..bytes.len() - find.len()).filter(|&i| bytes[i..].starts_with(find)).collect();
        bytes[found[which]] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    flip(&at("a.h5"), &pixels(1, 1, 16, 20), 0);
    flip(&b, &[0xff, 0xd8, 0xff], 4);
    std::fs::write(at("c.h5"), "junk").unwrap();
    shard(&at("d.h5"), Encoding::Raw, [8, 8], 0, &[1]);
    let files = find(&[dir.path().display().to_string()]).unwrap();
    let bad = inspect(&files, &|_| {}).damage;
    assert_eq!(bad.len(), 4, "{bad:?}");
    assert!(bad[0].contains("a.h5") && bad[0].contains("video-1 ") && bad[0].contains("checksum"), "{bad:?}");
    assert!(bad[1].contains("b.h5") && bad[1].contains("video-4"), "{bad:?}");
    assert!(bad[2].contains("c.h5") && bad[3].contains("d.h5"), "{bad:?}");
    assert!(
        find(&[format!("{}/none", dir.path().display())]).unwrap_err().to_string().contains("no such file or folder")
    );

    // A shard that is not there, though a later one is.
    std::fs::create_dir(at("part")).unwrap();
    for number in [0, 1, 3] {
        shard(&at(&format!("part/train-{number:05}.h5")), Encoding::Raw, [8, 8], 10 * number, &[1]);
    }
    let files = find(&[at("part").display().to_string()]).unwrap();
    let part = inspect(&files, &|_| {});
    assert!(part.damage.is_empty() && part.missing == [at("part/train-00002.h5")], "{:?}", part.missing);
    assert!(missing_shards(&files[..2]).is_empty() && missing_shards(&files[2..]) == part.missing);

    let empty = tempfile::tempdir().unwrap();
    assert!(find(&[empty.path().display().to_string()]).unwrap_err().to_string().contains("no file matches"));
}
