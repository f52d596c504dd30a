//! `sideways data prepare`: plans on rank 0, makes shards on all ranks, reports.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::StoreArgs;
use crate::cli::live::{Live, lasting};
use crate::cli::output::{json, shown};
use crate::comm::World;
use crate::comm::task_pool::{Tally, share};
use crate::data::Encoding;
use crate::data::prepare::description::{Description, Layout};
use crate::data::prepare::ffmpeg::Target;
use crate::data::prepare::layout::read_classes;
use crate::data::prepare::record::{Entry, Outcome};
use crate::data::prepare::report::{Ledger, Report, Summary, unused_list};
use crate::data::prepare::{Job, PrepareOptions};
use crate::{Error, Result};

/// Options of `sideways data prepare`.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// The dataset's description: dataset.toml or its folder, for instance datasets/kinetics600
    #[arg(long, value_name = "PATH", conflicts_with = "layout")]
    dataset: Option<PathBuf>,
    /// How the videos are organised, for a dataset without a description
    #[arg(long, value_enum, default_value_t = Layout::Folders)]
    layout: Layout,
    /// Folder of videos
    #[arg(long, value_name = "DIR")]
    videos: PathBuf,
    /// Folder of the dataset's annotation files, or the one file
    #[arg(long, value_name = "PATH")]
    annotations: Option<PathBuf>,
    /// Folder for the shards
    #[arg(long)]
    out: PathBuf,
    /// Splits to prepare, separated by commas [default: train, for a dataset without a description]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = parse_split)]
    split: Vec<String>,
    /// Class folders: part of each class that becomes the split `test` instead
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    test_fraction: f64,
    /// File with one class name a line, in label order [default: as the dataset has it, else sorted]
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// The name stored in the shards [default: the description's, or the name of the folder of videos]
    #[arg(long)]
    name: Option<String>,
    /// Leave out the videos in this list: an earlier run's quarantine-SPLIT.tsv, or an id a line (may be repeated)
    #[arg(long, value_name = "FILE")]
    skip: Vec<PathBuf>,
    /// Make the shards again that miss a video because it could not be decoded
    #[arg(long)]
    retry_broken: bool,
    /// The shorter side of the frames, in pixels
    #[arg(long, value_name = "PX", default_value_t = 128)]
    short_side: usize,
    /// Width to height of the frames, W:H
    #[arg(long, value_name = "W:H", default_value = "4:3", value_parser = parse_aspect, conflicts_with = "width")]
    aspect: f64,
    /// Width of the frames, with the short side as their height
    #[arg(long, value_name = "PX")]
    width: Option<usize>,
    /// Frames a second
    #[arg(long, default_value_t = 25.0)]
    fps: f64,
    /// Leave out what comes after this many seconds of a video
    #[arg(long, value_name = "S", default_value_t = 30.0)]
    max_seconds: f64,
    /// Pass over videos with fewer frames
    #[arg(long, value_name = "N", default_value_t = 8)]
    min_frames: usize,
    /// Give a video up after this many seconds of decoding
    #[arg(long, value_name = "S", default_value_t = 300)]
    time_limit: u64,
    /// Videos decoded at a time by each rank [default: its share of the node's cores]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Decides the order of the videos
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs it, on all ranks.
///
/// # Errors
/// As [`Job::plan`], [`Job::make`] and [`Job::finish`].
pub fn run(world: &World, args: PrepareArgs) -> Result<()> {
    let start = Instant::now();
    let (out, as_json) = (args.out.clone(), args.store.json);
    let options = world.first_error(options(world, args))?;
    let (job, ledger) = plan(world, options)?;
    if world.rank() == 0 && ledger.finished() > 0 {
        log::info!("{} shards are there already, {} are to be made", ledger.finished(), ledger.todo.len());
    }
    let mut progress = Progress::new(ledger.todo_videos as u64, world.rank() == 0);
    let work = |task, tell: &mut dyn FnMut(Tally) -> Result<()>| job.make(task, &mut |entry| tell(tally(entry)));
    let mine = share(world, &ledger.todo, &work, &mut |tally| progress.add(tally))?;
    drop(progress);
    let bytes = serde_json::to_vec(&mine).map_err(|e| Error::Run(format!("collecting what was made: {e}")))?;
    let all = world.gather_at_first(&bytes)?;
    if world.rank() > 0 {
        return world.first_error(Ok(()));
    }
    let made: std::result::Result<Vec<Vec<Summary>>, _> =
        all.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    let made = made.map_err(|e| Error::Run(format!("collecting what was made: {e}")));
    let reports = made.and_then(|made| job.finish(&ledger, made.into_iter().flatten().collect()));
    let reports = world.first_error(reports)?;
    if as_json {
        return json(&serde_json::json!({
            "out": shown(&out), "splits": reports.iter().map(as_split).collect::<Vec<_>>(), "unused": ledger.unused.len(),
            "unused_list": (!ledger.unused.is_empty()).then(|| shown(&unused_list(&out))),
            "seconds": start.elapsed().as_secs_f64(), "ranks": world.size(),
        }));
    }
    reports.iter().for_each(print);
    print_unused(&ledger, &out);
    outln!(
        "{:.1} s on {} rank{}",
        start.elapsed().as_secs_f64(),
        world.size(),
        if world.size() == 1 { "" } else { "s" }
    );
    Ok(())
}

