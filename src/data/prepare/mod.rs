//! Video files to shards.
//!
//! | module | subject |
//! |---|---|
//! | [`description`] | `dataset.toml`: what a dataset looks like on disk |
//! | [`layout`] | annotations and files → a list of videos with labels |
//! | `order` | that list, shuffled |
//! | [`plan`] | cut into shards, written down in [`mod@todo`]; what is there from an earlier run, `kept` |
//! | [`shard`] | one shard: its videos decoded side by side, written in order |
//! | [`ffmpeg`] | one video to frames, by a child process |
//! | `frames` | frames out of what that writes |
//! | `quantisation` | JPEG's quality |
//! | `messages` | what that says of the file's streams, and what went wrong |
//! | [`record`] | what is known of finished shards, so that a killed run goes on |
//! | [`report`] | what became of all videos; the lists of broken and missing ones |
//!
//! A [`Job`] is planned once, then its shards are made in any order by any number of processes: a shard is a pure function
//! of the seed, the annotations and its videos' files.

pub mod description;
pub mod ffmpeg;
mod files;
mod frames;
mod kept;
pub mod layout;
mod messages;
mod order;
pub mod output;
pub mod plan;
mod quantisation;
pub mod record;
pub mod report;
pub mod shard;
pub mod todo;

use std::path::PathBuf;

use super::shard::{Encoding, ShardHeader};
use crate::{Error, Result};
use description::Description;
use ffmpeg::{Ffmpeg, Form, Target};
use plan::Plan;
use record::{Entry, State};
use report::{Ledger, Report, Summary};
use todo::PlannedVideo;

/// More videos at a time than this no machine decodes.
const MAX_JOBS: usize = 1024;

/// How to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// What the dataset looks like.
    pub description: Description,
    /// The folder of videos.
    pub videos: PathBuf,
    /// The folder of annotation files, or the one file.
    pub annotations: Option<PathBuf>,
    /// The classes in label order; absent: as [`Description::classes`] says.
    pub classes: Option<Vec<String>>,
    /// The folder for shards.
    pub out: PathBuf,
    /// Names of the splits.
    pub splits: Vec<String>,
    /// Class folders only: this part of each class's videos becomes the split `test` instead; 0 for none.
    pub test_fraction: f64,
    /// Lists of videos to leave out (see [`plan::read_skip`]).
    pub skip: Vec<PathBuf>,
    /// Size and rate of the frames.
    pub target: Target,
    /// Videos with fewer frames than this are passed over.
    pub min_frames: usize,
    /// How frames are stored.
    pub encoding: Encoding,
    /// JPEG quality, 1..=100.
    pub quality: u8,
    /// Videos of a shard, at most; where videos are missing, about.
    pub per_shard: usize,
    /// Decides the order of the videos and which become test videos.
    pub seed: u64,
    /// Replace shards of these splits that are there already, instead of going on with them.
    pub overwrite: bool,
    /// Make the shards anew that miss a video because it could not be decoded.
    pub retry_broken: bool,
    /// Videos decoded at a time.
    pub jobs: usize,
}

/// A dataset to prepare: which shards there will be, and of which videos.
pub struct Job {
    options: PrepareOptions,
    plan: Plan,
    ffmpeg: Ffmpeg,
}

impl Job {
    /// Looks at everything there is, and plans. The [`Ledger`] says which shards are to be made.
    ///
    /// # Errors
    /// [`Error::Input`] for values that make no sense, annotations that make no sense, no videos, no `ffmpeg` that can, a folder that
    /// cannot be written, shards that are there already and were made in another way.
    pub fn plan(options: PrepareOptions) -> Result<(Self, Ledger)> {
        options.validate()?;
        let ffmpeg = Ffmpeg::find(options.form())?;
        let (plan, ledger) = plan::plan(&options)?;
        Ok((Job { options, plan, ffmpeg }, ledger))
    }

