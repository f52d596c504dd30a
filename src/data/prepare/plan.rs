//! Which shards there will be and of which videos; and which of them an earlier run has finished.
//!
//! Videos are ordered by a hash of seed, split and id, so that any run of them is a fair sample, whatever order the lists
//! have. The order holds missing videos too: one that turns up later changes its own shard and no other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::layout::{Listing, Place, Source, exclude, judge, list, read_classes};
use super::record::{self, Entry, FileState, Outcome, RECIPE, Record, State};
use super::report::{Ledger, SplitLedger, Summary};
use super::{PrepareOptions, files, output};
use crate::data::shard::{Encoding, ShardReader};
use crate::sys::files::write_whole;
use crate::{Error, Result};

/// The list of classes, in the folder of shards: all splits there have the same.
pub const CLASSES: &str = "classes.txt";

/// All shards of the splits asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// The shards, split after split.
    pub shards: Vec<ShardPlan>,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// Its split.
    pub split: String,
    /// Its number in the split.
    pub number: usize,
    /// The videos that are there, in the order they are to be written.
    pub videos: Vec<PlannedVideo>,
}

/// One video of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVideo {
    /// Its id.
    pub id: String,
    /// Its class.
    pub label: i32,
    /// The file, below the folder of videos.
    pub file: FileState,
}

/// A split's videos in order. Most may be missing: those take little room.
type Slots = Vec<Option<Box<PlannedVideo>>>;

/// What is stored of a split's plan, and has to be the same when a run goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    settings: BTreeMap<String, String>,
    shards: usize,
    /// The folder of videos, without links.
    #[serde(default)]
    videos: Option<PathBuf>,
}

const STORED: &str = "plan.json";

/// Plans the job and takes stock of what an earlier run has left.
pub(super) fn plan(options: &PrepareOptions) -> Result<(Plan, Ledger)> {
    output::make_folder(&options.out)?;
    let classes_file = options.out.join(CLASSES);
    let place = Place {
        videos: &options.videos,
        annotations: options.annotations.as_deref(),
        classes: options.classes.as_deref(),
        stored_classes: (!options.overwrite).then(|| classes_file.clone()),
        out: Some(&options.out),
    };
    let mut listing = list(&options.description, &place, &options.splits)?;
    if options.test_fraction > 0.0 {
        set_apart(&mut listing, options);
    }
    let skip = read_skips(options, &listing)?;
    let mut plan = Plan { class_names: listing.class_names, shards: Vec::new() };
    let mut ledger = Ledger { unused: listing.unused, ..Ledger::default() };
    let mut ready = Vec::new();
    let videos = options.videos.canonicalize().ok();
    let names: Vec<&str> = listing.splits.iter().map(|(name, _)| name.as_str()).collect();
    let others = others(options, &names, videos.as_deref())?;
    for (split, mut sources) in listing.splits {
        // Of two in one place the first by id.
        sources.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        sources.sort_by_cached_key(|source| place_of(options.seed, &split, &source.id));
        let (slots, mut account) = videos_of(options, &split, sources, &skip)?;
        let state = State::new(&options.out, &split);
        ledger.locks.push(state.lock()?);
        let settings = settings(options, &plan.class_names);
        let there = slots.iter().flatten().count();
        let shards = shards_of(options, &split, &state, &settings, there)?;
        refuse_shared(options, &split, &slots, &others)?;
        if there.div_ceil(shards) > options.per_shard.saturating_mul(2) {
            log::warn!(
                "{split}: {} videos a shard, since an earlier run found fewer and made {shards} shards of them: \
                 --overwrite starts over",
                there.div_ceil(shards)
            );
        }
        account.first_task = plan.shards.len();
        for number in 0..shards {
            let slice = number * slots.len() / shards..(number + 1) * slots.len() / shards;
            let videos = slots[slice].iter().flatten().map(|video| PlannedVideo::clone(video)).collect();
            plan.shards.push(ShardPlan { split: split.clone(), number, videos });
        }
        ready.push((state, Stored { settings, shards, videos: videos.clone() }));
        ledger.splits.push(account);
    }
    // Nothing has been written or removed up to here.
    store_classes(options, &classes_file, &plan.class_names)?;
    for ((state, stored), account) in ready.into_iter().zip(&ledger.splits) {
        output::tidy(&options.out, &account.name, options.overwrite)?;
        if options.overwrite {
            state.clear()?;
        }
        state.write(STORED, &stored)?;
    }
    for (task, shard) in plan.shards.iter().enumerate() {
        match kept(options, shard, &plan.class_names) {
            Ok(record) => ledger.kept.push(Summary::new(task as u64, &record)),
            Err(why) => {
                if let Some(why) = why {
                    log::info!("{}: shard {} is made again: {why}", shard.split, shard.number);
                }
                ledger.todo.push(task as u64);
            }
        }
    }
    ledger.todo_videos = ledger.todo.iter().map(|&task| plan.shards[task as usize].videos.len()).sum();
    Ok((plan, ledger))
}

