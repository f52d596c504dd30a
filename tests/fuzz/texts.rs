//! Lists, descriptions, configurations, records, checkpoints and headers of messages: read in this process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::common::runs::{config, shard};
use crate::mutate::{Mutator, go_on};
use crate::{LARGEST, TURN};
use sideways::checkpoint::{self, Checkpoint, Manifest};
use sideways::comm::{HEADER_WORDS, Header, Kind};
use sideways::config::Config;
use sideways::data::prepare::description::{Description, Layout};
use sideways::data::prepare::layout::{Place, list, read_classes};
use sideways::data::prepare::plan::read_skip;
use sideways::data::prepare::record::{Record, State};
use sideways::report::trace::Recorded;
use sideways::setup::Setup;
use sideways::{Error, Result};

/// What this process takes at once whatever the input is: buffers and tables of fixed size.
const FIXED: usize = 4 << 20;
/// What a parsed byte takes: trees of strings.
const A_BYTE: usize = 256;

/// Reads mutated inputs with `read`, which may refuse them as bad input.
fn read_all(times: u64, corpus: &[Vec<u8>], mut read: impl FnMut(&[u8]) -> Result<()>) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for (n, bytes) in corpus.iter().enumerate() {
        read(bytes).unwrap_or_else(|e| panic!("number {n} of the corpus: {e}"));
    }
    let (mut refused, mut all) = (0, 0);
    go_on(times, |seed| {
        let bytes = Mutator::new(seed).changed(corpus);
        LARGEST.0.store(0, Relaxed);
        let begun = Instant::now();
        let read = catch_unwind(AssertUnwindSafe(|| read(&bytes)));
        let what = || format!("seed {seed}: {:?}", String::from_utf8_lossy(&bytes));
        match read {
            Err(_) => panic!("a panic, {}", what()),
            Ok(Err(error)) => {
                assert_eq!(error.exit_code(), 2, "{error}, {}", what());
                refused += 1;
            }
            Ok(Ok(())) => {}
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}, {}", begun.elapsed(), what());
        let (largest, allowed) = (LARGEST.0.load(Relaxed), FIXED + A_BYTE * bytes.len());
        assert!(largest <= allowed, "{largest} bytes at once, {}", what());
        all += 1;
    });
    assert!(refused > 0 && refused < all, "{refused} of {all} were refused: the corpus or the changes are no good");
}

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn texts<const N: usize>(texts: [&str; N]) -> Vec<Vec<u8>> {
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

#[test]
fn lists_of_videos() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["videos/a/aaaaaaaaaa0_000012_000022.mp4", "videos/a/v_a_g01_c01.avi", "videos/b/x.avi"] {
        write(dir.path(), name, "");
    }
    let videos = dir.path().join("videos");
    let read = |layout: Layout, split: &str, file: &str| {
        let annotations = dir.path().join(file);
        let place = Place {
            videos: &videos,
            annotations: Some(&annotations),
            classes: None,
            stored_classes: None,
            out: Some(dir.path()),
        };
        list(&Description::plain(layout, "fuzz"), &place, &[split.to_string()]).map(drop)
    };
    let kinetics = texts([
        "label,youtube_id,time_start,time_end,split\n\"a, b\",aaaaaaaaaa0,12,22,train\nb,aaaaaaaaaa1,0,10,train\n",
        "label\tyoutube_id\ttime_start\ttime_end\nrun\taaaaaaaaaa0\t12.0\t22.0\n",
        r#"{"aaaaaaaaaa0": {"annotations": {"label": "run", "segment": [12.0, 22.0]}, "subset": "train", "url": ""}}"#,
    ]);
    read_all(3000, &kinetics, |bytes| {
        write(dir.path(), "train.csv", bytes);
        read(Layout::Kinetics, "train", "train.csv")
    });
    let ucf = texts(["a/v_a_g01_c01.avi 1\nb/x.avi 2\n", "a/v_a_g01_c01.avi\r\nb/none.avi\r\n"]);
    write(dir.path(), "ucf/classInd.txt", "1 a\n2 b\n");
    read_all(2000, &ucf, |bytes| {
        write(dir.path(), "ucf/trainlist01.txt", bytes);
        read(Layout::Ucf101, "train1", "ucf")
    });
    read_all(2000, &texts(["1 a\n2 b\n", "1 a\r\n2 b\r\n\r\n"]), |bytes| {
        write(dir.path(), "ucf/classInd.txt", bytes);
        write(dir.path(), "ucf/trainlist01.txt", "a/v_a_g01_c01.avi 1\n");
        read(Layout::Ucf101, "train1", "ucf")
    });
    read_all(2000, &texts(["v_a_g01_c01.avi 1 \nx.avi 2 \ny.avi 0 \n"]), |bytes| {
        write(dir.path(), "hmdb/a_test_split1.txt", bytes);
        read(Layout::Hmdb51, "train1", "hmdb")
    });
    read_all(1000, &texts(["a\nb\n", "id\twhat\twhy\tpath\na/1.mp4\tbroken\tno\tx\n"]), |bytes| {
        let path = write(dir.path(), "skip.tsv", bytes);
        read_skip(&path).and(read_classes(&path)).map(drop)
    });
}

