//! `sideways bench data`: how fast frames come from shards, stage by stage and all together.
//!
//! Everything is measured with the files in the page cache: what the program costs, not what the disk does.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::videos::Videos;
use super::wrong_size;
use crate::cli::output::{json, table, whole};
use crate::comm::World;
use crate::data::augment::{Geometry, Scaling, View};
use crate::data::{Augmentation, Dataset, Encoding, FrameStream, ShardReader, StreamOptions, jpeg};
use crate::sys::cpus::{parallelism, processor_seconds};
use crate::{Error, Result};

/// Options of `sideways bench data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Shards, or globs of them.
    #[arg(required = true)]
    pub shards: Vec<String>,
    /// Side of the random crop [default: 112, or the frames' shorter side].
    #[arg(long, value_name = "PX", value_parser = whole(1, 1 << 13))]
    pub crop: Option<usize>,
    /// Resize crops of this part of the frame's area and more (random resized crop).
    #[arg(long, value_name = "PART")]
    pub crop_scale: Option<f64>,
    /// Frames of a clip.
    #[arg(long, default_value_t = 16, value_parser = whole(1, 1 << 16))]
    pub frames: usize,
    /// Clips read side by side.
    #[arg(long, default_value_t = 8, value_parser = whole(1, 1 << 20))]
    pub batch: usize,
    /// Also decode these video files with ffmpeg when their frames are wanted, instead of reading shards.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub videos: Vec<PathBuf>,
    /// Frames made ahead, as data.prefetch.
    #[arg(long, default_value_t = 16, value_parser = whole(1, 1 << 16))]
    pub prefetch: usize,
    /// Numbers of decode threads to measure the whole loader with [default: 1, 2, 4 and so on up to the cores].
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = whole(1, 1 << 10))]
    pub threads: Vec<usize>,
    /// Time for each figure.
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// How fast something went.
#[derive(Clone, Copy, Debug, Serialize)]
struct Rate {
    /// By the clock.
    frames_per_second: f64,
    /// By the processor time of all threads: what a core gives.
    frames_per_core_second: f64,
    /// Bytes of stored frames (of the file for plain reads and whole videos), by the clock; 0 where it is not known.
    bytes_per_second: f64,
}

#[derive(Serialize)]
struct Figures {
    encoding: String,
    height: usize,
    width: usize,
    crop: usize,
    stages: Vec<(String, Rate)>,
}

/// Frames decoded over and over for the stages that work in memory.
const IN_MEMORY: u64 = 256;
/// Frames a read.
const BLOCK: u64 = 16;

