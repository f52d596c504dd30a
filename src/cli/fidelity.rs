//! `sideways fidelity`: how near each module's gradient comes to the exact one.

use std::path::PathBuf;

use clap::Args;

use super::eval::config_of;
use super::live::Live;
use crate::checkpoint::Checkpoint;
use crate::cli::output::{json, table, whole};
use crate::comm::World;
use crate::config::Config;
use crate::plan::gpu;
use crate::trainer::fidelity::{Compared, Comparison, Fidelity, fidelity};
use crate::{Error, Result};

/// Arguments of `sideways fidelity`.
#[derive(Args, Debug)]
pub struct FidelityArgs {
    /// A configuration (TOML), whose initial weights are meant; or a checkpoint or run folder.
    pub run: PathBuf,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Frame rates: multiples of data.stride.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1", value_parser = whole(0, 1 << 20))]
    pub strides: Vec<usize>,
    /// Of sideways (without skips), skip-sideways, stash [default: the last two; sideways and stash without skips].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub rules: Vec<String>,
    /// Batches over which means are taken.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub batches: u64,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// [`Error::Input`] for whatever in arguments, configuration or data cannot work.
pub fn run(world: &World, args: &FidelityArgs) -> Result<()> {
    world.first_error(plan(world, args))
}

fn plan(world: &World, args: &FidelityArgs) -> Result<()> {
    if world.size() > 1 {
        return Err(Error::input(format!(
            "fidelity compares with exact back-propagation in one process, but there are {} ranks: start it without mpirun or srun",
            world.size()
        )));
    }
    if args.strides.contains(&0) {
        return Err(Error::input("--strides 0: a stride is at least 1"));
    }
    let (config, checkpoint) = if args.run.is_dir() {
        let checkpoint = Checkpoint::open(&args.run)?;
        (config_of(&checkpoint, &args.set, &[])?, Some(checkpoint))
    } else {
        let config = Config::load(&args.run, &args.set)?;
        let init = config.train.init.as_ref().map(|path| Checkpoint::open(path)).transpose()?;
        (config, init)
    };
    let rules = match (args.rules.is_empty(), config.has_skips()) {
        (true, true) => vec![Compared::SkipSideways, Compared::Stash],
        (true, false) => vec![Compared::Sideways, Compared::Stash],
        (false, _) => args.rules.iter().map(|name| Compared::named(name)).collect::<Result<_>>()?,
    };
    let comparison = Comparison { rules, strides: args.strides.clone(), batches: args.batches };
    let device = gpu::describe(gpu::chosen(&config)?.as_ref());
    let live = Live::counting(0, "batches");
    let rows = fidelity(&config, checkpoint.as_ref(), &comparison, &mut |done, all| live.at(done, all))?;
    drop(live);
    if args.json {
        return json(&serde_json::json!({
            "checkpoint": checkpoint.map(|c| c.path().display().to_string()),
            "device": device, "frames": config.data.frames, "batch": config.data.batch, "rows": rows,
        }));
    }
    let weights = checkpoint.map_or("initial weights".into(), |c| format!("weights of {}", c.path().display()));
    outln!(
        "{weights}; {} batches of {} clips, T = {}; on {device} in 32-bit floats; mean and standard deviation of a batch",
        args.batches,
        config.data.batch,
        config.data.frames
    );
    table(1, "rule\tstride\tmodule\tcosine\t+-\tnorm ratio\t+-\trelative error\t+-", rows.iter().map(line));
    outln!("g by the rule, e exact, both means over a clip: cosine of g and e, |g| / |e|, |g - e| / |e|");
    Ok(())
}

fn line(row: &Fidelity) -> String {
    let Fidelity { rule, stride, module, cosine, norm_ratio, relative_error, .. } = row;
    let spreads = [cosine, norm_ratio, relative_error].map(|s| format!("{:.4}\t{:.4}", s.mean, s.deviation));
    format!("{rule}\t{stride}\t{module}\t{}", spreads.join("\t"))
}