#[test]
fn descriptions_and_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let description =
        texts(["name = 'x'\nlayout = 'kinetics'\ncolumns = ['label', 'youtube_id']\nexpect_classes = 600\n\
        [splits.train]\nannotations = ['train.csv']\nvideos = ['train']\nsubset = 'train'\nexpect = 1000\n"]);
    read_all(2000, &description, |bytes| Description::read(&write(dir.path(), "dataset.toml", bytes)).map(drop));
    shard(&dir.path().join("train.h5"), 24, 14, false);
    let written = config(dir.path(), &["train.batches=6"]).to_toml().unwrap();
    let plain = format!(
        "[data]\ntrain = '{0}/train.h5'\nframes = 14\nbatch = 2\nmean = [0.4, 0.4, 0.4]\n[model]\nlayers = [{{ kind = 'conv2d', out = 4, kernel = 3 }}, \
         {{ kind = 'residual', out = 8, groups = 4 }}, {{ kind = 'global-avg-pool' }}, {{ kind = 'linear', out = 4 }}]\nmodules = 2\n[train]\nbatches = 3\n\
         optimizer = {{ kind = 'sgd', lr = 0.1, momentum = 0.9 }}\nlr_schedule = {{ kind = 'step', every = 10, warmup = 2 }}\n[run]\ndir = '{0}/run'\n",
        dir.path().display()
    );
    read_all(2000, &[written.into_bytes(), plain.into_bytes()], |bytes| {
        let config = Config::load(&write(dir.path(), "config.toml", bytes), &[])?;
        config.validate()?;
        // A plan has as many steps as a clip has frames, whatever the length of the text.
        match config.data.frames {
            ..=1024 => Setup::dry(&config, 1).map(|setup| drop(setup.warnings())),
            _ => Ok(()),
        }
    });
    let overrides =
        texts(["train.optimizer.lr=0.01", "data.mean=[0.1,0.2,0.3]", "model.skip={ spans = [2] }", "train.seed=5"]);
    read_all(3000, &overrides, |bytes| {
        let set = String::from_utf8_lossy(bytes).into_owned();
        let config = Config::parse("[model]\npreset = 'motion-small'\n", "c.toml", &[set])?;
        config.validate()
    });
}

fn refused(e: serde_json::Error) -> Error {
    Error::input(e.to_string())
}

