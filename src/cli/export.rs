//! `sideways export`: a checkpoint's network for another program.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::eval::config_of;
use super::output::{json, shown};
use crate::checkpoint::Checkpoint;
use crate::{Result, torch};

/// Arguments of `sideways export`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("for").required(true)))]
pub struct ExportArgs {
    /// A checkpoint folder (step-NNNNNNNN), a run folder, whose newest checkpoint is meant, or RUN/best, which is the one that scored
    /// best in validation.
    pub checkpoint: PathBuf,
    /// For PyTorch: model.safetensors, and model.py, which computes the same.
    #[arg(long, group = "for")]
    pub torch: bool,
    /// The parameters themselves and not their moving average (train.ema).
    #[arg(long)]
    pub raw: bool,
    /// Folder for the files.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print what was written as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Writes the files.
///
/// # Errors
/// As [`torch::export`].
pub fn run(args: &ExportArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = config_of(&checkpoint, &[], &[])?;
    log::info!("{}, after {} batches", checkpoint.path().display(), checkpoint.manifest().batches);
    let [weights, program] = torch::export(&checkpoint, &config, args.raw, &args.out)?;
    if args.json {
        let of = (shown(checkpoint.path()), checkpoint.manifest().batches);
        return json(&serde_json::json!({
            "checkpoint": of.0, "batches": of.1, "weights": shown(&weights), "program": shown(&program)
        }));
    }
    outln!("{}\n{}", weights.display(), program.display());
    Ok(())
}
