//! What rank 0 does with the workers' reports: metrics, progress, and completing checkpoints.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::grid::Grid;
use super::report::Report;
use crate::checkpoint::{self, Manifest};
use crate::metrics::{Score, TimeAccount};
use crate::transport::{Kind, Receiver};
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
    checkpoints: PathBuf,
    manifest: Manifest,
    keep: usize,
}

impl Recorder {
    /// Opens `metrics.jsonl` in the run folder for appending; lines of batches from `first_clip` on, left over from a
    /// run that went further than its last checkpoint, are taken out.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn open(dir: &Path, checkpoints: PathBuf, manifest: Manifest, keep: usize, first_clip: u64) -> Result<Self> {
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        let path = dir.join("metrics.jsonl");
        let io = |e| Error::io(&path, e);
        let mut kept = Vec::new();
        match File::open(&path) {
            Ok(file) => {
                for line in BufReader::new(file).lines() {
                    let line = line.map_err(io)?;
                    let clips = serde_json::from_str::<serde_json::Value>(&line).ok().and_then(|v| v["clips"].as_u64());
                    if clips.is_some_and(|c| c <= first_clip) {
                        kept.push(line + "\n");
                    }
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
        let fresh = path.with_extension("jsonl.new");
        std::fs::write(&fresh, kept.concat()).map_err(|e| Error::io(&fresh, e))?;
        std::fs::rename(&fresh, &path).map_err(io)?;
        let metrics = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Recorder { metrics, path, checkpoints, manifest, keep })
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|e| Error::io(&self.path, e.into()))?;
        text.push(b'\n');
        self.metrics.write_all(&text).map_err(|e| Error::io(&self.path, e))
    }

    fn complete(&self, clips: u64, modules: usize) -> Result<()> {
        let path = checkpoint::finish(&self.checkpoints, clips, modules, self.manifest.clone(), self.keep)?;
        log::info!("checkpoint {}", path.display());
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
        Console { grid, total, frames_a_batch, recorder, observer, begun: now, last: now, done: Vec::new(), time }
    }

    /// All workers are set up; if they wrote their modules, checkpoint 0 is completed.
    ///
    /// # Errors
    /// [`Error::Io`] if the checkpoint cannot be completed.
    pub fn started(&mut self, reports: &[Report]) -> Result<()> {
        if let (Some(recorder), true) = (&self.recorder, reports.iter().any(|r| r.saved)) {
            recorder.complete(0, self.grid.modules)?;
        }
        (self.begun, self.last) = (Instant::now(), Instant::now());
        Ok(())
    }

    /// One batch of clips is through all modules.
    ///
    /// # Errors
    /// [`Error::Io`] if metrics or a checkpoint cannot be written.
    pub fn batch(&mut self, clip: u64, reports: Vec<Report>) -> Result<()> {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64().max(1e-9);
        self.last = now;
        let mut score = Score::default();
        for (w, report) in reports.iter().enumerate() {
            score.add(&report.score);
            let mut sum = self.time[w].to_array();
            sum.iter_mut().zip(report.time.to_array()).for_each(|(s, t)| *s += t);
            self.time[w] = TimeAccount::from_array(sum);
        }
        self.done.push(score);
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
                workers: workers.collect(),
            })?;
            if summary.reports.iter().any(|r| r.saved) {
                recorder.complete(clip + 1, self.grid.modules)?;
            }
        }
        (self.observer)(&summary);
        Ok(())
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
        }
    }
}

/// Takes one report of every worker, in order, for batch `clip`.
///
/// # Errors
/// [`Error::Transport`] if a worker is gone or reports another batch.
pub fn gather(receivers: &mut [(u32, Receiver)], clip: u64, batch: usize) -> Result<Vec<Report>> {
    receivers
        .iter_mut()
        .map(|(_, receiver)| {
            let (header, payload) = receiver.wait_any()?;
            if header.kind != Kind::Report || header.clip != clip {
                return Err(Error::Transport(format!("{header} came where the report of clip {clip} was due")));
            }
            let report = Report::read(&payload[..header.words as usize], batch);
            receiver.release()?;
            Ok(report)
        })
        .collect()
}
