//! The sampler's order and the frame stream: purity, replicas, windows, resuming, crops, damage.

use std::collections::BTreeSet;
use std::sync::Arc;

use sideways::data::sampler::MIXED_SHARDS;
use sideways::data::{
    Augmentation, BatchVideos, Dataset, Encoding, FrameStream, Sampler, SamplerOptions, StreamOptions, VideoWindow,
    Views,
};

use crate::common::numbers::close_each;
use crate::support::shard;

fn sampler(lengths: &[u64], options: SamplerOptions) -> Sampler {
    Sampler::new(lengths.to_vec(), options).unwrap()
}

fn training(batch: usize, replicas: usize, replica: usize, seed: u64) -> SamplerOptions {
    SamplerOptions {
        frames: 4,
        stride: 2,
        batch,
        shuffle: true,
        training: true,
        again: false,
        views: Views::ONE,
        seed,
        replicas,
        replica,
    }
}

const LENGTHS: [u64; 23] = [9, 1, 7, 30, 8, 12, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21];

#[test]
fn order_depends_on_seed_epoch_and_data_alone() {
    let windows = |seed, clips: &[u64]| -> Vec<_> {
        let mut s = sampler(&LENGTHS, training(4, 1, 0, seed));
        clips.iter().map(|&c| s.batch(c)).collect()
    };
    // 23 videos, batches of 4: 5 clips an epoch, 3 videos dropped.
    let forward = windows(7, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let mut backward = windows(7, &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]);
    backward.reverse();
    assert_eq!(forward, backward);
    assert_ne!(forward, windows(8, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]));
    assert_ne!(forward[..5], forward[5..], "epochs must differ");
    for epoch in forward.chunks(5) {
        let seen: BTreeSet<usize> = epoch.iter().flatten().flatten().map(|w| w.video).collect();
        assert_eq!(seen.len(), 20, "no video twice in an epoch");
    }
}

#[test]
fn replicas_together_are_one_replica_with_a_larger_batch() {
    for training_mode in [true, false] {
        for (batch, replicas) in [(2, 3), (3, 2), (1, 5), (4, 1)] {
            let of = |b, n, r| sampler(&LENGTHS, SamplerOptions { training: training_mode, ..training(b, n, r, 3) });
            let mut whole = of(batch * replicas, 1, 0);
            let mut parts: Vec<_> = (0..replicas).map(|r| of(batch, replicas, r)).collect();
            assert_eq!(whole.batches_per_epoch(), parts[0].batches_per_epoch());
            assert!(whole.batches_per_epoch() > 1);
            for clip in 0..2 * whole.batches_per_epoch() {
                let joined: Vec<_> = parts.iter_mut().flat_map(|p| p.batch(clip)).collect();
                assert_eq!(joined, whole.batch(clip), "clip {clip}, batch {batch}, replicas {replicas}");
            }
        }
    }
}

#[test]
fn windows_follow_the_rules() {
    let spans = |options: SamplerOptions| -> Vec<VideoWindow> {
        let mut s = sampler(&LENGTHS, options);
        (0..s.batches_per_epoch()).flat_map(|c| s.batch(c)).flatten().collect()
    };
    let base = SamplerOptions { frames: 4, stride: 2, ..training(1, 1, 0, 5) };
    // A window spans (4 - 1) * 2 + 1 = 7 source frames.
    assert_eq!(spans(base.clone()).len(), LENGTHS.len());
    for w in spans(base.clone()) {
        assert!(w.start <= w.length.saturating_sub(7), "{w:?}");
        assert_eq!(w.source(3), if w.length >= 7 { w.start + 6 } else { w.length - 1 });
    }
    let unshuffled = spans(SamplerOptions { shuffle: false, ..base.clone() });
    assert!(unshuffled.len() == LENGTHS.len() && unshuffled.iter().all(|w| w.start == 0), "{unshuffled:?}");
    let evaluation = spans(SamplerOptions { training: false, ..base.clone() });
    assert_eq!(evaluation.iter().map(|w| w.video).collect::<Vec<_>>(), (0..23).collect::<Vec<_>>());
    for w in evaluation {
        assert_eq!(w.start, w.length.saturating_sub(7) / 2);
    }
    // The start of a long video is drawn anew each epoch, and all its starts occur.
    let mut s = sampler(&[10], SamplerOptions { ..base });
    let starts: BTreeSet<u64> = (0..200).map(|c| s.batch(c)[0].unwrap().start).collect();
    assert_eq!(starts, (0..=3).collect());
}