fn options(world: &World, args: PrepareArgs) -> Result<PrepareOptions> {
    let (height, width) = match args.width {
        Some(width) => (args.short_side, width),
        None if args.aspect >= 1.0 => (args.short_side, (args.short_side as f64 * args.aspect).round() as usize),
        None => ((args.short_side as f64 / args.aspect).round() as usize, args.short_side),
    };
    let folder_name = || args.videos.canonicalize().ok()?.file_name()?.to_str().map(str::to_string);
    let mut description = match &args.dataset {
        Some(path) => Description::read(path)?,
        None => Description::plain(args.layout, &folder_name().unwrap_or_else(|| "videos".into())),
    };
    if let Some(name) = args.name {
        description.name = name;
    }
    let mut splits = args.split;
    if splits.is_empty() && description.splits.is_empty() {
        splits.push("train".into());
    }
    let mut seen = std::collections::BTreeSet::new();
    splits.retain(|split| seen.insert(split.clone()));
    Ok(PrepareOptions {
        description,
        classes: args.classes.as_deref().map(read_classes).transpose()?,
        videos: args.videos,
        annotations: args.annotations,
        out: args.out,
        splits,
        test_fraction: args.test_fraction,
        skip: args.skip,
        target: Target {
            height,
            width,
            fps: args.fps,
            max_seconds: args.max_seconds,
            time_limit: Duration::from_secs(args.time_limit),
        },
        min_frames: args.min_frames,
        encoding: args.store.encoding.unwrap_or(Encoding::Jpeg),
        quality: args.store.quality,
        per_shard: args.store.per_shard,
        seed: args.seed,
        overwrite: args.store.overwrite,
        retry_broken: args.retry_broken,
        jobs: args.jobs.unwrap_or_else(|| (world.local_cores() / world.local_size()).max(1)),
    })
}

/// Rank 0 plans, the others take its plan: so no rank can see other files.
fn plan(world: &World, options: PrepareOptions) -> Result<(Job, Ledger)> {
    if world.rank() == 0 {
        let shared = |job: &Job| if world.size() > 1 { job.to_bytes() } else { Ok(Vec::new()) };
        let planned = Job::plan(options).and_then(|(job, ledger)| Ok((shared(&job)?, job, ledger)));
        let (bytes, job, ledger) = world.first_error(planned)?;
        if world.size() > 1 {
            world.gather(&bytes)?;
        }
        return world.first_error(Ok((job, ledger)));
    }
    world.first_error(Ok(()))?;
    let all = world.gather(&[])?;
    let job = Job::join(options, &all[0]);
    Ok((world.first_error(job)?, Ledger::default()))
}

/// A video done: all, written, broken, too short.
fn tally(entry: &Entry) -> Tally {
    match entry.outcome {
        Outcome::Written { .. } => [1, 1, 0, 0],
        Outcome::Broken { .. } => [1, 0, 1, 0],
        Outcome::Short { .. } => [1, 0, 0, 1],
    }
}

/// Videos done so far.
struct Progress {
    total: u64,
    sum: [u64; 4],
    live: Live,
}

