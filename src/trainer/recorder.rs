//! A training run's record in its run folder: `config.toml`, `metrics.jsonl`, and checkpoints completed.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::board::Board;
use super::validation::Validated;
use crate::checkpoint::best::Best;
use crate::checkpoint::{self, Checkpoint, Manifest};
use crate::config::{OnCheckpointError, RunConfig};
use crate::metrics::{Report, TimeAccount};
use crate::pipeline::RunRange;
use crate::setup::Setup;
use crate::sys::files::{read, write_whole};
use crate::{Error, Result};

/// Opens the run folder for recording, if the range is to be recorded.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn recorder(setup: &Setup, range: &RunRange) -> Result<Option<Recorder>> {
    if !range.record {
        return Ok(None);
    }
    let dir = &setup.config.run.dir;
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let text = setup.config.to_toml()?;
    let path = dir.join("config.toml");
    write_whole(&path, text.as_bytes())?;
    let mut manifest = Manifest::new(text, setup.class_names.clone(), setup.network.input, setup.cuts());
    manifest.data = setup.dataset.as_ref().map(|data| data.digest());
    manifest.stored = setup.dataset.as_ref().map(|data| [data.height, data.width]);
    manifest.fps = setup.dataset.as_ref().map(|data| data.fps);
    checkpoint::clear_unfinished(&setup.checkpoints())?;
    let mut recorder = Recorder::open(dir, setup.checkpoints(), manifest, &setup.config.run, range.first)?;
    recorder.board = Board::begin(setup, range.first)?;
    Ok(Some(recorder))
}

/// Where a training run is recorded.
pub struct Recorder {
    metrics: File,
    path: PathBuf,
    /// Lines, or the end of one, that the disk has not taken yet.
    pending: Vec<u8>,
    checkpoints: PathBuf,
    manifest: Manifest,
    keep: usize,
    policy: OnCheckpointError,
    completed: Option<u64>,
    /// The best checkpoint so far.
    best: Option<Best>,
    /// Has every line too.
    board: Option<Board>,
}