#[test]
fn a_short_video_repeats_its_last_frame() {
    let w = VideoWindow { video: 0, start: 0, stride: 2, length: 4, crop: 0 };
    assert_eq!((0..5).map(|t| w.source(t)).collect::<Vec<_>>(), [0, 2, 3, 3, 3]);
}

#[test]
fn evaluation_pads_its_last_batch() {
    let mut s = sampler(&[8; 5], SamplerOptions { training: false, ..training(2, 2, 1, 1) });
    assert_eq!(s.batches_per_epoch(), 2);
    let videos = |b: Vec<Option<VideoWindow>>| b.iter().map(|w| w.map(|w| w.video)).collect::<Vec<_>>();
    assert_eq!(videos(s.batch(0)), [Some(2), Some(3)]);
    assert_eq!(videos(s.batch(1)), [None, None]);
    let mut s = sampler(&[8; 5], SamplerOptions { training: false, ..training(2, 2, 0, 1) });
    assert_eq!(videos(s.batch(1)), [Some(4), None]);
    assert_eq!(videos(s.batch(u64::MAX)), [None, None]);
}

/// Clips of a video from its first frame to its last, crops side by side; replicas share them; again and again.
#[test]
fn every_view_of_every_video_comes_once() {
    let views = Views { clips: 3, crops: 3 };
    let all = |batch, replicas, passes: u64| -> Vec<_> {
        let options =
            |r| SamplerOptions { training: false, again: passes > 1, views, ..training(batch, replicas, r, 1) };
        let mut samplers: Vec<_> = (0..replicas).map(|r| sampler(&[17, 7, 3], options(r))).collect();
        let batches = passes * samplers[0].batches_per_epoch();
        let windows = (0..batches).flat_map(|n| samplers.iter_mut().flat_map(|s| s.batch(n)).collect::<Vec<_>>());
        windows.flatten().map(|w| (w.video, w.start, w.crop)).collect()
    };
    // Windows of seven frames.
    let starts = [(0, 0), (0, 5), (0, 10), (1, 0), (1, 0), (1, 0), (2, 0), (2, 0), (2, 0)];
    let expected: Vec<_> = starts.iter().flat_map(|&(v, start)| (0..3).map(move |crop| (v, start, crop))).collect();
    assert_eq!(all(1, 1, 1), expected);
    assert_eq!(all(4, 1, 1), expected);
    assert_eq!(all(2, 3, 1), expected);
    assert_eq!(all(2, 3, 2), [&expected[..], &expected[..]].concat());
}

#[test]
fn impossible_options_are_refused() {
    let refused = |lengths: &[u64], o: SamplerOptions| Sampler::new(lengths.to_vec(), o).unwrap_err().to_string();
    let base = training(4, 1, 0, 1);
    assert!(refused(&[9; 3], base.clone()).contains("3 videos are fewer than one batch of 4 x 1"));
    assert!(refused(&[9; 9], SamplerOptions { stride: 0, ..base.clone() }).contains("stride"));
    assert!(refused(&[9; 9], SamplerOptions { replica: 1, ..base.clone() }).contains("replica 1"));
    assert!(refused(&[], base.clone()).contains("no videos"));
    assert!(refused(&[9; 9], SamplerOptions { batch: usize::MAX, replicas: 2, ..base }).contains("fewer"));
}

/// A dataset of two shards with videos of lengths 12, 3, 20 | 9, 15, 7, 30.
fn dataset(dir: &std::path::Path, encoding: Encoding) -> Arc<Dataset> {
    shard(&dir.join("a-00000.h5"), encoding, [16, 24], 0, &[12, 3, 20]);
    shard(&dir.join("a-00001.h5"), encoding, [16, 24], 3, &[9, 15, 7, 30]);
    Arc::new(Dataset::open(&[format!("{}/a-*.h5", dir.display())]).unwrap())
}

fn flip() -> Augmentation {
    Augmentation { flip: true, ..Augmentation::default() }
}