/// A video's place in the order of its split.
fn place_of(seed: u64, split: &str, id: &str) -> u64 {
    xxh3_64_with_seed(format!("{split}/{id}").as_bytes(), seed)
}

/// Moves a part of each class (rounded) into the split `test`.
fn set_apart(listing: &mut Listing, options: &PrepareOptions) {
    let mut classes: BTreeMap<i32, Vec<Source>> = BTreeMap::new();
    for source in listing.splits.drain(..).flat_map(|(_, sources)| sources) {
        classes.entry(source.label).or_default().push(source);
    }
    let (mut rest, mut test) = (Vec::new(), Vec::new());
    for (_, mut class) in classes {
        class.sort_by_cached_key(|source| (place_of(options.seed, "test fraction", &source.id), source.id.clone()));
        let n = (class.len() as f64 * options.test_fraction).round() as usize;
        rest.extend(class.split_off(n));
        test.extend(class);
    }
    listing.splits = vec![(options.splits[0].clone(), rest), ("test".into(), test)];
    listing.splits.retain(|(_, sources)| !sources.is_empty());
}

/// A split's videos in order, `None` in the place of those that are missing or to be skipped; and their account.
fn videos_of(
    options: &PrepareOptions,
    split: &str,
    sources: Vec<Source>,
    skip: &HashSet<String>,
) -> Result<(Slots, SplitLedger)> {
    let expected = options.description.splits.get(split).and_then(|s| s.expect);
    let listed = sources.len();
    let mut account = SplitLedger { name: split.into(), listed, expected, ..SplitLedger::default() };
    let mut slots = Slots::with_capacity(listed);
    account.missing.reserve_exact(sources.iter().filter(|source| source.path.is_none()).count());
    for source in sources {
        let Some(path) = &source.path else {
            account.missing.push(source.id);
            slots.push(None);
            continue;
        };
        if skip.contains(&source.id) {
            account.skipped += 1;
            slots.push(None);
            continue;
        }
        let file = FileState::of(&options.videos, path);
        slots.push(Some(Box::new(PlannedVideo { id: source.id, label: source.label, file })));
    }
    if slots.iter().flatten().next().is_none() {
        return Err(Error::input(format!(
            "{split}: none of the {listed} videos can be used: {} are missing below {}, {} are to be skipped",
            account.missing.len(),
            options.videos.display(),
            account.skipped
        )));
    }
    Ok((slots, account))
}

