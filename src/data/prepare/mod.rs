//! Video files to shards: a [`layout`] lists files and labels, [`ffmpeg`] decodes them at the shard's size and frame
//! rate, [`output`] and the shard writer store them. A video that cannot be decoded is written down in
//! `quarantine.tsv` and passed over.

pub mod ffmpeg;
pub mod layout;
pub mod output;

use std::io::Write;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::jpeg;
use super::shard::{Encoding, ShardHeader, ShardWriter};
use crate::{Error, Result};
use ffmpeg::{Decoded, Ffmpeg, Target};
use layout::{Listing, Source};

/// How to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// The folder of videos.
    pub videos: PathBuf,
    /// How it is organised.
    pub layout: layout::Layout,
    /// The classes in label order; absent: the class folders' names, sorted.
    pub classes: Option<Vec<String>>,
    /// The folder for shards.
    pub out: PathBuf,
    /// The dataset's name.
    pub dataset: String,
    /// Name of the split.
    pub split: String,
    /// This part of each class's videos becomes the split `test` instead; 0 for none.
    pub test_fraction: f64,
    /// Size and rate of the frames.
    pub target: Target,
    /// Videos with fewer frames than this are passed over.
    pub min_frames: usize,
    /// How frames are stored.
    pub encoding: Encoding,
    /// JPEG quality, 1..=100.
    pub quality: u8,
    /// Videos of a shard, at most.
    pub per_shard: usize,
    /// Decides the order of the videos and which become test videos.
    pub seed: u64,
    /// Replace shards of these splits that are there already.
    pub overwrite: bool,
    /// Videos decoded at a time.
    pub jobs: usize,
}

/// What became of the videos.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Video files found.
    pub found: usize,
    /// Videos written into shards.
    pub written: usize,
    /// Videos that could not be decoded.
    pub broken: usize,
    /// Videos with too few frames.
    pub short: usize,
    /// Videos that were written, but about which ffmpeg complained.
    pub doubtful: usize,
    /// Frames written.
    pub frames: u64,
    /// The shards.
    pub shards: Vec<PathBuf>,
    /// The list of what was passed over or is doubtful; absent if that is nothing.
    pub quarantine: Option<PathBuf>,
}

/// The list of videos that need attention, in the folder of the shards.
pub const QUARANTINE: &str = "quarantine.tsv";

/// What happened to one video.
enum Outcome {
    Good { frames: Vec<Vec<u8>>, complaint: Option<String> },
    Short(usize),
    Broken(String),
}

/// Prepares a dataset. `progress` is called once for each video done.
///
/// # Errors
/// [`Error::Input`] for values that make no sense, no videos, no `ffmpeg`, a folder that cannot be written, shards
/// that are there already, and when not one video could be decoded.
pub fn prepare(options: &PrepareOptions, progress: &dyn Fn()) -> Result<Report> {
    output::check(options.per_shard, options.quality)?;
    options.target.validate()?;
    if !(0.0..1.0).contains(&options.test_fraction) {
        return Err(Error::input(format!(
            "--test-fraction {}: it must be 0 or more and below 1",
            options.test_fraction
        )));
    }
    if options.test_fraction > 0.0 && options.split == "test" {
        return Err(Error::input("--split test and --test-fraction exclude each other: name the other split"));
    }
    let listing = layout::list(options.layout, &options.videos, options.classes.as_deref())?;
    let ffmpeg = Ffmpeg::find()?;
    let splits = listing.split(&options.split, options.test_fraction, options.seed);
    let names: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
    output::prepare_folder(&options.out, &names, options.overwrite)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.jobs.max(1))
        .build()
        .map_err(|e| Error::Run(format!("cannot start {} decoders: {e}", options.jobs)))?;
    let mut run = Run { options, listing: &listing, ffmpeg, pool, report: Report::default(), notes: Vec::new() };
    run.report.found = listing.sources.len();
    for (split, sources) in &splits {
        run.split(split, sources, progress)?;
    }
    run.finish()
}

struct Run<'a> {
    options: &'a PrepareOptions,
    listing: &'a Listing,
    ffmpeg: Ffmpeg,
    pool: rayon::ThreadPool,
    report: Report,
    /// Lines of the quarantine list: path, what, why.
    notes: Vec<[String; 3]>,
}