impl Recorder {
    /// Opens `metrics.jsonl` in the run folder for appending; lines of later batches than the first `first_batch`, left over from a
    /// run that went further than its last checkpoint, are taken out.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn open(
        dir: &Path,
        checkpoints: PathBuf,
        manifest: Manifest,
        run: &RunConfig,
        first_batch: u64,
    ) -> Result<Self> {
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        let path = dir.join("metrics.jsonl");
        let io = |e| Error::io(&path, e);
        let old = match read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            old => old.map_err(io)?,
        };
        let mut kept = Vec::new();
        // A run that was killed may have left a part of a line, and a machine that was, anything. (Lines of earlier versions
        // count "clips".)
        for line in old.split(|&byte| byte == b'\n') {
            let line_of =
                |v: serde_json::Value| v.get("batches").or(v.get("clips")).and_then(serde_json::Value::as_u64);
            let batches = serde_json::from_slice(line).ok().and_then(line_of);
            if batches.is_some_and(|batches| batches <= first_batch) {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        write_whole(&path, &kept)?;
        let best = Best::read(&checkpoints).filter(|best| best.batches <= first_batch);
        if best.is_none() {
            // Of another run, or of batches that are trained on again.
            Best::forget(&checkpoints)?;
        }
        let metrics = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Recorder {
            metrics,
            path,
            pending: Vec::new(),
            checkpoints,
            manifest,
            keep: run.keep,
            policy: run.on_checkpoint_error,
            completed: (first_batch > 0).then_some(first_batch),
            best,
            board: None,
        })
    }

    /// Appends a line; where that cannot be and the run goes on, the line waits for the next one.
    pub(super) fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let waiting = !self.pending.is_empty();
        serde_json::to_writer(&mut self.pending, line).map_err(|e| Error::io(&self.path, e.into()))?;
        self.pending.push(b'\n');
        match self.flush() {
            Err(e) if self.policy == OnCheckpointError::Continue => {
                if !waiting {
                    log::error!("the run goes on, and its metrics wait until they can be written: {e}");
                }
            }
            result => result?,
        }
        if let Some(board) = &mut self.board {
            board.line(&serde_json::to_value(line).map_err(|e| Error::io(&self.path, e.into()))?);
        }
        Ok(())
    }

    /// Writes what is pending, and keeps what of it the disk does not take (of which `write_all` would not tell).
    pub(super) fn flush(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            match self.metrics.write(&self.pending) {
                Ok(0) => return Err(Error::io(&self.path, std::io::ErrorKind::WriteZero.into())),
                Ok(written) => drop(self.pending.drain(..written)),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(&self.path, e)),
            }
        }
        Ok(())
    }

    /// Appends a validation's line. Where it is the best so far, and the checkpoint of its parameters is there, that is the best
    /// checkpoint from now on: this comes first, since a run that goes on from there repeats a validation only where it finds no
    /// line of it.
    pub(super) fn validated(&mut self, validated: &mut Validated) -> Result<()> {
        let best = validated.as_best().filter(|best| best.beats(self.best.as_ref()));
        if let Some(best) = best {
            let there = Checkpoint::trusted(&checkpoint::folder_of(&self.checkpoints, best.batches));
            match there.and_then(|_| best.write(&self.checkpoints)) {
                Ok(()) => (validated.best, self.best) = (true, Some(best)),
                Err(e) if self.policy == OnCheckpointError::Continue => {
                    log::error!("these are the best parameters so far, but they cannot be kept: {e}");
                }
                Err(e) => return Err(e),
            }
        }
        self.write(&ValidationLine { kind: VALIDATION, validated })
    }

    /// Shows the predicted frames of the validation after `done` batches, where any are reported.
    pub(super) fn frames(&mut self, done: u64, outputs: &[f32]) -> Result<()> {
        self.board.as_mut().map_or(Ok(()), |board| board.frames(done, outputs))
    }

    /// Completes the checkpoint that every module (of replica 0, the first `modules` reports) is on disk in.
    pub(super) fn complete(&mut self, reports: &[Report], modules: usize, last: bool) -> Result<()> {
        let Some(batches) = reports.iter().take(modules).map(|r| r.saved).min().flatten() else { return Ok(()) };
        if self.completed.is_some_and(|done| done >= batches) {
            return Ok(());
        }
        self.completed = Some(batches);
        // A run that resumes from here needs the lines up to here.
        if let Err(e) = self.metrics.sync_data() {
            log::warn!("{}: its last lines may be lost: {e}", self.path.display());
        }
        let keep = (self.keep, self.best.as_ref().map(|best| best.batches));
        match checkpoint::finish(&self.checkpoints, batches, modules, self.manifest.clone(), keep) {
            Ok(path) => log::info!("checkpoint {}", path.display()),
            Err(e) if self.policy == OnCheckpointError::Continue && !last => {
                log::error!("checkpoint {batches} could not be completed, the run goes on without it: {e}");
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// The validations in a run folder's `metrics.jsonl`: after how many batches each.
pub(super) fn validations(dir: &Path) -> Vec<u64> {
    let text = read(&dir.join("metrics.jsonl")).unwrap_or_default();
    let of = |line: &[u8]| {
        let line: serde_json::Value = serde_json::from_slice(line).ok()?;
        line.get("batches").filter(|_| line.get("kind").is_some_and(|kind| kind == VALIDATION))?.as_u64()
    };
    text.split(|&byte| byte == b'\n').filter_map(of).collect()
}

/// What tells a validation's line from a batch's.
const VALIDATION: &str = "validation";

/// A validation's line.
#[derive(Serialize)]
struct ValidationLine<'a> {
    kind: &'static str,
    #[serde(flatten)]
    validated: &'a Validated,
}

/// One line of `metrics.jsonl`.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    pub batches: u64,
    pub loss: f32,
    pub top1: f32,
    pub top5: f32,
    pub lr: f32,
    pub frames_per_second: f64,
    pub elapsed: f64,
    pub skipped: u64,
    pub videos_skipped: u64,
    pub workers: Vec<WorkerLine<'a>>,
}

#[derive(Serialize)]
pub(super) struct WorkerLine<'a> {
    pub module: usize,
    pub replica: usize,
    pub rank: usize,
    pub backward_steps: u32,
    pub grad_norm: f32,
    pub time: &'a TimeAccount,
}
