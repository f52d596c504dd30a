//! Kinetics-400, -600 and -700: annotation files that name each clip's label, YouTube id and times, and videos called
//! `ID_START_END.mp4` (`--Q3Yqj3s0k_000012_000022.mp4`) in class folders of any spelling, or in none.
//!
//! | annotation file | read by |
//! |---|---|
//! | DeepMind's `train.csv`, the mirrors' CSV and header-carrying `.txt` | [`csv_list`]: columns by name, in any order, more are allowed |
//! | DeepMind's `train.json`: `{ID: {"annotations": {"label", "segment"}, "subset", …}}` | [`json_list`] |
//!
//! A video of YouTube may be used twice, so a clip's key is id and times, never the id.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use super::shared::means;
use super::{Files, Place, Rows, spelling, text};
use crate::data::prepare::description::{Description, SplitDescription};
use crate::data::prepare::files::{Beginning, Order, VideoFile, annotation, beginning};
use crate::sys::sorting::{Record, Sorted, Sorter};
use crate::{Error, Result};

/// A YouTube id has this many characters, `_` and `-` among them.
const ID: usize = 11;

/// A clip's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    /// YouTube's id.
    id: [u8; ID],
    /// Seconds.
    start: u32,
    end: u32,
}

/// One line of an annotation file, of which there are up to a million: sorted outside of memory, those of one clip in the order of
/// the list. Texts are numbers of a [`Texts`].
#[derive(Clone, Copy)]
struct Annotation {
    key: Key,
    /// Its line, counted from 1; 0 for a JSON entry.
    line: u32,
    label: u32,
    /// [`NONE`] where none is said.
    subset: u32,
}

impl Annotation {
    fn to_value(self) -> Vec<u8> {
        [self.line, self.label, self.subset].map(u32::to_be_bytes).concat()
    }

    /// The other way.
    fn of(record: &Record) -> Result<Self> {
        let (id, times) = record.key.split_first_chunk().ok_or_else(damaged)?;
        let ([start, end], [line, label, subset]) = (words(times)?, words(&record.value)?);
        Ok(Annotation { key: Key { id: *id, start, end }, line, label, subset })
    }
}

/// So many numbers, the highest byte first, so that they are in order as bytes are.
fn words<const N: usize>(bytes: &[u8]) -> Result<[u32; N]> {
    let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_be_bytes(*word)).collect();
    words.try_into().map_err(|_| damaged())
}

fn damaged() -> Error {
    Error::Run("a sorted list of clips has lost its form (a bug)".into())
}

/// No text.
const NONE: u32 = u32::MAX;

/// Texts that come again and again, each kept once, numbered and counted.
#[derive(Default)]
struct Texts {
    all: Vec<(Arc<str>, u64)>,
    numbers: HashMap<Arc<str>, u32>,
}

impl Texts {
    fn keep(&mut self, text: &str) -> u32 {
        let number = self.numbers.get(text).copied().unwrap_or_else(|| {
            let (kept, number): (Arc<str>, u32) = (text.into(), self.all.len() as u32);
            self.all.push((kept.clone(), 0));
            self.numbers.insert(kept, number);
            number
        });
        self.all[number as usize].1 += 1;
        number
    }

    fn get(&self, number: u32) -> &str {
        &self.all[number as usize].0
    }
}

/// An annotation file being read.
struct List {
    entries: Sorter,
    total: u64,
    labels: Texts,
    subsets: Texts,
}

impl List {
    fn take(&mut self, key: Key, label: &str, subset: Option<&str>, line: u64) -> Result<()> {
        self.total += 1;
        let subset = subset.map_or(NONE, |subset| self.subsets.keep(subset));
        let line = u32::try_from(line).unwrap_or(u32::MAX);
        let entry = Annotation { key, line, label: self.labels.keep(label), subset };
        self.entries.push(&key.to_bytes(), &entry.to_value())
    }
}

