//! `sideways data synth | prepare | inspect`.

pub mod prepare;

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};

use prepare::PrepareArgs;

use super::live::Live;
use super::output::{json, shown};
use crate::comm::World;
use crate::data::inspect::{Inspection, ShardSummary, Sheet, contact_sheet, find, inspect};
use crate::data::synth::{Scene, SynthOptions, make};
use crate::data::{Dataset, Encoding};
use crate::{Error, Result};

/// Make, prepare and check datasets.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Make a dataset in which only motion tells the label (needs nothing else).
    Synth(SynthArgs),
    /// Turn folders of videos into shards.
    Prepare(Box<PrepareArgs>),
    /// Check shards and tell what is in them.
    Inspect(InspectArgs),
}

/// Options of `sideways data synth`.
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Folder for the shards
    #[arg(long)]
    out: PathBuf,
    /// Videos of the train split
    #[arg(long, default_value_t = 4000)]
    videos: usize,
    /// Videos of the test split
    #[arg(long, default_value_t = 800)]
    test_videos: usize,
    /// Frames of a video
    #[arg(long, default_value_t = 16)]
    frames: usize,
    /// Height and width, in pixels
    #[arg(long, value_name = "PX", default_value_t = 32)]
    size: usize,
    /// Everything random follows from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Speed of the shapes in pixels a frame: V, or MIN..MAX to draw one for each video
    #[arg(long, value_name = "V", default_value = "1..2", value_parser = parse_speed)]
    speed: Range<f64>,
    /// Shapes in a video
    #[arg(long, value_name = "K", default_value_t = 2)]
    shapes: usize,
    /// Radius of a shape, in pixels
    #[arg(long, value_name = "R", default_value_t = 6.0)]
    radius: f64,
    /// Size of the textures' features, in pixels
    #[arg(long, value_name = "PX", default_value_t = 4.0)]
    texture: f64,
    /// Speed of the background, in pixels a frame, in a direction that does not depend on the label
    #[arg(long, value_name = "V", default_value_t = 0.0)]
    camera: f64,
    /// Standard deviation of the noise, in grey levels
    #[arg(long, value_name = "SIGMA", default_value_t = 4.0)]
    noise: f64,
    /// Grey textures of one contrast instead of random colours
    #[arg(long)]
    grey: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// What all commands that write shards have in common.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// How frames are stored [default: raw for synth, jpeg for prepare]
    #[arg(long, value_enum)]
    encoding: Option<Encoding>,
    /// JPEG quality, 1 to 100
    #[arg(long, value_name = "Q", default_value_t = 90)]
    quality: u8,
    /// Videos of a shard, at most
    #[arg(long, value_name = "N", default_value_t = 1000)]
    per_shard: usize,
    /// Replace the split's shards if there are any
    #[arg(long)]
    overwrite: bool,
    /// Print what was made as one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of `sideways data inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Shards: files, quoted globs, or folders
    #[arg(required = true, value_name = "GLOB|DIR")]
    shards: Vec<String>,
    /// Also draw frames of some videos, a row each, into this PNG file
    #[arg(long, value_name = "PNG")]
    sheet: Option<PathBuf>,
    /// Rows of the sheet
    #[arg(long, default_value_t = 16)]
    rows: usize,
    /// Columns of the sheet
    #[arg(long, default_value_t = 8)]
    columns: usize,
    /// Print what was found as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs one of the `data` commands.
///
/// # Errors
/// What the command comes upon; [`Error::Input`] for damaged shards.
pub fn run(world: &World, command: DataCommand) -> Result<()> {
    match command {
        DataCommand::Synth(args) => synth(args),
        DataCommand::Prepare(args) => prepare::run(world, *args),
        DataCommand::Inspect(args) => inspect_shards(args),
    }
}

