//! TensorBoard's event files, read here from their bytes: what stands there is what `metrics.jsonl` says, once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, alone};
use crate::common::runs::{config, shard, train};

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

fn checked<'a>(bytes: &'a [u8], checksum: &[u8]) -> &'a [u8] {
    let crc = crc32c(bytes);
    let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(masked.to_le_bytes(), checksum);
    bytes
}

/// The records of a file.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(checked(&bytes[..8], &bytes[8..12]).try_into().unwrap()) as usize;
        found.push(checked(&bytes[12..12 + length], &bytes[12 + length..16 + length]));
        bytes = &bytes[16 + length..];
    }
    found
}

#[derive(Clone, Debug)]
enum Field<'a> {
    Number(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn bytes(&self) -> &'a [u8] {
        let Field::Bytes(bytes) = self else { panic!("{self:?}") };
        bytes
    }

    fn number(&self) -> u64 {
        let (Field::Number(n) | Field::Fixed(n)) = self else { panic!("{self:?}") };
        *n
    }

    fn string(&self) -> String {
        String::from_utf8(self.bytes().to_vec()).unwrap()
    }
}

/// A message's fields by number.
fn fields(mut bytes: &[u8]) -> BTreeMap<u64, Vec<Field<'_>>> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let length = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let (number, rest) = bytes.split_at(length);
        *bytes = rest;
        number.iter().rev().fold(0, |sum, byte| sum << 7 | u64::from(byte & 0x7f))
    }
    let mut found: BTreeMap<u64, Vec<Field>> = BTreeMap::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            wire => {
                let length = match wire {
                    1 => 8,
                    5 => 4,
                    2 => varint(&mut bytes) as usize,
                    other => panic!("wire type {other}"),
                };
                let (field, rest) = bytes.split_at(length);
                bytes = rest;
                match wire {
                    2 => Field::Bytes(field),
                    _ => Field::Fixed(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))),
                }
            }
        };
        found.entry(key >> 3).or_default().push(field);
    }
    found
}

/// What event files come to, in the order of their names.
#[derive(Default)]
struct Board {
    /// By tag and step.
    scalars: BTreeMap<(String, u64), f32>,
    pictures: BTreeMap<u64, Vec<u8>>,
    /// Of each file, the step that its START says.
    starts: Vec<u64>,
    wall_times: Vec<f64>,
}

fn event_files(folder: &Path) -> Vec<PathBuf> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = names.filter(|path| path.to_string_lossy().contains("tfevents")).collect();
    files.sort();
    files
}

fn board(folder: &Path) -> Board {
    let mut board = Board::default();
    for file in event_files(folder) {
        let bytes = std::fs::read(&file).unwrap();
        for (n, record) in records(&bytes).into_iter().enumerate() {
            let event = fields(record);
            let step = event.get(&2).map_or(0, |step| step[0].number());
            board.wall_times.push(f64::from_bits(event[&1][0].number()));
            match n {
                0 => assert_eq!(event[&3][0].string(), "brain.Event:2"),
                1 => {
                    assert_eq!(fields(event[&7][0].bytes())[&1][0].number(), 1, "a session log: START");
                    board.starts.push(step);
                    // What TensorBoard does then.
                    board.scalars.retain(|(_, earlier), _| *earlier < step);
                    board.pictures.retain(|earlier, _| *earlier < step);
                }
                _ => {
                    for value in &fields(event[&5][0].bytes())[&1] {
                        let value = fields(value.bytes());
                        let tag = value[&1][0].string();
                        if let Some(image) = value.get(&4) {
                            let image = fields(image[0].bytes());
                            assert_eq!((tag.as_str(), image[&3][0].number()), ("validation/predicted_frames", 3));
                            let png = image[&4][0].bytes().to_vec();
                            let (w, h, _) = pixels(&png);
                            assert_eq!((image[&1][0].number(), image[&2][0].number()), (h as u64, w as u64));
                            assert_eq!(board.pictures.insert(step, png), None, "twice at step {step}");
                            continue;
                        }
                        let scalar = f32::from_bits(value[&2][0].number() as u32);
                        assert_eq!(board.scalars.insert((tag.clone(), step), scalar), None, "{tag} twice at {step}");
                    }
                }
            }
        }
    }
    board
}

/// Width, height and bytes of a PNG file.
fn pixels(file: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    (info.width, info.height, bytes)
}

