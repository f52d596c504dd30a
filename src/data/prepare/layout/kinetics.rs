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
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::shared::means;
use super::{At, Place, Row, Rows, found_videos, spelling};
use crate::data::prepare::description::{Description, SplitDescription};
use crate::data::prepare::files::{VideoFile, annotation, text};
use crate::{Error, Result};

/// A YouTube id has this many characters, `_` and `-` among them.
const ID: usize = 11;

/// A clip's key: YouTube id, start and end in seconds.
type Key = ([u8; ID], u32, u32);

/// One line of an annotation file, of which there are up to a million: small. Its texts are numbers of a [`Texts`].
struct Annotation {
    key: Key,
    label: u32,
    subset: Option<u32>,
    /// Its line, counted from 1; 0 for a JSON entry.
    line: u32,
}

/// Texts that come again and again, each kept once and numbered.
#[derive(Default)]
struct Texts {
    all: Vec<Arc<str>>,
    numbers: HashMap<Arc<str>, u32>,
}

impl Texts {
    fn keep(&mut self, text: &str) -> u32 {
        self.numbers.get(text).copied().unwrap_or_else(|| {
            let (kept, number): (Arc<str>, u32) = (text.into(), self.all.len() as u32);
            self.all.push(kept.clone());
            self.numbers.insert(kept, number);
            number
        })
    }

    fn get(&self, number: u32) -> &Arc<str> {
        &self.all[number as usize]
    }
}

/// An annotation file: its entries in their order.
#[derive(Default)]
struct List {
    entries: Vec<Annotation>,
    texts: Texts,
}

pub(super) fn rows(description: &Description, split: (&str, &SplitDescription), place: &Place) -> Result<Rows> {
    let (name, split) = split;
    let file = annotation(place.annotations, &split.annotations)?;
    let mut list = {
        let content = text(&file)?;
        match content.trim_start().starts_with('{') {
            true => json_list(&file, &content)?,
            false => csv_list(&file, &content, description.columns.as_deref())?,
        }
    };
    keep_subset(&file, &mut list, name, split.subset.as_deref())?;
    let List { entries: mut all, texts } = list;
    // Those of one clip side by side, in the order of the list.
    all.sort_by_key(|entry| entry.key);
    let found = found_videos(split, place)?;
    let mut clips: HashMap<Key, Vec<&VideoFile>> = HashMap::new();
    for video in &found.videos {
        if let Some(key) = key_of(&video.stem) {
            clips.entry(key).or_default().push(video);
        }
    }
    let mut rows: Vec<Row> = Vec::with_capacity(all.len());
    let mut repeated = 0u64;
    let name: Arc<str> = file.display().to_string().into();
    let mut before: Option<Annotation> = None;
    for entry in all {
        let at = |entry: &Annotation| match entry.line {
            0 => At::Place(format!("{name}: entry {:?}", youtube_id(&entry.key)).into()),
            line => At::Line(name.clone(), line),
        };
        let label = texts.get(entry.label);
        if let Some(first) = before.as_ref().filter(|first| first.key == entry.key) {
            if first.label == entry.label {
                repeated += 1;
                continue;
            }
            let (id, other) = (id_of(&entry.key), texts.get(first.label));
            return Err(Error::input(format!("{}: {id} is {label:?} here and {other:?} at {}", at(&entry), at(first))));
        }
        // Of several copies the one in its class's folder, else the first by name.
        let copies = clips.get(&entry.key).map_or(&[][..], Vec::as_slice);
        let own = copies.iter().find(|video| spelling(&video.folder) == spelling(label));
        let path = own.or(copies.first()).map(|video| video.path.as_str().into());
        rows.push(Row { id: id_of(&entry.key).into(), class: label.clone(), path, at: at(&entry) });
        before = Some(entry);
    }
    if repeated > 0 {
        log::warn!("{}: {repeated} clips are listed more than once and count once", file.display());
    }
    let taken = rows.iter().filter(|row| row.path.is_some()).count();
    if taken == 0 {
        return Err(Error::input(format!(
            "{}: none of its {} clips is among the {} videos below {}; a clip is called ID_START_END, for instance {}.mp4",
            file.display(),
            rows.len(),
            found.videos.len(),
            place.videos.display(),
            rows.first().map_or("", |row| &*row.id)
        )));
    }
    Ok(Rows { rows, ..Rows::of(found) })
}

/// Keeps the entries of one subset: of the one that is asked for, else of the one that is called as the split is where a list is of
/// several.
fn keep_subset(file: &Path, list: &mut List, name: &str, subset: Option<&str>) -> Result<()> {
    let List { entries, texts } = list;
    let total = entries.len();
    let values: BTreeSet<u32> = entries.iter().filter_map(|entry| entry.subset).collect();
    let values: BTreeSet<&str> = values.into_iter().map(|value| &**texts.get(value)).collect();
    let values: Vec<&str> = values.into_iter().collect();
    let wanted: Vec<&str> = match (subset, &values[..]) {
        (Some(subset), _) => vec![subset],
        // A list of one split, whatever that is called there.
        (None, []) => return Ok(()),
        (None, [one]) if !is_of_another(one, name) => return Ok(()),
        (None, values) => values.iter().copied().filter(|value| means(value, name)).collect(),
    };
    entries.retain(|entry| entry.subset.is_some_and(|subset| wanted.contains(&&**texts.get(subset))));
    if entries.is_empty() {
        let wanted = subset.unwrap_or(name);
        return Err(Error::input(format!(
            "{}: none of {total} entries is of the split {wanted:?}; there are {values:?}. Give --split one of these, or `subset` in a \
             description of the dataset (docs/data.md)",
            file.display()
        )));
    }
    if entries.len() < total {
        log::info!("{}: {} of {total} entries are of the split {name:?}", file.display(), entries.len());
    }
    Ok(())
}

