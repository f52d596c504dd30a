//! What a run's folder tells: its metrics batch by batch, its validations, its configuration.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use serde::Deserialize;

use super::limits::{Limit, limit};
use crate::checkpoint::best::Best;
use crate::config::Config;
use crate::metrics::attempt::{self, Attempt};
use crate::metrics::{PHASES, TimeAccount};
use crate::nn::head::Task;
use crate::sys::files::{read_text, what};
use crate::{Error, Result};

/// A run as its folder has it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The folder's name.
    pub name: String,
    /// `config.toml`, if it can be read.
    pub config: Option<String>,
    /// By `[train]`, such as `skip-sideways, stash activations`.
    pub rule: String,
    /// One entry a batch.
    pub batches: Vec<Batch>,
    /// One entry a validation.
    pub validations: Vec<Validation>,
    /// By module: all of its replicas' time.
    pub modules: Vec<Module>,
    /// Batches before which the run was stopped and went on.
    pub resumed: Vec<u64>,
    /// One entry a start that is on record.
    pub attempts: Vec<Attempt>,
    /// The best checkpoint.
    pub best: Option<Best>,
    /// What is missing or cannot be read, in words.
    pub problems: Vec<String>,
}

/// A batch's line in `metrics.jsonl`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Batch {
    /// Batches done, this one included (formerly `clips`).
    #[serde(alias = "clips")]
    pub batches: u64,
    /// Mean loss of a step.
    pub loss: Option<f64>,
    /// Share of clips whose label came first.
    pub top1: Option<f64>,
    /// From the batch before to this one.
    pub frames_per_second: Option<f64>,
    /// Seconds since this attempt's first batch began.
    pub elapsed: f64,
    /// Losses, cotangents and updates left out.
    pub skipped: u64,
    /// Damaged videos passed over.
    pub videos_skipped: u64,
    workers: Vec<Worker>,
    /// By module, the norm of the last update's gradient (of the first replica).
    #[serde(skip)]
    pub grad_norms: Vec<f64>,
    /// What held it back most.
    #[serde(skip)]
    pub(super) limit: Option<Limit>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Worker {
    module: usize,
    replica: usize,
    rank: usize,
    grad_norm: Option<f64>,
    time: TimeAccount,
}

/// A validation's line.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Validation {
    /// Batches trained on before.
    pub batches: u64,
    /// Mean loss of a step.
    pub loss: Option<f64>,
    /// Share of clips whose label came first.
    pub top1: Option<f64>,
    /// Future frames: mean squared error of pixels.
    pub mse: Option<f64>,
    /// And that of the newest frame's copy.
    pub copy_mse: Option<f64>,
}

/// A module over the whole run.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// The rank of its first replica.
    pub rank: usize,
    /// Seconds in each phase, in the order of [`TimeAccount`].
    pub seconds: [f64; PHASES],
}

/// Opens `metrics.jsonl`, to be read line by line: it may be too long for memory. What is no file would be waited for.
pub(super) fn open_metrics(path: &Path) -> std::io::Result<BufReader<File>> {
    match what(&std::fs::metadata(path)?) {
        Some(what) => Err(std::io::Error::other(format!("it is {what}, not a file"))),
        None => File::open(path).map(BufReader::new),
    }
}

