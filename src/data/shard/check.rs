//! What makes a shard valid: pure checks, each with an error that names the file and what is wrong with it.

use std::path::Path;

use super::{Encoding, ShardHeader};
use crate::{Error, Result};

/// Larger frames than this are taken for damage (and would not fit the reader's buffers).
const MAX_SIDE: usize = 8192;
/// A JPEG frame longer than this is taken for damage.
const MAX_JPEG: usize = 256 << 20;

fn bad(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::input(format!("{}: {what}", path.display()))
}

/// The file is there, is a file, and is not empty; its length in bytes.
pub(super) fn file(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| bad(path, format!("this shard cannot be read: {e}")))?;
    if !meta.is_file() {
        return Err(bad(path, "not a file"));
    }
    if meta.len() == 0 {
        return Err(bad(path, "empty file (0 bytes): an interrupted copy?"));
    }
    Ok(meta.len())
}

/// The root attributes make sense.
pub(super) fn header(path: &Path, h: &ShardHeader) -> Result<()> {
    if !(1..=MAX_SIDE).contains(&h.height) || !(1..=MAX_SIDE).contains(&h.width) {
        let (height, width) = (h.height, h.width);
        return Err(bad(path, format!("frames of {height}x{width} (HxW): a side must be 1..={MAX_SIDE}")));
    }
    if !(h.fps.is_finite() && h.fps > 0.0) {
        return Err(bad(path, format!("fps is {}: it must be above 0", h.fps)));
    }
    if h.class_names.is_empty() {
        return Err(bad(path, "class_names is empty"));
    }
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = h.class_names.iter().find(|name| !seen.insert(name.as_str())) {
        return Err(bad(path, format!("class_names has {twice:?} twice: a class needs a name of its own")));
    }
    if h.class_names.iter().any(String::is_empty) {
        return Err(bad(path, "class_names has an empty name"));
    }
    if h.class_names.len() > i32::MAX as usize {
        return Err(bad(path, "class_names is too long"));
    }
    Ok(())
}

/// The label is a class.
pub(super) fn label(path: &Path, id: &str, label: i32, classes: usize) -> Result<()> {
    match usize::try_from(label) {
        Ok(k) if k < classes => Ok(()),
        _ => Err(bad(path, format!("video {id} has label {label}, out of range for {classes} classes"))),
    }
}

/// The per-video lists fit each other; returns the number of frames they speak of.
pub(super) fn videos(
    path: &Path,
    labels: &[i32],
    ids: &[String],
    offsets: &[u64],
    checksums: &[u64],
    classes: usize,
) -> Result<u64> {
    let n = labels.len();
    if n == 0 {
        return Err(bad(path, "the shard holds no videos"));
    }
    for (name, len, wanted) in
        [("video_ids", ids.len(), n), ("video_offsets", offsets.len(), n + 1), ("video_checksums", checksums.len(), n)]
    {
        if len != wanted {
            return Err(bad(path, format!("/{name} has {len} entries, not {wanted}: /labels has {n} videos")));
        }
    }
    if offsets[0] != 0 {
        return Err(bad(path, format!("/video_offsets begins with {}, not 0", offsets[0])));
    }
    for v in 0..n {
        label(path, &ids[v], labels[v], classes)?;
        let (from, to) = (offsets[v], offsets[v + 1]);
        if to == from {
            return Err(bad(path, format!("video {} (number {v}) has no frames", ids[v])));
        }
        if to < from {
            return Err(bad(path, format!("/video_offsets does not grow: entry {} is {to} after {from}", v + 1)));
        }
    }
    Ok(offsets[n])
}

/// The datasets that hold frames have the shapes the header and the `frames` of the videos ask for.
pub(super) fn frame_shapes(
    path: &Path,
    header: &ShardHeader,
    frames: u64,
    data: &[usize],
    frame_offsets: Option<Vec<usize>>,
) -> Result<()> {
    let (h, w) = (header.height, header.width);
    match header.encoding {
        Encoding::Raw => {
            if data.len() != 4 || data[1..] != [h, w, 3] {
                let what = if data.len() == 4 && data[3] != 3 { "wrong channel count: " } else { "" };
                return Err(bad(path, format!("{what}/frames has shape {data:?}, not [frames, {h}, {w}, 3]")));
            }
            if data[0] as u64 != frames {
                return Err(bad(path, format!("/frames has {} frames, /video_offsets ends at {frames}", data[0])));
            }
        }
        Encoding::Jpeg => {
            if data.len() != 1 {
                return Err(bad(path, format!("/jpeg has shape {data:?}, not one dimension")));
            }
            let entries = frame_offsets.unwrap_or_default();
            if entries.len() != 1 || entries[0] as u64 != frames.saturating_add(1) {
                return Err(bad(path, format!("/frame_offsets has shape {entries:?}; {frames} frames need one more")));
            }
        }
    }
    Ok(())
}

/// A part of `/name` that begins at entry `first` grows strictly.
pub(super) fn growing(path: &Path, name: &str, part: &[u64], first: u64) -> Result<()> {
    match part.windows(2).position(|w| w[1] <= w[0]) {
        None => Ok(()),
        Some(i) => {
            let (a, b, at) = (part[i], part[i + 1], first + i as u64 + 1);
            Err(bad(path, format!("/{name} does not grow: entry {at} is {b} after {a}")))
        }
    }
}

/// `/frame_offsets` runs from 0 to the length of `/jpeg`; `part` may hold its first and its last entry.
pub(super) fn frame_ends(path: &Path, part: &[u64], has_first: bool, has_last: bool, bytes: usize) -> Result<()> {
    match (part.first(), part.last()) {
        (Some(&first), _) if has_first && first != 0 => {
            Err(bad(path, format!("/frame_offsets begins with {first}, not 0")))
        }
        (_, Some(&last)) if has_last && last != bytes as u64 => {
            Err(bad(path, format!("/frame_offsets ends at {last}, but /jpeg has {bytes} bytes")))
        }
        _ => Ok(()),
    }
}

/// The bytes `first..last` of `/jpeg`, which hold `frames` frames, are there and of a sane length.
pub(super) fn jpeg_span(path: &Path, first: usize, last: usize, bytes: usize, frames: usize) -> Result<()> {
    if last > bytes || last - first > MAX_JPEG.saturating_mul(frames) {
        let text = format!("/frame_offsets puts {frames} frames at bytes {first}..{last} of {bytes}");
        return Err(bad(path, text));
    }
    Ok(())
}
