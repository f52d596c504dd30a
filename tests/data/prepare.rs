//! `data prepare` on real video files, made by ffmpeg's own test sources; and on broken ones.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sideways::data::prepare::description::{Description, Layout};
use sideways::data::prepare::ffmpeg::{Ffmpeg, Form, Target};
use sideways::data::prepare::layout::{Listing, Place, list};
use sideways::data::prepare::plan::read_skip;
use sideways::data::prepare::report::Report;
use sideways::data::prepare::{Job, PrepareOptions, prepare};
use sideways::data::{Dataset, Encoding, ShardReader, jpeg};

/// Makes a video file of a source such as `testsrc=size=64x48:rate=10`.
pub fn film(path: &Path, source: &str, seconds: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let status = Command::new("ffmpeg")
        .args(["-nostdin", "-loglevel", "error", "-f", "lavfi", "-i", source, "-t", seconds])
        .args(["-pix_fmt", "yuv420p", "-y"])
        .arg(format!("file:{}", path.display()))
        .stdin(Stdio::null())
        .status()
        .expect("the tests of `data prepare` need ffmpeg");
    assert!(status.success(), "ffmpeg makes no {source}");
}

fn target(height: usize, width: usize, fps: f64) -> Target {
    Target { height, width, fps, max_seconds: 10.0, time_limit: Duration::from_secs(60) }
}

pub fn options(videos: &Path, out: &Path) -> PrepareOptions {
    PrepareOptions {
        description: Description::plain(Layout::Folders, "films"),
        videos: videos.into(),
        annotations: None,
        classes: None,
        out: out.into(),
        splits: vec!["train".into()],
        test_fraction: 0.0,
        skip: Vec::new(),
        target: target(24, 32, 10.0),
        min_frames: 8,
        encoding: Encoding::Jpeg,
        quality: 95,
        per_shard: 3,
        seed: 1,
        overwrite: false,
        retry_broken: false,
        jobs: 2,
    }
}

/// Prepares one split.
pub fn prepared(options: &PrepareOptions) -> Report {
    prepare(options.clone(), &mut |_| ()).unwrap().remove(0)
}