pub(super) fn rows(
    description: &Description,
    split: (&str, &SplitDescription),
    place: &Place,
    files: &mut Files,
) -> Result<Rows> {
    let (name, split) = split;
    let file = annotation(place.annotations, &split.annotations)?;
    let entries = Sorter::new(&place.scratch());
    let mut list = List { entries, total: 0, labels: Texts::default(), subsets: Texts::default() };
    let content = beginning(&file)?;
    match content.text.trim_start().starts_with('{') {
        true => json_list(&file, content, &mut list)?,
        false => csv_list(&file, content, description.columns.as_deref(), &mut list)?,
    }
    let wanted = wanted_subsets(&file, &list, name, split.subset.as_deref())?;
    let List { entries, labels, .. } = list;
    let (mut clips, order) = (Sorter::new(&place.scratch()), Order::new(place.videos, &split.videos));
    let found = files.videos(split, place, &mut |video| match key_of(video.stem()) {
        Some(key) => clips.push(&key.to_bytes(), &order.bytes(&video.path)),
        None => Ok(()),
    })?;
    let listed = join(&file, place, (entries.sorted(), &labels, wanted.as_deref()), &clips.sorted())?;
    if listed.are_there == 0 {
        let missing = listed.missing.sorted();
        let first = missing.iter().next().transpose()?.unwrap_or_default();
        return Err(Error::input(format!(
            "{}: none of its {} clips is among the {found} videos below {}; a clip is called ID_START_END, for instance {}.mp4",
            file.display(),
            missing.len(),
            place.videos.display(),
            text(&first.key)
        )));
    }
    Ok(listed)
}

/// The clips of a list and their files, both by key.
fn join(
    file: &Path,
    place: &Place,
    (entries, labels, wanted): (Sorted, &Texts, Option<&[u32]>),
    clips: &Sorted,
) -> Result<Rows> {
    let at = |entry: &Annotation| match entry.line {
        0 => format!("{}: entry {:?}", file.display(), entry.key.youtube_id()),
        line => format!("{}: line {line}", file.display()),
    };
    let (mut rows, mut clips) = (Rows::new(place), clips.lookup());
    let (mut repeated, mut before) = (0u64, None::<Annotation>);
    for record in entries.iter() {
        let record = record?;
        let entry = Annotation::of(&record)?;
        if wanted.is_some_and(|wanted| !wanted.contains(&entry.subset)) {
            continue;
        }
        let label = labels.get(entry.label);
        if let Some(first) = before.filter(|first| first.key == entry.key) {
            if first.label == entry.label {
                repeated += 1;
                continue;
            }
            let (id, other) = (entry.key.id(), labels.get(first.label));
            return Err(Error::input(format!(
                "{}: {id} is {label:?} here and {other:?} at {}",
                at(&entry),
                at(&first)
            )));
        }
        // Of several copies the one in its class's folder, else the first.
        let (mut first, mut own) = (None, None);
        while let Some(clip) = clips.take(&record.key)? {
            let video = VideoFile { path: Order::path(&clip.value) };
            if own.is_none() && spelling(video.folder()) == spelling(label) {
                own = Some(video);
            } else {
                first.get_or_insert(video);
            }
        }
        let video = own.or(first);
        rows.add(&entry.key.id(), label, video.as_ref().map(|video| video.path.as_str()), || at(&entry))?;
        before = Some(entry);
    }
    if repeated > 0 {
        log::warn!("{}: {repeated} clips are listed more than once and count once", file.display());
    }
    Ok(rows)
}

/// The subsets whose entries are to be taken, `None` for all: the one that is asked for, else the one that is called as the split is
/// where a list is of several.
fn wanted_subsets(file: &Path, list: &List, name: &str, subset: Option<&str>) -> Result<Option<Vec<u32>>> {
    let List { total, subsets, .. } = list;
    let values: BTreeSet<&str> = subsets.all.iter().map(|(value, _)| &**value).collect();
    let values: Vec<&str> = values.into_iter().collect();
    let wanted: Vec<&str> = match (subset, &values[..]) {
        (Some(subset), _) => vec![subset],
        // A list of one split, whatever that is called there.
        (None, []) => return Ok(None),
        (None, [one]) if !is_of_another(one, name) => return Ok(None),
        (None, values) => values.iter().copied().filter(|value| means(value, name)).collect(),
    };
    let wanted: Vec<u32> = wanted.into_iter().filter_map(|value| subsets.numbers.get(value).copied()).collect();
    let taken: u64 = wanted.iter().map(|number| subsets.all[*number as usize].1).sum();
    if taken == 0 {
        let wanted = subset.unwrap_or(name);
        return Err(Error::input(format!(
            "{}: none of {total} entries is of the split {wanted:?}; there are {values:?}. Give --split one of these, or `subset` in a \
             description of the dataset (docs/data.md)",
            file.display()
        )));
    }
    if taken < *total {
        log::info!("{}: {taken} of {total} entries are of the split {name:?}", file.display());
    }
    Ok(Some(wanted))
}

