//! `sideways doctor`: what training would check at its start, and more, as a table.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Args;

use super::output::json;

use crate::backend::cpu;
use crate::comm::World;
use crate::config::Config;
use crate::pipeline::RunRange;
use crate::setup::{Purpose, Setup};
use crate::trainer::preflight::{Check, Verdict, check, places};
use crate::trainer::{resume, run_folder};
use crate::{Error, Result};

/// Arguments of `sideways doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// A run's configuration (TOML), to check that run as well.
    pub config: Option<PathBuf>,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// Print what was found as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Looks at every rank's place and prints, on rank 0, what was found. Collective.
///
/// # Errors
/// [`Error::Input`] if training would fail.
pub fn run(world: &World, args: &DoctorArgs) -> Result<()> {
    let places = places(world)?;
    let mut table = vec![launcher(world)];
    let planned = args.config.as_ref().map(|path| {
        let planned = Config::load(path, &args.set).and_then(|c| Setup::new(&c, world.size(), Purpose::Train));
        world.first_error(planned)
    });
    let setup = planned.as_ref().and_then(|planned| planned.as_ref().ok());
    if world.rank() == 0 {
        table.extend(check(&places, setup));
    }
    table.push(match cpu::has_onednn() {
        true => Check::fine("convolutions", cpu::back_end()),
        false => Check::warning(
            "convolutions",
            format!("{}; with oneDNN some are faster (docs/install.md)", cpu::back_end()),
        ),
    });
    table.push(ffmpeg());
    match &planned {
        None => {}
        Some(Err(error)) => table.push(Check::failure("configuration", error.to_string())),
        Some(Ok(setup)) => {
            table.push(configuration(setup));
            table.push(run_folder::check(world, setup)?);
            table.push(match resume::range(setup, world, None) {
                Ok(range) => Check::fine("goes on from", starts(&range)),
                Err(error) => Check::failure("goes on from", error.to_string()),
            });
        }
    }
    if world.rank() == 0 {
        print(&table, args.json)?;
    }
    world.as_first(verdict(&table))
}

/// The table of ranks that do not find each other.
///
/// # Errors
/// [`Error::Input`], always.
pub fn without_ranks(error: &Error, args: &DoctorArgs) -> Result<()> {
    let table = [Check::failure("launcher", error.to_string())];
    print(&table, args.json)?;
    verdict(&table)
}

fn print(table: &[Check], as_json: bool) -> Result<()> {
    if as_json {
        return json(&serde_json::json!({ "ok": verdict(table).is_ok(), "checks": table }));
    }
    for check in table {
        let mark = match check.verdict {
            Verdict::Fine => "ok",
            Verdict::Warning => "could be better",
            Verdict::Failure => "WILL FAIL",
        };
        let mark = console::style(format!("{mark:<15}"));
        let mark = match check.verdict {
            Verdict::Fine => mark.green(),
            Verdict::Warning => mark.yellow(),
            Verdict::Failure => mark.red().bold(),
        };
        outln!("{mark}  {:<13}  {}", check.what, check.found);
    }
    Ok(())
}

fn verdict(table: &[Check]) -> Result<()> {
    let failed: Vec<&str> = table.iter().filter(|c| c.verdict == Verdict::Failure).map(|c| c.what).collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Error::input(format!("training would fail: {}", failed.join(", ")))),
    }
}

fn launcher(world: &World) -> Check {
    let job = std::env::var("SLURM_JOB_ID").ok();
    let job = job.map_or(String::new(), |job| format!(", Slurm job {job}"));
    match world.mpi_library() {
        Some(library) => {
            let library = library.split(',').next().unwrap_or_default();
            Check::fine("launcher", format!("{} rank(s){job}; {library}", world.size()))
        }
        None if !job.is_empty() => Check::warning(
            "launcher",
            format!("one process{job}: ranks are started with srun --mpi=pmix (slurm/train.sbatch does it)"),
        ),
        None => Check::fine("launcher", "one process; mpirun -n N or srun --mpi=pmix start N ranks"),
    }
}

fn configuration(setup: &Setup) -> Check {
    let grid = setup.grid;
    let videos = setup.dataset.as_ref().map_or(0, |data| data.videos.len());
    let found = format!(
        "{} module(s) x {} replica(s) on {} rank(s); {videos} videos, {} classes",
        grid.modules, grid.replicas, grid.ranks, setup.classes
    );
    match setup.warnings() {
        warnings if warnings.is_empty() => Check::fine("configuration", found),
        warnings => Check::warning("configuration", format!("{found}; {}", warnings.join("; "))),
    }
}

fn starts(range: &RunRange) -> String {
    match &range.from {
        Some(from) => format!("{}: {} of {} batches are done", from.path().display(), range.first, range.total),
        None => format!("nothing: a new run of {} batches", range.total),
    }
}

/// Only `data prepare` needs it.
fn ffmpeg() -> Check {
    let output = Command::new("ffmpeg").arg("-version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    match output.map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string()) {
        Ok(line) if !line.is_empty() => Check::fine("ffmpeg", line.split(" Copyright").next().unwrap_or_default()),
        _ => Check::warning("ffmpeg", "not found: `sideways data prepare` needs it, training does not"),
    }
}