fn refused(options: &PrepareOptions) -> String {
    let error = prepare(options.clone(), &mut |_| ()).unwrap_err();
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

    let mut seen = Vec::new();
    let report = prepare(options(&videos, &out), &mut |entry| seen.push(entry.id.clone())).unwrap().remove(0);
    let Report { found, written, broken, short, ref shards, .. } = report;
    assert_eq!((found, written, broken, short, seen.len()), (8, 4, 3, 1, 8), "{report:?}");
    assert_eq!(report.missing, 0);
    let path = out.join("quarantine-train.tsv");
    assert_eq!(report.quarantine.as_ref(), Some(&path));
    let list = std::fs::read_to_string(&path).unwrap();
    assert_eq!(list.lines().next(), Some("id\twhat\twhy\tpath"));
    assert_eq!(list.lines().count(), 5);
    let line = |name: &str| list.lines().find(|l| l.contains(name)).unwrap().split('\t').collect::<Vec<_>>();
    assert_eq!(line("short.mp4")[..3], ["fractal/short.mp4", "too short", "3 frames, 8 needed"]);
    for name in ["junk.mp4", "empty.mp4", "cut.mp4"] {
        assert_eq!(line(name)[1], "broken");
        assert!(line(name).len() == 4 && line(name)[2].len() > 5, "no reason for {name}: {list}");
        assert!(Path::new(line(name)[3]).is_file());
    }
    assert_eq!(read_skip(&path).unwrap().len(), 4);
    assert_eq!(std::fs::read_to_string(out.join("classes.txt")).unwrap(), "a test\nfractal\n");

    let data = Dataset::open(&[format!("{}/train-*.h5", out.display())]).unwrap();
    assert_eq!(data.class_names, ["a test", "fractal"]);
    assert_eq!((data.height, data.width, data.fps, data.name.as_str()), (24, 32, 10.0, "films"));
    let frames = |id: &str| data.videos.iter().find(|v| v.id == id).map(|v| (v.label, v.frames));
    assert_eq!(frames("a test/one.mp4"), Some((0, 20)), "2 s at 10 frames a second");
    assert_eq!(frames("a test/-two: 50%.mkv"), Some((0, 16)), "5 frames a second become 10");
    assert_eq!(frames("fractal/m1.mp4"), Some((1, 10)));
    assert_eq!(frames("fractal/m2.AVI"), Some((1, 10)));
    // 4 videos, 3 a shard.
    assert_eq!(shards.len(), 2);
    for shard in shards {
        let r = ShardReader::open(shard).unwrap();
        (0..r.videos()).for_each(|v| r.verify(v).unwrap());
    }
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
        let report = prepared(&o);
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

/// What a JPEG shard holds is what a raw one does, whatever colours a video's numbers stand for.
#[test]
fn colours_are_the_same_in_jpeg_and_raw_shards() {
    let dir = tempfile::tempdir().unwrap();
    let (videos, out) = (dir.path().join("v/bars"), dir.path().join("out"));
    std::fs::create_dir_all(&videos).unwrap();
    let kinds = [
        ("plain.mkv", "-c:v ffv1 -pix_fmt yuv420p"),
        ("hd.mkv", "-vf scale=out_color_matrix=bt709,format=yuv420p -colorspace bt709 -c:v ffv1"),
        ("full.avi", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
        ("rgb.mkv", "-c:v ffv1 -pix_fmt bgr0"),
        ("grey.mkv", "-c:v ffv1 -pix_fmt gray"),
    ];
    for (name, coded) in kinds {
        let made = Command::new("ffmpeg")
            .args("-nostdin -loglevel error -f lavfi -i smptebars=size=256x192:rate=10 -t 1".split(' '))
            .args(coded.split(' '))
            .arg(videos.join(name))
            .status();
        assert!(made.unwrap().success(), "{name}");
    }
    // Odd, and with colour in full and halved.
    let (h, w) = (95, 127);
    let of = |encoding, quality| {
        let (target, root) = (target(h, w, 10.0), dir.path().join("v"));
        let options =
            PrepareOptions { target, encoding, quality, overwrite: true, per_shard: 9, ..options(&root, &out) };
        let report = prepared(&options);
        assert_eq!((report.written, report.doubtful), (kinds.len(), 0));
        let shard = ShardReader::open(&report.shards[0]).unwrap();
        let frame = |v: usize| {
            let first = shard.frames_of(v).start;
            let (bytes, _) = shard.read(first..first + 1).unwrap();
            let mut rgb = vec![0; h * w * 3];
            match encoding {
                Encoding::Raw => rgb.copy_from_slice(&bytes),
                Encoding::Jpeg => jpeg::decode(&bytes, h, w, &mut rgb).unwrap(),
            }
            rgb
        };
        (0..shard.videos()).map(|v| (shard.ids[v].clone(), frame(v))).collect::<Vec<_>>()
    };
    let raw = of(Encoding::Raw, 95);
    for quality in [95, 85] {
        for ((id, raw), (other, jpeg)) in raw.iter().zip(of(Encoding::Jpeg, quality)) {
            assert_eq!(*id, other);
            let far = raw.iter().zip(&jpeg).filter(|(a, b)| a.abs_diff(**b) > 5).count() as f64 / raw.len() as f64;
            // At the bars' edges, where RGB comes with coarser colour: a tenth. With another matrix or range it is a third and more.
            assert!(far < 0.2, "{id}, quality {quality}: {far}");
        }
    }
}

/// Of a quality JPEG frames are as near to what is shown, and as large, as those of another encoder.
#[test]
fn quality_means_what_it_does_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let videos = dir.path().join("v");
    std::fs::create_dir_all(videos.join("c")).unwrap();
    let made = Command::new("ffmpeg")
        .args(
            "-nostdin -loglevel error -f lavfi -i mandelbrot=size=96x80:rate=10 -t 1 -c:v ffv1 -pix_fmt bgr0"
                .split(' '),
        )
        .arg(videos.join("c/one.mkv"))
        .status();
    assert!(made.unwrap().success());
    let of = |encoding, quality| {
        let out = dir.path().join("out");
        let target = target(80, 96, 10.0);
        let report = prepared(&PrepareOptions { target, encoding, quality, overwrite: true, ..options(&videos, &out) });
        ShardReader::open(&report.shards[0]).unwrap().read(9..10).unwrap().0
    };
    let raw = of(Encoding::Raw, 95);
    let error = |coded: &[u8]| {
        let mut rgb = vec![0; raw.len()];
        jpeg::decode(coded, 80, 96, &mut rgb).unwrap();
        raw.iter().zip(&rgb).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum::<f64>() / raw.len() as f64
    };
    for quality in [1, 50, 89, 90, 100] {
        let (own, other) = (of(Encoding::Jpeg, quality), jpeg::encode(&raw, 80, 96, quality).unwrap());
        let (errors, bytes) = (error(&own) / error(&other), own.len() as f64 / other.len() as f64);
        // The mean of a block is rounded to a level of grey, which counts where nothing else is lost.
        let most = if quality == 100 { 2.0 } else { 1.5 };
        assert!((0.5..most).contains(&errors) && (0.7..1.3).contains(&bytes), "quality {quality}: {errors}, {bytes}");
    }
}

#[test]
fn splits_are_pure_balanced_and_cover_everything() {
    let dir = tempfile::tempdir().unwrap();
    let videos = dir.path().join("videos");
    for class in ["a", "b"] {
        std::fs::create_dir_all(videos.join(class)).unwrap();
        for i in 0..20 {
            std::fs::write(videos.join(format!("{class}/{i}.mp4")), "").unwrap();
        }
    }
    let ids = |name: &str, seed| -> Vec<Vec<String>> {
        let out = dir.path().join(name);
        let o = PrepareOptions { test_fraction: 0.25, seed, per_shard: 15, ..options(&videos, &out) };
        let (job, ledger) = Job::plan(o).unwrap();
        assert_eq!((&ledger.todo[..], ledger.todo_videos), (&[0, 1, 2][..], 40));
        assert_eq!(job.shards().iter().map(|s| s.split.as_str()).collect::<Vec<_>>(), ["train", "train", "test"]);
        // What other ranks are told is where they find their videos, not all videos.
        assert!(job.to_bytes().unwrap().len() < 800, "{}", job.to_bytes().unwrap().len());
        (0..3).map(|task| job.videos(task).unwrap().into_iter().map(|v| v.id).collect()).collect()
    };
    let shards = ids("1", 1);
    assert_eq!(shards, ids("2", 1));
    assert_ne!(shards, ids("3", 2));
    assert_eq!(shards.iter().map(Vec::len).collect::<Vec<_>>(), [15, 15, 10]);
    assert_eq!(shards[2].iter().filter(|id| id.starts_with("a/")).count(), 5);
    let mut all: Vec<_> = shards.concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 40);
    // Shuffled: the first shard is not one class.
    assert!(shards[0].iter().any(|id| id.starts_with("a/")) && shards[0].iter().any(|id| id.starts_with("b/")));
}