/// Measures and prints.
///
/// # Errors
/// [`Error::Input`] for shards that cannot be read, or options that do not fit them.
pub fn run(args: &DataArgs, world: &World) -> Result<()> {
    if world.size() > 1 {
        return Err(wrong_size("data", world.size(), "it measures one process"));
    }
    if !(args.seconds > 0.0 && args.seconds <= 1e6) || args.threads.contains(&0) {
        return Err(Error::input("bench data: --seconds must be above 0, and --threads at least 1 each"));
    }
    let dataset = Arc::new(Dataset::open(&args.shards)?);
    let crop = args.crop.unwrap_or(112.min(dataset.height).min(dataset.width));
    let geometry = Geometry::new(dataset.height, dataset.width, Some(crop))?;
    let augmentation =
        Augmentation { flip: true, crop_scale: args.crop_scale.map(|s| [s, 1.0]), ..Augmentation::default() };
    augmentation.validate(Some(crop))?;
    let readers = dataset.shards.iter().map(|path| ShardReader::open(path)).collect::<Result<Vec<_>>>()?;
    let mut stages = vec![
        ("plain read of the files".to_string(), plain(&dataset, args.seconds)?),
        ("read".into(), read(&readers, args.seconds)?),
        ("checksum".into(), checksum(&readers, args.seconds)?),
    ];
    let (bytes, spans) = readers[0].read(0..IN_MEMORY.min(*readers[0].offsets.last().unwrap_or(&0)))?;
    let stored: Vec<&[u8]> = spans.into_iter().map(|span| &bytes[span]).collect();
    let mut frame = vec![0; geometry.stored_len()];
    if dataset.encoding == Encoding::Jpeg {
        stages.push(("decode".into(), decode(&stored, &geometry, &mut frame, args.seconds)?));
    } else {
        frame.copy_from_slice(stored[0]);
    }
    stages.push(("crop, flip, scale".into(), augment(&frame, geometry, &augmentation, args.seconds)?));
    let cores = parallelism();
    let doubling = || std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n <= cores).collect();
    let threads: Vec<usize> = if args.threads.is_empty() { doubling() } else { args.threads.clone() };
    for threads in threads {
        let s = if threads == 1 { "" } else { "s" };
        let name = format!("loader, {threads} decode thread{s}");
        stages.push((name, loader(&dataset, args, (crop, &augmentation), threads)?));
    }
    if !args.videos.is_empty() {
        stages.extend(on_the_fly(&dataset, args, geometry, &augmentation)?);
    }
    let encoding = format!("{:?}", dataset.encoding).to_lowercase();
    let result = Figures { encoding, height: dataset.height, width: dataset.width, crop, stages };
    if args.json {
        return json(&result);
    }
    outln!(
        "{} videos, {} frames of {}x{} (HxW), {}, {} shard(s); crop {crop}; page cache warm",
        dataset.videos.len(),
        dataset.frames(),
        dataset.height,
        dataset.width,
        result.encoding,
        dataset.shards.len()
    );
    let row = |(name, rate): &(String, Rate)| {
        let Rate { frames_per_second, frames_per_core_second, bytes_per_second } = rate;
        format!("{name}\t{frames_per_second:.0}\t{frames_per_core_second:.0}\t{:.0}", bytes_per_second / 1e6)
    };
    let header = "stage\tframes/s\tframes/s a core\tMB/s";
    table(1, header, result.stages.iter().map(row));
    let of = |name: &str| result.stages.iter().find(|(n, _)| n == name).map_or(f64::NAN, |(_, r)| r.bytes_per_second);
    outln!("read / plain read: {:.2}", of("read") / of("plain read of the files"));
    Ok(())
}

/// Repeats `round`, which gives the frames and bytes it went through, for `seconds` after one round that does not count.
fn timed(seconds: f64, mut round: impl FnMut() -> Result<(u64, u64)>) -> Result<Rate> {
    round()?;
    let (begun, used) = (Instant::now(), processor_seconds());
    let (mut frames, mut bytes) = (0, 0);
    while begun.elapsed().as_secs_f64() < seconds {
        let (f, b) = round()?;
        (frames, bytes) = (frames + f, bytes + b);
    }
    let (clock, used) = (begun.elapsed().as_secs_f64(), processor_seconds() - used);
    Ok(Rate {
        frames_per_second: frames as f64 / clock,
        frames_per_core_second: frames as f64 / used,
        bytes_per_second: bytes as f64 / clock,
    })
}

/// Whole files, one after the other, into one buffer.
fn plain(dataset: &Dataset, seconds: f64) -> Result<Rate> {
    let mut buffer = vec![0; 1 << 20];
    timed(seconds, || {
        let mut bytes = 0;
        for path in &dataset.shards {
            let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
            loop {
                match file.read(&mut buffer).map_err(|e| Error::io(path, e))? {
                    0 => break,
                    n => bytes += n as u64,
                }
            }
        }
        Ok((dataset.frames(), bytes))
    })
}

/// All stored frames in order, as the loader reads them.
fn read(readers: &[ShardReader], seconds: f64) -> Result<Rate> {
    timed(seconds, || {
        let (mut frames, mut bytes) = (0, 0);
        for reader in readers {
            let end = *reader.offsets.last().unwrap_or(&0);
            let mut at = 0;
            while at < end {
                let next = (at + BLOCK).min(end);
                bytes += black_box(reader.read(at..next)?.0).len() as u64;
                at = next;
            }
            frames += end;
        }
        Ok((frames, bytes))
    })
}