fn options() -> StreamOptions {
    // Normalisation off: a value is its byte / 255.
    StreamOptions { frames: 6, batch: 2, mean: [0.0; 3], std: [1.0; 3], chunk: 4, ..StreamOptions::default() }
}

fn values(frame: sideways::Result<candle_core::Tensor>) -> Vec<f32> {
    frame.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Clips `options.first_batch..end` with all their frames.
fn run(data: &Arc<Dataset>, options: StreamOptions, end: u64) -> Vec<(BatchVideos, Vec<Vec<f32>>)> {
    let (first, frames, batch) = (options.first_batch, options.frames, options.batch);
    let mut stream = FrameStream::open(data.clone(), options).unwrap();
    let [h, w, c] = stream.shape();
    (first..end)
        .map(|clip| {
            let info = stream.begin(clip).unwrap();
            let all = (0..frames)
                .map(|t| {
                    let out = values(stream.frame(t));
                    assert_eq!(out.len(), batch * h * w * c);
                    out
                })
                .collect();
            (info, all)
        })
        .collect()
}

/// The red (video) and green (frame) bytes of place b, read back from a delivered frame.
fn told(frame: &[f32], batch: usize, b: usize) -> (usize, usize) {
    let at = b * frame.len() / batch;
    let byte = |x: f32| (x * 255.0).round() as usize;
    ((byte(frame[at]) - 40) / 7, (byte(frame[at + 1]) - 30) / 3)
}

#[test]
fn the_stream_delivers_the_samplers_windows() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    for (training, shuffle, stride, chunk) in
        [(true, true, 1, 4), (true, false, 3, 1), (false, false, 2, 8), (true, true, 7, 6)]
    {
        let o = StreamOptions { training, shuffle, stride, chunk, ..options() };
        let mut s = Sampler::new(data.videos.iter().map(|v| v.frames).collect(), o.sampler()).unwrap();
        let mut checked = 0;
        for (clip, (info, frames)) in run(&data, o, 3).into_iter().enumerate() {
            for (b, window) in s.batch(clip as u64).into_iter().enumerate() {
                assert_eq!(info.videos[b], window.map(|w| w.video));
                let Some(w) = window else { continue };
                assert_eq!(info.labels[b], (w.video % 3) as i32);
                assert_eq!(info.ids[b], format!("video-{}", w.video));
                for (t, frame) in frames.iter().enumerate() {
                    assert_eq!(told(frame, 2, b), (w.video, w.source(t) as usize), "clip {clip} place {b} frame {t}");
                    checked += 1;
                }
            }
        }
        // Three clips of two windows of six frames, none of them padding.
        assert_eq!(checked, 3 * 2 * 6);
    }
}

#[test]
fn resuming_at_a_clip_gives_the_same_frames() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Jpeg);
    let o =
        StreamOptions { training: true, shuffle: true, augmentation: flip(), crop: Some(10), decoders: 2, ..options() };
    let all = run(&data, o.clone(), 8);
    assert_eq!(run(&data, StreamOptions { first_batch: 5, decoders: 1, chunk: 1, ..o }, 8), all[5..]);
}

#[test]
fn crop_and_flip_are_one_for_all_frames_of_a_clip_and_central_in_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    let o = StreamOptions { training: true, shuffle: true, augmentation: flip(), crop: Some(8), ..options() };
    let mut mirrored = BTreeSet::new();
    let mut lefts = BTreeSet::new();
    for (_, frames) in run(&data, o.clone(), 60) {
        for b in 0..2 {
            let blue = |frame: &Vec<f32>| -> Vec<f32> { (0..8).map(|x| frame[b * 8 * 8 * 3 + x * 3 + 2]).collect() };
            let first = blue(&frames[0]);
            assert!(frames.iter().all(|f| blue(f) == first));
            mirrored.insert(first[0] > first[7]);
            lefts.insert((first[0].min(first[7]) * 255.0).round() as usize);
        }
    }
    assert_eq!(mirrored.len(), 2, "both orientations occur");
    assert_eq!(lefts.len(), 17, "all 24 - 8 + 1 crops occur: {lefts:?}");
    for (_, frames) in run(&data, StreamOptions { training: false, ..o }, 2) {
        assert_eq!((frames[0][2] * 255.0).round() as usize, 8 * 160 / 24, "the crop starts at column (24 - 8) / 2");
    }
}