#[test]
fn a_list_of_classes_decides_the_labels_of_folders() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["play_guitar", "shoot goal", "rock_paper"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("x.mp4"), "").unwrap();
    }
    let listed = |names: &[&str]| -> Result<Listing, sideways::Error> {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        let place =
            Place { videos: dir.path(), annotations: None, classes: Some(&names), stored_classes: None, out: None };
        list(&Description::plain(Layout::Folders, "films"), &place, &["train".into()])
    };
    // Folders with underscores for spaces, and without parentheses and quotes.
    let good = listed(&["shoot goal", "absent", "\"rock\" (paper)", "play guitar"]).unwrap();
    let videos: Vec<_> = good.splits[0].1.there.iter().map(Result::unwrap).collect();
    let labels: Vec<(&str, i32)> = videos.iter().map(|s| (s.id.as_str(), s.label)).collect();
    assert_eq!(labels, [("play_guitar/x.mp4", 3), ("rock_paper/x.mp4", 2), ("shoot goal/x.mp4", 0)]);
    assert_eq!(good.class_names[2], "\"rock\" (paper)");
    let error = |names: &[&str]| listed(names).unwrap_err().to_string();
    assert!(error(&["play guitar", "rock_paper"]).contains("\"shoot goal\" is not in the list of 2 classes"));
    assert!(error(&["play guitar", "rock_paper", "shoot goals"]).contains("did you mean \"shoot goals\"?"));
    assert!(error(&["a", "b", "a"]).contains("names a class twice: \"a\""));
    // Two classes that one folder could be.
    assert!(error(&["play guitar", "(play guitar)", "rock_paper", "shoot goal"]).contains("\"play_guitar\" is not"));
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
    assert!(with(|o| o.splits = vec!["a/b".into()]).contains("cannot name a split"));
    assert!(with(|o| o.quality = 101).contains("--quality"));
}

