//! `sideways train`: alone, under mpirun, or under srun.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{logging, progress::Progress, signals};
use crate::Result;
use crate::backend::cpu;
use crate::comm::World;
use crate::config::{Config, Rule, Task};
use crate::pipeline::bp;
use crate::pipeline::stop::{self, Requests};
use crate::plan::cut::{cut, resume_cut};
use crate::setup::{Purpose, Setup};
use crate::trainer::console::Totals;
use crate::trainer::limits;
use crate::trainer::preflight;
use crate::trainer::run;
use crate::trainer::run_range::Span;

/// Arguments of `sideways train`.
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// The run's configuration (TOML).
    pub config: PathBuf,
    /// Override a key, e.g. --set train.epochs=2 (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Print the configuration with every default, and stop.
    #[arg(long)]
    pub print_config: bool,
    /// Check everything without training: shapes, memory and bytes a rank; needs neither ranks nor data.
    #[arg(long)]
    pub dry_run: bool,
    /// With --dry-run: how many ranks to plan for.
    #[arg(long, value_name = "N", requires = "dry_run")]
    pub ranks: Option<usize>,
    /// Stop after so many batches of clips with a checkpoint (exit code 75); the same command goes on from there.
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,
}

impl TrainArgs {
    /// Is this a question about the configuration, which needs no ranks?
    pub fn plans_only(&self) -> bool {
        self.print_config || self.dry_run
    }
}

/// `--print-config` and `--dry-run`.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn plan(args: &TrainArgs) -> Result<()> {
    let config = Config::load(&args.config, &args.set)?;
    config.validate()?;
    if args.print_config {
        outln!("{}", config.to_toml()?.trim_end());
        return Ok(());
    }
    super::dry_run::run(&config, args.ranks)
}

/// Trains.
///
/// # Errors
/// As the parts; [`crate::Error::Stopped`] after `--stop-after`.
pub fn run(world: &World, args: &TrainArgs) -> Result<()> {
    let planned = Config::load(&args.config, &args.set).and_then(|mut config| {
        resume_cut(&mut config)?;
        Setup::new(&config, world.size(), Purpose::Train)
    });
    let setup = cut(world.first_error(planned)?, world)?;
    preflight::require(world, &setup)?;
    let chief = world.rank() == 0;
    let hold = || preflight::hold_run_folder(&setup.config.run.dir, patience());
    let _held = world.first_error(chief.then(hold).transpose())?;
    let span = Span::of_training(&setup, world, args.stop_after)?;
    if chief {
        logging::also_to(&setup.config.run.dir.join("log.txt"))?;
        announce(&setup, world, &span);
    }
    if span.first >= span.end {
        if chief {
            log::info!("nothing to do: {} of {} batches of clips are done", span.first, span.total);
        }
        return Ok(());
    }
    let mut progress = chief.then(|| Progress::new(setup.config.model.task == Task::Recognition));
    let mut observer = |summary: &_| {
        if let Some(progress) = &mut progress {
            progress.show(summary);
        }
    };
    let requests = Requests::default();
    signals::raise_on_signals(&requests, chief)?;
    let totals = match setup.config.train.rule {
        Rule::Bp => bp::train(&setup, &span, &requests, &mut observer),
        Rule::Sideways | Rule::SkipSideways => run::train(&setup, world, &span, &requests, &mut observer),
    };
    if let Some(progress) = progress {
        progress.finish();
    }
    let totals = totals?;
    if chief && totals.batches > 0 {
        conclude(&setup, &totals);
    }
    if totals.decision & stop::UNDO != 0 {
        let failure = totals.failure.as_ref().map(|why| stop::undone(why, span.first + totals.batches));
        return world.first_error(failure.map_or(Ok(()), Err));
    }
    match totals.decision {
        decision if decision & stop::FINISH != 0 => Ok(()),
        decision if decision & stop::STOP != 0 => Err(stop::stopped("a signal")),
        _ if span.end < span.total => Err(stop::stopped("--stop-after")),
        _ => Ok(()),
    }
}

/// How long to wait for a run folder that another run holds: NFS gives the locks of a dead host back after 90 s.
fn patience() -> Duration {
    Duration::from_secs(if std::env::var_os("SLURM_JOB_ID").is_some() { 120 } else { 0 })
}

fn announce(setup: &Setup, world: &World, span: &Span) {
    let train = &setup.config.train;
    let rule = toml::Value::try_from(train.rule).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default();
    log::info!(
        "{rule}: {} modules x {} replicas on {} rank(s), {} parameters; batches of {} x {} clips of {} frames",
        setup.grid.modules,
        setup.grid.replicas,
        world.size(),
        setup.network.modules.iter().map(|m| m.params).sum::<u64>(),
        setup.grid.replicas,
        setup.config.data.batch,
        setup.config.data.frames,
    );
    if !cpu::has_onednn() {
        log::warn!("built without oneDNN: strided, 1x1 and narrow convolutions are slower (README, \"oneDNN\")");
    }
    log::info!("convolutions: {}, {} thread(s) a module", cpu::back_end(), setup.config.run.threads);
    if let Some((from, _)) = &span.from {
        log::info!("from {}", from.path().display());
    }
    for warning in setup.warnings() {
        log::warn!("{warning}");
    }
}

/// The last module's figures and where every worker's time went.
fn conclude(setup: &Setup, totals: &Totals) {
    let recent = &totals.recent;
    let accuracy = if setup.config.model.task == Task::Recognition {
        format!(", top-1 {:.1} %", 100.0 * recent.top1 / recent.clips.max(1.0))
    } else {
        String::new()
    };
    log::info!(
        "done: {} batches in {:.1} s, {:.0} frames/s; last quarter: loss {:.4}{accuracy}",
        totals.batches,
        totals.seconds,
        totals.frames as f64 / totals.seconds.max(1e-9),
        recent.loss(),
    );
    if totals.videos_skipped > 0 {
        log::warn!(
            "damaged videos were skipped {} times (named above; metrics.jsonl counts them batch by batch); \
             `sideways data inspect` finds them all",
            totals.videos_skipped
        );
    }
    if totals.skipped > 0 {
        log::warn!("{} losses, cotangents or updates were left out because they were not finite", totals.skipped);
    }
    if setup.config.train.rule == Rule::Bp {
        return;
    }
    log::info!("{}", limits::describe(setup, totals));
    log::info!("time by module (% of wall): forward, wait, backward, wait, optimizer, data, send, turn, other");
    for (w, time) in totals.time.iter().enumerate() {
        let (module, replica) = setup.grid.module_and_replica(w);
        let all = time.total().max(1e-9);
        let share: Vec<String> = time.to_array().iter().map(|t| format!("{:5.1}", 100.0 * t / all)).collect();
        log::info!("  module {module} replica {replica} rank {}: {}", setup.grid.rank_of(w), share.join(" "));
    }
}