/// Everything but the videos that decides what is in the shards.
fn settings(options: &PrepareOptions, class_names: &[String]) -> BTreeMap<String, String> {
    let target = &options.target;
    let mut settings = vec![
        ("dataset", options.description.name.clone()),
        ("height", target.height.to_string()),
        ("width", target.width.to_string()),
        ("fps", target.fps.to_string()),
        ("max-seconds", target.max_seconds.to_string()),
        ("min-frames", options.min_frames.to_string()),
        ("encoding", options.encoding.name().into()),
        ("per-shard", options.per_shard.to_string()),
        ("test-fraction", options.test_fraction.to_string()),
        ("seed", options.seed.to_string()),
        ("list of classes", format!("{:016x}", xxh3_64(class_names.join("\n").as_bytes()))),
    ];
    if options.encoding == Encoding::Jpeg {
        settings.push(("quality", options.quality.to_string()));
    }
    settings.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// How many shards the split has: as many as an earlier run decided on, whose settings have to be these.
fn shards_of(
    options: &PrepareOptions,
    split: &str,
    state: &State,
    settings: &BTreeMap<String, String>,
    videos: usize,
) -> Result<usize> {
    let fresh = videos.div_ceil(options.per_shard);
    if options.overwrite {
        return Ok(fresh);
    }
    let out = options.out.display();
    let Some(stored) = state.read::<Stored>(STORED) else {
        let old = output::shards(&options.out, split)?.len();
        if old > 0 {
            return Err(Error::input(format!(
                "{out}: {old} shards of {split} are there already, and not from `sideways data prepare`: give another \
                 --out, or --overwrite to replace them"
            )));
        }
        return Ok(fresh);
    };
    let names: BTreeSet<&String> = stored.settings.keys().chain(settings.keys()).collect();
    let value = |of: &BTreeMap<String, String>, name: &str| of.get(name).cloned().unwrap_or_else(|| "absent".into());
    let differ: Vec<String> = names
        .into_iter()
        .filter(|name| stored.settings.get(*name) != settings.get(*name))
        .map(|name| format!("{name} (was {}, now {})", value(&stored.settings, name), value(settings, name)))
        .collect();
    if !differ.is_empty() {
        return Err(Error::input(format!(
            "{out}: the shards of {split} that are there were made with other settings: {}. Give another --out, or \
             --overwrite to replace them",
            differ.join(", ")
        )));
    }
    Ok(stored.shards)
}

/// Writes the list of classes, or compares it with the one that the shards of other splits have.
fn store_classes(options: &PrepareOptions, file: &Path, names: &[String]) -> Result<()> {
    if file.is_file() && read_classes(file)? == names {
        return Ok(());
    }
    if file.is_file() && !options.overwrite {
        return Err(Error::input(format!(
            "{}: the shards that are there have other classes: give another --out, or --overwrite",
            file.display()
        )));
    }
    if let Some(name) = names.iter().find(|name| name.contains(['\n', '\r']) || name.is_empty()) {
        return Err(Error::input(format!("class {name:?}: a class needs a name of one line")));
    }
    write_whole(file, (names.join("\n") + "\n").as_bytes())
}

/// The splits that earlier runs made of the same folder of videos beside `mine`, each with its videos' paths.
fn others(options: &PrepareOptions, mine: &[&str], videos: Option<&Path>) -> Result<Vec<(String, HashSet<String>)>> {
    let mut others = Vec::new();
    for (name, state) in State::all(&options.out)? {
        let Some(stored) = state.read::<Stored>(STORED) else { continue };
        if mine.contains(&name.as_str()) || stored.videos.as_deref() != videos || videos.is_none() {
            continue;
        }
        let records = (0..stored.shards).filter_map(|n| state.read::<Record>(&record::name(n)));
        let written = |entry: Entry| matches!(entry.outcome, Outcome::Written { .. }).then_some(entry.file.path);
        others.push((name, records.flat_map(|record| record.videos).filter_map(written).collect()));
    }
    Ok(others)
}

/// Refuses a split with the videos of one that is there.
fn refuse_shared(
    options: &PrepareOptions,
    split: &str,
    slots: &[Option<Box<PlannedVideo>>],
    others: &[(String, HashSet<String>)],
) -> Result<()> {
    let mine: Vec<&str> = slots.iter().flatten().map(|video| video.file.path.as_str()).collect();
    for (other, theirs) in others.iter().filter(|(other, _)| exclude(split, other)) {
        let shared: Vec<&str> = mine.iter().copied().filter(|path| theirs.contains(*path)).collect();
        let counts = (shared.len(), mine.len().min(theirs.len()));
        judge(options.description.layout, (split, other), counts, shared.first().copied())?;
    }
    Ok(())
}

/// The record of a shard that need not be made again, without the videos that are now to be skipped; else why it must be, where
/// that is not known already.
fn kept(
    options: &PrepareOptions,
    shard: &ShardPlan,
    class_names: &[String],
) -> std::result::Result<Record, Option<String>> {
    let state = State::new(&options.out, &shard.split);
    let mut record: Record = state.read(&record::name(shard.number)).ok_or(None)?;
    let planned: HashMap<&str, &PlannedVideo> = shard.videos.iter().map(|v| (v.id.as_str(), v)).collect();
    let in_shard = |outcome: &Outcome| matches!(outcome, Outcome::Written { .. });
    for entry in &record.videos {
        let of_cover = |outcome: &Outcome| {
            matches!(outcome, Outcome::Short { frames: ..=1 } | Outcome::Written { frames: ..=1, .. })
        };
        let why = match planned.contains_key(entry.id.as_str()) {
            false if in_shard(&entry.outcome) => "is no longer to be in it",
            true if options.retry_broken && matches!(entry.outcome, Outcome::Broken { .. }) => "is tried again",
            true if record.recipe < RECIPE && of_cover(&entry.outcome) => "may have been taken for its cover picture",
            _ => continue,
        };
        return Err(Some(format!("{} {why}", entry.id)));
    }
    let all = record.videos.len();
    record.videos.retain(|entry| planned.contains_key(entry.id.as_str()));
    let mut refreshed = record.videos.len() == all;
    if !record.videos.iter().map(|entry| &entry.id).eq(shard.videos.iter().map(|video| &video.id)) {
        return Err(Some("it is to hold other videos".into()));
    }
    let stored = labels_in_shard(options, shard, &record);
    for (entry, video) in record.videos.iter_mut().zip(&shard.videos) {
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
    let path = output::shard_path(&options.out, &shard.split, shard.number);
    if std::fs::metadata(path).map_or(0, |meta| meta.len()) != record.bytes {
        return Err(Some("its file is not there, or of another size".into()));
    }
    // So that no content need be compared the next time.
    if !refreshed && let Err(e) = state.write(&record::name(shard.number), &record) {
        log::debug!("{e}");
    }
    Ok(record)
}

/// The labels of a shard whose record is an earlier version's and has none.
fn labels_in_shard(options: &PrepareOptions, shard: &ShardPlan, record: &Record) -> HashMap<String, i32> {
    if record.videos.iter().all(|entry| entry.label.is_some()) {
        return HashMap::new();
    }
    let path = output::shard_path(&options.out, &shard.split, shard.number);
    let read = ShardReader::open(&path).map(|shard| shard.ids.into_iter().zip(shard.labels).collect());
    read.unwrap_or_default()
}

/// The ids to leave out.
fn read_skips(options: &PrepareOptions, listing: &Listing) -> Result<HashSet<String>> {
    if options.skip.is_empty() {
        return Ok(HashSet::new());
    }
    let listed: HashSet<&str> = listing.splits.iter().flat_map(|(_, sources)| sources).map(|s| s.id.as_str()).collect();
    let mut all = HashSet::new();
    for path in &options.skip {
        let ids = read_skip(path)?;
        let known = ids.iter().filter(|id| listed.contains(id.as_str())).count();
        if known < ids.len() {
            let splits = options.splits.join(" and ");
            log::warn!("{}: only {known} of its {} videos are in {splits}", path.display(), ids.len());
        }
        all.extend(ids);
    }
    Ok(all)
}

/// A list of videos to leave out: an id a line, or an earlier run's quarantine list, of which `doubtful` videos (they are
/// in their shards) and `missing` ones are not left out.
///
/// # Errors
/// [`Error::Input`] when it cannot be read.
pub fn read_skip(path: &Path) -> Result<Vec<String>> {
    let text = files::text(path)?;
    let rows = text.lines().map(|line| {
        let mut parts = line.split('\t');
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    });
    let wanted = rows.filter(|(id, what)| !id.is_empty() && !matches!(*what, "doubtful" | "missing" | "what"));
    Ok(wanted.map(|(id, _)| id.to_string()).collect())
}