#[test]
fn raw_and_jpeg_agree_and_normalisation_is_applied() {
    let (raw, jpeg) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let o = StreamOptions { mean: [0.5, 0.4, 0.3], std: [0.25, 0.5, 1.0], ..options() };
    let a = run(&dataset(raw.path(), Encoding::Raw), o.clone(), 3);
    let b = run(&dataset(jpeg.path(), Encoding::Jpeg), o, 3);
    assert_eq!((a.len(), b.len()), (3, 3));
    for ((info, x), (same, y)) in a.iter().zip(&b) {
        assert_eq!(info, same);
        // 4 of 255 levels, over the smallest std: what quality 95 costs on flat colours and a ramp.
        let wide = |frames: &[Vec<f32>]| frames.iter().flatten().map(|&v| f64::from(v)).collect::<Vec<_>>();
        close_each("JPEG", &wide(y), &wide(x), |_| 4.0 / 255.0 / 0.25);
    }
    assert!((a[0].1[0][0] - (40.0 / 255.0 - 0.5) / 0.25).abs() < 1e-6);
}

#[test]
fn padding_has_label_minus_one_and_zero_frames() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    let (info, frames) = run(&data, StreamOptions { batch: 5, ..options() }, 2).remove(1);
    assert_eq!(info.labels, [2, 0, -1, -1, -1]);
    assert_eq!(info.ids[2..], ["", "", ""]);
    assert!(frames.iter().all(|f| f[2 * f.len() / 5..].iter().all(|&x| x == 0.0)));
}

#[test]
fn frames_ahead_can_be_read_and_older_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    let o = StreamOptions { frames: 20, ahead: 5, chunk: 2, batch: 1, first_batch: 2, ..options() };
    let mut stream = FrameStream::open(data, o).unwrap();
    assert!(stream.frame(0).unwrap_err().to_string().contains("before any batch"));
    stream.begin(2).unwrap();
    for t in 0..15 {
        for want in [t, t + 5] {
            assert_eq!(told(&values(stream.frame(want)), 1, 0), (2, want));
        }
    }
    assert!(stream.frame(7).unwrap_err().to_string().contains("no longer held"));
    assert!(stream.frame(20).unwrap_err().to_string().contains("frame 20 of 20"));
    assert!(stream.begin(2).unwrap_err().to_string().contains("its next is 3"));
    // Beginning the next clip early drops the rest of this one.
    stream.begin(3).unwrap();
    stream.begin(4).unwrap();
    assert_eq!(told(&values(stream.frame(3)), 1, 0), (4, 3));
}

#[test]
fn a_stream_ends_and_can_be_dropped_at_any_time() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    drop(FrameStream::open(data.clone(), options()).unwrap());
    let mut stream = FrameStream::open(data, StreamOptions { end_batch: 2, ..options() }).unwrap();
    stream.begin(0).unwrap();
    stream.begin(1).unwrap();
    assert!(stream.begin(2).unwrap_err().to_string().contains("ends before 2"));
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    let refused = |o| FrameStream::open(data.clone(), o).err().unwrap().to_string();
    assert!(refused(StreamOptions { crop: Some(17), ..options() }).contains("16x24"));
    assert!(refused(StreamOptions { crop: Some(0), ..options() }).contains("crop"));
    assert!(refused(StreamOptions { std: [1.0, 0.0, 1.0], ..options() }).contains("std"));
    assert!(refused(StreamOptions { frames: 0, ..options() }).contains("frames"));
    assert!(refused(StreamOptions { chunk: 0, ..options() }).contains("chunk"));
}

/// Runs until an error comes; it must name the shard, and it must stay.
fn fails(data: Arc<Dataset>, o: StreamOptions) -> String {
    let mut stream = FrameStream::open(data, o.clone()).unwrap();
    for clip in 0..100 {
        let step = stream.begin(clip).and_then(|_| (0..o.frames).try_for_each(|t| stream.frame(t).map(|_| ())));
        if let Err(error) = step {
            assert_eq!(error.exit_code(), 2);
            assert!(stream.frame(0).is_err() || stream.begin(clip + 1).is_err());
            return error.to_string();
        }
    }
    panic!("no error came");
}

