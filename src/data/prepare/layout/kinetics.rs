//! Kinetics-400, -600 and -700: annotation files that name each clip's label, YouTube id and times, and videos called
//! `ID_START_END.mp4` (`--Q3Yqj3s0k_000012_000022.mp4`) in class folders of any spelling, or in none.
//!
//! | annotation file | read by |
//! |---|---|
//! | DeepMind's `train.csv`, the mirrors' CSV and header-carrying `.txt` | [`csv_rows`]: columns by name, in any order, more are allowed |
//! | DeepMind's `train.json`: `{ID: {"annotations": {"label", "segment"}, "subset", …}}` | [`json_rows`] |
//!
//! A video of YouTube may be used twice, so a clip's key is id and times, never the id.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
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

/// One line of an annotation file, of which there are up to a million: small.
struct Annotation {
    key: Key,
    label: Arc<str>,
    subset: Option<Arc<str>>,
    /// Its line, counted from 1; `None` for a JSON entry.
    line: Option<u64>,
}

/// Texts that come again and again, each kept once.
#[derive(Default)]
struct Texts(HashSet<Arc<str>>);

impl Texts {
    fn keep(&mut self, text: &str) -> Arc<str> {
        self.0.get(text).cloned().unwrap_or_else(|| {
            let kept: Arc<str> = text.into();
            self.0.insert(kept.clone());
            kept
        })
    }
}

pub(super) fn rows(description: &Description, split: (&str, &SplitDescription), place: &Place) -> Result<Rows> {
    let (name, split) = split;
    let file = annotation(place.annotations, &split.annotations)?;
    let all = {
        let content = text(&file)?;
        match content.trim_start().starts_with('{') {
            true => json_rows(&file, &content)?,
            false => csv_rows(&file, &content, description.columns.as_deref())?,
        }
    };
    let all = of_subset(&file, all, name, split.subset.as_deref())?;
    let found = found_videos(split, place)?;
    let mut clips: HashMap<Key, Vec<&VideoFile>> = HashMap::new();
    for video in &found.videos {
        if let Some(key) = key_of(&video.stem) {
            clips.entry(key).or_default().push(video);
        }
    }
    // By key, the place among the rows.
    let mut seen: HashMap<Key, usize> = HashMap::with_capacity(all.len());
    let mut rows: Vec<Row> = Vec::with_capacity(all.len());
    let mut repeated = 0u64;
    let name: Arc<str> = file.display().to_string().into();
    for Annotation { key, label, line, .. } in all {
        let at = match line {
            Some(line) => At::Line(name.clone(), line),
            None => At::Place(format!("{name}: entry {:?}", youtube_id(&key))),
        };
        match seen.entry(key) {
            Entry::Occupied(first) if rows[*first.get()].class == label => {
                repeated += 1;
                continue;
            }
            Entry::Occupied(first) => {
                let Row { id, class: other, at: before, .. } = &rows[*first.get()];
                return Err(Error::input(format!("{at}: {id} is {label:?} here and {other:?} at {before}")));
            }
            Entry::Vacant(place) => drop(place.insert(rows.len())),
        }
        // Of several copies the one in its class's folder, else the first by name.
        let copies = clips.get(&key).map_or(&[][..], Vec::as_slice);
        let own = copies.iter().find(|video| spelling(&video.folder) == spelling(&label));
        let path = own.or(copies.first()).map(|video| video.path.clone());
        rows.push(Row { id: id_of(&key), class: label, path, at });
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
            rows.first().map_or("", |row| row.id.as_str())
        )));
    }
    Ok(Rows { rows, ..Rows::of(found) })
}

/// The entries of one subset: of the one that is asked for, else of the one that is called as the split is where a list is of several.
fn of_subset(file: &Path, all: Vec<Annotation>, name: &str, subset: Option<&str>) -> Result<Vec<Annotation>> {
    let total = all.len();
    let values: BTreeSet<&str> = all.iter().filter_map(|a| a.subset.as_deref()).collect();
    let values: Vec<&str> = values.into_iter().collect();
    let wanted: Vec<String> = match (subset, &values[..]) {
        (Some(subset), _) => vec![subset.to_string()],
        // A list of one split, whatever that is called there.
        (None, []) => return Ok(all),
        (None, [one]) if !is_of_another(one, name) => return Ok(all),
        (None, values) => values.iter().filter(|value| means(value, name)).map(|value| value.to_string()).collect(),
    };
    let values = format!("{values:?}");
    let kept: Vec<Annotation> =
        all.into_iter().filter(|a| a.subset.as_deref().is_some_and(|s| wanted.iter().any(|w| w == s))).collect();
    if kept.is_empty() {
        let wanted = subset.unwrap_or(name);
        return Err(Error::input(format!(
            "{}: none of {total} entries is of the split {wanted:?}; there are {values}. Give --split one of these, or `subset` in a \
             description of the dataset (docs/data.md)",
            file.display()
        )));
    }
    if kept.len() < total {
        log::info!("{}: {} of {total} entries are of the split {name:?}", file.display(), kept.len());
    }
    Ok(kept)
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
fn csv_rows(file: &Path, content: &str, columns: Option<&[String]>) -> Result<Vec<Annotation>> {
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
    let (mut rows, mut texts) = (Vec::new(), Texts::default());
    for record in reader.records() {
        let record = record.map_err(|e| bad(table_error(&e, header.len())))?;
        let line = record.position().map_or(0, csv::Position::line);
        let get = |column: usize| record.get(column).unwrap_or_default();
        let key = key(get(id), get(start), get(end)).map_err(|why| bad(format!("line {line}: {why}")))?;
        if get(label).is_empty() {
            return Err(bad(format!("line {line}: the label is empty")));
        }
        let subset = subset.map(|column| texts.keep(get(column)));
        rows.push(Annotation { key, label: texts.keep(get(label)), subset, line: Some(line) });
    }
    if rows.is_empty() { Err(bad("no clips in this file, only a header".into())) } else { Ok(rows) }
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
fn json_rows(file: &Path, content: &str) -> Result<Vec<Annotation>> {
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
    let entries: Entries = serde_json::from_str(content).map_err(|e| bad(format!("not Kinetics JSON: {e}")))?;
    let mut texts = Texts::default();
    entries
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
            Ok(Annotation { key, label: texts.keep(&label), subset, line: None })
        })
        .collect()
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
