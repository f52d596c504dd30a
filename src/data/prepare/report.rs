//! What became of all videos, and the lists of those that need attention.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::{AllUnused, Missing};
use super::plan::Plan;
use super::record::{Entry, Outcome, Record, State};
use super::{PrepareOptions, output, todo};
use crate::sys::files::write_whole_by;
use crate::{Error, Result};

/// The state of a job before its shards are made; kept by the process that planned it.
#[derive(Default)]
pub struct Ledger {
    /// Shards to make, as indices into the plan.
    pub todo: Vec<u64>,
    /// Videos of those shards.
    pub todo_videos: usize,
    /// Shards that an earlier run has finished.
    pub(super) kept: Vec<Summary>,
    pub(super) splits: Vec<SplitLedger>,
    /// What lies below the folder of videos and is in no split.
    pub unused: AllUnused,
    /// Other runs stay out while these live.
    pub(super) locks: Vec<File>,
}

impl Ledger {
    /// How many shards an earlier run has finished.
    pub fn finished(&self) -> usize {
        self.kept.len()
    }
}

/// One split before its shards are made.
#[derive(Debug, Default)]
pub(super) struct SplitLedger {
    pub name: String,
    /// Videos that the annotations list.
    pub listed: usize,
    /// As many as they should.
    pub expected: Option<usize>,
    /// Videos whose file is not there.
    pub missing: Missing,
    pub skipped: usize,
    /// The split's first shard in the plan.
    pub first_task: usize,
}

/// A finished shard, without the many videos there is nothing to say about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    task: u64,
    bytes: u64,
    written: usize,
    frames: u64,
    notes: Vec<Entry>,
    /// The labels of the written videos, each once.
    classes: BTreeSet<i32>,
}

impl Summary {
    pub(super) fn new(task: u64, record: &Record) -> Self {
        let frames = record.videos.iter().filter_map(|entry| match entry.outcome {
            Outcome::Written { frames, .. } => Some(frames),
            _ => None,
        });
        let silent = |entry: &&Entry| !matches!(entry.outcome, Outcome::Written { complaint: None, .. });
        let of_written =
            |entry: &Entry| matches!(entry.outcome, Outcome::Written { .. }).then(|| entry.label.unwrap_or(-1));
        Summary {
            classes: record.videos.iter().filter_map(of_written).collect(),
            task,
            bytes: record.bytes,
            written: frames.clone().count(),
            frames: frames.sum(),
            notes: record.videos.iter().filter(silent).cloned().collect(),
        }
    }
}

/// What became of a split's videos: `listed = found + missing`, and `found = skipped + broken + short + written`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The split.
    pub split: String,
    /// Videos that the annotations list (class folders: that are there).
    pub listed: usize,
    /// As many as the dataset's description expects them to list.
    pub expected: Option<usize>,
    /// Videos whose file is there.
    pub found: usize,
    /// Videos whose file is not there.
    pub missing: usize,
    /// Videos left out because a list said so.
    pub skipped: usize,
    /// Videos that could not be decoded.
    pub broken: usize,
    /// Videos with too few frames.
    pub short: usize,
    /// Videos written into shards.
    pub written: usize,
    /// Videos among these about which ffmpeg complained.
    pub doubtful: usize,
    /// Frames written.
    pub frames: u64,
    /// Bytes of the shards.
    pub bytes: u64,
    /// The shards.
    pub shards: Vec<PathBuf>,
    /// How many of them an earlier run made.
    pub earlier: usize,
    /// The first broken videos and why.
    pub examples: Vec<(String, String)>,
    /// The list of broken, too short and doubtful videos; absent if there are none.
    pub quarantine: Option<PathBuf>,
    /// The list of missing videos; absent if there are none.
    pub missing_list: Option<PathBuf>,
    /// Classes of which no video was written.
    pub without: Vec<String>,
}

/// How many broken videos a report shows.
const EXAMPLES: usize = 3;