fn synth(args: SynthArgs) -> Result<()> {
    let start = Instant::now();
    let options = SynthOptions {
        scene: Scene {
            frames: args.frames,
            size: args.size,
            speed: args.speed,
            shapes: args.shapes,
            radius: args.radius,
            texture: args.texture,
            camera: args.camera,
            noise: args.noise,
            grey: args.grey,
        },
        videos: args.videos,
        test_videos: args.test_videos,
        seed: args.seed,
        encoding: args.store.encoding.unwrap_or(Encoding::Raw),
        quality: args.store.quality,
        per_shard: args.store.per_shard,
        overwrite: args.store.overwrite,
    };
    let live = Live::counting(args.videos.saturating_add(args.test_videos) as u64, "videos");
    let shards = make(&args.out, &options, &|n| live.add(n))?;
    drop(live);
    let dataset = Dataset::from_files(&shards)?;
    if args.store.json {
        return json(&serde_json::json!({
            "out": shown(&args.out), "shards": shards.iter().map(|path| shown(path)).collect::<Vec<_>>(), "videos": dataset.videos.len(), "train_videos": args.videos,
            "test_videos": args.test_videos, "frames": args.frames, "height": dataset.height, "width": dataset.width,
            "encoding": dataset.encoding.name(), "classes": dataset.class_names, "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    outln!(
        "{} videos ({} train, {} test) of {} frames, {}x{} {}, {} classes, in {} shards in {} ({:.1} s)",
        dataset.videos.len(),
        args.videos,
        args.test_videos,
        args.frames,
        dataset.height,
        dataset.width,
        dataset.encoding.name(),
        dataset.class_names.len(),
        shards.len(),
        args.out.display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn inspect_shards(args: InspectArgs) -> Result<()> {
    let files = find(&args.shards)?;
    let total = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let live = Live::counting(total, "bytes");
    let found = inspect(&files, &|n| live.add(n));
    drop(live);
    let drawn = args.sheet.as_ref().filter(|_| found.videos() > 0);
    let sheet = drawn.map(|png| contact_sheet(&files, png, args.rows, args.columns)).transpose()?;
    if args.json {
        json(&as_json(&found, drawn.zip(sheet.as_ref())))?;
        return verdict(&found);
    }
    print_inspection(&found);
    if let Some((png, sheet)) = drawn.zip(sheet) {
        outln!("\n{}: {} frames a row, from the top:", png.display(), sheet.columns);
        for (id, class) in &sheet.rows {
            outln!("  {class}  {id}");
        }
    }
    if let Some(first) = found.repeated.first() {
        outln!("\n{} ids occur more than once, the first is {first}", found.repeated.len());
    }
    verdict(&found)?;
    outln!("\nall sound");
    Ok(())
}

/// What is wrong, if anything.
fn verdict(found: &Inspection) -> Result<()> {
    let mut wrong = Vec::new();
    if let Some((id, [a, b])) = found.shared.first() {
        wrong.push(format!(
            "{} videos are in two splits, the first is {id}, in {a} and {b}: what is trained on would be tested on",
            found.shared.len()
        ));
    }
    if let Some(first) = found.missing.first() {
        wrong.push(format!(
            "{} shards are not there, though later ones are; the first is {}: was a part of a copy lost?",
            found.missing.len(),
            first.display()
        ));
    }
    if !found.damage.is_empty() {
        wrong.push(format!("{} damaged:\n  {}", found.damage.len(), found.damage.join("\n  ")));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Error::input(wrong.join("\n"))) }
}

fn as_json(found: &Inspection, sheet: Option<(&PathBuf, &Sheet)>) -> serde_json::Value {
    let shard = |shard: &ShardSummary| {
        serde_json::json!({
            "path": shown(&shard.path), "split": shard.split, "encoding": shard.encoding.name(), "videos": shard.videos,
            "frames": shard.frames, "bytes": shard.bytes,
        })
    };
    let class = |(name, videos): (&String, &u64)| serde_json::json!({ "class": name, "videos": videos });
    let (shortest, longest, all) = found.frames;
    serde_json::json!({
        "sound": verdict(found).is_ok(),
        "shards": found.shards.iter().map(shard).collect::<Vec<_>>(),
        "videos": found.videos(), "frames": all, "shortest_frames": shortest, "longest_frames": longest,
        "height": found.size.0, "width": found.size.1,
        "classes": found.class_names.iter().zip(&found.per_class).map(class).collect::<Vec<_>>(),
        "repeated_ids": found.repeated, "ids_in_two_splits": found.shared, "missing_shards": found.missing.iter().map(|path| shown(path)).collect::<Vec<_>>(),
        "damage": found.damage, "sheet": sheet.map(|(png, _)| shown(png)),
        "sheet_rows": sheet.map(|(_, sheet)| &sheet.rows),
    })
}

fn print_inspection(found: &Inspection) {
    for shard in &found.shards {
        outln!(
            "{}  {}  {}  {} videos  {} frames  {:.1} MB",
            shard.path.display(),
            shard.split,
            shard.encoding.name(),
            shard.videos,
            shard.frames,
            shard.bytes as f64 / 1e6
        );
    }
    let videos = found.videos();
    if videos == 0 {
        return;
    }
    let (shortest, longest, all) = found.frames;
    outln!(
        "\n{videos} videos, {all} frames of {}x{} (HxW); a video has {shortest} to {longest}, {:.1} on average",
        found.size.0,
        found.size.1,
        all as f64 / videos as f64
    );
    let wide = found.class_names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    for (k, (name, n)) in found.class_names.iter().zip(&found.per_class).enumerate() {
        outln!("  {k:>4}  {name:wide$}  {n:>8}  {:5.1} %", *n as f64 * 100.0 / videos as f64);
    }
}

fn parse_speed(text: &str) -> std::result::Result<Range<f64>, String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|_| format!("{s:?} is not a number; use V or MIN..MAX"));
    match text.split_once("..") {
        None => number(text).map(|v| v..v),
        Some((lo, hi)) => Ok(number(lo)?..number(hi)?),
    }
}
