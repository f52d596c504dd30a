//! The command line: one file a command.

use clap::{Parser, Subcommand};

use crate::Result;

pub mod data;
pub mod dry_run;
pub mod eval;
pub mod logging;
pub mod progress;
pub mod train;

/// Training of deep video networks without the backward lock.
#[derive(Parser, Debug)]
#[command(name = "sideways", version, about, max_term_width = 100)]
pub struct Cli {
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
    /// Score a checkpoint on test shards.
    Eval(eval::EvalArgs),
}

/// Runs a command.
///
/// # Errors
/// What the command says; [`crate::Error::exit_code`] is the process's.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Data(command) => data::run(command),
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
    }
}
