//! `sideways bench`: what layers, links, the overlap of links with compute, and training reach on the machine at hand.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Subcommand, ValueEnum};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};

use super::output::whole;
use crate::comm::World;
use crate::config::{DeviceChoice, Rule, Stash};
use crate::setup::site::{self, Site};
use crate::{Error, Result};

mod data;
mod layers;
mod link;
mod overlap;
mod peak;
mod train;
mod videos;

/// Micro-benchmarks of the machine at hand.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Latency and bandwidth of a link, beside plain MPI: run it under `mpirun -n 2`, or alone for threads.
    Link(LinkArgs),
    /// A pipeline with sleeps for compute: does a tick take longer than its compute? Alone, or under mpirun.
    Overlap(OverlapArgs),
    /// Each layer's forward pass and gradients: time, GFLOP/s and GB/s beside this machine's peaks.
    Layers(layers::LayersArgs),
    /// Reading shards: frames/s of each stage and of the whole loader, beside a plain read of the same files.
    Data(data::DataArgs),
    /// Training as configured, on made-up frames: frames/s, peak memory, where the time goes. Alone, or under mpirun.
    Train(train::TrainArgs),
}

/// Options of `sideways bench link`.
#[derive(Debug, Args)]
pub struct LinkArgs {
    /// Smallest payload.
    #[arg(long, default_value = "1KiB", value_parser = parse_bytes)]
    pub from: usize,
    /// Largest payload; sizes grow fourfold.
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    pub to: usize,
    /// Batches of messages a size, links and plain MPI in turn; the best of each counts.
    #[arg(long, default_value_t = 9, value_parser = whole(1, 1 << 20))]
    pub repeat: usize,
    /// Instead, an all-reduce among all ranks, 2 or more, beside MPI_Iallreduce.
    #[arg(long, conflicts_with = "device")]
    pub all_reduce: bool,
    /// Where payloads are made and used: on a GPU they are staged in host memory, and set beside the copies alone.
    #[arg(long, value_enum, default_value_t)]
    pub device: On,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Options of `sideways bench overlap`.
#[derive(Debug, Args)]
pub struct OverlapArgs {
    /// Workers in the chain [default: one a rank, 8 when alone].
    #[arg(long, value_parser = whole(1, 1 << 12))]
    pub workers: Option<usize>,
    /// One worker a rank (the default under mpirun; says so in a script).
    #[arg(long, conflicts_with = "workers")]
    pub ranks_from_world: bool,
    /// Compute a direction, in milliseconds: a tick has two.
    #[arg(long, default_value_t = 10.0)]
    pub compute_ms: f64,
    /// Compute by using the processor instead of sleeping (needs a core a worker).
    #[arg(long)]
    pub busy: bool,
    /// Payload of every message.
    #[arg(long, default_value = "1MiB", value_parser = parse_bytes)]
    pub bytes: usize,
    /// How gradients are made, which says who waits for whom: sideways, skip-sideways, 1f1b, gpipe, or bp alone.
    #[arg(long, default_value = "sideways", value_parser = parse_name::<Rule>)]
    pub rule: Rule,
    /// Which activations a cotangent meets: none (those at hand), inputs or activations (its own).
    #[arg(long, default_value = "none", value_parser = parse_name::<Stash>)]
    pub stash: Stash,
    /// Skips over so many modules each, from every module (skip-sideways and the exact rules).
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    pub spans: Vec<usize>,
    /// A cluster's interconnects (TOML, as `plan --scale` takes them) for the simulated tick; absent: messages take no time in it.
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Ticks of a batch, and two more a worker; by 1f1b, gpipe and bp its frames. One batch warms up, the next one counts.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1 << 16))]
    pub ticks: u64,
    /// Where modules wait, and their arrays are.
    #[arg(long, value_enum, default_value_t)]
    pub device: On,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Where something is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// On the processor.
    #[default]
    Cpu,
    /// On this rank's GPU.
    Cuda,
}

/// The number of this rank's GPU, if one is asked for. Collective.
fn gpu_of(world: &World, on: On) -> Result<Option<usize>> {
    let choice = if on == On::Cuda { DeviceChoice::Cuda } else { DeviceChoice::Cpu };
    match site::choose(world, choice)? {
        Site::Cpu => Ok(None),
        Site::Gpu { ordinal, .. } => Ok(Some(ordinal)),
    }
}

/// A wait longer than this means that something is wrong.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a benchmark and prints its table on rank 0.
///
/// # Errors
/// [`Error::Input`] for options that cannot work here; [`Error::Transport`] when a link fails.
pub fn run(command: &BenchCommand, world: &World) -> Result<()> {
    match command {
        BenchCommand::Link(args) => link::run(args, world),
        BenchCommand::Overlap(args) => overlap::run(args, world),
        BenchCommand::Layers(args) => layers::run(args),
        BenchCommand::Data(args) => data::run(args, world),
        BenchCommand::Train(args) => train::run(args, world),
    }
}

/// Reads `64`, `1KiB`, `16MiB` or `1GiB` as a number of bytes that is a multiple of 4.
const MOST_BYTES: u64 = 16 << 30;

fn parse_bytes(text: &str) -> std::result::Result<usize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(bytes)) if bytes > MOST_BYTES => Err(format!("a payload is at most {}", ByteSize(MOST_BYTES))),
        Ok(ByteSize(bytes)) if bytes > 0 && bytes % 4 == 0 => Ok(bytes as usize),
        Ok(_) => Err("a payload is a multiple of 4 bytes, and not zero".to_string()),
        Err(_) => Err("write a size as 64, 1KiB, 16MiB or 1GiB".to_string()),
    }
}

/// Reads a rule, or what is stashed, by the name that it has in a configuration.
fn parse_name<'de, T: Deserialize<'de>>(text: &str) -> std::result::Result<T, String> {
    let name: StrDeserializer<ValueError> = text.into_deserializer();
    T::deserialize(name).map_err(|e| e.to_string())
}

/// As people read it: `1.5 MiB`.
fn show_bytes(bytes: usize) -> ByteSize {
    ByteSize(bytes as u64)
}

/// An unsuitable number of ranks.
fn wrong_size(name: &str, size: usize, wanted: &str) -> Error {
    Error::input(format!("`sideways bench {name}` was started on {size} ranks: {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rules_are_read_and_shown() {
        let read = |text: &str| parse_bytes(text);
        assert_eq!((read("64"), read("1KiB"), read("16 mib")), (Ok(64), Ok(1024), Ok(16 << 20)));
        assert!(["6", "0", "", "1 mile"].iter().all(|text| read(text).is_err()));
        assert_eq!(parse_name("1f1b"), Ok(Rule::OneForwardOneBackward));
        assert!(parse_name::<Rule>("2f2b").unwrap_err().contains("gpipe"));
        assert_eq!([64, 1536, 1 << 24].map(|n| show_bytes(n).to_string()), ["64 B", "1.5 KiB", "16.0 MiB"]);
    }
}
