//! `sideways predict`: future frames as pictures, and their error beside the copy of the newest frame seen.

use std::path::{Path, PathBuf};

use clap::Args;

use super::eval::{chosen, config_of, tell};
use super::output::{json, shown};
use super::progress::Progress;
use crate::checkpoint::Checkpoint;
use crate::comm::World;
use crate::config::Task;
use crate::data::inspect::png_writer;
use crate::data::{FrameStream, Views};
use crate::setup::Purpose;
use crate::trainer::pictures::{Step, Truth, pixels, row, strip};
use crate::trainer::{Evaluator, Tally, psnr};
use crate::{Error, Result};

/// Arguments of `sideways predict`.
#[derive(Args, Debug)]
pub struct PredictArgs {
    /// A checkpoint folder (step-NNNNNNNN), or a run folder, whose newest checkpoint is meant.
    pub checkpoint: PathBuf,
    /// Shards to take clips from; default: the run's data.test.
    #[arg(long, value_name = "GLOB")]
    pub data: Vec<String>,
    /// Override a key of the run's configuration (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Use the parameters themselves and not their moving average (train.ema).
    #[arg(long)]
    pub raw: bool,
    /// Clips to make pictures of. Errors are those of all clips.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub clips: u64,
    /// Folder for the pictures: clip-NNNN.png (columns: steps; rows: newest frame seen, target, prediction) and
    /// clip-NNNN-animated.png.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// [`Error::Input`] for a checkpoint of a recognition network; as the parts.
pub fn run(world: &World, args: &PredictArgs) -> Result<()> {
    let planned = Checkpoint::open(&args.checkpoint).and_then(|checkpoint| {
        let mut config = config_of(&checkpoint, &args.set, &args.data)?;
        if config.model.task != Task::FutureFrames {
            return Err(Error::input(format!(
                "{}: this network was trained for recognition; score it with `sideways eval`",
                checkpoint.path().display()
            )));
        }
        tell(world, &checkpoint);
        let scored = (checkpoint.path().display().to_string(), checkpoint.manifest().batches);
        let all = Evaluator::new(world, &config, checkpoint.clone(), Purpose::Evaluate, Views::ONE, None)?;
        config.data.batch = 1;
        let pictures = Evaluator::new(world, &config, checkpoint, Purpose::Predict, Views::ONE, Some(args.clips))?;
        Ok((chosen(all, args.raw), chosen(pictures, args.raw), scored))
    });
    let (all, evaluator, (checkpoint, batches)) = world.first_error(planned)?;
    let mut tally = Tally::default();
    let mut progress = Progress::new(Task::FutureFrames, world.rank() == 0);
    all.run(&mut |summary| {
        tally.add(&summary.reports);
        progress.show(summary);
    })?;
    drop(progress);
    let mut predictions: Vec<Vec<f32>> = Vec::new();
    evaluator.run(&mut |summary| predictions.extend(summary.reports.last().map(|last| last.outputs.clone())))?;
    if world.rank() > 0 {
        return Ok(());
    }
    let (setup, clips) = (evaluator.setup(), evaluator.batches());
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let dataset = setup.dataset.clone().ok_or_else(|| Error::input("there is no dataset to read"))?;
    let mut stream = FrameStream::open(dataset, setup.stream(0, 0, clips))?;
    let [h, w, _] = setup.network.input;
    for (clip, outputs) in (0..clips).zip(&predictions) {
        let steps = Truth::read(setup, &mut stream, clip)?.beside(0, &pixels(&setup.config, outputs));
        still(&args.out.join(format!("clip-{clip:04}.png")), &steps, h, w)?;
        animation(&args.out.join(format!("clip-{clip:04}-animated.png")), &steps, h, w)?;
    }
    let result = tally.result(Task::FutureFrames, 0, 0.0);
    if args.json {
        return json(&serde_json::json!({
            "checkpoint": checkpoint, "batches": batches, "clips": result.clips,
            "mse": result.mse, "psnr": result.psnr, "copy_mse": result.copy_mse, "copy_psnr": result.copy_mse.map(psnr),
            "pictures": predictions.len(), "out": shown(&args.out),
        }));
    }
    outln!("{} clips; pixels in 0..1; pictures of {clips} in {}", result.clips, args.out.display());
    for (what, mse) in [("prediction:", result.mse), ("copy of the newest seen:", result.copy_mse)] {
        let mse = mse.unwrap_or(f64::NAN);
        outln!("{what:24} MSE {mse:.6}  PSNR {:.2} dB", psnr(mse));
    }
    Ok(())
}

/// Columns: steps; rows: newest frame seen, target, prediction.
fn still(path: &Path, steps: &[Step], h: usize, w: usize) -> Result<()> {
    let mut writer = png_writer(path, w * steps.len(), 3 * h, None)?;
    writer.write_image_data(&strip(steps, h, w)).and_then(|()| writer.finish()).map_err(|e| Error::io(path, e.into()))
}

/// A frame a step: newest frame seen, target, prediction side by side, five steps a second.
fn animation(path: &Path, steps: &[Step], h: usize, w: usize) -> Result<()> {
    let mut writer = png_writer(path, 3 * w, h, Some(steps.len() as u32))?;
    let frames = steps.iter().map(|step| row(&step.each_ref().map(|picture| &picture[..]), h, w));
    frames
        .into_iter()
        .try_for_each(|frame| writer.write_image_data(&frame))
        .and_then(|()| writer.finish())
        .map_err(|e| Error::io(path, e.into()))
}