/// What checking costs, once a video.
fn checksum(readers: &[ShardReader], seconds: f64) -> Result<Rate> {
    timed(seconds, || {
        let mut frames = 0;
        for reader in readers {
            for v in 0..reader.videos() {
                black_box(reader.digest(v)?);
            }
            frames += reader.offsets.last().unwrap_or(&0);
        }
        Ok((frames, readers.iter().map(|r| r.bytes).sum()))
    })
}

/// The JPEG decoder alone, one thread, from and to memory.
fn decode(stored: &[&[u8]], geometry: &Geometry, frame: &mut [u8], seconds: f64) -> Result<Rate> {
    timed(seconds, || {
        for jpeg in stored {
            jpeg::decode(jpeg, geometry.height, geometry.width, frame).map_err(Error::input)?;
        }
        Ok((stored.len() as u64, stored.iter().map(|s| s.len() as u64).sum()))
    })
}

/// What follows decoding, one thread, from and to memory.
fn augment(frame: &[u8], geometry: Geometry, augmentation: &Augmentation, seconds: f64) -> Result<Rate> {
    let defaults = StreamOptions::default();
    let scaling = Scaling { mean: defaults.mean, std: defaults.std };
    let mut out = vec![0.0; geometry.frame_len()];
    let mut clip = 0;
    timed(seconds, || {
        let view = View::drawn(geometry, scaling, augmentation, (1, 0, clip));
        clip += 1;
        for _ in 0..BLOCK {
            view.apply(frame, &mut out);
            black_box(&mut out);
        }
        Ok((BLOCK, BLOCK * frame.len() as u64))
    })
}

/// No shards: `ffmpeg` decodes and scales, this process does what follows.
fn on_the_fly(
    dataset: &Dataset,
    args: &DataArgs,
    geometry: Geometry,
    augmentation: &Augmentation,
) -> Result<[(String, Rate); 2]> {
    let defaults = StreamOptions::default();
    let scaling = Scaling { mean: defaults.mean, std: defaults.std };
    let view = View::drawn(geometry, scaling, augmentation, (1, 0, 0));
    let (mut out, mut videos) = (vec![0.0; geometry.frame_len()], Videos::new(&args.videos, dataset));
    let whole = timed(args.seconds, || videos.whole(&view, &mut out))?;
    let windows = timed(args.seconds, || videos.window(args.frames, &view, &mut out))?;
    Ok([("ffmpeg, whole videos".into(), whole), (format!("ffmpeg, {} frames anywhere", args.frames), windows)])
}

/// The whole loader, in training's order.
fn loader(
    dataset: &Arc<Dataset>,
    args: &DataArgs,
    (crop, augmentation): (usize, &Augmentation),
    threads: usize,
) -> Result<Rate> {
    let options = StreamOptions {
        frames: args.frames,
        batch: args.batch.min(dataset.videos.len()),
        crop: Some(crop),
        augmentation: augmentation.clone(),
        verify: false,
        shuffle: true,
        training: true,
        decoders: threads,
        ..StreamOptions::default()
    }
    .reading_ahead(args.prefetch);
    let frames = (options.batch * options.frames) as u64;
    let a_frame = dataset.shards.iter().filter_map(|p| p.metadata().ok()).map(|m| m.len()).sum::<u64>() as f64
        / dataset.frames() as f64;
    let mut stream = FrameStream::open(dataset.clone(), options)?;
    let mut clip = 0;
    timed(args.seconds, || {
        stream.begin(clip)?;
        clip += 1;
        for t in 0..args.frames {
            black_box(stream.frame(t)?);
        }
        Ok((frames, (frames as f64 * a_frame) as u64))
    })
}