#[test]
fn a_shard_that_vanishes_or_shrinks_while_in_use_is_an_error_not_a_hang() {
    let o = StreamOptions { training: true, batch: 1, ..options() };
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    std::fs::remove_file(&data.shards[1]).unwrap();
    let error = fails(data, o.clone());
    assert!(error.contains("a-00001.h5") && error.contains("No such file"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    let mut stream = FrameStream::open(data.clone(), o).unwrap();
    stream.begin(0).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&data.shards[0]).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let error = (1..100).find_map(|clip| stream.begin(clip).err()).unwrap().to_string();
    assert!(error.contains("a-00000.h5") && error.contains("truncated"), "{error}");
}

/// Also where the new one has the same videos, stored in another way.
#[test]
fn a_shard_that_is_replaced_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Raw);
    dataset(dir.path(), Encoding::Jpeg);
    let error = fails(data, StreamOptions { training: true, batch: 1, ..options() });
    assert!(error.contains("the shard has changed since the run began"), "{error}");
}

/// Overwrites a part of frame 4 of the second video of `data`'s second shard.
fn damage_video_4(data: &Dataset) {
    let path = &data.shards[1];
    let mut bytes = std::fs::read(path).unwrap();
    let at = if data.encoding == Encoding::Jpeg {
        // Frames come first in the file, after the header.
        let starts: Vec<usize> = (0..bytes.len() - 2).filter(|&i| bytes[i..i + 3] == [0xff, 0xd8, 0xff]).collect();
        assert_eq!(starts.len(), 9 + 15 + 7 + 30);
        starts[9 + 4]
    } else {
        let frame = crate::support::pixels(4, 4, 16, 24);
        (0..bytes.len()).find(|&i| bytes[i..].starts_with(&frame)).unwrap()
    };
    bytes[at..at + 100].fill(0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_video_is_skipped_in_training_and_an_error_in_evaluation() {
    for (encoding, verify) in [(Encoding::Jpeg, true), (Encoding::Raw, true), (Encoding::Jpeg, false)] {
        let dir = tempfile::tempdir().unwrap();
        let data = dataset(dir.path(), encoding);
        let o = StreamOptions { training: true, shuffle: false, verify, frames: 9, batch: 3, ..options() };
        let sound = run(&data, o.clone(), 4);
        damage_video_4(&data);
        let mut stream = FrameStream::open(data.clone(), o.clone()).unwrap();
        // Two clips an epoch, the second of videos 3, 4 and 5.
        for (clip, (before, frames)) in sound.iter().enumerate() {
            let info = stream.begin(clip as u64).unwrap();
            let met = clip % 2 == 1;
            let mut labels = before.labels.clone();
            // Without checksums the damage is only met at frame 4, the first of the second chunk, when the labels
            // are told; from the next epoch on it is known.
            if met && (verify || clip == 3) {
                labels[1] = -1;
            }
            assert_eq!(info.labels, labels, "clip {clip}, {encoding:?}, verify {verify}");
            assert_eq!((&info.ids, &info.videos), (&before.ids, &before.videos));
            for (t, before) in frames.iter().enumerate() {
                let mut wanted = before.clone();
                let place = wanted.len() / 3..wanted.len() / 3 * 2;
                let empty = met && (verify || clip == 3 || t >= 4);
                if empty {
                    wanted[place.clone()].fill(0.0);
                }
                assert_eq!(values(stream.frame(t)), wanted, "clip {clip} frame {t}, {encoding:?}, verify {verify}");
            }
            assert_eq!(stream.skipped(), if met { &[1][..] } else { &[] });
        }
        let error = fails(data, StreamOptions { training: false, ..o });
        assert!(error.contains("a-00001.h5") && error.contains("video-4") && error.contains("damaged"), "{error}");
    }
}

/// All that is drawn at random, and resizing.
fn augmented() -> StreamOptions {
    let augmentation =
        Augmentation { crop_scale: Some([0.3, 1.0]), brightness: 0.4, contrast: 0.3, saturation: 0.5, ..flip() };
    StreamOptions { training: true, shuffle: true, crop: Some(10), augmentation, ..options() }
}

#[test]
fn threads_chunks_and_replicas_change_no_bit_of_a_clip() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Jpeg);
    let whole = StreamOptions { batch: 4, ..augmented() };
    let all = run(&data, whole.clone(), 5);
    for (decoders, chunk, prefetch) in [(2, 1, 0), (3, 3, 5), (8, 6, 1)] {
        let o = StreamOptions { decoders, chunk, prefetch, ..whole.clone() };
        assert!(run(&data, o, 5) == all, "{decoders} threads, chunks of {chunk}");
    }
    // Two replicas with half the batch have the two halves.
    let halves = [0, 1].map(|replica| run(&data, StreamOptions { batch: 2, replicas: 2, replica, ..augmented() }, 5));
    for (clip, (info, frames)) in all.iter().enumerate() {
        let (a, b) = (&halves[0][clip], &halves[1][clip]);
        assert_eq!([&a.0.videos[..], &b.0.videos].concat(), info.videos);
        let joined: Vec<Vec<f32>> = a.1.iter().zip(&b.1).map(|(a, b)| [&a[..], b].concat()).collect();
        assert!(joined == *frames, "clip {clip}");
    }
}