impl Progress {
    fn new(total: u64, shown: bool) -> Self {
        let template = "[{bar:24}] {pos}/{len} videos ({rate}/s)  {msg}  ETA {eta}";
        Progress { total, sum: [0; 4], live: Live::new(total, template, shown && total > 0) }
    }

    fn add(&mut self, tally: Tally) {
        self.sum.iter_mut().zip(tally).for_each(|(sum, n)| *sum += u64::from(n));
        let ([done, _, broken, short], total) = (self.sum, self.total);
        let rate = done as f64 / self.live.seconds();
        let bad = || format!("{broken} broken, {short} too short");
        let left = || lasting(total.saturating_sub(done) as f64 / rate);
        let line = || format!("{done}/{total} videos ({rate:.1}/s), {}, ETA {}", bad(), left());
        self.live.tell([done, total], bad, line);
    }
}

fn as_split(report: &Report) -> serde_json::Value {
    let Report { split, listed, expected, found, missing, skipped, broken, short, written, doubtful, .. } = report;
    let list = |list: &Option<PathBuf>| list.as_deref().map(shown);
    serde_json::json!({
        "split": split, "listed": listed, "expected": expected, "found": found, "missing": missing, "skipped": skipped,
        "broken": broken, "too_short": short, "written": written, "doubtful": doubtful,
        "frames": report.frames, "bytes": report.bytes,
        "shards": report.shards.iter().map(|path| shown(path)).collect::<Vec<_>>(), "earlier_shards": report.earlier,
        "quarantine_list": list(&report.quarantine), "missing_list": list(&report.missing_list),
        "classes_without_videos": report.without,
    })
}

fn print(report: &Report) {
    let Report { split, listed, found, missing, skipped, broken, short, written, .. } = report;
    let expected = match report.expected {
        Some(expected) if expected != *listed => format!(" (the dataset's description expects {expected})"),
        _ => String::new(),
    };
    outln!("{split}: {listed} videos listed{expected}");
    outln!("  found      {found:>8}");
    outln!("  missing    {missing:>8}{}", see(&report.missing_list));
    outln!("  skipped    {skipped:>8}");
    outln!("  broken     {broken:>8}{}", see(&report.quarantine));
    for (id, why) in &report.examples {
        outln!("             {id}: {why}");
    }
    outln!("  too short  {short:>8}");
    outln!(
        "  written    {written:>8}  {} frames, {:.1} MB, {} shards{}",
        report.frames,
        report.bytes as f64 / 1e6,
        report.shards.len(),
        if report.earlier > 0 { format!(" ({} made earlier)", report.earlier) } else { String::new() }
    );
    if report.doubtful > 0 {
        outln!("             of which {} are doubtful{}", report.doubtful, see(&report.quarantine));
    }
    if !report.without.is_empty() {
        let (n, all) = (report.without.len(), &report.without);
        let first = all.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        outln!("  no video of {n} classes: {first}{}", if n > 8 { ", …" } else { "" });
    }
}

/// What lies below the folder of videos and is in no split, by reason.
fn print_unused(ledger: &Ledger, out: &Path) {
    if ledger.unused.is_empty() {
        return;
    }
    outln!(
        "not used: {} files and folders below the folder of videos  see {}",
        ledger.unused.len(),
        unused_list(out).display()
    );
    for (why, n, first) in ledger.unused.reasons() {
        outln!("  {n:>19}  {why}: {first}{}", if *n > 1 { ", …" } else { "" });
    }
}

fn see(list: &Option<PathBuf>) -> String {
    list.as_ref().map_or_else(String::new, |path| format!("  see {}", path.display()))
}

/// Spaces around the commas are no part of a name.
fn parse_split(text: &str) -> std::result::Result<String, String> {
    Ok(text.trim().to_string())
}

fn parse_aspect(text: &str) -> std::result::Result<f64, String> {
    let ratio = text.split_once(':').and_then(|(w, h)| Some(w.parse::<f64>().ok()? / h.parse::<f64>().ok()?));
    ratio.filter(|r| r.is_finite() && *r > 0.0).ok_or_else(|| format!("{text:?} is not W:H, for instance 4:3"))
}
