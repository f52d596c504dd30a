//! `sideways eval`: top-1, top-5, accuracy by class, confusion matrix, scores of every video; the error of future frames.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::output::{json, table};
use super::progress::Progress;
use super::votes::{Scores, Votes};
use crate::checkpoint::Checkpoint;
use crate::comm::World;
use crate::config::{Config, DeviceChoice, Exchange, Globs, Precision, Task, Wire};
use crate::data::Views;
use crate::setup::{Purpose, Setup};
use crate::trainer::{BatchSummary, Evaluator, Tally, Validated};
use crate::{Error, Result};

/// Arguments of `sideways eval`.
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// A checkpoint folder (step-NNNNNNNN), a run folder, whose newest checkpoint is meant, or RUN/best, which is the one that scored
    /// best in validation.
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
    /// Look at every video several times: CLIPS windows spread evenly from its first frame to its last, 1 crop of the centre or 3
    /// along the frame's longer side; a video's class probabilities are the mean over its views.
    #[arg(long, value_name = "CLIPSxCROPS", value_parser = views, default_value = "1x1")]
    pub views: Views,
    /// Write every video's id, label, predicted class and class probabilities there: .csv, or .jsonl (JSON lines).
    #[arg(long, value_name = "FILE")]
    pub scores: Option<PathBuf>,
    /// Print the accuracy of every class.
    #[arg(long)]
    pub per_class: bool,
    /// Write the confusion matrix there as CSV (rows: label, columns: prediction).
    #[arg(long, value_name = "FILE")]
    pub confusion: Option<PathBuf>,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

impl EvalArgs {
    /// What cannot work, before anything is read.
    fn validate(&self, task: Task) -> Result<()> {
        let asks = self.scores.is_some() || self.confusion.is_some() || self.per_class;
        if task == Task::FutureFrames && asks {
            return Err(Error::input(
                "--scores, --confusion and --per-class are about classes: this network predicts frames",
            ));
        }
        self.scores.as_ref().map_or(Ok(()), |path| Scores::is_json(path).map(drop))
    }
}

/// Clips of a video, at most.
const MOST_CLIPS: usize = 1 << 16;

/// `3x1`: clips of a video, crops of a clip.
fn views(text: &str) -> std::result::Result<Views, String> {
    let (clips, crops) = text.split_once('x').ok_or("CLIPSxCROPS is meant, for instance 10x3")?;
    let number = |text: &str| text.parse::<usize>().map_err(|e| format!("{text:?}: {e}"));
    let (clips, crops) = (number(clips)?, number(crops)?);
    if !(1..=MOST_CLIPS).contains(&clips) || !matches!(crops, 1 | 3) {
        return Err(format!("clips are 1 to {MOST_CLIPS}, crops 1 or 3"));
    }
    Ok(Views { clips, crops })
}

/// How videos are looked at.
#[derive(Clone, Debug, Serialize)]
struct Protocol {
    frames: usize,
    stride: usize,
    /// Clips of a video, crops of a clip.
    views: [usize; 2],
    /// Height, width.
    crop: [usize; 2],
    of: [usize; 2],
    /// Frames are taken as they are stored.
    resize: &'static str,
    /// What is scored, and the batches that it was trained on.
    checkpoint: String,
    batches: u64,
}

