//! `sideways train`: alone, under mpirun, or under srun.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::output::json;
use super::{logging, progress::Progress};
use crate::backend::cpu;
use crate::checkpoint::best::Best;
use crate::comm::World;
use crate::config::{Config, Task};
use crate::metrics::TimeAccount;
use crate::setup::Setup;
use crate::trainer::{Totals, Trainer, Validated, limits};
use crate::{Error, Result};

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
    /// Stop after so many batches with a checkpoint (exit code 75); the same command goes on from there.
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,
    /// Print what the run came to, or what --dry-run or --print-config say, as one JSON object.
    #[arg(long)]
    pub json: bool,
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
    if args.print_config && args.json {
        return json(&config);
    }
    if args.print_config {
        outln!("{}", config.to_toml()?.trim_end());
        return Ok(());
    }
    super::dry_run::run(&config, args.ranks, args.json)
}

/// Trains.
///
/// # Errors
/// As [`Trainer`]; [`crate::Error::Stopped`] after `--stop-after`.
pub fn run(world: &World, args: &TrainArgs) -> Result<()> {
    let config = world.first_error(Config::load(&args.config, &args.set))?;
    let trainer = Trainer::new(world, &config, args.stop_after)?;
    let chief = world.rank() == 0;
    if chief {
        logging::also_to(&trainer.setup().config.run.dir.join("log.txt"))?;
        announce(world, &trainer);
    }
    if trainer.is_done() {
        if chief {
            let range = trainer.range();
            let until = trainer.setup().config.train.until.filter(|_| range.first < range.total);
            let reached = until.map_or(String::new(), |until| format!(", and train.until = {until} is reached"));
            log::info!("nothing to do: {} of {} batches are done{reached}", range.first, range.total);
            if args.json {
                json(&Summary::of(&trainer, &Totals::default(), false))?;
            }
        }
        return Ok(());
    }
    trainer.listen_to_signals()?;
    let mut progress = Progress::of_training(&config, chief);
    let totals = trainer.run(&mut |summary| progress.show(summary));
    drop(progress);
    let totals = totals?;
    if chief && totals.batches > 0 {
        summarise(trainer.setup(), trainer.range().total, &totals);
    }
    let end = trainer.conclude(&totals);
    let stopped = matches!(end, Err(Error::Stopped(_)));
    if chief && args.json && (stopped || end.is_ok()) {
        json(&Summary::of(&trainer, &totals, stopped))?;
    }
    end
}

/// What a run came to, as JSON.
#[derive(Serialize)]
struct Summary {
    run_dir: PathBuf,
    /// Batches done in all attempts, and of the whole run.
    batches: u64,
    total_batches: u64,
    /// Those of this attempt, what it took, and its speed.
    attempt_batches: u64,
    attempt_seconds: f64,
    frames_per_second: f64,
    /// Of the last quarter of the attempt's batches: mean loss of a step; recognition: the share of clips whose label came first.
    loss: Option<f32>,
    top1: Option<f32>,
    /// The attempt's last validation, as `metrics.jsonl` has it.
    validation: Option<Validated>,
    /// The checkpoint that scored best in validation.
    best: Option<Best>,
    /// Losses, cotangents and updates left out.
    skipped: u64,
    /// Times a damaged video was passed over.
    videos_skipped: u64,
    /// Whether a signal or `--stop-after` ended it, so that the same command goes on.
    stopped: bool,
    /// What limited the speed, in words.
    limited_by: Option<String>,
}

