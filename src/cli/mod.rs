//! The command line: one file a command.

use clap::{Parser, Subcommand};

use crate::Result;
use crate::comm::World;
use crate::comm::launch::is_rank;
use crate::plan::profile::{COMMAND, measure_on_request};

#[macro_use]
mod output;

pub mod bench;
pub mod data;
pub mod doctor;
pub mod dry_run;
pub mod eval;
pub mod export;
pub mod fidelity;
mod live;
pub mod logging;
mod made_up;
pub mod plan;
pub mod plan_scale;
pub mod predict;
pub mod progress;
pub mod report;
pub mod scale;
pub mod shell;
mod ticks;
pub mod trace;
pub mod train;
mod votes;

/// Training of deep video networks without the backward lock.
#[derive(Parser, Debug)]
#[command(name = "sideways", version, about, max_term_width = 100)]
pub struct Cli {
    /// Nothing but results and errors: no progress, notes or warnings (a run's log.txt has them all the same).
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make, prepare and inspect datasets of HDF5 shards.
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Train a network; alone, under mpirun or under srun.
    Train(train::TrainArgs),
    /// Predict future frames: pictures, and MSE and PSNR beside the copy of the newest frame.
    Predict(predict::PredictArgs),
    /// Show how the network is cut, and who does what at which tick.
    Plan(plan::PlanArgs),
    /// Measure training on more and more nodes: a study's points, table and plots, beside what was predicted.
    Scale(scale::ScaleArgs),
    /// Measure layers, training, the loader and links on the machine at hand.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Measure layers for another process of this program.
    #[command(name = COMMAND, hide = true)]
    MeasureLayers,
    /// Check ranks, hosts and (given a configuration) everything that training needs; exit code 2 if it would fail.
    Doctor(doctor::DoctorArgs),
    /// Score a checkpoint on test shards.
    Eval(eval::EvalArgs),
    /// Write a checkpoint's network for PyTorch: its weights, and a program that computes with them.
    Export(export::ExportArgs),
    /// Compare each module's gradient with the exact one: cosine, ratio of norms, relative error.
    Fidelity(fidelity::FidelityArgs),
    /// Show what runs came to as one page: curves, modules, time, configuration.
    Report(report::ReportArgs),
    /// Show who did what when, moment by moment: a trace of some batches, for Perfetto.
    Trace(trace::TraceArgs),
    /// Print what completes this program's commands and options in a shell.
    Completions(shell::CompletionsArgs),
    /// Write manual pages.
    Man(shell::ManArgs),
}

/// Runs a command, logs its error, and returns the process's exit code: 0 done, 2 bad usage, configuration or input, 75
/// stopped early with a checkpoint, 1 else.
pub fn run(cli: Cli) -> i32 {
    let alone = |result| conclude(World::Alone, result);
    if is_rank() {
        console::set_colors_enabled(false);
    }
    match cli.command {
        Command::Data(command @ data::DataCommand::Prepare(_)) => with_world(|world| data::run(world, command)),
        Command::Data(command) => alone(data::run(&World::Alone, command)),
        Command::Train(args) if args.plans_only() => alone(train::plan(&args)),
        Command::Train(args) => with_world(|world| train::run(world, &args)),
        Command::Predict(args) => with_world(|world| predict::run(world, &args)),
        Command::Plan(args) => alone(plan::run(&args)),
        Command::Scale(args) => alone(scale::run(&args)),
        Command::MeasureLayers => alone(measure_on_request()),
        Command::Bench(command) => with_world(|world| bench::run(&command, world)),
        Command::Doctor(args) => match World::join() {
            Ok(world) => {
                let result = doctor::run(&world, &args);
                conclude(world, result)
            }
            Err(error) => alone(doctor::without_ranks(&error, &args)),
        },
        Command::Eval(args) => with_world(|world| eval::run(world, &args)),
        Command::Export(args) => alone(export::run(&args)),
        Command::Fidelity(args) => with_world(|world| fidelity::run(world, &args)),
        Command::Report(args) => alone(report::run(&args)),
        Command::Trace(args) if args.is_of_run() => alone(trace::of_run(&args)),
        Command::Trace(args) => with_world(|world| trace::of_configuration(&args, world)),
        Command::Completions(args) => alone(shell::completions(&args)),
        Command::Man(args) => alone(shell::man(&args)),
    }
}

/// Runs a command on all ranks of this job.
fn with_world(command: impl FnOnce(&World) -> Result<()>) -> i32 {
    match World::join() {
        Ok(world) => {
            let result = command(&world);
            conclude(world, result)
        }
        Err(error) => conclude(World::Alone, Err(error)),
    }
}

/// Ends this process's part; what was printed must have come through.
fn conclude(world: World, result: Result<()>) -> i32 {
    world.conclude(result.and_then(|()| output::finish()))
}
