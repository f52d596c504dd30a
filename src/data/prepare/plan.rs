//! Which shards there will be and of which videos; and which of them an earlier run has finished.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::kept::kept;
use super::layout::{Listing, Place, There, Videos, exclude, judge, list, read_classes, text};
use super::order::{Ordered, in_order, set_apart};
use super::record::{self, Entry, FileState, Outcome, Record, State};
use super::report::{Ledger, Summary};
use super::todo::{self, PlannedVideo, Todo, TodoWriter};
use super::{PrepareOptions, files, output};
use crate::data::shard::Encoding;
use crate::sys::files::write_whole;
use crate::sys::sorting::Sorter;
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
    /// What it is to hold; nothing where an earlier run has made it.
    pub todo: Option<Todo>,
}

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
        set_apart(&mut listing, options)?;
    }
    let skip = read_skips(options, &listing)?;
    let mut plan = Plan { class_names: listing.class_names, shards: Vec::new() };
    let mut ledger = Ledger { unused: listing.unused, ..Ledger::default() };
    let mut ready = Vec::new();
    let videos = options.videos.canonicalize().ok();
    let names: Vec<&str> = listing.splits.iter().map(|(name, _)| name.as_str()).collect();
    let others = others(options, &names, videos.as_deref())?;
    for (split, listed) in listing.splits {
        let (ordered, videos_there, account) = in_order(options, &split, listed, &skip)?;
        let state = State::new(&options.out, &split);
        ledger.locks.push(state.lock()?);
        let settings = settings(options, &plan.class_names);
        let there = ordered.usable;
        let shards = shards_of(options, &split, &state, &settings, there)?;
        refuse_shared(options, (&split, &videos_there, there), &skip, &others)?;
        if there.div_ceil(shards) > options.per_shard.saturating_mul(2) {
            log::warn!(
                "{split}: {} videos a shard, since an earlier run found fewer and made {shards} shards of them: \
                 --overwrite starts over",
                there.div_ceil(shards)
            );
        }
        let stored = Stored { settings, shards, videos: videos.clone() };
        ready.push((state, stored, ordered));
        ledger.splits.push(account);
    }
    // Nothing has been written or removed up to here.
    store_classes(options, &classes_file, &plan.class_names)?;
    for (n, (state, stored, ordered)) in ready.into_iter().enumerate() {
        let split = &ledger.splits[n].name;
        output::tidy(&options.out, split, options.overwrite)?;
        todo::forget(&state)?;
        if options.overwrite {
            state.clear()?;
        }
        state.write(STORED, &stored)?;
        ledger.splits[n].first_task = plan.shards.len();
        cut(options, n, (&state, stored.shards, ordered), (&mut plan, &mut ledger))?;
    }
    Ok((plan, ledger))
}

/// Cuts split `n` into shards, and writes down what those are to hold that are to be made.
fn cut(
    options: &PrepareOptions,
    n: usize,
    (state, shards, ordered): (&State, usize, Ordered),
    (plan, ledger): (&mut Plan, &mut Ledger),
) -> Result<()> {
    let (split, listed) = (ledger.splits[n].name.clone(), ledger.splits[n].listed);
    let mut written = TodoWriter::new(state);
    let mut places = ordered.iter().enumerate().peekable();
    for number in 0..shards {
        let end = (number + 1) * listed / shards;
        let mut videos = Vec::new();
        while let Some((_, source)) = places.next_if(|(place, _)| *place < end) {
            let Some(source) = source? else { continue };
            let file = FileState::of(&options.videos, &source.path);
            videos.push(PlannedVideo { id: source.id, label: source.label, file });
        }
        let task = plan.shards.len() as u64;
        let todo = match kept(options, (&split, number), &videos, &plan.class_names) {
            Ok(record) => {
                ledger.kept.push(Summary::new(task, &record));
                None
            }
            Err(why) => {
                if let Some(why) = why {
                    log::info!("{split}: shard {number} is made again: {why}");
                }
                ledger.todo.push(task);
                ledger.todo_videos += videos.len();
                Some(written.write(&videos)?)
            }
        };
        plan.shards.push(ShardPlan { split: split.clone(), number, todo });
    }
    written.finish()
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

/// The splits that earlier runs made of the same folder of videos beside `mine`, each with its number of shards.
fn others(options: &PrepareOptions, mine: &[&str], videos: Option<&Path>) -> Result<Vec<(String, State, usize)>> {
    let mut others = Vec::new();
    for (name, state) in State::all(&options.out)? {
        let Some(stored) = state.read::<Stored>(STORED) else { continue };
        if !mine.contains(&name.as_str()) && stored.videos.as_deref() == videos && videos.is_some() {
            others.push((name, state, stored.shards));
        }
    }
    Ok(others)
}

/// Refuses a split with the videos of one that is there; `usable`: so many of its videos are not to be skipped.
fn refuse_shared(
    options: &PrepareOptions,
    (split, there, usable): (&str, &There, usize),
    skip: &HashSet<String>,
    others: &[(String, State, usize)],
) -> Result<()> {
    for (other, state, shards) in others.iter().filter(|(other, ..)| exclude(split, other)) {
        let mut theirs = Sorter::new(&options.out);
        for record in (0..*shards).filter_map(|n| state.read::<Record>(&record::name(n))) {
            let mut written = record.videos.iter().filter(|entry| matches!(entry.outcome, Outcome::Written { .. }));
            written.try_for_each(|Entry { file, .. }| theirs.push(file.path.as_bytes(), &[]))?;
        }
        let theirs = theirs.sorted();
        let (mut lookup, mut shared, mut first) = (theirs.lookup(), 0, None);
        for mine in there.by_path().iter() {
            let mine = mine?;
            if lookup.has(&mine.key)? && !skip.contains(&text(&mine.value)) {
                shared += 1;
                first.get_or_insert_with(|| text(&mine.key));
            }
        }
        let counts = (shared, usable.min(theirs.len()));
        judge(options.description.layout, (split, other), counts, first.as_deref())?;
    }
    Ok(())
}

/// The ids to leave out.
fn read_skips(options: &PrepareOptions, listing: &Listing) -> Result<HashSet<String>> {
    if options.skip.is_empty() {
        return Ok(HashSet::new());
    }
    let lists = options.skip.iter().map(|path| read_skip(path)).collect::<Result<Vec<_>>>()?;
    let all: HashSet<String> = lists.iter().flatten().cloned().collect();
    let mut known = HashSet::new();
    for (_, Videos { there, missing }) in &listing.splits {
        for source in there.iter() {
            known.extend(all.get(&source?.id));
        }
        for id in missing.ids() {
            known.extend(all.get(&id?));
        }
    }
    for (path, ids) in options.skip.iter().zip(&lists) {
        let count = ids.iter().filter(|id| known.contains(id)).count();
        if count < ids.len() {
            let splits = options.splits.join(" and ");
            log::warn!("{}: only {count} of its {} videos are in {splits}", path.display(), ids.len());
        }
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
