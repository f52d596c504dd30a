//! What is in shards, checked: structure, offsets, labels, checksums, JPEG frames, splits; counts; a contact sheet.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::dataset::{Dataset, expand, missing_shards};
use super::jpeg;
use super::prepare::layout::exclude;
use super::shard::{Encoding, ShardReader};
use crate::{Error, Result};

/// What [`inspect`] found.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// One entry a shard that could be opened.
    pub shards: Vec<ShardSummary>,
    /// All classes, in label order, as the first sound shard has them.
    pub class_names: Vec<String>,
    /// Videos of each class.
    pub per_class: Vec<u64>,
    /// Shortest, longest and all videos together, in frames.
    pub frames: (u64, u64, u64),
    /// Height and width of the first sound shard's frames.
    pub size: (usize, usize),
    /// Ids that more than one video has: the same clip in two splits, or a shard that is there twice.
    pub repeated: Vec<String>,
    /// Videos that two splits have which are to have none in common: each with the splits' names.
    pub shared: Vec<(String, [String; 2])>,
    /// Shards that are not there though later ones of their split are.
    pub missing: Vec<PathBuf>,
    /// What is wrong, an entry an error: damaged videos, unreadable or disagreeing shards.
    pub damage: Vec<String>,
}

/// One shard in numbers.
#[derive(Clone, Debug)]
pub struct ShardSummary {
    /// Its file.
    pub path: PathBuf,
    /// `train`, `test`, …
    pub split: String,
    /// How its frames are stored.
    pub encoding: Encoding,
    /// Videos.
    pub videos: usize,
    /// Frames.
    pub frames: u64,
    /// Size of the file.
    pub bytes: u64,
}

impl Inspection {
    /// Videos in all sound shards.
    pub fn videos(&self) -> u64 {
        self.per_class.iter().sum()
    }
}

/// The shards `patterns` stand for: files, globs, or folders (their `*.h5`).
///
/// # Errors
/// [`Error::Input`] when a pattern or a folder has no shards, or a path leads nowhere.
pub fn find(patterns: &[String]) -> Result<Vec<PathBuf>> {
    if let Some(path) = patterns.iter().find(|p| !p.contains(['*', '?', '[']) && !Path::new(p.as_str()).exists()) {
        return Err(Error::input(format!("{path}: there is no such file or folder")));
    }
    let globs: Vec<String> = patterns
        .iter()
        .map(|p| {
            if Path::new(p).is_dir() {
                format!("{}/*.h5", glob::Pattern::escape(p.trim_end_matches('/')))
            } else {
                p.clone()
            }
        })
        .collect();
    expand(&globs)
}

/// Reads every byte of the shards and checks it. Damage does not end the inspection, it is collected. `progress` is
/// called with the number of bytes' worth of shards done since the last call.
pub fn inspect(files: &[PathBuf], progress: &dyn Fn(u64)) -> Inspection {
    let mut found = Inspection { frames: (u64::MAX, 0, 0), missing: missing_shards(files), ..Inspection::default() };
    let mut sound: Option<PathBuf> = None;
    let mut ids: HashMap<String, u32> = HashMap::new();
    let mut splits: HashMap<(u64, u64), Vec<String>> = HashMap::new();
    for path in files {
        let reader = match ShardReader::open(path) {
            Ok(reader) => reader,
            Err(error) => {
                found.damage.push(error.to_string());
                continue;
            }
        };
        // Dataset::from_files is what training uses: what it would refuse is damage here.
        match &sound {
            None => {
                found.class_names = reader.header.class_names.clone();
                found.per_class = vec![0; found.class_names.len()];
                found.size = (reader.header.height, reader.header.width);
                sound = Some(path.clone());
            }
            Some(first) => {
                if let Err(error) = Dataset::from_files(&[first.clone(), path.clone()]) {
                    found.damage.push(error.to_string());
                    continue;
                }
            }
        }
        let mut told = 0;
        for v in 0..reader.videos() {
            if let Err(error) = reader.verify(v) {
                found.damage.push(error.to_string());
            }
            *ids.entry(reader.ids[v].clone()).or_default() += 1;
            let range = reader.frames_of(v);
            let n = range.end - range.start;
            let (split, of) = (&reader.header.split, splits.entry((reader.checksums[v], n)).or_default());
            if let Some(other) = of.iter().find(|other| exclude(split, other)) {
                found.shared.push((reader.ids[v].clone(), [other.clone(), split.clone()]));
            }
            if !of.contains(split) {
                of.push(split.clone());
            }
            found.per_class[reader.labels[v] as usize] += 1;
            found.frames = (found.frames.0.min(n), found.frames.1.max(n), found.frames.2 + n);
            let done = (reader.bytes as f64 * (v + 1) as f64 / reader.videos() as f64) as u64;
            progress(done - told);
            told = done;
        }
        found.shards.push(ShardSummary {
            path: path.clone(),
            split: reader.header.split.clone(),
            encoding: reader.header.encoding,
            videos: reader.videos(),
            frames: reader.offsets.last().copied().unwrap_or(0),
            bytes: reader.bytes,
        });
    }
    found.repeated = ids.into_iter().filter(|(_, times)| *times > 1).map(|(id, _)| id).collect();
    found.repeated.sort();
    found
}

/// What a contact sheet shows: a row a video, and frames of it from left to right.
#[derive(Clone, Debug, PartialEq)]
pub struct Sheet {
    /// Each row's video and class, from the top.
    pub rows: Vec<(String, String)>,
    /// Frames a row.
    pub columns: usize,
}

