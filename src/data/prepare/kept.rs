//! Which shards of an earlier run need not be made again.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::record::{self, FileState, Outcome, RECIPE, Record, State};
use super::todo::PlannedVideo;
use super::{PrepareOptions, output};
use crate::data::shard::ShardReader;

/// The record of a shard that need not be made again, without the videos that are now to be skipped; else why it must be, where
/// that is not known already.
pub(super) fn kept(
    options: &PrepareOptions,
    (split, number): (&str, usize),
    videos: &[PlannedVideo],
    class_names: &[String],
) -> std::result::Result<Record, Option<String>> {
    let state = State::new(&options.out, split);
    let mut record: Record = state.read(&record::name(number)).ok_or(None)?;
    let planned: HashSet<&str> = videos.iter().map(|video| video.id.as_str()).collect();
    let in_shard = |outcome: &Outcome| matches!(outcome, Outcome::Written { .. });
    for entry in &record.videos {
        let of_cover = |outcome: &Outcome| {
            matches!(outcome, Outcome::Short { frames: ..=1 } | Outcome::Written { frames: ..=1, .. })
        };
        let why = match planned.contains(entry.id.as_str()) {
            false if in_shard(&entry.outcome) => "is no longer to be in it",
            true if options.retry_broken && matches!(entry.outcome, Outcome::Broken { .. }) => "is tried again",
            true if record.recipe < RECIPE && of_cover(&entry.outcome) => "may have been taken for its cover picture",
            _ => continue,
        };
        return Err(Some(format!("{} {why}", entry.id)));
    }
    let all = record.videos.len();
    record.videos.retain(|entry| planned.contains(entry.id.as_str()));
    let mut refreshed = record.videos.len() == all;
    if !record.videos.iter().map(|entry| &entry.id).eq(videos.iter().map(|video| &video.id)) {
        return Err(Some("it is to hold other videos".into()));
    }
    let path = output::shard_path(&options.out, split, number);
    let stored = labels_in_shard(&path, &record);
    for (entry, video) in record.videos.iter_mut().zip(videos) {
        if !entry.file.is_same(&video.file, &options.videos) {
            return Err(Some(format!("the file of {} has changed", entry.id)));
        }
        let label = entry.label.or_else(|| stored.get(&entry.id).copied());
        if in_shard(&entry.outcome) && label != Some(video.label) {
            let name = |label: i32| class_names.get(label as usize).map_or("?", String::as_str);
            let was = label.map_or(String::new(), |label| format!(", not {:?}", name(label)));
            return Err(Some(format!("{} is of class {:?} now{was}", entry.id, name(video.label))));
        }
        let file = FileState { content: entry.file.content, ..video.file.clone() };
        let label = Some(video.label);
        refreshed &= (&entry.file, entry.label) == (&file, label);
        (entry.file, entry.label) = (file, label);
    }
    if std::fs::metadata(path).map_or(0, |meta| meta.len()) != record.bytes {
        return Err(Some("its file is not there, or of another size".into()));
    }
    // So that no content need be compared the next time.
    if !refreshed && let Err(e) = state.write(&record::name(number), &record) {
        log::debug!("{e}");
    }
    Ok(record)
}

/// The labels of a shard whose record is an earlier version's and has none.
fn labels_in_shard(path: &Path, record: &Record) -> HashMap<String, i32> {
    if record.videos.iter().all(|entry| entry.label.is_some()) {
        return HashMap::new();
    }
    let read = ShardReader::open(path).map(|shard| shard.ids.into_iter().zip(shard.labels).collect());
    read.unwrap_or_default()
}
