//! What is stored is what a player shows: the right stream, in its shape; and nothing is waited for that is no file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::program::PROGRAM;
use crate::prepare::{film, options, prepared};
use sideways::data::Encoding;
use sideways::data::ShardReader;
use sideways::data::prepare::ffmpeg::Target;
use sideways::data::prepare::record::Outcome;
use sideways::data::prepare::{Job, PrepareOptions, prepare};

fn ffmpeg(args: &[&str], out: &Path) {
    let status = Command::new("ffmpeg")
        .args(["-nostdin", "-loglevel", "error", "-y"])
        .args(args)
        .arg(out)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "ffmpeg {args:?}");
}

/// A folder of class `c` with films of one colour to make others of.
struct Films {
    dir: tempfile::TempDir,
}

impl Films {
    fn new() -> Self {
        let films = Films { dir: tempfile::tempdir().unwrap() };
        for (name, colour) in [("red", "red"), ("blue", "blue")] {
            film(&films.at(&format!("{name}.mkv")), &format!("color={colour}:size=64x48:rate=10"), "1");
        }
        ffmpeg(&["-f", "lavfi", "-i", "color=green:size=32x32", "-frames:v", "1"], &films.at("cover.png"));
        std::fs::create_dir_all(films.at("v/c")).unwrap();
        films
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn video(&self, name: &str, args: &[&str]) {
        let args: Vec<String> = args
            .iter()
            .map(|arg| {
                if arg.contains(".mkv") || arg.contains(".png") {
                    self.at(arg).display().to_string()
                } else {
                    arg.to_string()
                }
            })
            .collect();
        ffmpeg(&args.iter().map(String::as_str).collect::<Vec<_>>(), &self.at(&format!("v/c/{name}")));
    }

    fn options(&self) -> PrepareOptions {
        let target =
            Target { height: 24, width: 32, fps: 10.0, max_seconds: 10.0, time_limit: Duration::from_secs(60) };
        PrepareOptions { encoding: Encoding::Raw, per_shard: 99, target, ..options(&self.at("v"), &self.at("out")) }
    }

    /// The pixel in the middle of each stored video's first frame, and how many frames it has.
    fn stored(&self) -> Vec<(String, [u8; 3], u64)> {
        let shard = ShardReader::open(&self.at("out/train-00000.h5")).unwrap();
        let mut all: Vec<_> = (0..shard.videos())
            .map(|v| {
                let frames = shard.frames_of(v);
                let (rgb, _) = shard.read(frames.start..frames.start + 1).unwrap();
                let middle = rgb[(12 * 32 + 16) * 3..][..3].try_into().unwrap();
                (shard.ids[v].clone(), middle, frames.end - frames.start)
            })
            .collect();
        all.sort();
        all
    }
}

fn is(colour: [u8; 3], channel: usize) -> bool {
    (0..3).all(|c| if c == channel { colour[c] > 200 } else { colour[c] < 60 })
}

#[test]
fn a_cover_is_no_video_and_of_several_streams_the_one_that_is_shown_is_taken() {
    let films = Films::new();
    films.video(
        "cover.mkv.mp4",
        &[
            "-i",
            "cover.png",
            "-i",
            "red.mkv",
            "-map",
            "0",
            "-map",
            "1",
            "-c:v:0",
            "png",
            "-disposition:v:0",
            "attached_pic",
            "-f",
            "mp4",
        ],
    );
    films.video(
        "second.mkv",
        &[
            "-i",
            "red.mkv",
            "-i",
            "blue.mkv",
            "-map",
            "0",
            "-map",
            "1",
            "-disposition:v:0",
            "0",
            "-disposition:v:1",
            "default",
        ],
    );
    films.video(
        "first.mkv",
        &["-i", "red.mkv", "-i", "blue.mkv", "-map", "0", "-map", "1", "-disposition:v:0", "default"],
    );
    films.video("sound.mp4", &["-f", "lavfi", "-i", "sine=duration=1"]);
    let report = prepared(&films.options());
    assert_eq!((report.written, report.broken, report.doubtful), (3, 1, 2), "{report:?}");
    let stored = films.stored();
    for ((id, colour, frames), (name, channel)) in stored.iter().zip([("cover", 0), ("first", 0), ("second", 2)]) {
        assert!(id.contains(name) && *frames == 10 && is(*colour, channel), "{id}: {colour:?}, {frames} frames");
    }
    let list = std::fs::read_to_string(films.at("out/quarantine-train.tsv")).unwrap();
    assert!(list.contains("sound.mp4\tbroken\tno stream of pictures in it"), "{list}");
    assert!(list.contains("second.mkv\tdoubtful\t2 video streams"), "{list}");
}

/// Where the sound begins before the pictures, as where a recording was cut: the first picture is not repeated until then.
#[test]
fn a_video_begins_with_its_first_picture() {
    let films = Films::new();
    film(&films.at("moving.mkv"), "testsrc=size=64x48:rate=10", "1");
    let sound = ["-f", "lavfi", "-i", "sine=duration=3", "-map", "0:v", "-map", "1:a", "-c:v", "copy"];
    films.video("late.mkv", &[&["-itsoffset", "1.5", "-i", "moving.mkv"][..], &sound].concat());
    films.video("plain.mkv", &[&["-i", "moving.mkv"][..], &sound].concat());
    assert_eq!(prepared(&films.options()).written, 2);
    let shard = ShardReader::open(&films.at("out/train-00000.h5")).unwrap();
    assert_eq!(shard.frames_of(0), 0..10);
    assert_eq!(shard.checksums[0], shard.checksums[1], "late pictures are other pictures");
}

/// Pixels that are not square, as of discs and of old cameras: 64x48 shown as 128x48.
#[test]
fn a_picture_is_stored_in_the_shape_in_which_it_is_shown() {
    let films = Films::new();
    // Red in the middle half of its width, blue at both sides: shown twice as wide, the sides are cut off.
    let picture = "color=blue:size=64x48:rate=10,drawbox=x=16:w=32:h=48:color=red:t=fill,setsar=2";
    films.video("wide.mp4", &["-f", "lavfi", "-i", picture, "-t", "1", "-pix_fmt", "yuv420p"]);
    let report = prepared(&films.options());
    assert_eq!(report.written, 1, "{report:?}");
    let shard = ShardReader::open(&films.at("out/train-00000.h5")).unwrap();
    let (rgb, _) = shard.read(0..1).unwrap();
    for x in [1, 8, 16, 24, 30] {
        let pixel: [u8; 3] = rgb[(12 * 32 + x) * 3..][..3].try_into().unwrap();
        assert!(is(pixel, 0), "{x}: {pixel:?}");
    }
}

#[test]
fn what_is_no_file_is_waited_for_by_nobody() {
    let films = Films::new();
    films.video("red.mp4", &["-i", "red.mkv"]);
    let pipe = films.at("v/c/pipe.mp4");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink(&pipe, films.at("v/c/link.mp4")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", films.at("v/c/zero.mp4")).unwrap();
    let begun = Instant::now();
    let o = films.options();
    assert_eq!(prepared(&o).written, 1);
    // Lists, too; and a video that becomes a pipe while the run is under way.
    let refused = |o: PrepareOptions| prepare(o, &mut |_| ()).unwrap_err().to_string();
    let skip = refused(PrepareOptions { skip: vec![pipe.clone()], overwrite: true, ..o.clone() });
    assert!(skip.contains("pipe.mp4") && skip.contains("a named pipe, not a file"), "{skip}");
    let limit = Target { time_limit: Duration::from_secs(1), ..o.target.clone() };
    let (job, _) = Job::plan(PrepareOptions { overwrite: true, target: limit, ..o.clone() }).unwrap();
    std::fs::rename(&pipe, films.at("v/c/red.mp4")).unwrap();
    let mut outcomes = Vec::new();
    job.make(0, &mut |entry| {
        outcomes.push(entry.outcome.clone());
        Ok(())
    })
    .unwrap();
    assert_eq!(outcomes, [Outcome::Broken { why: "a named pipe, no file".into() }]);
    for name in ["config.toml", "dataset.toml"] {
        let path = films.at(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = match name {
            "config.toml" => sideways::config::Config::load(&path, &[]).unwrap_err(),
            _ => sideways::data::prepare::description::Description::read(&path).unwrap_err(),
        };
        assert!(error.exit_code() == 2 && error.to_string().contains("a named pipe, not a file"), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "something was waited for");
}

#[test]
fn numbers_that_no_video_has_are_refused() {
    let films = Films::new();
    films.video("red.mp4", &["-i", "red.mkv"]);
    type Change = fn(&mut PrepareOptions);
    let changes: [(&str, Change); 7] = [
        ("--fps 1000000000", |o| o.target.fps = 1e9),
        ("--max-seconds 1000000000000000000", |o| o.target.max_seconds = 1e18),
        ("--jobs 9223372036854775807", |o| o.jobs = i64::MAX as usize),
        ("--jobs 0", |o| o.jobs = 0),
        ("--per-shard 9223372036854775807", |o| o.per_shard = i64::MAX as usize),
        ("--time-limit 18446744073709551615", |o| o.target.time_limit = Duration::from_secs(u64::MAX)),
        ("pixels height", |o| o.target.height = usize::MAX),
    ];
    for (words, change) in changes {
        let mut o = films.options();
        change(&mut o);
        let error = prepare(o, &mut |_| ()).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
    }
}

/// An ffmpeg that was built without its JPEG encoder breaks no video: it is said before the first.
#[test]
fn an_ffmpeg_that_writes_no_jpeg_is_refused() {
    let films = Films::new();
    films.video("one.mkv", &["-i", "red.mkv", "-c", "copy"]);
    let (real, poor) = (std::env::var("PATH").unwrap(), films.at("ffmpeg"));
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *mjpeg*) echo \"Unknown encoder 'mjpeg'\" >&2; exit 1;; esac\nPATH='{real}' exec ffmpeg \"$@\"\n"
    );
    std::fs::write(&poor, script).unwrap();
    std::fs::set_permissions(&poor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let prepare = |encoding: &str| {
        let [videos, out] = ["v", encoding].map(|name| films.at(name).display().to_string());
        let output = Command::new(PROGRAM)
            .args(["data", "prepare", "--layout", "folders", "--videos", &videos, "--split", "train", "--out", &out])
            .args(["--encoding", encoding, "--short-side", "24"])
            .env("PATH", format!("{}:{real}", films.at("").display()))
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = prepare("jpeg");
    assert!(code == Some(2) && said.contains("cannot write JPEG here: Unknown encoder 'mjpeg'"), "{said}");
    assert_eq!(prepare("raw").0, Some(0));
}