/// Whether a list of the one split `value` is another's than `name`: both are common words, and differ.
fn is_of_another(value: &str, name: &str) -> bool {
    let common = |word: &str| ["train", "val", "test"].iter().any(|known| means(word, known));
    common(value) && common(name) && !means(value, name)
}

impl Key {
    /// In whose order, byte by byte, clips are.
    fn to_bytes(self) -> Vec<u8> {
        [&self.id[..], &self.start.to_be_bytes(), &self.end.to_be_bytes()].concat()
    }

    /// How the clip is called: `ID_SSSSSS_EEEEEE`.
    fn id(&self) -> String {
        format!("{}_{:06}_{:06}", self.youtube_id(), self.start, self.end)
    }

    fn youtube_id(&self) -> &str {
        // A key's id is ASCII.
        std::str::from_utf8(&self.id).unwrap_or_default()
    }
}

/// Reads a file's name from the right: the id may hold `_` itself.
fn key_of(stem: &str) -> Option<Key> {
    let mut parts = stem.rsplitn(3, '_');
    let seconds = |part: &str| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<u32>().ok()).flatten();
    let (end, start) = (seconds(parts.next()?)?, seconds(parts.next()?)?);
    let id = parts.next()?;
    let id: [u8; ID] = id.as_bytes().try_into().ok()?;
    id.is_ascii().then_some(Key { id, start, end })
}

/// A clip's key out of its three parts.
fn key(id: &str, start: &str, end: &str) -> std::result::Result<Key, String> {
    let letters = |id: &[u8; ID]| id.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    let id: [u8; ID] = <[u8; ID]>::try_from(id.as_bytes())
        .ok()
        .filter(letters)
        .ok_or_else(|| format!("{id:?} is not a YouTube id ({ID} letters, digits, - or _)"))?;
    let seconds = |text: &str| {
        let value: f64 = text.trim().parse().map_err(|_| format!("{text:?} is not a time in seconds"))?;
        if (0.0..1e9).contains(&value) { Ok(value.round() as u32) } else { Err(format!("{text:?} is not a time")) }
    };
    let (start, end) = (seconds(start)?, seconds(end)?);
    if end <= start {
        return Err(format!("the clip ends at {end} s, not after its start at {start} s"));
    }
    Ok(Key { id, start, end })
}

/// Reads a table with a header line, or with the `columns` a description gives.
fn csv_list(file: &Path, content: Beginning, columns: Option<&[String]>, list: &mut List) -> Result<()> {
    let bad = |why: String| Error::input(format!("{}: {why}", file.display()));
    let first = content.text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let delimiter = if !first.contains(',') && first.contains('\t') { b'\t' } else { b',' };
    let mut reader = csv::ReaderBuilder::new();
    reader.delimiter(delimiter).has_headers(columns.is_none());
    let mut reader = reader.from_reader(content.whole());
    let header: Vec<String> = match columns {
        Some(columns) => columns.to_vec(),
        None => {
            let header = reader.headers().map_err(|e| bad(table_error(&e, 0)))?;
            header.iter().map(|name| name.trim().to_string()).collect()
        }
    };
    let find = |name: &str| header.iter().position(|column| column == name);
    // What else a list may call its column of splits: passed over, it would mix them.
    let is_split = |column: &String| {
        ["split", "subset", "set", "partition", "usage"].contains(&column.to_ascii_lowercase().as_str())
    };
    let column = |name: &str| {
        find(name).ok_or_else(|| {
            let mut why = format!("no column {name:?}: there are {}", header.join(", "));
            if find("youtube_id").is_some() && name == "label" {
                why += ". This is a list without labels, such as the test list of the 2018 challenge; DeepMind's archive \
                        has labels for it";
            } else if find("youtube_id").is_none() && columns.is_none() {
                why += ". The first line must name the columns (label, youtube_id, time_start, time_end); for files \
                        without such a line give `columns = [...]` in dataset.toml";
            }
            bad(why)
        })
    };
    let (label, id) = (column("label")?, column("youtube_id")?);
    let (start, end, subset) =
        (column("time_start")?, column("time_end")?, find("split").or_else(|| header.iter().position(is_split)));
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|e| bad(table_error(&e, header.len())))? {
        let line = record.position().map_or(0, csv::Position::line);
        let get = |column: usize| record.get(column).unwrap_or_default();
        let key = key(get(id), get(start), get(end)).map_err(|why| bad(format!("line {line}: {why}")))?;
        if get(label).is_empty() {
            return Err(bad(format!("line {line}: the label is empty")));
        }
        list.take(key, get(label), subset.map(get), line)?;
    }
    if list.total == 0 {
        return Err(bad("no clips in this file, only a header".into()));
    }
    Ok(())
}

