//! `sideways export`: a checkpoint's network for another program.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::eval::config_of;
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
}

/// Writes the files.
///
/// # Errors
/// As [`torch::export`].
pub fn run(args: &ExportArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = config_of(&checkpoint, &[], &[])?;
    log::info!("{}, after {} batches", checkpoint.path().display(), checkpoint.manifest().batches);
    for file in torch::export(&checkpoint, &config, args.raw, &args.out)? {
        outln!("{}", file.display());
    }
    Ok(())
}
