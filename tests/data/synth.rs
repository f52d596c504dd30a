//! The synthetic data: no single frame and no place tells the label, motion does; and it is a pure function.

use std::f64::consts::{FRAC_PI_4, TAU};

use sideways::data::synth::{CLASS_NAMES, Scene, SynthOptions, SynthVideo, make};
use sideways::data::{Dataset, Encoding, ShardReader};

const SIZE: usize = 16;
const SPEED: f64 = 1.5;
/// Videos to learn from, and as many to be tested on: chance is then 0.125 ± 0.027 (see [`band`]).
const N: usize = 2400;

fn scene() -> Scene {
    Scene {
        frames: 6,
        size: SIZE,
        speed: SPEED..SPEED,
        shapes: 1,
        radius: 3.0,
        texture: 3.0,
        camera: 0.0,
        noise: 2.0,
        grey: false,
    }
}

fn videos(split: &str, n: usize) -> Vec<SynthVideo> {
    (0..n as u64).map(|i| scene().video(1, split, i)).collect()
}

/// Softmax regression, by gradient descent on standardised features; returns the accuracy on the test half.
fn learn(train: &[Vec<f64>], labels: &[usize], test: &[Vec<f64>], truth: &[usize]) -> f64 {
    let (n, d) = (train.len() as f64, train[0].len());
    let mean: Vec<f64> = (0..d).map(|j| train.iter().map(|x| x[j]).sum::<f64>() / n).collect();
    let std: Vec<f64> =
        (0..d).map(|j| (train.iter().map(|x| (x[j] - mean[j]).powi(2)).sum::<f64>() / n).sqrt().max(1e-6)).collect();
    let scaled = |x: &[f64]| -> Vec<f64> { (0..d).map(|j| (x[j] - mean[j]) / std[j]).chain([1.0]).collect() };
    let scores = |w: &[Vec<f64>], x: &[f64]| -> Vec<f64> {
        w.iter().map(|w| w.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let train: Vec<_> = train.iter().map(|x| scaled(x)).collect();
    let mut w = vec![vec![0.0; d + 1]; 8];
    for _ in 0..40 {
        let mut gradient = vec![vec![0.0; d + 1]; 8];
        for (x, &label) in train.iter().zip(labels) {
            let s = scores(&w, x);
            let top = s.iter().cloned().fold(f64::MIN, f64::max);
            let total: f64 = s.iter().map(|v| (v - top).exp()).sum();
            for k in 0..8 {
                let g = (s[k] - top).exp() / total - f64::from(k == label);
                gradient[k].iter_mut().zip(x).for_each(|(to, v)| *to += g * v / n);
            }
        }
        for (w, g) in w.iter_mut().flatten().zip(gradient.iter().flatten()) {
            *w -= 0.3 * g;
        }
    }
    let right = test.iter().zip(truth).filter(|(x, label)| argmax(&scores(&w, &scaled(x))) == **label).count();
    right as f64 / test.len() as f64
}

fn argmax(values: &[f64]) -> usize {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
}

/// The label of the most similar frame seen in training.
fn nearest(train: &[&[u8]], labels: &[usize], test: &[&[u8]], truth: &[usize]) -> f64 {
    let distance = |a: &[u8], b: &[u8]| -> u32 { a.iter().zip(b).map(|(x, y)| u32::from(x.abs_diff(*y)).pow(2)).sum() };
    let right = test.iter().zip(truth).filter(|(x, label)| {
        let best = (0..train.len()).min_by_key(|&i| distance(train[i], x)).unwrap();
        labels[best] == **label
    });
    right.count() as f64 / test.len() as f64
}

/// Grey levels in blocks of 2x2, and each channel's mean.
fn frame_features(frame: &[u8]) -> Vec<f64> {
    let pixel = |y: usize, x: usize, c: usize| f64::from(frame[(y * SIZE + x) * 3 + c]);
    let grey = |y, x| (0..3).map(|c| pixel(y, x, c)).sum::<f64>();
    let mut out: Vec<f64> = (0..SIZE * SIZE / 4)
        .map(|i| (i / (SIZE / 2) * 2, i % (SIZE / 2) * 2))
        .map(|(y, x)| grey(y, x) + grey(y + 1, x) + grey(y, x + 1) + grey(y + 1, x + 1))
        .collect();
    out.extend((0..3).map(|c| (0..SIZE * SIZE).map(|i| pixel(i / SIZE, i % SIZE, c)).sum::<f64>()));
    out
}

/// A place on the torus, in a form a linear classifier can use.
fn place_features(place: [f64; 2]) -> Vec<f64> {
    let [x, y] = place.map(|p| p / SIZE as f64 * TAU);
    let mut out = vec![place[0], place[1], place[0] * place[1]];
    for (a, b) in [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0), (2.0, 0.0), (0.0, 2.0)] {
        out.extend([(a * x + b * y).sin(), (a * x + b * y).cos()]);
    }
    out
}

/// Which direction fits best what moved? The frames' deviation from the video's mean (which takes out the resting
/// background), correlated with itself two frames on, shifted by two frames' motion in each of the 8 directions.
fn estimate_motion(video: &SynthVideo) -> usize {
    let (n, frames) = (SIZE * SIZE * 3, video.frames.len());
    let mean: Vec<f64> =
        (0..n).map(|i| video.frames.iter().map(|f| f64::from(f[i])).sum::<f64>() / frames as f64).collect();
    let score = |k: usize| -> f64 {
        let angle = k as f64 * FRAC_PI_4;
        let shift = [angle.cos(), angle.sin()].map(|v| (2.0 * SPEED * v).round() as i64);
        let mut sum = 0.0;
        for t in 0..frames - 2 {
            for y in 0..SIZE {
                for x in 0..SIZE {
                    let on = |p: usize, s: i64| (p as i64 + s).rem_euclid(SIZE as i64) as usize;
                    let (from, to) = ((y * SIZE + x) * 3, (on(y, shift[1]) * SIZE + on(x, shift[0])) * 3);
                    for c in 0..3 {
                        let now = f64::from(video.frames[t][from + c]) - mean[from + c];
                        let then = f64::from(video.frames[t + 2][to + c]) - mean[to + c];
                        sum += now * then;
                    }
                }
            }
        }
        sum
    };
    argmax(&(0..8).map(score).collect::<Vec<_>>())
}

/// Four standard deviations around chance for `n` guesses among 8: an honest coin leaves this band once in 16,000
/// trials (and the data are the same in every run).
fn band(n: usize) -> std::ops::RangeInclusive<f64> {
    let width = 4.0 * (0.125f64 * 0.875 / n as f64).sqrt();
    0.125 - width..=0.125 + width
}

#[test]
fn no_single_frame_and_no_place_tells_the_label_but_motion_does() {
    let (train, test) = (videos("train", N), videos("test", N));
    let labels = |v: &[SynthVideo]| v.iter().map(|v| v.label as usize).collect::<Vec<_>>();
    let (known, truth) = (labels(&train), labels(&test));
    for t in [0, 5] {
        let of = |v: &[SynthVideo]| v.iter().map(|v| frame_features(&v.frames[t])).collect::<Vec<_>>();
        let (x, y) = (of(&train), of(&test));
        let accuracy = learn(&x, &known, &y, &truth);
        assert!(band(N).contains(&accuracy), "softmax regression on frame {t}: {accuracy}");
        let of = |v: &[SynthVideo]| v.iter().map(|v| place_features(v.places[t][0])).collect::<Vec<_>>();
        let accuracy = learn(&of(&train), &known, &of(&test), &truth);
        assert!(band(N).contains(&accuracy), "softmax regression on places at {t}: {accuracy}");
        // The same classifier does see what is in a frame: here, how red it is, in 8 steps.
        if t == 0 {
            let steps = |x: &[Vec<f64>]| -> Vec<usize> {
                x.iter().map(|x| (x[x.len() - 3] / (SIZE * SIZE) as f64 / 32.0) as usize).collect()
            };
            let accuracy = learn(&x, &steps(&x), &y, &steps(&y));
            assert!(accuracy > 0.25, "redness is not found in frames: {accuracy}");
        }
    }
    let half = N / 2;
    fn frames(videos: &[SynthVideo]) -> Vec<&[u8]> {
        videos.iter().map(|v| &v.frames[3][..]).collect()
    }
    let accuracy = nearest(&frames(&train[..half]), &known, &frames(&test[..half]), &truth);
    assert!(band(half).contains(&accuracy), "nearest neighbour on single frames: {accuracy}");

    let right = test[..500].iter().filter(|v| estimate_motion(v) == v.label as usize).count();
    assert!(right > 400, "a simple motion estimate gets {right} of 500 right");
}

#[test]
fn labels_are_balanced_and_shapes_move_as_they_say() {
    for split in ["train", "test"] {
        for block in 0..5 {
            let mut labels: Vec<i32> = (0..8).map(|i| scene().video(3, split, block * 8 + i).label).collect();
            labels.sort_unstable();
            assert_eq!(labels, (0..8).collect::<Vec<_>>());
        }
    }
    for i in 0..16 {
        let video = Scene { shapes: 3, ..scene() }.video(1, "train", i);
        let angle = f64::from(video.label) * FRAC_PI_4;
        for t in 1..6 {
            for s in 0..3 {
                let moved = [0, 1].map(|c| video.places[t][s][c] - video.places[t - 1][s][c]);
                for (m, v) in moved.iter().zip([angle.cos() * SPEED, angle.sin() * SPEED]) {
                    assert!((m - v).rem_euclid(SIZE as f64).min((v - m).rem_euclid(SIZE as f64)) < 1e-9);
                }
            }
        }
    }
    assert_eq!((CLASS_NAMES[0], CLASS_NAMES[2]), ("right", "down"));
}

/// Whole-pixel motion without noise moves every pixel of the shape exactly, around the torus.
#[test]
fn a_shape_takes_its_texture_along() {
    let scene = Scene { speed: 2.0..2.0, noise: 0.0, camera: 0.0, frames: 9, ..scene() };
    let video = (0..64).map(|i| scene.video(5, "train", i)).find(|v| v.label == 2).unwrap();
    // After 8 steps of 2 pixels on a torus of 16 the first frame is back.
    assert_eq!(video.frames[0], video.frames[8]);
    assert_ne!(video.frames[0], video.frames[4]);
    let (now, then) = (&video.frames[0], &video.frames[1]);
    let mut inside = 0;
    for y in 0..SIZE {
        for x in 0..SIZE {
            let d = |p: f64, c: f64| (p + 0.5 - c + 8.0).rem_euclid(16.0) - 8.0;
            let [cx, cy] = video.places[0][0];
            if d(x as f64, cx).hypot(d(y as f64, cy)) < 2.0 {
                let (a, b) = ((y * SIZE + x) * 3, ((y + 2) % SIZE * SIZE + x) * 3);
                let worst = (0..3).map(|c| now[a + c].abs_diff(then[b + c])).max().unwrap();
                assert!(worst <= 1, "pixel {y},{x} changes by {worst}");
                inside += 1;
            }
        }
    }
    assert!(inside > 8);
}

fn options(encoding: Encoding) -> SynthOptions {
    SynthOptions {
        scene: scene(),
        videos: 21,
        test_videos: 9,
        seed: 4,
        encoding,
        quality: 90,
        per_shard: 8,
        overwrite: false,
    }
}

#[test]
fn the_files_hold_the_videos_and_are_the_same_each_time() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let made = std::sync::atomic::AtomicU64::new(0);
    let count = |n| {
        made.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    };
    let shards = make(a.path(), &options(Encoding::Raw), &count).unwrap();
    assert_eq!(made.into_inner(), 30);
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let again = one.install(|| make(b.path(), &options(Encoding::Raw), &|_| {})).unwrap();
    assert_eq!((shards.len(), again.len()), (5, 5));
    for (x, y) in shards.iter().zip(&again) {
        assert_eq!(x.file_name(), y.file_name());
        let (x, y) = (ShardReader::open(x).unwrap(), ShardReader::open(y).unwrap());
        assert_eq!((&x.checksums, &x.labels, &x.ids), (&y.checksums, &y.labels, &y.ids));
    }
    let train = Dataset::open(&[format!("{}/train-*.h5", a.path().display())]).unwrap();
    assert_eq!((train.videos.len(), train.frames(), train.class_names.len()), (21, 21 * 6, 8));
    let reader = ShardReader::open(&train.shards[1]).unwrap();
    let video = scene().video(4, "train", 8 + 3);
    assert_eq!(reader.read(reader.frames_of(3)).unwrap().0, video.frames.concat());
    assert_eq!((reader.labels[3], reader.ids[3].as_str()), (video.label, "train-000011"));
}