    /// The plan, for other processes.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(&self.plan).map_err(|e| Error::Run(format!("writing down the plan: {e}")))
    }

    /// The same job in another process, which has the same options and is given [`Job::to_bytes`].
    ///
    /// # Errors
    /// [`Error::Input`] when this process has no `ffmpeg`, or does not see the videos or the folder of shards.
    pub fn join(options: PrepareOptions, bytes: &[u8]) -> Result<Self> {
        let plan: Plan = serde_json::from_slice(bytes).map_err(|e| Error::Run(format!("reading the plan: {e}")))?;
        let ffmpeg = Ffmpeg::find(options.form())?;
        std::fs::read_dir(&options.videos).map_err(|e| {
            Error::input(format!("{}: cannot read the folder of videos here: {e}", options.videos.display()))
        })?;
        for split in &options.splits {
            if !State::new(&options.out, split).is_there() {
                return Err(Error::input(format!(
                    "{}: not the folder that rank 0 writes into: it must be on a file system that all ranks see",
                    options.out.display()
                )));
            }
        }
        Ok(Job { options, plan, ffmpeg })
    }

    /// The shards there will be.
    pub fn shards(&self) -> &[plan::ShardPlan] {
        &self.plan.shards
    }

    /// The videos of shard `task` of the plan, in the order they are to be written; none where an earlier run has made it.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be read where the plan was written down.
    pub fn videos(&self, task: u64) -> Result<Vec<PlannedVideo>> {
        let shard = &self.plan.shards[task as usize];
        let state = State::new(&self.options.out, &shard.split);
        shard.todo.as_ref().map_or(Ok(Vec::new()), |list| todo::read(&state, list))
    }

    /// Makes shard `task` of the plan. `done` is called after each of its videos.
    ///
    /// # Errors
    /// As [`Job::videos`] and [`shard::make`].
    pub fn make(&self, task: u64, done: &mut dyn FnMut(&Entry) -> Result<()>) -> Result<Summary> {
        let (o, shard) = (&self.options, &self.plan.shards[task as usize]);
        let header = ShardHeader {
            encoding: o.encoding,
            fps: o.target.fps,
            height: o.target.height,
            width: o.target.width,
            dataset: o.description.name.clone(),
            split: shard.split.clone(),
            class_names: self.plan.class_names.clone(),
        };
        let videos: Vec<shard::Video> = self
            .videos(task)?
            .into_iter()
            .map(|v| shard::Video { path: o.videos.join(&v.file.path), id: v.id, label: v.label, file: v.file })
            .collect();
        let recipe = shard::Recipe {
            ffmpeg: &self.ffmpeg,
            target: &o.target,
            form: o.form(),
            min_frames: o.min_frames,
            jobs: o.jobs,
        };
        let path = output::shard_path(&o.out, &shard.split, shard.number);
        let record = shard::make(&path, &header, &videos, &recipe, done)?;
        State::new(&o.out, &shard.split).write(&record::name(shard.number), &record)?;
        Ok(Summary::new(task, &record))
    }

    /// The end: writes the lists of videos that need attention, and reports each split.
    ///
    /// # Errors
    /// [`Error::Io`] when the lists cannot be written; [`Error::Input`] when a split has not one good video.
    pub fn finish(&self, ledger: &Ledger, made: Vec<Summary>) -> Result<Vec<Report>> {
        report::finish(&self.options, &self.plan, ledger, made)
    }
}

/// Prepares a dataset in this process. `done` is called after each video.
///
/// # Errors
/// As [`Job::plan`], [`Job::make`] and [`Job::finish`].
pub fn prepare(options: PrepareOptions, done: &mut dyn FnMut(&Entry)) -> Result<Vec<Report>> {
    let (job, ledger) = Job::plan(options)?;
    let mut tell = |entry: &Entry| {
        done(entry);
        Ok(())
    };
    let made = ledger.todo.iter().map(|task| job.make(*task, &mut tell)).collect::<Result<Vec<_>>>()?;
    job.finish(&ledger, made)
}

impl PrepareOptions {
    /// In what form ffmpeg is to write frames.
    fn form(&self) -> Form {
        match self.encoding {
            Encoding::Raw => Form::Rgb,
            Encoding::Jpeg => Form::Jpeg(self.quality),
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Input`] naming the value and what it has to be.
    pub fn validate(&self) -> Result<()> {
        output::check(self.per_shard, self.quality)?;
        self.target.validate()?;
        if self.splits.is_empty() {
            let known: Vec<&str> = self.description.splits.keys().map(String::as_str).collect();
            return Err(Error::input(format!(
                "--split is missing: {} has {}",
                self.description.name,
                known.join(", ")
            )));
        }
        for split in &self.splits {
            output::check_split(split)?;
        }
        if !(1..=MAX_JOBS).contains(&self.jobs) {
            return Err(Error::input(format!("--jobs {}: it must be 1..={MAX_JOBS}", self.jobs)));
        }
        if !(0.0..1.0).contains(&self.test_fraction) {
            let fraction = self.test_fraction;
            return Err(Error::input(format!("--test-fraction {fraction}: it must be 0 or more and below 1")));
        }
        if self.test_fraction > 0.0 {
            if self.description.layout != description::Layout::Folders || self.splits.len() != 1 {
                return Err(Error::input(
                    "--test-fraction is for class folders and one --split: other layouts have lists",
                ));
            }
            if self.splits[0] == "test" {
                return Err(Error::input("--split test and --test-fraction exclude each other: name the other split"));
            }
        }
        Ok(())
    }
}
