//! `sideways eval`: top-1, top-5, per class, confusion matrix.

use std::path::{Path, PathBuf};

use clap::Args;

use super::progress::Progress;
use crate::checkpoint::Checkpoint;
use crate::comm::World;
use crate::config::{Config, DeviceChoice, Exchange, Globs, Precision, Task, Wire};
use crate::nn::loss::topk_correct;
use crate::setup::Purpose;
use crate::trainer::{BatchSummary, Evaluator};
use crate::{Error, Result};

/// Arguments of `sideways eval`.
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// A checkpoint folder (step-NNNNNNNN), or a run folder, whose newest checkpoint is meant.
    pub checkpoint: PathBuf,
    /// Shards to score on; default: the run's data.test.
    #[arg(long, value_name = "GLOB")]
    pub data: Vec<String>,
    /// Override a key of the run's configuration (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Use the parameters themselves and not their moving average (train.ema).
    #[arg(long)]
    pub raw: bool,
    /// Write the confusion matrix there as CSV (rows: label, columns: prediction).
    #[arg(long, value_name = "FILE")]
    pub confusion: Option<PathBuf>,
    /// Print the result as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// Counts over the test clips.
struct Tally {
    classes: usize,
    clips: u64,
    top1: u64,
    top5: u64,
    /// `[label][prediction]`
    confusion: Vec<u64>,
}

impl Tally {
    fn new(classes: usize) -> Self {
        Tally { classes, clips: 0, top1: 0, top5: 0, confusion: vec![0; classes * classes] }
    }

    fn add(&mut self, summary: &BatchSummary) {
        let Some(last) = summary.reports.last().filter(|r| !r.outputs.is_empty()) else { return };
        for (row, &label) in last.outputs.chunks_exact(self.classes).zip(&last.labels) {
            let Ok(label) = usize::try_from(label) else { continue };
            self.clips += 1;
            self.top1 += u64::from(topk_correct(row, label as i32, 1));
            self.top5 += u64::from(topk_correct(row, label as i32, 5));
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            self.confusion[label * self.classes + best] += 1;
        }
    }

    fn share(&self, correct: u64) -> f64 {
        correct as f64 / self.clips.max(1) as f64
    }

    fn write(&self, names: &[String], path: &Path) -> Result<()> {
        let quoted: Vec<String> = names.iter().map(|n| format!("\"{}\"", n.replace('"', "\"\""))).collect();
        let mut text = format!("label,{}\n", quoted.join(","));
        for (name, row) in quoted.iter().zip(self.confusion.chunks_exact(self.classes)) {
            let row: Vec<String> = row.iter().map(u64::to_string).collect();
            text += &format!("{name},{}\n", row.join(","));
        }
        std::fs::write(path, text).map_err(|e| Error::io(path, e))
    }
}

/// The configuration a checkpoint was trained with, for evaluating: its modules, its overrides, the shards `data`.
///
/// # Errors
/// [`Error::Input`] if checkpoint or overrides are unusable.
pub fn config_of(checkpoint: &Checkpoint, set: &[String], data: &[String]) -> Result<Config> {
    let manifest = checkpoint.manifest();
    let mut config = Config::parse(&manifest.config, &checkpoint.path().display().to_string(), set)?;
    if !set.iter().any(|s| s.starts_with("run.device") || s.starts_with("run.precision")) {
        // Not where it was trained: where it is evaluated.
        (config.run.device, config.run.precision) = (DeviceChoice::Auto, Precision::F32);
        (config.run.exchange, config.run.wire) = (Exchange::Auto, Wire::Auto);
    }
    if !set.iter().any(|s| s.starts_with("model.modules") || s.starts_with("model.cuts")) {
        // Where skips go depends on the cut: the one the network was trained with.
        (config.model.modules, config.model.cuts) = (None, Some(manifest.cuts.clone()));
    }
    if !data.is_empty() {
        config.data.test = Globs::Many(data.to_vec());
    }
    Ok(config)
}

/// The evaluator of the moving average, or of the `raw` parameters; says which where there are both.
pub(super) fn chosen(evaluator: Evaluator, raw: bool) -> Evaluator {
    match (evaluator.setup().config.train.ema, raw) {
        (Some(_), true) => log::info!("of the parameters themselves, not of their moving average"),
        (Some(decay), false) => {
            log::info!("of the parameters' moving average (train.ema = {decay}); --raw: of the parameters")
        }
        (None, _) => {}
    }
    if raw { evaluator.raw() } else { evaluator }
}

/// Some of many names.
fn classes(names: &[String]) -> String {
    let first = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    format!("{} classes ({first}{})", names.len(), if names.len() > 8 { ", …" } else { "" })
}

/// Runs it.
///
/// # Errors
/// As the parts.
pub fn run(world: &World, args: &EvalArgs) -> Result<()> {
    let planned = Checkpoint::open(&args.checkpoint).and_then(|checkpoint| {
        let config = config_of(&checkpoint, &args.set, &args.data)?;
        let (names, path) = (checkpoint.manifest().class_names.clone(), checkpoint.path().to_path_buf());
        let evaluator = Evaluator::new(world, &config, checkpoint, Purpose::Evaluate, None)?;
        let setup = evaluator.setup();
        if setup.class_names != names {
            return Err(Error::input(format!(
                "the shards have {}, but {} was trained on {}: give shards of the same dataset (--data)",
                classes(&setup.class_names),
                path.display(),
                classes(&names)
            )));
        }
        Ok(chosen(evaluator, args.raw))
    });
    let evaluator = world.first_error(planned)?;
    let setup = evaluator.setup();
    let chief = world.rank() == 0;
    let mut tally = Tally::new(setup.classes);
    let mut progress = chief.then(|| Progress::new(setup.config.model.task == Task::Recognition));
    let mut observer = |summary: &BatchSummary| {
        tally.add(summary);
        if let Some(progress) = &mut progress {
            progress.show(summary);
        }
    };
    let totals = evaluator.run(&mut observer);
    if let Some(progress) = progress {
        progress.finish();
    }
    let totals = totals?;
    if !chief {
        return Ok(());
    }
    if setup.config.model.task == Task::FutureFrames {
        outln!("loss {:.6} over {} clips", totals.score.loss(), totals.score.clips);
        return Ok(());
    }
    if let Some(path) = &args.confusion {
        tally.write(&setup.class_names, path)?;
    }
    let (top1, top5) = (tally.share(tally.top1), tally.share(tally.top5));
    if args.json {
        let loss = totals.score.loss();
        outln!("{}", serde_json::json!({ "clips": tally.clips, "top1": top1, "top5": top5, "loss": loss }));
        return Ok(());
    }
    outln!(
        "clips {}  loss {:.4}  top-1 {:.2} %  top-5 {:.2} %",
        tally.clips,
        totals.score.loss(),
        100.0 * top1,
        100.0 * top5
    );
    for (k, name) in setup.class_names.iter().enumerate() {
        let row = &tally.confusion[k * tally.classes..(k + 1) * tally.classes];
        let clips: u64 = row.iter().sum();
        outln!("  {name}: {:.2} % of {clips}", 100.0 * row[k] as f64 / clips.max(1) as f64);
    }
    Ok(())
}