impl Run {
    /// Reads the run in folder `dir`. What of it is missing or damaged stands in [`Run::problems`].
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such folder, or nothing of a run in it.
    pub fn read(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::input(format!(
                "{}: no such folder; give a run's, with metrics.jsonl in it",
                dir.display()
            )));
        }
        let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let name = absolute.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
        let mut run = Run { name, best: Best::read(&dir.join("checkpoints")), ..Run::default() };
        let mut recognition = true;
        match read_text(&dir.join("config.toml")) {
            Ok(text) => {
                match Config::of_manifest(&text, "config.toml", &[]) {
                    Ok(config) => {
                        let (rule, stash) = (config.train.rule, config.train.stash);
                        run.rule = if rule.is_exact() { rule.to_string() } else { format!("{rule}, stash {stash}") };
                        recognition = config.model.task == Task::Recognition;
                    }
                    Err(e) => run.problems.push(format!("config.toml cannot be understood: {e}")),
                }
                run.config = Some(text);
            }
            Err(e) => run.problems.push(format!("config.toml cannot be read: {e}")),
        }
        match read_text(&dir.join(attempt::FILE)) {
            Ok(text) => {
                let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
                run.attempts = lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
                if run.attempts.len() < lines.len() {
                    let damaged = lines.len() - run.attempts.len();
                    run.problems.push(format!("{damaged} line(s) of {} are damaged, and left out", attempt::FILE));
                }
            }
            // Runs of earlier versions have none.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => run.problems.push(format!("{} cannot be read: {e}", attempt::FILE)),
        }
        let metrics = dir.join("metrics.jsonl");
        match open_metrics(&metrics) {
            Ok(file) => run.follow(file).map_err(|e| Error::io(&metrics, e))?,
            Err(e) if e.kind() == ErrorKind::NotFound && run.config.is_none() => {
                return Err(Error::input(format!(
                    "{}: neither metrics.jsonl nor config.toml: give a run's folder, as run.dir names it",
                    dir.display()
                )));
            }
            Err(e) => run.problems.push(format!("metrics.jsonl cannot be read: {e}")),
        }
        if !recognition {
            // Future frames have no classes, and lines say 0.
            run.batches.iter_mut().for_each(|batch| batch.top1 = None);
        }
        if run.batches.is_empty() {
            run.problems.push("no batch is on record yet".into());
        }
        Ok(run)
    }

    fn follow(&mut self, lines: impl BufRead) -> std::io::Result<()> {
        let (mut damaged, mut elapsed) = (0u64, 0.0);
        for line in lines.split(b'\n') {
            let line = line?;
            if line.is_empty() {
                continue;
            }
            let Ok(value) = serde_json::from_slice::<serde_json::Value>(&line) else {
                damaged += 1;
                continue;
            };
            if value.get("kind").is_some_and(|kind| kind == "validation") {
                match serde_json::from_value(value) {
                    Ok(validation) => self.validations.push(validation),
                    Err(_) => damaged += 1,
                }
                continue;
            }
            let Ok(mut batch) = serde_json::from_value::<Batch>(value) else {
                damaged += 1;
                continue;
            };
            let times: Vec<_> = batch.workers.iter().map(|worker| (worker.module, worker.time)).collect();
            batch.limit = limit(&times);
            for worker in std::mem::take(&mut batch.workers) {
                let Some(place) = worker.module.checked_sub(1) else { continue };
                if self.modules.len() <= place {
                    self.modules.resize(place + 1, Module::default());
                }
                let module = &mut self.modules[place];
                let seconds = worker.time.to_array();
                module.seconds.iter_mut().zip(seconds).for_each(|(sum, seconds)| *sum += f64::from(seconds));
                if worker.replica == 0 {
                    module.rank = worker.rank;
                    batch.grad_norms.resize(batch.grad_norms.len().max(place + 1), f64::NAN);
                    batch.grad_norms[place] = worker.grad_norm.unwrap_or(f64::NAN);
                }
            }
            if batch.elapsed < elapsed {
                self.resumed.push(batch.batches.saturating_sub(1));
            }
            elapsed = batch.elapsed;
            self.batches.push(batch);
        }
        if damaged > 0 {
            self.problems.push(format!("{damaged} line(s) of metrics.jsonl are damaged or cut short, and left out"));
        }
        Ok(())
    }

    /// A column of the batches by their number.
    pub fn series(&self, of: impl Fn(&Batch) -> Option<f64>) -> Vec<(f64, f64)> {
        self.batches.iter().filter_map(|batch| Some((batch.batches as f64, of(batch)?))).collect()
    }

    /// A column of the validations.
    pub fn validated(&self, of: impl Fn(&Validation) -> Option<f64>) -> Vec<(f64, f64)> {
        self.validations.iter().filter_map(|validation| Some((validation.batches as f64, of(validation)?))).collect()
    }
}