impl Summary {
    fn of(trainer: &Trainer, totals: &Totals, stopped: bool) -> Self {
        let (setup, range, recent) = (trainer.setup(), trainer.range(), &totals.recent);
        let worked = totals.batches > 0;
        let recognition = setup.config.model.task == Task::Recognition;
        Summary {
            run_dir: setup.config.run.dir.clone(),
            batches: range.first + totals.batches,
            total_batches: range.total,
            attempt_batches: totals.batches,
            attempt_seconds: totals.seconds,
            frames_per_second: if worked { totals.frames as f64 / totals.seconds.max(1e-9) } else { 0.0 },
            loss: worked.then(|| recent.loss()),
            top1: (worked && recognition).then(|| recent.top1 / recent.clips.max(1.0)),
            validation: totals.validations.last().cloned(),
            best: Best::read(&setup.checkpoints()),
            skipped: totals.skipped,
            videos_skipped: totals.videos_skipped,
            stopped,
            limited_by: limits::describe(setup, totals),
        }
    }
}

fn announce(world: &World, trainer: &Trainer) {
    let setup = trainer.setup();
    let rule = setup.config.train.rule;
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
    for note in notes(setup) {
        log::info!("{note}");
    }
    if !cpu::has_onednn() {
        log::warn!("built without oneDNN: strided, 1x1 and narrow convolutions are slower (docs/install.md)");
    }
    if let Some(from) = &trainer.range().from {
        log::info!("from {}", from.path().display());
    }
    for warning in setup.warnings() {
        log::warn!("{warning}");
    }
}

/// What some keys of `[train]` come to.
pub(super) fn notes(setup: &Setup) -> Vec<String> {
    let config = &setup.config;
    let mut notes = Vec::new();
    if let Some(meant) = config.train.scale_lr {
        let (lr, batch, replicas) = (config.train.optimizer.lr(), config.data.batch, config.train.replicas);
        let scaled = lr * config.lr_scale();
        notes.push(format!(
            "train.scale_lr: learning rate {scaled} = {lr} x {batch} clips x {replicas} replicas / {meant}"
        ));
    }
    let (beta, d) = (config.lr_depth(), setup.grid.modules);
    if beta < 1.0 && d > 1 {
        notes.push(format!(
            "train.lr_depth: modules farther from the loss learn at a lower rate, {beta} times for each module between; module 1 \
             at {:.2e} of module {d}'s (lr_depth = 1: all at the same)",
            config.lr_factor(1, d) / config.lr_factor(d, d)
        ));
    }
    if !config.train.freeze.is_empty() {
        let learned: u64 = (1..=setup.grid.modules).map(|i| setup.frozen.learned(i)).sum();
        let lowest = setup.frozen.lowest();
        notes.push(format!("train.freeze: {learned} parameters learn; backward passes in modules from {lowest} on"));
    }
    notes
}

/// With more workers than this, the end of a run tells of modules, not of each replica's.
const LINES: usize = 64;

/// The last module's figures of a run of `total` batches, and where every worker's time went.
fn summarise(setup: &Setup, total: u64, totals: &Totals) {
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
    let reaches = |until| totals.validations.iter().any(|validated| validated.reaches(until));
    let all = totals.validations.last().is_some_and(|last| last.batches == total);
    if let Some(until) = setup.config.train.until.filter(|&until| all && !reaches(until)) {
        log::warn!("train.until = {until} was not reached in {total} batches");
    }
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
    if let Some(limit) = limits::describe(setup, totals) {
        log::info!("{limit}");
    }
    log::info!(
        "time by module (% of wall): forward, wait, backward, wait, optimizer, data, send, wait for a core, other, validation, \
         all-reduce, checkpoint"
    );
    let share = |time: &TimeAccount| -> String {
        let all = time.total().max(1e-9);
        time.to_array().map(|t| format!("{:5.1}", 100.0 * t / all)).join(" ")
    };
    let grid = setup.grid;
    if grid.workers() > LINES {
        for i in 1..=grid.modules {
            let mut time = TimeAccount::default();
            (0..grid.replicas).for_each(|r| time.add(&totals.time[grid.worker(i, r)]));
            log::info!("  module {i}, all {} replicas: {}", grid.replicas, share(&time));
        }
        return;
    }
    for (w, time) in totals.time.iter().enumerate() {
        let (module, replica) = grid.module_and_replica(w);
        log::info!("  module {module} replica {replica} rank {}: {}", grid.rank_of(w), share(time));
    }
}
