//! `sideways trace`: who did what when, as a trace for Perfetto: what a run recorded, or a few batches made for it.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::made_up::{Folder, made_up};
use crate::cli::output::{json, shown, whole};
use crate::comm::World;
use crate::config::Batches;
use crate::metrics::Recording;
use crate::metrics::recording::{Clocks, FOLDER, read_json};
use crate::pipeline::Traced;
use crate::plan::cut::cut;
use crate::report::trace::{Recorded, recordings};
use crate::setup::{Purpose, Setup};
use crate::sys::files::write_whole;
use crate::trainer::Trainer;
use crate::{Error, Result};

/// Arguments of `sideways trace`.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// A run folder with something recorded in it (`run.trace`, or a file TRACE there while it trains); or a configuration (TOML),
    /// of which a few batches are trained on made-up frames and recorded, alone, under mpirun or under srun.
    #[arg(value_name = "RUN|CONFIG")]
    pub source: PathBuf,
    /// Which batches [default: the last ones recorded; of a configuration three, once every module is at work].
    #[arg(long, value_name = "FIRST..END")]
    pub batches: Option<Batches>,
    /// Of a configuration: override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Of a configuration: classes to tell apart [default: model.classes].
    #[arg(long, value_name = "K", value_parser = whole(1, 1 << 20))]
    pub classes: Option<usize>,
    /// The trace, to be opened at ui.perfetto.dev or chrome://tracing.
    #[arg(long, value_name = "FILE", default_value = "trace.json")]
    pub out: PathBuf,
    /// Print what was written as one JSON object.
    #[arg(long)]
    pub json: bool,
}

impl TraceArgs {
    /// Is it a run that is asked about, which needs no ranks?
    pub fn is_of_run(&self) -> bool {
        !self.source.is_file()
    }
}

/// Batches recorded of a configuration.
const BATCHES: u64 = 3;

/// Writes the trace of what a run recorded.
///
/// # Errors
/// [`Error::Input`] for a folder in which nothing is recorded; [`Error::Io`] if the trace cannot be written.
pub fn of_run(args: &TraceArgs) -> Result<()> {
    if !args.source.is_dir() {
        return Err(Error::input(format!(
            "{}: there is neither a run folder nor a configuration",
            args.source.display()
        )));
    }
    if !args.set.is_empty() || args.classes.is_some() {
        return Err(Error::input(
            "--set and --classes are for a configuration: a run has recorded what it has recorded",
        ));
    }
    let all = recordings(&args.source)?;
    let known = || all.iter().map(|(batches, _)| batches.to_string()).collect::<Vec<_>>().join(", ");
    let (batches, folder) = match args.batches {
        None => all.last(),
        Some(wanted) => all.iter().find(|(batches, _)| *batches == wanted),
    }
    .ok_or_else(|| Error::input(format!("--batches: these are recorded: {}", known())))?;
    if args.batches.is_none() && all.len() > 1 {
        log::info!("the last of those recorded, {}: --batches chooses another", known());
    }
    write(&Recorded::read(folder)?, *batches, args)
}

/// Trains some batches on made-up frames and writes their trace.
///
/// # Errors
/// As training; [`Error::Input`] if the frames' size or the classes are not known.
pub fn of_configuration(args: &TraceArgs, world: &World) -> Result<()> {
    let folder = Folder::shared(world)?;
    let config = world.first_error(made_up(&args.source, &args.set, args.classes, world, &folder))?;
    let setup = cut(world.first_error(Setup::new(&config, world.size(), Purpose::Train))?, world)?;
    // As in `bench train`: the first batches fill the pipeline, the last ones let it run empty.
    let depth = setup.grid.modules.div_ceil(config.data.frames) as u64;
    let wanted = args.batches.or(config.run.trace);
    let batches = wanted.unwrap_or(Batches { first: depth + 1, end: depth + 1 + BATCHES });
    let to = Traced { folder: folder.path.join(FOLDER), batches: Some(batches.first..batches.end) };
    let trainer = Trainer::traced(world, setup, batches.end.saturating_add(depth), Some(to));
    trainer.run(&mut |_| ())?;
    match gathered(world, trainer.setup(), &folder.path)? {
        Some(recorded) => write(&recorded, batches, args),
        None => Ok(()),
    }
}

/// What all ranks recorded in `run`, which each node has its own of: on rank 0. Collective.
fn gathered(world: &World, setup: &Setup, run: &Path) -> Result<Option<Recorded>> {
    let own = || -> Result<Vec<u8>> {
        let all = recordings(run)?;
        let Some((_, folder)) = all.first() else { return Ok(Vec::new()) };
        let part = |w| {
            let (i, r) = setup.grid.module_and_replica(w);
            read_json::<serde_json::Value>(&Recording::file(folder, i, r))
        };
        let parts = setup.grid.workers_of(world.rank()).map(part).collect::<Result<Vec<_>>>()?;
        let clocks = if world.rank() == 0 { Some(read_json::<Clocks>(&folder.join(Clocks::FILE))?) } else { None };
        serde_json::to_vec(&(parts, clocks)).map_err(|e| Error::Run(format!("gathering what was recorded: {e}")))
    };
    let all = world.gather_at_first(&world.first_error(own())?)?;
    let (mut parts, mut clocks) = (Vec::new(), None);
    for bytes in &all {
        let (of_rank, known): (Vec<Recording>, Option<Clocks>) =
            serde_json::from_slice(bytes).map_err(|e| Error::Transport(format!("what a rank recorded: {e}")))?;
        parts.extend(of_rank);
        clocks = clocks.or(known);
    }
    Ok(Recorded::of(parts, clocks))
}

fn write(recorded: &Recorded, batches: Batches, args: &TraceArgs) -> Result<()> {
    let out = &args.out;
    recorded.problems.iter().for_each(|problem| log::warn!("{problem}"));
    let (text, summary) = recorded.json()?;
    write_whole(out, &text)?;
    if args.json {
        return json(&serde_json::json!({
            "trace": shown(out),
            "batches": batches.to_string(),
            "modules": recorded.parts.len(),
            "slices": summary.slices,
            "messages": summary.arrows,
            "seconds": summary.length as f64 / 1e9,
            "clock_uncertainty_seconds": summary.uncertainty as f64 / 1e9,
        }));
    }
    outln!(
        "{}: batches {batches} of {} modules, {:.1} ms; {} slices, {} messages; clocks within {:.1} µs",
        out.display(),
        recorded.parts.len(),
        summary.length as f64 / 1e6,
        summary.slices,
        summary.arrows,
        summary.uncertainty as f64 / 1e3
    );
    Ok(())
}