#[test]
fn existing_shards_are_kept_unless_told_otherwise_and_bad_values_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |o: &SynthOptions| {
        let error = make(dir.path(), o, &|_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let good = options(Encoding::Jpeg);
    make(dir.path(), &good, &|_| {}).unwrap();
    assert!(refused(&good).contains("--overwrite"));
    let fewer = SynthOptions { videos: 8, test_videos: 0, overwrite: true, ..good.clone() };
    assert_eq!(make(dir.path(), &fewer, &|_| {}).unwrap().len(), 1);
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left = names.filter(|name| name.ends_with(".h5")).count();
    assert_eq!(left, 1 + 2, "the old train shards are gone, the test shards are still there");
    let with = |change: &dyn Fn(&mut Scene)| {
        let mut o = SynthOptions { overwrite: true, ..good.clone() };
        change(&mut o.scene);
        o
    };
    assert!(refused(&with(&|s| s.radius = 9.0)).contains("--radius"));
    assert!(refused(&with(&|s| s.speed = 0.0..0.0)).contains("--speed"));
    assert!(refused(&with(&|s| s.speed = 2.0..f64::NAN)).contains("--speed"));
    assert!(refused(&with(&|s| s.noise = -1.0)).contains("--noise"));
    assert!(refused(&with(&|s| s.camera = f64::INFINITY)).contains("--camera"));
    assert!(refused(&with(&|s| s.texture = 0.0)).contains("--texture"));
    assert!(refused(&with(&|s| s.shapes = 0)).contains("--shapes"));
    assert!(refused(&with(&|s| s.frames = 0)).contains("--frames"));
    assert!(refused(&SynthOptions { quality: 0, ..good.clone() }).contains("--quality"));
    assert!(refused(&SynthOptions { per_shard: 0, ..good.clone() }).contains("--per-shard"));
    assert!(refused(&SynthOptions { videos: 0, ..good.clone() }).contains("--videos"));
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = make(&file.join("x"), &good, &|_| {}).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("cannot write"), "{error}");
}

/// Another that is started meanwhile is refused, and does not give its own unfinished shard the first one's name.
#[test]
fn one_at_a_time_makes_shards_in_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let tried = std::sync::Once::new();
    let shards = make(dir.path(), &options(Encoding::Raw), &|_| {
        tried.call_once(|| {
            let other = SynthOptions { seed: 5, ..options(Encoding::Raw) };
            let error = make(dir.path(), &other, &|_| {}).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("is at work"), "{error}");
        });
    });
    assert_eq!(shards.unwrap().len(), 5);
    assert!(tried.is_completed());
}