/// Whether a list of the one split `value` is another's than `name`: both are common words, and differ.
fn is_of_another(value: &str, name: &str) -> bool {
    let common = |word: &str| ["train", "val", "test"].iter().any(|known| means(word, known));
    common(value) && common(name) && !means(value, name)
}

/// How a clip is called: `ID_SSSSSS_EEEEEE`.
fn id_of(key: &Key) -> String {
    let (_, start, end) = key;
    format!("{}_{start:06}_{end:06}", youtube_id(key))
}

fn youtube_id((id, ..): &Key) -> &str {
    // A key's id is ASCII.
    std::str::from_utf8(id).unwrap_or_default()
}

/// Reads a file's name from the right: the id may hold `_` itself.
fn key_of(stem: &str) -> Option<Key> {
    let mut parts = stem.rsplitn(3, '_');
    let seconds = |part: &str| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<u32>().ok()).flatten();
    let (end, start) = (seconds(parts.next()?)?, seconds(parts.next()?)?);
    let id = parts.next()?;
    let id: [u8; ID] = id.as_bytes().try_into().ok()?;
    id.is_ascii().then_some((id, start, end))
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
    Ok((id, start, end))
}

/// Reads a table with a header line, or with the `columns` a description gives.
fn csv_list(file: &Path, content: &str, columns: Option<&[String]>) -> Result<List> {
    let bad = |why: String| Error::input(format!("{}: {why}", file.display()));
    let first = content.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let delimiter = if !first.contains(',') && first.contains('\t') { b'\t' } else { b',' };
    let mut reader = csv::ReaderBuilder::new();
    reader.delimiter(delimiter).has_headers(columns.is_none());
    let mut reader = reader.from_reader(content.as_bytes());
    let header: Vec<String> = match columns {
        Some(columns) => columns.to_vec(),
        None => {
            let header = reader.headers().map_err(|e| bad(e.to_string()))?;
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
    let lines = content.bytes().filter(|byte| *byte == b'\n').count();
    let (mut entries, mut texts) = (Vec::with_capacity(lines + 1), Texts::default());
    for record in reader.records() {
        let record = record.map_err(|e| bad(table_error(&e, header.len())))?;
        let line = record.position().map_or(0, csv::Position::line);
        let get = |column: usize| record.get(column).unwrap_or_default();
        let key = key(get(id), get(start), get(end)).map_err(|why| bad(format!("line {line}: {why}")))?;
        if get(label).is_empty() {
            return Err(bad(format!("line {line}: the label is empty")));
        }
        let subset = subset.map(|column| texts.keep(get(column)));
        let line = u32::try_from(line).unwrap_or(u32::MAX);
        entries.push(Annotation { key, label: texts.keep(get(label)), subset, line });
    }
    if entries.is_empty() {
        return Err(bad("no clips in this file, only a header".into()));
    }
    Ok(List { entries, texts })
}

/// What is wrong with a table, with its line.
fn table_error(error: &csv::Error, columns: usize) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { pos, len, .. } => {
            let line = pos.as_ref().map_or(0, csv::Position::line);
            format!("line {line}: {len} values, not {columns}: is a quote or a comma missing?")
        }
        _ => error.to_string(),
    }
}

/// DeepMind's JSON, whose entries are read in order so that none replaces another.
fn json_list(file: &Path, content: &str) -> Result<List> {
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
    struct Entries(Vec<(String, Video)>);
    impl<'de> Deserialize<'de> for Entries {
        fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
            struct InOrder;
            impl<'de> Visitor<'de> for InOrder {
                type Value = Entries;
                fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                    f.write_str("an object with YouTube ids as keys")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                    let mut entries = Vec::new();
                    while let Some(entry) = map.next_entry()? {
                        entries.push(entry);
                    }
                    Ok(Entries(entries))
                }
            }
            from.deserialize_map(InOrder)
        }
    }
    let bad = |why: String| Error::input(format!("{}: {why}", file.display()));
    let all: Entries = serde_json::from_str(content).map_err(|e| bad(format!("not Kinetics JSON: {e}")))?;
    let mut texts = Texts::default();
    let entries = all
        .0
        .into_iter()
        .map(|(id, video)| {
            let at = format!("entry {id:?}");
            let without = |what: &str| bad(format!("{at} has no {what}"));
            let clip = video.annotations.ok_or_else(|| without("`annotations`"))?;
            let label = clip.label.filter(|l| !l.is_empty()).ok_or_else(|| without("label"))?;
            let [start, end] = clip.segment.map(|s| s.to_string());
            let key = key(&id, &start, &end).map_err(|why| bad(format!("{at}: {why}")))?;
            let subset = video.subset.map(|subset| texts.keep(&subset));
            Ok(Annotation { key, label: texts.keep(&label), subset, line: 0 })
        })
        .collect::<Result<_>>()?;
    Ok(List { entries, texts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_the_right() {
        let key = |id: &[u8; ID], a, b| Some((*id, a, b));
        assert_eq!(key_of("-_a_b-__c_d_000012_000022"), key(b"-_a_b-__c_d", 12, 22));
        assert_eq!(key_of("0123456789a_000000_000010"), key(b"0123456789a", 0, 10));
        assert_eq!(key_of("0123456789a_7_17"), key(b"0123456789a", 7, 17));
        for not in ["0123456789a", "0123456789_000000_000010", "0123456789a_000000", "0123456789a_00000x_000010", ""] {
            assert_eq!(key_of(not), None, "{not}");
        }
        assert_eq!(id_of(&(*b"--abc_def-_", 3, 1234567)), "--abc_def-__000003_1234567");
    }
}