/// Pixels of a sheet, at most.
const MOST_PIXELS: usize = 1 << 28;

/// Draws a contact sheet as PNG: up to `rows` videos (of different classes first) and `columns` frames of each, evenly
/// spaced over its length. Damaged shards are passed over, a damaged frame is a red cross.
///
/// # Errors
/// [`Error::Input`] when no shard can be read; [`Error::Io`] when `out` cannot be written.
pub fn contact_sheet(files: &[PathBuf], out: &Path, rows: usize, columns: usize) -> Result<Sheet> {
    const GAP: usize = 2;
    let sound: Vec<PathBuf> = files.iter().filter(|p| ShardReader::open(p).is_ok()).cloned().collect();
    let dataset = Dataset::from_files(&sound)?;
    let (h, w) = (dataset.height, dataset.width);
    let columns = columns.max(1);
    // The first video of each class, then the second of each, …
    let mut seen = vec![0u32; dataset.class_names.len()];
    let mut order: Vec<(u32, i32, usize)> = Vec::new();
    for (i, video) in dataset.videos.iter().enumerate() {
        let round = &mut seen[video.label as usize];
        order.push((*round, video.label, i));
        *round += 1;
    }
    order.sort_unstable();
    order.truncate(rows.max(1));
    let pixels = (h + GAP).checked_mul(w + GAP).and_then(|n| n.checked_mul(order.len())?.checked_mul(columns));
    if pixels.is_none_or(|pixels| pixels > MOST_PIXELS) {
        return Err(Error::input(format!(
            "{}: {} rows of {columns} frames of {h}x{w} are too large a picture (--rows, --columns)",
            out.display(),
            order.len()
        )));
    }
    let (sheet_h, sheet_w) = (order.len() * (h + GAP) - GAP, columns * (w + GAP) - GAP);
    let mut pixels = vec![255u8; sheet_h * sheet_w * 3];
    let mut frame = vec![0u8; h * w * 3];
    for (row, (_, _, index)) in order.iter().enumerate() {
        let video = &dataset.videos[*index];
        let reader = ShardReader::open(&dataset.shards[video.shard])?;
        for column in 0..columns {
            let t = (video.frames - 1) * column as u64 / (columns as u64 - 1).max(1);
            if !read_frame(&reader, video.offset + t, &mut frame) {
                draw_cross(&mut frame, h, w);
            }
            for (y, line) in frame.chunks_exact(w * 3).enumerate() {
                let at = ((row * (h + GAP) + y) * sheet_w + column * (w + GAP)) * 3;
                pixels[at..at + w * 3].copy_from_slice(line);
            }
        }
    }
    let mut writer = png_writer(out, sheet_w, sheet_h, None)?;
    writer.write_image_data(&pixels).and_then(|()| writer.finish()).map_err(|e| Error::io(out, e.into()))?;
    let name = |i: usize| dataset.class_names[dataset.videos[i].label as usize].clone();
    Ok(Sheet { rows: order.iter().map(|&(_, _, i)| (dataset.videos[i].id.clone(), name(i))).collect(), columns })
}

/// Reads frame `f` of a shard as RGB; false where it is damaged.
fn read_frame(reader: &ShardReader, f: u64, rgb: &mut [u8]) -> bool {
    let Ok((bytes, _)) = reader.read(f..f + 1) else { return false };
    match reader.header.encoding {
        Encoding::Raw => rgb.copy_from_slice(&bytes),
        Encoding::Jpeg => return jpeg::decode(&bytes, reader.header.height, reader.header.width, rgb).is_ok(),
    }
    true
}

/// Red diagonals on grey.
fn draw_cross(rgb: &mut [u8], height: usize, width: usize) {
    rgb.fill(128);
    for y in 0..height {
        let x = y * width / height;
        for x in [x, width - 1 - x] {
            rgb[(y * width + x) * 3..][..3].copy_from_slice(&[255, 0, 0]);
        }
    }
}

/// A PNG file of `width` x `height` pixels of RGB, animated if `frames` are given.
///
/// # Errors
/// [`Error::Input`] for a picture larger than PNG allows; [`Error::Io`] when `path` cannot be written.
pub(crate) fn png_writer(
    path: &Path,
    width: usize,
    height: usize,
    frames: Option<u32>,
) -> Result<png::Writer<BufWriter<File>>> {
    let file = BufWriter::new(File::create(path).map_err(|e| Error::io(path, e))?);
    png_into(file, path, width, height, frames)
}

/// The same into `out`; `path` names it in errors.
///
/// # Errors
/// As [`png_writer`].
pub(crate) fn png_into<W: Write>(
    out: W,
    path: &Path,
    width: usize,
    height: usize,
    frames: Option<u32>,
) -> Result<png::Writer<W>> {
    let (Ok(w), Ok(h)) = (u32::try_from(width), u32::try_from(height)) else {
        return Err(Error::input(format!("{}: {height}x{width} pixels are too large a picture", path.display())));
    };
    let mut encoder = png::Encoder::new(out, w, h);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let animated = match frames {
        Some(frames) => encoder.set_animated(frames, 0).and_then(|()| encoder.set_frame_delay(1, 5)),
        None => Ok(()),
    };
    animated.and_then(|()| encoder.write_header()).map_err(|e| Error::io(path, e.into()))
}
