//! `sideways data synth | prepare | inspect`.

use std::io::IsTerminal;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::data::inspect::{Inspection, contact_sheet, find, inspect};
use crate::data::prepare::ffmpeg::Target;
use crate::data::prepare::layout::Layout;
use crate::data::prepare::{PrepareOptions, prepare};
use crate::data::synth::{Scene, SynthOptions, make};
use crate::data::{Dataset, Encoding};
use crate::{Error, Result};

/// Make, prepare and check datasets.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Make a dataset in which only motion tells the label (needs nothing else).
    Synth(SynthArgs),
    /// Turn folders of videos into shards.
    Prepare(PrepareArgs),
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
}

/// Options of `sideways data prepare`.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// How the videos are organised
    #[arg(long, value_enum, default_value_t = Layout::Folders)]
    layout: Layout,
    /// Folder of videos
    #[arg(long, value_name = "DIR")]
    videos: PathBuf,
    /// Folder for the shards
    #[arg(long)]
    out: PathBuf,
    /// Name of the split
    #[arg(long, value_name = "NAME", default_value = "train")]
    split: String,
    /// Part of each class that becomes the split `test` instead
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    test_fraction: f64,
    /// File with one class name a line, in label order [default: the folders' names, sorted]
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// The dataset's name [default: the name of the folder of videos]
    #[arg(long)]
    dataset: Option<String>,
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
    /// Videos decoded at a time [default: the number of cores]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Decides the order of the videos
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    store: StoreArgs,
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
}

/// Runs one of the `data` commands.
///
/// # Errors
/// What the command comes upon; [`Error::Input`] for damaged shards.
pub fn run(command: DataCommand) -> Result<()> {
    match command {
        DataCommand::Synth(args) => synth(args),
        DataCommand::Prepare(args) => prepare_videos(args),
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
    let bar = bar((args.videos + args.test_videos) as u64, "videos");
    let shards = make(&args.out, &options, &|n| bar.inc(n))?;
    bar.finish_and_clear();
    let dataset = Dataset::from_files(&shards)?;
    println!(
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

fn prepare_videos(args: PrepareArgs) -> Result<()> {
    let start = Instant::now();
    let (height, width) = match args.width {
        Some(width) => (args.short_side, width),
        None if args.aspect >= 1.0 => (args.short_side, (args.short_side as f64 * args.aspect).round() as usize),
        None => ((args.short_side as f64 / args.aspect).round() as usize, args.short_side),
    };
    let classes = match &args.classes {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::input(format!("{}: cannot read the list of classes: {e}", path.display())))?;
            Some(text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect())
        }
    };
    let folder_name = || args.videos.canonicalize().ok()?.file_name()?.to_str().map(str::to_string);
    let options = PrepareOptions {
        dataset: args.dataset.clone().or_else(folder_name).unwrap_or_else(|| "videos".into()),
        videos: args.videos,
        layout: args.layout,
        classes,
        out: args.out,
        split: args.split,
        test_fraction: args.test_fraction,
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
        jobs: args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())),
    };
    let bar = bar(0, "videos");
    let report = prepare(&options, &|| bar.inc(1))?;
    bar.finish_and_clear();
    println!(
        "found {} videos: {} written ({} frames of {height}x{width} in {} shards), {} broken, {} too short ({:.1} s)",
        report.found,
        report.written,
        report.frames,
        report.shards.len(),
        report.broken,
        report.short,
        start.elapsed().as_secs_f64()
    );
    if report.doubtful > 0 {
        println!("ffmpeg complained about {} of the videos written", report.doubtful);
    }
    if let Some(list) = report.quarantine {
        println!("see {}", list.display());
    }
    Ok(())
}

fn inspect_shards(args: InspectArgs) -> Result<()> {
    let files = find(&args.shards)?;
    let total = files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    let bar = bar(total, "bytes");
    let found = inspect(&files, &|n| bar.inc(n));
    bar.finish_and_clear();
    print_inspection(&found);
    if let Some(png) = &args.sheet {
        let sheet = contact_sheet(&files, png, args.rows, args.columns)?;
        println!("\n{}: {} frames a row, from the top:", png.display(), sheet.columns);
        for (id, class) in &sheet.rows {
            println!("  {class}  {id}");
        }
    }
    if found.damage.is_empty() {
        println!("\nall sound");
        return Ok(());
    }
    Err(Error::input(format!("{} damaged:\n  {}", found.damage.len(), found.damage.join("\n  "))))
}

fn print_inspection(found: &Inspection) {
    for shard in &found.shards {
        println!(
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
    println!(
        "\n{videos} videos, {all} frames of {}x{} (HxW); a video has {shortest} to {longest}, {:.1} on average",
        found.size.0,
        found.size.1,
        all as f64 / videos as f64
    );
    let wide = found.class_names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    for (k, (name, n)) in found.class_names.iter().zip(&found.per_class).enumerate() {
        println!("  {k:>4}  {name:wide$}  {n:>8}  {:5.1} %", *n as f64 * 100.0 / videos as f64);
    }
}

/// A progress bar where someone watches, nothing elsewhere. A length of 0 counts without an end.
fn bar(length: u64, unit: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, text) = match (length, unit) {
        (0, _) => (ProgressBar::new_spinner(), "{spinner} {pos} UNIT ({per_sec})"),
        (n, "bytes") => (ProgressBar::new(n), "{bar:40} {bytes}/{total_bytes} ({bytes_per_sec}, {eta})"),
        (n, _) => (ProgressBar::new(n), "{bar:40} {pos}/{len} UNIT ({per_sec}, {eta})"),
    };
    match ProgressStyle::with_template(&text.replace("UNIT", unit)) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn parse_speed(text: &str) -> std::result::Result<Range<f64>, String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|_| format!("{s:?} is not a number; use V or MIN..MAX"));
    match text.split_once("..") {
        None => number(text).map(|v| v..v),
        Some((lo, hi)) => Ok(number(lo)?..number(hi)?),
    }
}

fn parse_aspect(text: &str) -> std::result::Result<f64, String> {
    let ratio = text.split_once(':').and_then(|(w, h)| Some(w.parse::<f64>().ok()? / h.parse::<f64>().ok()?));
    ratio.filter(|r| r.is_finite() && *r > 0.0).ok_or_else(|| format!("{text:?} is not W:H, for instance 4:3"))
}