/// As when a file system is lost for a while: that must not brand its videos as broken.
#[test]
fn a_file_that_is_gone_ends_the_run_instead_of_counting_as_broken() {
    let dir = tempfile::tempdir().unwrap();
    let (videos, out) = (dir.path().join("v"), dir.path().join("out"));
    for name in ["1.mkv", "2.mkv"] {
        film(&videos.join("c").join(name), "testsrc=size=32x24:rate=10", "1");
    }
    let (job, ledger) = Job::plan(options(&videos, &out)).unwrap();
    std::fs::rename(videos.join("c"), videos.join("away")).unwrap();
    let error = job.make(0, &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains(".mkv: was there when the run was planned"), "{error}");
    assert!(!out.join("train-00000.h5").exists() && !out.join("train-00000.h5.partial").exists());
    std::fs::rename(videos.join("away"), videos.join("c")).unwrap();
    let made = job.make(0, &mut |_| Ok(())).unwrap();
    assert_eq!(job.finish(&ledger, vec![made]).unwrap()[0].written, 2);
}

/// A file that ends early gives the frames it has, and is listed.
#[test]
fn a_video_cut_short_is_written_and_doubtful() {
    let dir = tempfile::tempdir().unwrap();
    let (videos, out) = (dir.path().join("v"), dir.path().join("out"));
    film(&videos.join("c/whole.avi"), "testsrc=size=64x48:rate=10", "3");
    let whole = std::fs::read(videos.join("c/whole.avi")).unwrap();
    std::fs::write(videos.join("c/cut.avi"), &whole[..whole.len() * 6 / 10]).unwrap();
    let report = prepared(&options(&videos, &out));
    assert_eq!((report.written, report.doubtful, report.broken), (2, 1, 0), "{report:?}");
    let list = out.join("quarantine-train.tsv");
    assert!(std::fs::read_to_string(&list).unwrap().contains("c/cut.avi\tdoubtful\t"));
    assert!(read_skip(&list).unwrap().is_empty(), "what was written need not be skipped");
}

#[test]
fn a_video_that_takes_too_long_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.mkv");
    film(&path, "testsrc=size=320x240:rate=50", "10");
    let slow = Target { time_limit: Duration::from_millis(1), ..target(240, 320, 50.0) };
    let error = Ffmpeg::find(Form::Rgb).unwrap().decode(&path, &slow, Form::Rgb, None).unwrap().unwrap_err();
    assert!(error.why.contains("took longer") && !error.killed, "{error:?}");
}