#[test]
fn checkpoints_and_records() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = |n: usize| {
        vec![(
            format!("layers.{n}.linear.weight"),
            Tensor::ones((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap(),
        )]
    };
    (1..=2).for_each(|i| checkpoint::write_module(dir.path(), 7, i, tensors(i)).unwrap());
    let manifest = Manifest::new("[train]\nbatches = 3\n".into(), vec!["a".into()], [8, 8, 3], vec![1]);
    let folder = checkpoint::finish(dir.path(), 7, 2, manifest, (1, None)).unwrap();
    let text = std::fs::read(folder.join("manifest.json")).unwrap();
    read_all(2000, std::slice::from_ref(&text), |bytes| {
        write(&folder, "manifest.json", bytes);
        let checkpoint = Checkpoint::open(&folder)?;
        checkpoint.load(|_| true)?;
        Config::of_manifest(&checkpoint.manifest().config, "manifest", &[]).map(drop)
    });
    // The tensors' file, with a checksum that is right: its header is what is left to be wrong.
    let module = std::fs::read(folder.join("module-001.safetensors")).unwrap();
    read_all(2000, &[module], |bytes| {
        let mut manifest: Manifest = serde_json::from_slice(&text).map_err(refused)?;
        (manifest.files[0].bytes, manifest.files[0].xxh3) = (bytes.len() as u64, format!("{:016x}", xxh3_64(bytes)));
        write(&folder, "module-001.safetensors", bytes);
        write(&folder, "manifest.json", serde_json::to_vec(&manifest).map_err(refused)?);
        Checkpoint::open(&folder)?.load(|_| true).map(drop)
    });
    let record = br#"{"bytes":9,"videos":[{"id":"a","label":1,"path":"a/1.mp4","bytes":3,"modified":5,"content":7,"outcome":{"written":{"frames":2,"complaint":null}}}],"recipe":1}"#;
    let state = State::new(dir.path(), "train");
    read_all(1000, &[record.to_vec()], |bytes| {
        write(dir.path(), ".prepare/train/00000.json", bytes);
        state.read::<Record>("00000.json").map(drop).ok_or_else(|| Error::input("no record"))
    });
}

/// Recordings of two ranks with clocks of their own, from their files to a trace.
#[test]
fn recordings() {
    let dir = tempfile::tempdir().unwrap();
    let part = |rank: usize, clock: &str, sent: bool| {
        format!(
            r#"{{"launch":3,"module":{module},"replica":0,"grid":[2,1],"rank":{rank},"host":"a","clock":{clock},"slices":[{{"phase":"forward","begin":100,"end":900,"batch":1,"tick":7,"step":2}},{{"phase":"wait-core","begin":900,"end":950,"batch":1,"tick":7,"step":2}}],"device":[{{"phase":"backward","begin":100,"end":900,"batch":1,"tick":7,"step":2}}],"messages":[{{"kind":"activation","link":1,"sent":{sent},"at":500,"batch":1,"step":2,"bytes":64}},{{"kind":"cotangent","link":2,"sent":{other},"at":700,"batch":1,"step":2,"bytes":64}}],"dropped":0}}"#,
            module = rank + 1,
            other = !sent
        )
    };
    let first = part(0, r#"{"at":0,"offset":0,"uncertainty":0}"#, true);
    let second = part(1, r#"{"at":50,"offset":-80,"uncertainty":30}"#, false);
    let clocks =
        r#"{"launch":3,"clocks":[{"at":0,"offset":0,"uncertainty":0},{"at":5000,"offset":-200,"uncertainty":30}]}"#;
    let names = ["module-1.0.json", "module-2.0.json", "clocks.json"];
    let read = |changed: &str, bytes: &[u8]| {
        for (name, text) in names.iter().zip([&first[..], &second, clocks]) {
            write(dir.path(), name, if *name == changed { bytes } else { text.as_bytes() });
        }
        Recorded::read(dir.path())?.json().map(drop)
    };
    for (name, text) in names.iter().zip([&first[..], &second, clocks]) {
        read_all(1000, &texts([text]), |bytes| read(name, bytes));
    }
}

/// Headers of messages between ranks, of another program or damaged.
#[test]
fn headers_of_messages() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let header = Header::new(Kind::Cotangent, 7, 1 << 40, 5, [16, 28, 28, 64]);
    let bytes: Vec<u8> = header.encode(42).iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut mutator = Mutator::new(0);
    go_on(20_000, |_| {
        let mut changed = mutator.changed(std::slice::from_ref(&bytes));
        changed.resize(4 * HEADER_WORDS, 0);
        let words: Vec<u32> = changed.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let words: [u32; HEADER_WORDS] = words.try_into().unwrap();
        LARGEST.0.store(0, Relaxed);
        if let Ok((found, _)) = Header::decode(&words) {
            let _ = (found.verify(&header), found.to_string());
        }
        assert!(LARGEST.0.load(Relaxed) < FIXED);
    });
}