impl Run<'_> {
    fn split(&mut self, split: &str, sources: &[&Source], progress: &dyn Fn()) -> Result<()> {
        let mut writer: Option<ShardWriter> = None;
        let mut number = 0;
        // As many videos are held in memory as are decoded at a time.
        for block in sources.chunks(self.options.jobs.max(1)) {
            let outcomes: Vec<Outcome> = self.pool.install(|| block.par_iter().map(|s| self.decode(s)).collect());
            for (source, outcome) in block.iter().zip(outcomes) {
                progress();
                let Some(frames) = self.judge(source, outcome) else { continue };
                let open = match writer.take() {
                    Some(writer) => writer,
                    None => self.create(split, number)?,
                };
                let open = writer.insert(open);
                open.append(&source.id, source.label, &frames)?;
                self.report.written += 1;
                self.report.frames += frames.len() as u64;
                if open.videos() >= self.options.per_shard
                    && let Some(full) = writer.take()
                {
                    self.report.shards.push(full.finish()?);
                    number += 1;
                }
            }
        }
        if let Some(rest) = writer {
            self.report.shards.push(rest.finish()?);
        }
        Ok(())
    }

    fn create(&self, split: &str, number: usize) -> Result<ShardWriter> {
        let target = &self.options.target;
        let header = ShardHeader {
            encoding: self.options.encoding,
            fps: target.fps,
            height: target.height,
            width: target.width,
            dataset: self.options.dataset.clone(),
            split: split.into(),
            class_names: self.listing.class_names.clone(),
        };
        ShardWriter::create(&output::shard_path(&self.options.out, split, number), header)
    }

    fn decode(&self, source: &Source) -> Outcome {
        let target = &self.options.target;
        let (h, w) = (target.height, target.width);
        let mut frames = Vec::new();
        let mut store = |rgb: &[u8]| -> Result<()> {
            frames.push(match self.options.encoding {
                Encoding::Raw => rgb.to_vec(),
                Encoding::Jpeg => jpeg::encode(rgb, h, w, self.options.quality)?,
            });
            Ok(())
        };
        match self.ffmpeg.decode(&source.path, target, &mut store) {
            Ok(Decoded { complaint }) if frames.len() >= self.options.min_frames.max(1) => {
                Outcome::Good { frames, complaint }
            }
            Ok(Decoded { complaint: Some(why) }) if frames.is_empty() => Outcome::Broken(why),
            Ok(_) => Outcome::Short(frames.len()),
            Err(why) => Outcome::Broken(why),
        }
    }

    /// The frames of a good video; otherwise counts and notes what is wrong.
    fn judge(&mut self, source: &Source, outcome: Outcome) -> Option<Vec<Vec<u8>>> {
        let (count, what, why, frames) = match outcome {
            Outcome::Good { frames, complaint: None } => return Some(frames),
            Outcome::Good { frames, complaint: Some(why) } => {
                (&mut self.report.doubtful, "doubtful", why, Some(frames))
            }
            Outcome::Short(n) => {
                (&mut self.report.short, "too short", format!("{n} frames, {} needed", self.options.min_frames), None)
            }
            Outcome::Broken(why) => (&mut self.report.broken, "broken", why, None),
        };
        *count += 1;
        log::warn!("{}: {what}: {why}", source.path.display());
        self.notes.push([source.path.display().to_string(), what.into(), why]);
        frames
    }

    fn finish(mut self) -> Result<Report> {
        let path = self.options.out.join(QUARANTINE);
        if self.notes.is_empty() {
            // One left by an earlier run would be about other shards.
            let _ = std::fs::remove_file(&path);
        } else {
            write_notes(&path, &self.notes).map_err(|e| Error::io(&path, e))?;
            self.report.quarantine = Some(path);
        }
        if self.report.written == 0 {
            let why = self.notes.first().map_or("", |note| &note[2]);
            return Err(Error::input(format!(
                "{}: none of {} videos could be used ({} broken, {} too short); the first: {why}",
                self.options.videos.display(),
                self.report.found,
                self.report.broken,
                self.report.short
            )));
        }
        Ok(self.report)
    }
}

fn write_notes(path: &Path, notes: &[[String; 3]]) -> std::io::Result<()> {
    let clean = |s: &str| s.replace(['\t', '\n', '\r'], " ");
    let mut text = String::from("path\twhat\twhy\n");
    for note in notes {
        text.push_str(&note.each_ref().map(|s| clean(s)).join("\t"));
        text.push('\n');
    }
    std::fs::File::create(path)?.write_all(text.as_bytes())
}