impl Protocol {
    fn of(setup: &Setup, (checkpoint, batches): (String, u64)) -> Self {
        let (data, [h, w, _]) = (&setup.config.data, setup.network.input);
        let of = setup.dataset.as_ref().map_or([h, w], |dataset| [dataset.height, dataset.width]);
        let views = [setup.views.clips, setup.views.crops];
        Protocol {
            frames: data.frames,
            stride: data.stride,
            views,
            crop: [h, w],
            of,
            resize: "none",
            checkpoint,
            batches,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Protocol { frames, stride, views: [clips, crops], crop: [h, w], of: [height, width], resize, .. } = self;
        write!(
            f,
            "protocol: T = {frames} frames, stride {stride}; {clips}x{crops} views (clips of a video x crops of a clip); \
             {h}x{w} of {height}x{width} pixels (HxW), resize: {resize}"
        )
    }
}

/// The configuration a checkpoint was trained with, for evaluating: its modules, its overrides, the shards `data`.
///
/// # Errors
/// [`Error::Input`] if checkpoint or overrides are unusable.
pub fn config_of(checkpoint: &Checkpoint, set: &[String], data: &[String]) -> Result<Config> {
    let manifest = checkpoint.manifest();
    let mut config = Config::of_manifest(&manifest.config, &checkpoint.path().display().to_string(), set)?;
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

/// Says which checkpoint is looked at.
pub(super) fn tell(world: &World, checkpoint: &Checkpoint) {
    if world.rank() == 0 {
        log::info!("{}, after {} batches", checkpoint.path().display(), checkpoint.manifest().batches);
    }
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

/// Runs it.
///
/// # Errors
/// As the parts.
pub fn run(world: &World, args: &EvalArgs) -> Result<()> {
    let planned = Checkpoint::open(&args.checkpoint).and_then(|checkpoint| {
        let config = config_of(&checkpoint, &args.set, &args.data)?;
        args.validate(config.model.task)?;
        tell(world, &checkpoint);
        let scored = (checkpoint.path().display().to_string(), checkpoint.manifest().batches);
        let evaluator = Evaluator::new(world, &config, checkpoint, Purpose::Evaluate, args.views, None)?;
        Ok((chosen(evaluator, args.raw), scored))
    });
    let (evaluator, scored) = world.first_error(planned)?;
    let setup = evaluator.setup();
    let chief = world.rank() == 0;
    let (task, names) = (setup.config.model.task, &setup.class_names);
    if chief && setup.grid.ranks < world.size() {
        log::warn!(
            "{} of {} ranks have nothing to do: pipelines take {} ranks each, one a module",
            world.size() - setup.grid.ranks,
            world.size(),
            setup.grid.modules
        );
    }
    let scores = args.scores.as_ref().filter(|_| chief);
    let mut scores = world.first_error(scores.map(|path| Scores::create(path, names)).transpose())?;
    let (mut tally, mut votes) = (Tally::default(), Votes::new(setup.classes, setup.views.count()));
    let mut progress = Progress::new(task, chief);
    let mut refused = None;
    let mut observer = |summary: &BatchSummary| {
        tally.add(&summary.reports);
        // The last modules' logits, replica by replica: their clips are in this order.
        for last in summary.reports.iter().filter(|report| !report.outputs.is_empty()) {
            let added = votes.add(&last.outputs, &last.labels, |video| match (&mut scores, &setup.dataset) {
                (Some(scores), Some(dataset)) => scores.write(&dataset.videos[video.place].id, &video),
                _ => Ok(()),
            });
            refused = refused.take().or(added.err());
        }
        progress.show(summary);
    };
    evaluator.run(&mut observer)?;
    drop(progress);
    if !chief {
        return Ok(());
    }
    refused.map_or(Ok(()), Err)?;
    scores.map_or(Ok(()), Scores::finish)?;
    if let Some(path) = &args.confusion {
        votes.write_confusion(names, path)?;
    }
    let (result, protocol) = (tally.result(task, 0, 0.0), Protocol::of(setup, scored));
    if args.json {
        return print_json(&result, &votes, &protocol, args.per_class.then_some(names));
    }
    match (result.mse, result.psnr, result.copy_mse) {
        (Some(mse), Some(psnr), Some(copy)) => {
            outln!("loss {:.6} over {} clips", result.loss, result.clips);
            outln!("MSE {mse:.6}  PSNR {psnr:.2} dB  (copy of the newest frame seen: MSE {copy:.6})");
        }
        _ => {
            let share = |correct| 100.0 * votes.share(correct);
            outln!(
                "{} {}  loss {:.4}  top-1 {:.2} %  top-5 {:.2} %  mean class accuracy {:.2} %",
                if setup.views == Views::ONE { "clips" } else { "videos" },
                votes.videos,
                result.loss,
                share(votes.top1),
                share(votes.top5),
                100.0 * votes.mean_class_accuracy()
            );
        }
    }
    if args.per_class {
        let share = |(videos, found): (u64, u64)| 100.0 * found as f64 / videos.max(1) as f64;
        let row = |(name, of): (&String, (u64, u64))| format!("{name}\t{}\t{}\t{:.2}", of.0, of.1, share(of));
        table(1, "class\tvideos\tcorrect\taccuracy %", names.iter().zip(votes.classes()).map(row));
    }
    outln!("{protocol}");
    Ok(())
}

fn print_json(result: &Validated, votes: &Votes, protocol: &Protocol, names: Option<&Vec<String>>) -> Result<()> {
    let mut line = serde_json::json!({ "clips": result.clips, "loss": result.loss, "protocol": protocol });
    match (result.mse, result.psnr, result.copy_mse) {
        (Some(mse), Some(psnr), Some(copy)) => {
            (line["mse"], line["psnr"], line["copy_mse"]) = (mse.into(), psnr.into(), copy.into());
        }
        _ => {
            line["videos"] = votes.videos.into();
            (line["top1"], line["top5"]) = (votes.share(votes.top1).into(), votes.share(votes.top5).into());
            line["mean_class_accuracy"] = votes.mean_class_accuracy().into();
        }
    }
    if let Some(names) = names {
        let class = |(name, (videos, correct)): (&String, (u64, u64))| serde_json::json!({ "class": name, "videos": videos, "correct": correct });
        line["classes"] = names.iter().zip(votes.classes()).map(class).collect();
    }
    json(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_clips_by_crops() {
        assert_eq!(views("10x3"), Ok(Views { clips: 10, crops: 3 }));
        for wrong in ["10", "0x1", "1x2", "x", "3x", "-1x1"] {
            assert!(views(wrong).is_err(), "{wrong}");
        }
    }
}