fn lines(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The scalars that the lines of a run stand for, spelt out.
fn expected(run: &Path, recognition: bool) -> BTreeMap<(String, u64), f32> {
    let mut all = BTreeMap::new();
    let shares: &[&str] = if recognition { &["top1", "top5"] } else { &[] };
    let errors: &[&str] = if recognition { &[] } else { &["mse", "psnr", "copy_mse"] };
    for line in lines(run) {
        let step = line["batches"].as_u64().unwrap();
        let mut add = |tag: String, value: &Value| all.insert((tag, step), value.as_f64().unwrap() as f32);
        if line["kind"] == "validation" {
            for key in [&["loss", "clips", "seconds", "skipped"], shares, errors].concat() {
                add(format!("validation/{key}"), &line[key]);
            }
            continue;
        }
        for key in [&["loss", "lr", "frames_per_second", "skipped", "videos_skipped"], shares].concat() {
            add(format!("train/{key}"), &line[key]);
        }
        for worker in line["workers"].as_array().unwrap().iter().filter(|worker| worker["replica"] == 0) {
            for key in ["grad_norm", "backward_steps"] {
                add(format!("{key}/module_{}", worker["module"]), &worker[key]);
            }
            for (phase, seconds) in worker["time"].as_object().unwrap() {
                add(format!("time/module_{}/{phase}", worker["module"]), seconds);
            }
        }
    }
    all
}

/// Three attempts, the second from a checkpoint that the first had gone beyond: a file each, and everything once.
#[test]
fn event_files_say_what_the_metrics_say_and_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let run = dir.path().join("run");
    let sets =
        ["run.tensorboard=true", "train.batches=12", "train.validate_every=3", "train.replicas=2", "data.batch=1"];
    let config = config(dir.path(), &sets);
    train(&config, Some(7));
    assert_eq!(board(&run).scalars, expected(&run, true));
    for lost in 5..=7 {
        std::fs::remove_dir_all(run.join(format!("checkpoints/step-{lost:08}"))).unwrap();
    }
    train(&config, Some(2));
    // Batches 1 to 6 and two validations are on record: of the seventh batch nothing is left.
    assert_eq!(board(&run).scalars, expected(&run, true));
    assert!(!board(&run).scalars.contains_key(&("train/loss".into(), 7)));
    train(&config, None);
    let whole = board(&run);
    assert_eq!(whole.starts, [1, 5, 7]);
    assert_eq!(whole.scalars, expected(&run, true));
    assert_eq!(whole.scalars.keys().filter(|(tag, _)| tag == "validation/top1").count(), 4);
    assert!(whole.wall_times.is_sorted() && whole.pictures.is_empty());

    // The same made of the metrics, and made anew.
    let out = dir.path().join("board");
    for _ in 0..2 {
        let args = ["report", run.to_str().unwrap(), "--tensorboard", out.to_str().unwrap()];
        let output = alone(&args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && event_files(&out.join("run")) == [Path::new(said.trim())],
            "{}",
            text(&output)
        );
    }
    let made = board(&out.join("run"));
    assert!(made.scalars == whole.scalars && made.starts == [1] && made.wall_times.is_sorted());
    // As long as the attempts took, and no older than the run.
    let (first, last) = (made.wall_times[0], *made.wall_times.last().unwrap());
    assert!(first >= whole.wall_times[0] - 1.0 && last <= whole.wall_times.last().unwrap() + 1.0);

    // Not beside the run's own files; and not two runs in one folder.
    for (args, says) in [
        (
            vec![run.to_str().unwrap(), "--tensorboard", dir.path().to_str().unwrap()],
            "an event file that is there already",
        ),
        (vec![run.to_str().unwrap(), run.to_str().unwrap(), "--tensorboard", "/nowhere"], "two runs are called run"),
    ] {
        let output = alone(&[&["report"], &args[..]].concat());
        assert!(output.status.code() == Some(2) && text(&output).contains(says), "{}", text(&output));
    }
    assert_eq!(event_files(&run).len(), 3);
}

/// On several ranks: the frames shown are those that `predict` draws of the same checkpoint.
#[test]
fn predicted_frames_are_shown() {
    const FRAMES: &str = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
        { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    shard(&dir.path().join("held-out.h5"), 5, 20, false);
    let held_out = dir.path().join("held-out.h5").display().to_string();
    let sets =
        [FRAMES, "model.task=future-frames", "model.modules=3", "run.tensorboard=true", "train.validate_every=2"];
    let path = dir.path().join("config.toml");
    let validation = format!("data.validation={held_out}");
    let config = config(dir.path(), &[&sets[..], &[&validation]].concat());
    std::fs::write(&path, config.to_toml().unwrap()).unwrap();
    let output = mpirun(3, Path::new(PROGRAM), &["train", path.to_str().unwrap()], &[], MINUTE);
    assert!(output.status.success(), "{}", text(&output));
    let run = dir.path().join("run");
    let found = board(&run);
    assert_eq!(found.scalars, expected(&run, false));
    assert_eq!(found.pictures.keys().collect::<Vec<_>>(), [&2, &4]);
    for (step, picture) in &found.pictures {
        let (checkpoint, out) = (run.join(format!("checkpoints/step-{step:08}")), dir.path().join(step.to_string()));
        let args = ["predict", checkpoint.to_str().unwrap(), "--data", &held_out, "--out", out.to_str().unwrap()];
        let output = alone(&args);
        assert!(output.status.success(), "{}", text(&output));
        assert!(pixels(picture) == pixels(&std::fs::read(out.join("clip-0000.png")).unwrap()), "step {step}");
    }
    assert!(found.pictures[&2] != found.pictures[&4]);
}

#[test]
fn nothing_is_written_unless_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    train(&config(dir.path(), &[]), None);
    assert_eq!(event_files(&dir.path().join("run")), Vec::<PathBuf>::new());
}

/// An event file that cannot grow any more (here beyond 48 KiB, which some 53 would be, and metrics 43) costs no training.
#[test]
fn a_disk_that_refuses_event_files_costs_no_training() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let path = dir.path().join("config.toml");
    let config = config(dir.path(), &["run.tensorboard=true", "train.batches=24"]);
    std::fs::write(&path, config.to_toml().unwrap()).unwrap();
    let limited = "ulimit -f 48; exec \"$0\" train \"$1\"";
    let output = Command::new("bash").args(["-c", limited, PROGRAM]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(text(&output).matches("warn: TensorBoard sees no more of this attempt").count(), 1, "{}", text(&output));
    let run = dir.path().join("run");
    assert_eq!(lines(&run).len(), 24);
    assert_eq!(std::fs::metadata(&event_files(&run)[0]).unwrap().len(), 48 << 10);
}
