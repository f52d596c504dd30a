//! `data prepare` on real video files, made by ffmpeg's own test sources; and on broken ones.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sideways::data::prepare::ffmpeg::{Ffmpeg, Target};
use sideways::data::prepare::layout::{self, Layout};
use sideways::data::prepare::{PrepareOptions, Report, prepare};
use sideways::data::{Dataset, Encoding, ShardReader, jpeg};

/// Makes a video file of a source such as `testsrc=size=64x48:rate=10`.
fn film(path: &Path, source: &str, seconds: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let status = Command::new("ffmpeg")
        .args(["-nostdin", "-loglevel", "error", "-f", "lavfi", "-i", source, "-t", seconds])
        .args(["-pix_fmt", "yuv420p", "-y"])
        .arg(format!("file:{}", path.display()))
        .stdin(Stdio::null())
        .status()
        .expect("the tests of `data prepare` need ffmpeg");
    assert!(status.success());
}

fn target(height: usize, width: usize, fps: f64) -> Target {
    Target { height, width, fps, max_seconds: 10.0, time_limit: Duration::from_secs(60) }
}

fn options(videos: &Path, out: &Path) -> PrepareOptions {
    PrepareOptions {
        videos: videos.into(),
        layout: Layout::Folders,
        classes: None,
        out: out.into(),
        dataset: "films".into(),
        split: "train".into(),
        test_fraction: 0.0,
        target: target(24, 32, 10.0),
        min_frames: 8,
        encoding: Encoding::Jpeg,
        quality: 95,
        per_shard: 3,
        seed: 1,
        overwrite: false,
        jobs: 2,
    }
}

fn refused(options: &PrepareOptions) -> String {
    let error = prepare(options, &|| {}).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn class_folders_become_shards_and_broken_videos_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let (videos, out) = (dir.path().join("videos"), dir.path().join("out"));
    film(&videos.join("a test/one.mp4"), "testsrc=size=64x48:rate=20", "2");
    film(&videos.join("a test/-two: 50%.mkv"), "testsrc=size=100x40:rate=5", "1.6");
    film(&videos.join("fractal/m1.mp4"), "mandelbrot=size=40x60:rate=10", "1");
    film(&videos.join("fractal/m2.AVI"), "mandelbrot=size=48x48:rate=25", "1");
    film(&videos.join("fractal/short.mp4"), "testsrc=size=64x48:rate=10", "0.3");
    std::fs::create_dir_all(videos.join("no videos")).unwrap();
    std::fs::write(videos.join("fractal/notes.txt"), "not a video").unwrap();
    std::fs::write(videos.join("a test/junk.mp4"), "this is\nno\tvideo").unwrap();
    std::fs::write(videos.join("a test/empty.mp4"), "").unwrap();
    // Cut in half, an mp4 has lost its index.
    let whole = std::fs::read(videos.join("a test/one.mp4")).unwrap();
    std::fs::write(videos.join("fractal/cut.mp4"), &whole[..whole.len() / 2]).unwrap();

    let report = prepare(&options(&videos, &out), &|| {}).unwrap();
    let Report { found, written, broken, short, ref shards, .. } = report;
    assert_eq!((found, written, broken, short, shards.len()), (8, 4, 3, 1, 2), "{report:?}");
    let list = std::fs::read_to_string(report.quarantine.unwrap()).unwrap();
    assert_eq!(list.lines().next(), Some("path\twhat\twhy"));
    assert_eq!(list.lines().count(), 5);
    let line = |name: &str| list.lines().find(|l| l.contains(name)).unwrap().split('\t').collect::<Vec<_>>();
    assert_eq!(line("short.mp4")[1..], ["too short", "3 frames, 8 needed"]);
    for name in ["junk.mp4", "empty.mp4", "cut.mp4"] {
        assert_eq!(line(name)[1], "broken");
        assert!(line(name).len() == 3 && line(name)[2].len() > 5, "no reason for {name}: {list}");
    }

    let data = Dataset::open(&[format!("{}/train-*.h5", out.display())]).unwrap();
    assert_eq!(data.class_names, ["a test", "fractal", "no videos"]);
    assert_eq!((data.height, data.width, data.fps, data.name.as_str()), (24, 32, 10.0, "films"));
    let frames = |id: &str| data.videos.iter().find(|v| v.id == id).map(|v| (v.label, v.frames));
    assert_eq!(frames("a test/one.mp4"), Some((0, 20)), "2 s at 10 frames a second");
    assert_eq!(frames("a test/-two: 50%.mkv"), Some((0, 16)), "5 frames a second become 10");
    assert_eq!(frames("fractal/m1.mp4"), Some((1, 10)));
    assert_eq!(frames("fractal/m2.AVI"), Some((1, 10)));
    for shard in shards {
        let r = ShardReader::open(shard).unwrap();
        (0..r.videos()).for_each(|v| r.verify(v).unwrap());
    }
    assert!(refused(&options(&videos, &out)).contains("--overwrite"));
}

