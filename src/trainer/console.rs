//! What rank 0 does with the workers' reports: metrics, progress, and completing checkpoints.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::checkpoint::{self, Manifest};
use crate::comm::{Kind, Receiver};
use crate::config::{OnCheckpointError, RunConfig};
use crate::pipeline::metrics::{Score, TimeAccount};
use crate::pipeline::report::Report;
use crate::setup::grid::Grid;
use crate::sys::files::write_whole;
use crate::{Error, Result};

/// One batch of clips, all replicas together, as rank 0 shows it.
#[derive(Clone, Debug)]
pub struct ClipSummary {
    /// Batches of clips done, this one included.
    pub clips: u64,
    /// Batches of clips in the whole run.
    pub total: u64,
    /// The last module's counts.
    pub score: Score,
    /// Frames per second of this process group since the last batch: R·B·T over the time between.
    pub frames_per_second: f64,
    /// Every worker's report, by worker number.
    pub reports: Vec<Report>,
}

/// What is called after each batch of clips.
pub type Observer<'a> = &'a mut (dyn FnMut(&ClipSummary) + Send);

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
}

impl Recorder {
    /// Opens `metrics.jsonl` in the run folder for appending; lines of batches from `first_clip` on, left over from a
    /// run that went further than its last checkpoint, are taken out.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn open(
        dir: &Path,
        checkpoints: PathBuf,
        manifest: Manifest,
        run: &RunConfig,
        first_clip: u64,
    ) -> Result<Self> {
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        let path = dir.join("metrics.jsonl");
        let io = |e| Error::io(&path, e);
        let old = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            old => old.map_err(io)?,
        };
        let mut kept = Vec::new();
        // A run that was killed may have left a part of a line, and a machine that was, anything.
        for line in old.split(|&byte| byte == b'\n') {
            let clips = serde_json::from_slice::<serde_json::Value>(line).ok().and_then(|v| v["clips"].as_u64());
            if clips.is_some_and(|c| c <= first_clip) {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        write_whole(&path, &kept)?;
        let metrics = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Recorder {
            metrics,
            path,
            pending: Vec::new(),
            checkpoints,
            manifest,
            keep: run.keep,
            policy: run.on_checkpoint_error,
            completed: (first_clip > 0).then_some(first_clip),
        })
    }

    /// Appends a line; where that cannot be and the run goes on, the line waits for the next one.
    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let waiting = !self.pending.is_empty();
        serde_json::to_writer(&mut self.pending, line).map_err(|e| Error::io(&self.path, e.into()))?;
        self.pending.push(b'\n');
        match self.flush() {
            Err(e) if self.policy == OnCheckpointError::Continue => {
                if !waiting {
                    log::error!("the run goes on, and its metrics wait until they can be written: {e}");
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Writes what is pending, and keeps what of it the disk does not take (of which `write_all` would not tell).
    fn flush(&mut self) -> Result<()> {
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

    /// Completes the checkpoint that every module (of replica 0, the first `modules` reports) is on disk in.
    fn complete(&mut self, reports: &[Report], modules: usize, last: bool) -> Result<()> {
        let Some(clips) = reports.iter().take(modules).map(|r| r.saved).min().flatten() else { return Ok(()) };
        if self.completed.is_some_and(|done| done >= clips) {
            return Ok(());
        }
        self.completed = Some(clips);
        // A run that resumes from here needs the lines up to here.
        if let Err(e) = self.metrics.sync_data() {
            log::warn!("{}: its last lines may be lost: {e}", self.path.display());
        }
        match checkpoint::finish(&self.checkpoints, clips, modules, self.manifest.clone(), self.keep) {
            Ok(path) => log::info!("checkpoint {}", path.display()),
            Err(e) if self.policy == OnCheckpointError::Continue && !last => {
                log::error!("checkpoint {clips} could not be completed, the run goes on without it: {e}");
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// One line of `metrics.jsonl`.
#[derive(Serialize)]
struct Line<'a> {
    clips: u64,
    loss: f32,
    top1: f32,
    top5: f32,
    lr: f32,
    frames_per_second: f64,
    elapsed: f64,
    skipped: u64,
    videos_skipped: u64,
    workers: Vec<WorkerLine<'a>>,
}

#[derive(Serialize)]
struct WorkerLine<'a> {
    module: usize,
    replica: usize,
    rank: usize,
    backward_steps: f32,
    grad_norm: f32,
    time: &'a TimeAccount,
}

/// What a run amounted to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Batches of clips done in this process's life.
    pub batches: u64,
    /// Counts of the last quarter of them.
    pub recent: Score,
    /// Counts of all of them.
    pub score: Score,
    /// Time accounts by worker, summed.
    pub time: Vec<TimeAccount>,
    /// Seconds from the first batch's begin to the last one's end.
    pub seconds: f64,
    /// Frames worked on.
    pub frames: u64,
    /// By link, seconds that workers waited on it where it was the one they waited on longest in a clip.
    pub waits: BTreeMap<u32, f64>,
    /// Losses, cotangents and updates left out because they were not finite.
    pub skipped: u64,
    /// Times a damaged video was passed over.
    pub videos_skipped: u64,
    /// What ended the run early (bits of [`crate::pipeline::stop`]), 0 if nothing did.
    pub decision: u32,
    /// Why the clip that was undone could not be read.
    pub failure: Option<String>,
}

/// Gathers reports batch by batch.
pub struct Console<'a> {
    grid: Grid,
    total: u64,
    frames_a_batch: u64,
    recorder: Option<Recorder>,
    observer: Observer<'a>,
    begun: Instant,
    last: Instant,
    done: Vec<Score>,
    time: Vec<TimeAccount>,
    waits: BTreeMap<u32, f64>,
    skipped: u64,
    videos_skipped: u64,
}

impl<'a> Console<'a> {
    /// A console for `total` batches of `frames_a_batch` frames each (all replicas together).
    pub fn new(
        grid: Grid,
        total: u64,
        frames_a_batch: u64,
        recorder: Option<Recorder>,
        observer: Observer<'a>,
    ) -> Self {
        let time = vec![TimeAccount::default(); grid.workers()];
        let now = Instant::now();
        let (done, waits) = (Vec::new(), BTreeMap::new());
        Console {
            grid,
            total,
            frames_a_batch,
            recorder,
            observer,
            begun: now,
            last: now,
            done,
            time,
            waits,
            skipped: 0,
            videos_skipped: 0,
        }
    }

    /// All workers are set up; if they wrote their modules, checkpoint 0 is completed.
    ///
    /// # Errors
    /// [`Error::Io`] if the checkpoint cannot be completed.
    pub fn started(&mut self, reports: &[Report]) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            recorder.complete(reports, self.grid.modules, false)?;
        }
        (self.begun, self.last) = (Instant::now(), Instant::now());
        Ok(())
    }

    /// One batch of clips is through all modules; `last`: no other follows.
    ///
    /// # Errors
    /// [`Error::Io`] if metrics or a checkpoint cannot be written.
    pub fn batch(&mut self, clip: u64, reports: Vec<Report>, last: bool) -> Result<()> {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64().max(1e-9);
        self.last = now;
        let (mut score, mut skipped, mut videos_skipped) = (Score::default(), 0, 0);
        for (w, report) in reports.iter().enumerate() {
            score.add(&report.score);
            skipped += report.skipped as u64;
            videos_skipped += report.videos_skipped as u64;
            *self.waits.entry(report.link).or_default() += f64::from(report.waited);
            let mut sum = self.time[w].to_array();
            sum.iter_mut().zip(report.time.to_array()).for_each(|(s, t)| *s += t);
            self.time[w] = TimeAccount::from_array(sum);
        }
        self.done.push(score);
        self.skipped += skipped;
        self.videos_skipped += videos_skipped;
        let summary = ClipSummary {
            clips: clip + 1,
            total: self.total,
            score,
            frames_per_second: self.frames_a_batch as f64 / seconds,
            reports,
        };
        if let Some(recorder) = &mut self.recorder {
            let workers = summary.reports.iter().enumerate().map(|(w, report)| {
                let (module, replica) = self.grid.module_and_replica(w);
                let Report { backward_steps, grad_norm, time, .. } = report;
                let rank = self.grid.rank_of(w);
                WorkerLine { module, replica, rank, backward_steps: *backward_steps, grad_norm: *grad_norm, time }
            });
            let counted = score.clips.max(1.0);
            recorder.write(&Line {
                clips: clip + 1,
                loss: score.loss(),
                top1: score.top1 / counted,
                top5: score.top5 / counted,
                lr: summary.reports.last().map_or(0.0, |r| r.lr),
                frames_per_second: summary.frames_per_second,
                elapsed: (now - self.begun).as_secs_f64(),
                skipped,
                videos_skipped,
                workers: workers.collect(),
            })?;
            recorder.complete(&summary.reports, self.grid.modules, last)?;
            if last {
                recorder.flush()?;
            }
        }
        (self.observer)(&summary);
        Ok(())
    }

    /// A batch of clips was undone: the checkpoint of what was before it is completed, and that is all.
    ///
    /// # Errors
    /// As [`Console::batch`].
    pub fn undone(&mut self, reports: &[Report]) -> Result<()> {
        match &mut self.recorder {
            Some(recorder) => recorder.complete(reports, self.grid.modules, true).and_then(|()| recorder.flush()),
            None => Ok(()),
        }
    }

    /// What it all amounted to.
    pub fn totals(self) -> Totals {
        let sum = |scores: &[Score]| {
            scores.iter().fold(Score::default(), |mut sum, s| {
                sum.add(s);
                sum
            })
        };
        let batches = self.done.len() as u64;
        let recent = self.done.len() - self.done.len().div_ceil(4);
        Totals {
            batches,
            recent: sum(&self.done[recent..]),
            score: sum(&self.done),
            time: self.time,
            seconds: (self.last - self.begun).as_secs_f64(),
            frames: batches * self.frames_a_batch,
            waits: self.waits,
            skipped: self.skipped,
            videos_skipped: self.videos_skipped,
            decision: 0,
            failure: None,
        }
    }
}

/// Takes one report of every worker, in order, for batch `clip`, and their headers' flags together.
///
/// # Errors
/// [`Error::Transport`] if a worker is gone or reports another batch.
pub fn gather(receivers: &mut [(u32, Receiver)], clip: u64, batch: usize) -> Result<(Vec<Report>, u32)> {
    let mut flags = 0;
    let reports = receivers
        .iter_mut()
        .map(|(_, receiver)| {
            let (header, payload) = receiver.wait_any()?;
            if header.kind != Kind::Report || header.clip != clip {
                return Err(Error::Transport(format!("{header} came where the report of clip {clip} was due")));
            }
            let report = Report::read(&payload[..header.words as usize], batch);
            receiver.release()?;
            flags |= header.flags;
            Ok(report)
        })
        .collect::<Result<Vec<Report>>>()?;
    Ok((reports, flags))
}