/// Writes the lists and adds everything up.
pub(super) fn finish(
    options: &PrepareOptions,
    plan: &Plan,
    ledger: &Ledger,
    made: Vec<Summary>,
) -> Result<Vec<Report>> {
    for account in &ledger.splits {
        todo::forget(&State::new(&options.out, &account.name))?;
    }
    let earlier = ledger.kept.len();
    let mut all: Vec<(bool, &Summary)> =
        ledger.kept.iter().map(|s| (true, s)).chain(made.iter().map(|s| (false, s))).collect();
    all.sort_by_key(|(_, summary)| summary.task);
    if all.len() != plan.shards.len() || all.iter().zip(0..).any(|((_, summary), task)| summary.task != task) {
        let (got, wanted) = (all.len(), plan.shards.len());
        return Err(Error::Run(format!("{got} shards are done ({earlier} earlier), not each of {wanted} once")));
    }
    let unused = ledger.unused.iter().map(|unused| unused.map(|unused| [unused.path, unused.why]));
    write_list(&unused_list(&options.out), ["path", "why"], unused)?;
    let mut reports = Vec::new();
    for account in &ledger.splits {
        let of_split =
            all[account.first_task..].iter().take_while(|(_, s)| plan.shards[s.task as usize].split == account.name);
        reports.push(split(options, plan, account, of_split)?);
    }
    match reports.iter().find(|report| report.written == 0) {
        None => Ok(reports),
        Some(Report { split, found, broken, short, examples, .. }) => {
            let first = examples.first().map(|(id, why)| format!("; {id}: {why}")).unwrap_or_default();
            Err(Error::input(format!(
                "{}: none of {found} videos of {split} could be used ({broken} broken, {short} too short{first})",
                options.videos.display()
            )))
        }
    }
}

fn split<'a>(
    options: &PrepareOptions,
    plan: &Plan,
    account: &super::report::SplitLedger,
    shards: impl Iterator<Item = &'a (bool, &'a Summary)>,
) -> Result<Report> {
    let missing = account.missing.len();
    let mut report = Report {
        split: account.name.clone(),
        listed: account.listed,
        expected: account.expected,
        found: account.listed - missing,
        missing,
        skipped: account.skipped,
        ..Report::default()
    };
    let mut notes = Vec::new();
    let mut classes = BTreeSet::new();
    for (earlier, summary) in shards {
        let shard = &plan.shards[summary.task as usize];
        classes.extend(summary.classes.iter().copied());
        report.written += summary.written;
        report.frames += summary.frames;
        report.bytes += summary.bytes;
        report.earlier += usize::from(*earlier);
        if summary.bytes > 0 {
            report.shards.push(output::shard_path(&options.out, &shard.split, shard.number));
        }
        for entry in &summary.notes {
            let (count, what, why) = match &entry.outcome {
                Outcome::Broken { why } => (&mut report.broken, "broken", why.clone()),
                Outcome::Short { frames } => {
                    (&mut report.short, "too short", format!("{frames} frames, {} needed", options.min_frames))
                }
                Outcome::Written { complaint, .. } => {
                    (&mut report.doubtful, "doubtful", complaint.clone().unwrap_or_default())
                }
            };
            *count += 1;
            if what == "broken" && report.examples.len() < EXAMPLES {
                report.examples.push((entry.id.clone(), why.clone()));
            }
            let path = options.videos.join(&entry.file.path).display().to_string();
            notes.push([entry.id.clone(), what.into(), why, path]);
        }
    }
    notes.sort_by(|a, b| (&a[1], &a[0]).cmp(&(&b[1], &b[0])));
    let missing = account.missing.ids().map(|id| Ok([id?, "missing".into(), "no such file".into(), String::new()]));
    let names = plan.class_names.iter().enumerate();
    report.without = names.filter(|(k, _)| !classes.contains(&(*k as i32))).map(|(_, name)| name.clone()).collect();
    let path = |what: &str| options.out.join(format!("{what}-{}.tsv", account.name));
    report.quarantine = write_list(&path("quarantine"), ["id", "what", "why", "path"], notes.into_iter().map(Ok))?;
    report.missing_list = write_list(&path("missing"), ["id", "what", "why", "path"], missing)?;
    Ok(report)
}

/// The list of what lies below the folder of videos and is in no split.
pub fn unused_list(out: &Path) -> PathBuf {
    out.join("unused.tsv")
}

/// Writes a list, row by row; an empty one is not written, and one that an earlier run left is removed.
fn write_list<const N: usize>(
    path: &Path,
    header: [&str; N],
    rows: impl Iterator<Item = Result<[String; N]>>,
) -> Result<Option<PathBuf>> {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
            _ => Ok(None),
        };
    }
    write_whole_by(path, |file| {
        writeln!(file, "{}", header.join("\t"))?;
        rows.try_for_each(|row| {
            let row = row.map_err(std::io::Error::other)?;
            writeln!(file, "{}", row.map(|text| text.replace(['\t', '\n', '\r'], " ")).join("\t"))
        })
    })?;
    Ok(Some(path.to_path_buf()))
}
