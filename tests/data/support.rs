//! Small shards for the data tests. The frame t of video v is recognisable from any of its pixels.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use sideways::data::{Encoding, ShardHeader, ShardWriter, jpeg};

pub const CLASSES: [&str; 3] = ["run", "jump", "fall"];

pub fn header(encoding: Encoding, height: usize, width: usize) -> ShardHeader {
    ShardHeader {
        encoding,
        fps: 25.0,
        height,
        width,
        dataset: "tiny".into(),
        split: "train".into(),
        class_names: CLASSES.iter().map(|s| s.to_string()).collect(),
    }
}

/// RGB: red tells the video, green the frame, blue is a smooth ramp (JPEG keeps it) that tells left from right.
pub fn pixels(video: usize, t: usize, height: usize, width: usize) -> Vec<u8> {
    (0..height * width)
        .flat_map(|i| [(40 + video * 7 % 180) as u8, (30 + t * 3 % 200) as u8, (i % width * 160 / width) as u8])
        .collect()
}

/// Writes a shard whose video v (counted from `first`) has `lengths[v]` frames and label v % 3.
pub fn shard(path: &Path, encoding: Encoding, size: [usize; 2], first: usize, lengths: &[usize]) -> PathBuf {
    let [h, w] = size;
    let mut writer = ShardWriter::create(path, header(encoding, h, w)).unwrap();
    for (i, &frames) in lengths.iter().enumerate() {
        let v = first + i;
        let stored = (0..frames).map(|t| match encoding {
            Encoding::Raw => pixels(v, t, h, w),
            Encoding::Jpeg => jpeg::encode(&pixels(v, t, h, w), h, w, 95).unwrap(),
        });
        writer.append(&format!("video-{v}"), (v % 3) as i32, stored).unwrap();
    }
    writer.finish().unwrap()
}