/// What is wrong with a table, with its line.
fn table_error(error: &csv::Error, columns: usize) -> String {
    let line = |pos: &Option<csv::Position>| pos.as_ref().map_or(1, csv::Position::line);
    match error.kind() {
        csv::ErrorKind::UnequalLengths { pos, len, .. } => {
            format!("line {}: {len} values, not {columns}: is a quote or a comma missing?", line(pos))
        }
        csv::ErrorKind::Utf8 { pos, .. } => format!("line {} is not UTF-8", line(pos)),
        csv::ErrorKind::Io(e) => format!("cannot read this file: {e}"),
        _ => error.to_string(),
    }
}

/// Reads DeepMind's JSON, entry by entry, so that none replaces another.
fn json_list(file: &Path, content: Beginning, list: &mut List) -> Result<()> {
    #[derive(Deserialize)]
    struct Video {
        annotations: Option<Clip>,
        subset: Option<String>,
    }
    #[derive(Deserialize)]
    struct Clip {
        label: Option<String>,
        segment: [f64; 2],
    }
    struct InOrder<'a>(&'a mut dyn FnMut(String, Video) -> Result<()>, &'a mut Option<Error>);
    impl<'de> Visitor<'de> for InOrder<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object with YouTube ids as keys")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
            while let Some((id, video)) = map.next_entry()? {
                self.0(id, video).map_err(|e| {
                    *self.1 = Some(e);
                    A::Error::custom("an entry makes no sense")
                })?;
            }
            Ok(())
        }
    }
    let bad = |why: String| Error::input(format!("{}: {why}", file.display()));
    let mut take = |id: String, video: Video| {
        let at = format!("entry {id:?}");
        let without = |what: &str| bad(format!("{at} has no {what}"));
        let clip = video.annotations.ok_or_else(|| without("`annotations`"))?;
        let label = clip.label.filter(|l| !l.is_empty()).ok_or_else(|| without("label"))?;
        let [start, end] = clip.segment.map(|s| s.to_string());
        let key = key(&id, &start, &end).map_err(|why| bad(format!("{at}: {why}")))?;
        list.take(key, &label, video.subset.as_deref(), 0)
    };
    let mut refused = None;
    let mut reader = serde_json::Deserializer::from_reader(BufReader::new(content.whole()));
    let read = serde::Deserializer::deserialize_map(&mut reader, InOrder(&mut take, &mut refused));
    let read = read.and_then(|()| reader.end());
    match refused {
        Some(error) => Err(error),
        None => read.map_err(|e| bad(format!("not Kinetics JSON: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_the_right() {
        let key = |id: &[u8; ID], start, end| Some(Key { id: *id, start, end });
        assert_eq!(key_of("-_a_b-__c_d_000012_000022"), key(b"-_a_b-__c_d", 12, 22));
        assert_eq!(key_of("0123456789a_000000_000010"), key(b"0123456789a", 0, 10));
        assert_eq!(key_of("0123456789a_7_17"), key(b"0123456789a", 7, 17));
        for not in ["0123456789a", "0123456789_000000_000010", "0123456789a_000000", "0123456789a_00000x_000010", ""] {
            assert_eq!(key_of(not), None, "{not}");
        }
        assert_eq!(key(b"--abc_def-_", 3, 1234567).unwrap().id(), "--abc_def-__000003_1234567");
    }
}