#[test]
fn augmentation_is_one_for_all_frames_of_a_clip() {
    let dir = tempfile::tempdir().unwrap();
    // Videos of one frame: windows repeat it, so all that could differ is the augmentation.
    shard(&dir.path().join("still.h5"), Encoding::Jpeg, [16, 24], 0, &[1; 6]);
    let data = Arc::new(Dataset::open(&[format!("{}/still.h5", dir.path().display())]).unwrap());
    let clips = run(&data, StreamOptions { batch: 1, ..augmented() }, 24);
    assert!(clips.iter().all(|(_, frames)| frames.iter().all(|f| *f == frames[0])));
    let of = |video| clips.iter().filter(|(c, _)| c.videos == [Some(video)]).map(|(_, f)| &f[0]).collect::<Vec<_>>();
    assert!((0..6).all(|v| of(v).len() == 4 && of(v).windows(2).all(|w| w[0] != w[1])), "drawn anew each epoch");
}

#[test]
fn resuming_within_an_epoch_gives_the_same_augmented_clips() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), Encoding::Jpeg);
    let o = augmented();
    let all = run(&data, o.clone(), 8);
    let again = StreamOptions { first_batch: 5, decoders: 3, chunk: 1, prefetch: 0, verify: false, ..o.clone() };
    assert_eq!(run(&data, again, 8), all[5..]);
    let plain = run(&data, StreamOptions { augmentation: Augmentation::default(), ..o }, 8);
    assert!(plain.len() == all.len() && plain.iter().zip(&all).all(|((a, x), (b, y))| a == b && x != y));
}

#[test]
fn many_shards_are_mixed_a_few_at_a_time_and_every_video_comes_once() {
    let dir = tempfile::tempdir().unwrap();
    for s in 0..MIXED_SHARDS * 2 + 3 {
        shard(&dir.path().join(format!("m-{s:03}.h5")), Encoding::Raw, [4, 4], s * 3, &[2, 2, 2]);
    }
    let data = Dataset::open(&[format!("{}/m-*.h5", dir.path().display())]).unwrap();
    let order = |epoch: u64| -> Vec<usize> {
        let mut s = Sampler::of(&data, training(1, 1, 0, 11)).unwrap();
        let clips = s.batches_per_epoch();
        (epoch * clips..(epoch + 1) * clips).map(|c| s.batch(c)[0].unwrap().video).collect()
    };
    let (first, second) = (order(0), order(1));
    assert_eq!(first, order(0));
    assert_ne!(first, second);
    for order in [first, second] {
        assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), data.videos.len());
        let groups: Vec<BTreeSet<usize>> =
            order.chunks(MIXED_SHARDS * 3).map(|g| g.iter().map(|&v| data.videos[v].shard).collect()).collect();
        assert_eq!(groups.iter().map(BTreeSet::len).collect::<Vec<_>>(), [MIXED_SHARDS, MIXED_SHARDS, 3]);
        assert!(groups[0].last() > Some(&MIXED_SHARDS), "shards are mixed: {groups:?}");
    }
}
