//! What layouts find, outside of memory: a large dataset has hundreds of thousands of videos, of which most may be missing.

use std::path::Path;

use super::{Place, nothing_in};
use crate::data::prepare::description::SplitDescription;
use crate::data::prepare::files::{Order, VideoFile, walk};
use crate::sys::sorting::{Record, Sorted, Sorter};
use crate::{Error, Result};

/// One video whose file is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name, unique in the split: `CLASS/file name`, Kinetics: `ID_START_END`.
    pub id: String,
    /// Its class, an index into [`super::Listing::class_names`].
    pub label: i32,
    /// The file, below the folder of videos.
    pub path: String,
}

impl Source {
    /// Class and path, as they are sorted with something.
    pub(in crate::data::prepare) fn to_value(label: i32, path: &str) -> Vec<u8> {
        [&label.to_le_bytes()[..], path.as_bytes()].concat()
    }

    /// The other way.
    pub(in crate::data::prepare) fn of_value(id: String, value: &[u8]) -> Result<Self> {
        let parts =
            value.split_first_chunk().ok_or_else(|| Error::Run(format!("{id}: sorted without a class (a bug)")));
        let (label, path) = parts?;
        Ok(Source { id, label: i32::from_le_bytes(*label), path: text(path) })
    }
}

/// What was text when it was sorted.
pub(in crate::data::prepare) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The videos of a split that are there.
#[derive(Debug, Default)]
pub struct There {
    by_id: Sorted,
    /// Of each by path, with its id.
    by_path: Sorted,
    /// The label of each class as it was found.
    labels: Vec<i32>,
}

impl There {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// They, by id.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn iter(&self) -> impl Iterator<Item = Result<Source>> {
        self.by_id.iter().map(|record| {
            let Record { key, value } = record?;
            let found = Source::of_value(text(&key), &value)?;
            let label = self.labels.get(found.label as usize).copied().unwrap_or(found.label);
            Ok(Source { label, ..found })
        })
    }

    /// Their paths, in order, each with its video's id.
    pub(in crate::data::prepare) fn by_path(&self) -> &Sorted {
        &self.by_path
    }

    /// The labels of the classes by the numbers that they were added with.
    pub(super) fn set_labels(&mut self, labels: Vec<i32>) {
        self.labels = labels;
    }
}

/// Takes the videos of a split that are there, in any order.
pub(in crate::data::prepare) struct AddThere {
    by_id: Sorter,
    by_path: Sorter,
}

impl AddThere {
    pub(in crate::data::prepare) fn new(scratch: &Path) -> Self {
        AddThere { by_id: Sorter::new(scratch), by_path: Sorter::new(scratch) }
    }

    pub(in crate::data::prepare) fn push(&mut self, id: &str, label: i32, path: &str) -> Result<()> {
        self.by_id.push(id.as_bytes(), &Source::to_value(label, path))?;
        self.by_path.push(path.as_bytes(), id.as_bytes())
    }

    pub(in crate::data::prepare) fn sorted(self) -> There {
        There { by_id: self.by_id.sorted(), by_path: self.by_path.sorted(), labels: Vec::new() }
    }
}

/// The ids of a split's videos that are listed and not there, in order.
#[derive(Debug, Default)]
pub struct Missing(Sorted);

impl Missing {
    pub(in crate::data::prepare) fn of(ids: Sorter) -> Self {
        Missing(ids.sorted())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their ids, from the first on.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn ids(&self) -> impl Iterator<Item = Result<String>> {
        self.0.iter().map(|record| Ok(text(&record?.key)))
    }
}

/// All that lies below the folder of videos, whether it is in a split or not.
pub(super) struct Files {
    /// By path, with what is to be said of it where it is in none; with nothing for a video, of which there may be many.
    all: Sorter,
}

/// What is said of a video that is in no split.
const UNLISTED: &str = "a video in no list, or a copy of one that is";

impl Files {
    pub(super) fn new(scratch: &Path) -> Self {
        Files { all: Sorter::new(scratch) }
    }

    /// What is no video of any split: why not.
    pub(super) fn other(&mut self, path: &str, why: &'static str) -> Result<()> {
        self.all.push(path.as_bytes(), why.as_bytes())
    }

    /// Hands on the split's files below the folder of videos, in no order; how many there are.
    pub(super) fn videos(
        &mut self,
        split: &SplitDescription,
        place: &Place,
        take: &mut dyn FnMut(VideoFile) -> Result<()>,
    ) -> Result<usize> {
        let mut count = 0;
        walk(place.videos, &split.videos, place.out, &mut |(path, why)| {
            self.other(&path, why.unwrap_or_default())?;
            if why.is_none() {
                count += 1;
                take(VideoFile { path })?;
            }
            Ok(())
        })?;
        if count == 0 { Err(nothing_in(place.videos, "below this folder")) } else { Ok(count) }
    }

    /// The same, in order, of a dataset whose videos fit into memory.
    pub(super) fn all_videos(&mut self, split: &SplitDescription, place: &Place) -> Result<Vec<VideoFile>> {
        let mut found = Vec::new();
        self.videos(split, place, &mut |video| {
            found.push(video);
            Ok(())
        })?;
        let order = Order::new(place.videos, &split.videos);
        found.sort_by_cached_key(|video: &VideoFile| order.bytes(&video.path));
        Ok(found)
    }

    /// What is in none of these splits.
    pub(super) fn unused<'a>(self, scratch: &Path, splits: impl Iterator<Item = &'a There>) -> Result<AllUnused> {
        let mut used: Vec<_> = splits.map(|there| there.by_path.lookup()).collect();
        let mut unused = Sorter::new(scratch);
        let mut before = Record::default();
        for record in self.all.sorted().iter() {
            let record = record?;
            let mut is_used = false;
            for used in &mut used {
                is_used |= used.has(&record.key)?;
            }
            // Of several splits whose videos lie in one folder each has come upon it.
            if !is_used && record != before {
                let why = if record.value.is_empty() { UNLISTED.as_bytes() } else { &record.value };
                unused.push(why, &record.key)?;
            }
            before = record;
        }
        let mut all = AllUnused { list: unused.sorted(), reasons: Vec::new() };
        for unused in all.list.iter() {
            let Record { key, value } = unused?;
            match all.reasons.last_mut() {
                Some((why, count, _)) if *why.as_bytes() == *key => *count += 1,
                _ => all.reasons.push((text(&key), 1, text(&value))),
            }
        }
        Ok(all)
    }
}

/// What lies below the folder of videos and is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    /// Why not.
    pub why: String,
    /// Its path below the folder of videos.
    pub path: String,
}

/// All of it.
#[derive(Debug, Default)]
pub struct AllUnused {
    /// By reason and path.
    list: Sorted,
    reasons: Vec<(String, usize, String)>,
}

impl AllUnused {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The reasons, each with how many there are of it, and the first.
    pub fn reasons(&self) -> &[(String, usize, String)] {
        &self.reasons
    }

    /// By reason and path.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn iter(&self) -> impl Iterator<Item = Result<Unused>> {
        self.list.iter().map(|record| {
            let Record { key, value } = record?;
            Ok(Unused { why: text(&key), path: text(&value) })
        })
    }
}