/// The picture covers the target and is cut around its centre; its colours survive.
#[test]
fn frames_are_scaled_to_cover_and_cut_at_the_centre() {
    let dir = tempfile::tempdir().unwrap();
    let (videos, out) = (dir.path().join("v"), dir.path().join("out"));
    // Red left half, blue right half, twice as wide as the target.
    film(
        &videos.join("c/wide.mkv"),
        "color=red:size=64x64:rate=10[a];color=blue:size=64x64:rate=10[b];[a][b]hstack",
        "1",
    );
    for encoding in [Encoding::Raw, Encoding::Jpeg] {
        let o = PrepareOptions { target: target(32, 32, 10.0), encoding, overwrite: true, ..options(&videos, &out) };
        let report = prepare(&o, &|| {}).unwrap();
        let r = ShardReader::open(&report.shards[0]).unwrap();
        let (mut rgb, _) = r.read(4..5).unwrap();
        if encoding == Encoding::Jpeg {
            let coded = std::mem::replace(&mut rgb, vec![0; 32 * 32 * 3]);
            jpeg::decode(&coded, 32, 32, &mut rgb).unwrap();
        }
        let pixel = |y: usize, x: usize| <[u8; 3]>::try_from(&rgb[(y * 32 + x) * 3..][..3]).unwrap();
        for y in [0, 16, 31] {
            for (x, red) in [(0, true), (11, true), (20, false), (31, false)] {
                let [r, g, b] = pixel(y, x);
                let (strong, weak) = if red { (r, b) } else { (b, r) };
                assert!(strong > 200 && weak < 50 && g < 50, "{encoding:?} {y},{x}: {:?}", [r, g, b]);
            }
        }
    }
}

#[test]
fn splits_are_pure_balanced_and_cover_everything() {
    let dir = tempfile::tempdir().unwrap();
    for class in ["a", "b"] {
        std::fs::create_dir(dir.path().join(class)).unwrap();
        for i in 0..20 {
            std::fs::write(dir.path().join(format!("{class}/{i}.mp4")), "").unwrap();
        }
    }
    let listing = layout::list(Layout::Folders, dir.path(), None).unwrap();
    let ids = |seed| -> Vec<(String, Vec<String>)> {
        let splits = listing.split("train", 0.25, seed).into_iter();
        splits.map(|(name, s)| (name, s.iter().map(|s| s.id.clone()).collect())).collect()
    };
    let splits = ids(1);
    assert_eq!(splits, ids(1));
    assert_ne!(splits, ids(2));
    assert_eq!((splits[0].0.as_str(), splits[0].1.len()), ("train", 30));
    assert_eq!((splits[1].0.as_str(), splits[1].1.len()), ("test", 10));
    assert_eq!(splits[1].1.iter().filter(|id| id.starts_with("a/")).count(), 5);
    let mut all: Vec<_> = splits.into_iter().flat_map(|(_, ids)| ids).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 40);
    // Shuffled: the first half is not one class.
    let first = &ids(1)[0].1[..15];
    assert!(first.iter().any(|id| id.starts_with("a/")) && first.iter().any(|id| id.starts_with("b/")));

    let classes = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    let given = layout::list(Layout::Folders, dir.path(), Some(&classes(&["b", "x", "a"]))).unwrap();
    assert_eq!(given.sources.iter().find(|s| s.id == "a/3.mp4").unwrap().label, 2);
    let error = layout::list(Layout::Folders, dir.path(), Some(&classes(&["a"]))).unwrap_err();
    assert!(error.to_string().contains("\"b\" is not in the list"));
    assert!(layout::list(Layout::Folders, dir.path(), Some(&classes(&["a", "b", "a"]))).is_err());
}

#[test]
fn bad_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    assert!(refused(&options(&dir.path().join("none"), &out)).contains("none: cannot read this folder"));
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(refused(&options(&empty, &out)).contains("no class folders"));
    std::fs::create_dir(empty.join("class")).unwrap();
    assert!(refused(&options(&empty, &out)).contains("no videos"));
    std::fs::write(empty.join("class/x.mp4"), "junk").unwrap();
    let all_broken = refused(&options(&empty, &out));
    assert!(all_broken.contains("none of 1 videos") && all_broken.contains("1 broken"), "{all_broken}");
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(refused(&options(&empty, &file)).contains("cannot write into this folder"));
    let with = |change: fn(&mut PrepareOptions)| {
        let mut o = options(&empty, &out);
        change(&mut o);
        refused(&o)
    };
    assert!(with(|o| o.target.fps = 0.0).contains("--fps"));
    assert!(with(|o| o.target.max_seconds = f64::NAN).contains("--max-seconds"));
    assert!(with(|o| o.target.height = 0).contains("height"));
    assert!(with(|o| o.test_fraction = 1.0).contains("--test-fraction"));
    assert!(with(|o| o.split = "a/b".into()).contains("cannot name a split"));
    assert!(with(|o| o.quality = 101).contains("--quality"));
}

#[test]
fn a_video_that_takes_too_long_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.mkv");
    film(&path, "testsrc=size=320x240:rate=50", "10");
    let slow = Target { time_limit: Duration::from_millis(1), ..target(240, 320, 50.0) };
    let error = Ffmpeg::find().unwrap().decode(&path, &slow, &mut |_| Ok(())).unwrap_err();
    assert!(error.contains("took longer"), "{error}");
}
