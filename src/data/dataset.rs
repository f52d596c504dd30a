//! Many shards seen as one list of videos.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::prepare::record::{self, Record, State};
use super::shard::{Encoding, ShardReader};
use crate::{Error, Result};

/// One video of a [`Dataset`].
#[derive(Clone, Debug, PartialEq)]
pub struct Video {
    /// Its class, an index into [`Dataset::class_names`].
    pub label: i32,
    /// Its length in frames, at least 1.
    pub frames: u64,
    /// The shard that holds it, an index into [`Dataset::shards`].
    pub shard: usize,
    /// Its place among the shard's videos.
    pub index: usize,
    /// Its first frame, counted in the shard.
    pub offset: u64,
    /// Its name.
    pub id: String,
    /// XXH3-64 of its stored bytes.
    pub checksum: u64,
}

/// The videos of a set of shards, in shard order. Holds no open files and no frames.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The shards' files, sorted within each pattern.
    pub shards: Vec<PathBuf>,
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
    /// Frames a second.
    pub fps: f64,
    /// The dataset's name, as its first shard has it.
    pub name: String,
    /// How frames are stored, as the first shard has it (shards of both kinds may be mixed).
    pub encoding: Encoding,
    /// All videos: shard after shard, in the order they lie there.
    pub videos: Vec<Video>,
}

impl Dataset {
    /// Opens and checks all shards that match `patterns` (paths, or globs such as `data/motion/train-*.h5`).
    ///
    /// # Errors
    /// [`Error::Input`] when a pattern matches nothing, a shard is malformed, or two shards disagree on classes,
    /// frame size or frame rate (the error names both).
    pub fn open<S: AsRef<str>>(patterns: &[S]) -> Result<Dataset> {
        Self::from_files(&expand(patterns)?)
    }

    /// The same for a list of files.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn from_files(files: &[PathBuf]) -> Result<Dataset> {
        let Some((first, rest)) = files.split_first() else {
            return Err(Error::input("no shards were given: name at least one, for instance data/motion/train-*.h5"));
        };
        let reader = ShardReader::open(first)?;
        let header = reader.header.clone();
        let mut dataset = Dataset {
            shards: Vec::new(),
            class_names: header.class_names.clone(),
            height: header.height,
            width: header.width,
            fps: header.fps,
            name: header.dataset.clone(),
            encoding: header.encoding,
            videos: Vec::new(),
        };
        dataset.add(&reader)?;
        for path in rest {
            dataset.add(&ShardReader::open(path)?)?;
        }
        Ok(dataset)
    }

    /// Frames of all videos together.
    pub fn frames(&self) -> u64 {
        self.videos.iter().map(|v| v.frames).sum()
    }

    /// A hash of all that decides which clips there are and what is in them: the videos, in order.
    pub fn digest(&self) -> String {
        let mut hash = Xxh3::new();
        for video in &self.videos {
            hash.update(&video.label.to_le_bytes());
            hash.update(&video.frames.to_le_bytes());
            hash.update(&video.checksum.to_le_bytes());
        }
        format!("{:016x}", hash.digest())
    }

    fn add(&mut self, reader: &ShardReader) -> Result<()> {
        let h = &reader.header;
        if let Some(first) = self.shards.first() {
            agree(first, &reader.path, "frame size HxW", &(self.height, self.width), &(h.height, h.width))?;
            agree(first, &reader.path, "frame rate", &self.fps, &h.fps)?;
            agree(first, &reader.path, "number of classes", &self.class_names.len(), &h.class_names.len())?;
            for (k, (a, b)) in self.class_names.iter().zip(&h.class_names).enumerate() {
                agree(first, &reader.path, &format!("name of class {k}"), a, b)?;
            }
        }
        let shard = self.shards.len();
        self.videos.extend((0..reader.videos()).map(|v| {
            let range = reader.frames_of(v);
            Video {
                label: reader.labels[v],
                frames: range.end - range.start,
                shard,
                index: v,
                offset: range.start,
                id: reader.ids[v].clone(),
                checksum: reader.checksums[v],
            }
        }));
        self.shards.push(reader.path.clone());
        Ok(())
    }
}

fn agree<T: PartialEq + std::fmt::Debug>(first: &Path, second: &Path, what: &str, a: &T, b: &T) -> Result<()> {
    if a == b {
        return Ok(());
    }
    Err(Error::input(format!(
        "shards of one dataset must agree on the {what}: {} has {a:?}, {} has {b:?}",
        first.display(),
        second.display()
    )))
}

/// Shards that are not on disk though later ones of their split are: `train-00002.h5` beside `train-00003.h5`. A copy may have
/// lost them. Those that `data prepare` has not made, for want of a good video in them, are none of these.
pub fn missing_shards(shards: &[PathBuf]) -> Vec<PathBuf> {
    let mut splits: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for path in shards {
        let name = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.rsplit_once('-'));
        if let Some((split, digits)) = name
            && digits.len() == 5
            && let Ok(number) = digits.parse()
        {
            let last = splits.entry(path.with_file_name(split)).or_insert(number);
            *last = number.max(*last);
        }
    }
    let before = |(split, last): (PathBuf, usize)| {
        let split = split.display().to_string();
        (0..last).map(move |number| PathBuf::from(format!("{split}-{number:05}.h5")))
    };
    splits.into_iter().flat_map(before).filter(|path| !path.exists() && !was_empty(path)).collect()
}

/// Whether `data prepare` says that no video of this shard was any good.
fn was_empty(path: &Path) -> bool {
    let number = |path: &Path| -> Option<(String, usize)> {
        let (split, digits) = path.file_stem()?.to_str()?.rsplit_once('-')?;
        Some((split.to_string(), digits.parse().ok()?))
    };
    let Some((split, number)) = number(path) else { return false };
    let state = State::new(path.parent().unwrap_or(Path::new("")), &split);
    state.read::<Record>(&record::name(number)).is_some_and(|record| record.bytes == 0)
}

/// The files `patterns` stand for: each pattern's in sorted order, none twice.
///
/// # Errors
/// [`Error::Input`] for a pattern that is malformed, matches no file, or a folder that cannot be read.
pub fn expand<S: AsRef<str>>(patterns: &[S]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    for pattern in patterns {
        let pattern = pattern.as_ref();
        // A plain path is taken as it is, even with a `[` in it; its absence is then the reader's to report.
        let matched = if !pattern.contains(['*', '?', '[']) || Path::new(pattern).is_file() {
            vec![PathBuf::from(pattern)]
        } else {
            let paths = glob::glob(pattern).map_err(|e| Error::input(format!("bad pattern {pattern:?}: {e}")))?;
            paths
                .collect::<std::result::Result<Vec<_>, _>>()
                .map_err(|e| Error::input(format!("pattern {pattern:?}: {e}")))?
        };
        if matched.is_empty() {
            let hint = match pattern.contains('[') {
                true => "; [ ] stand for one of the characters in them: a [ in a name is written [[]",
                false => "",
            };
            return Err(Error::input(format!(
                "no file matches {pattern:?}: is the path right, was the data made?{hint}"
            )));
        }
        files.extend(matched.into_iter().filter(|p| seen.insert(p.clone())));
    }
    Ok(files)
}
