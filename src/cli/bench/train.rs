//! `sideways bench train`: a configuration trained on made-up frames, without a dataset and without writing anything.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use crate::Result;
use crate::backend::cpu;
use crate::cli::made_up::{Folder, made_up};
use crate::cli::output::{json, table, whole};
use crate::comm::World;
use crate::config::{Config, Exchange, Rule, Stash};
use crate::metrics::{PHASES, TimeAccount};
use crate::plan::cut::{cut, times_together};
use crate::plan::gpu::{OnGpu, chosen};
use crate::plan::predict::{Parts, Prediction, predict};
use crate::plan::simulate::Processors;
use crate::setup::site;
use crate::setup::{Purpose, Setup};
use crate::sys::cpus::{at_once, own_processors, parallelism, processor_name};
use crate::sys::host::{hostname, nvidia_driver, program_hash};
use crate::sys::memory::peak_memory;
use crate::trainer::{BatchSummary, Trainer};

/// Options of `sideways bench train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run's configuration (TOML); its data.train is not read.
    pub config: PathBuf,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Classes to tell apart [default: model.classes].
    #[arg(long, value_name = "K", value_parser = whole(1, 1 << 20))]
    pub classes: Option<usize>,
    /// Batches that count, after two or more of warm-up.
    #[arg(long, alias = "clips", value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub batches: u64,
    /// Measure the layers anew for the prediction, whatever was measured before.
    #[arg(long)]
    pub fresh: bool,
    /// Predict nothing, so that no layer is measured for it.
    #[arg(long, conflicts_with = "fresh")]
    pub no_prediction: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Bytes of a MiB.
const MIB: f64 = 1_048_576.0;

/// What is printed, on rank 0.
#[derive(Serialize)]
struct Outcome {
    modules: usize,
    replicas: usize,
    ranks: usize,
    threads: usize,
    /// Cores rank 0 may run on.
    cores: usize,
    frames: usize,
    batch: usize,
    rule: Rule,
    stash: Stash,
    /// Batches that counted.
    batches: u64,
    back_end: String,
    /// Rank 0's GPU, cuDNN and number format, where modules compute on one.
    gpu: Option<OnGpu>,
    frames_per_second: f64,
    /// Milliseconds of a tick: a clip's time over its frames.
    tick_ms: f64,
    /// Peak resident memory of all ranks together, in MiB.
    peak_mib: f64,
    /// The largest rank's, in MiB.
    peak_mib_rank: f64,
    /// Share of all modules' steps that have backward work.
    backward_share: f64,
    /// Milliseconds of computing a tick, by rank: its modules' forward and backward passes and updates together.
    rank_busy_ms: Vec<f64>,
    /// How many of its modules each rank computes at once, at most.
    rank_slots: Vec<usize>,
    #[serde(flatten)]
    place: Place,
    /// Mean over maximum of the ranks' busy time.
    balance: f64,
    /// Milliseconds a tick by module: forward, backward, optimiser, data, sending.
    module_ms: Vec<[f64; 5]>,
    /// The same of averaging gradients over replicas, where a backward pass on a GPU does not hide it.
    all_reduce_ms: Vec<f64>,
    /// The layers before which the network is cut.
    cuts: Vec<usize>,
    /// What `sideways plan` predicts for a tick, from measured layers.
    predicted_tick_ms: Option<f64>,
    /// And for mean over maximum of the ranks' busy time.
    predicted_balance: Option<f64>,
}

/// On what it ran.
#[derive(Serialize)]
struct Place {
    /// The nodes' names, in the order of ranks.
    hosts: Vec<String>,
    /// Rank 0's processor.
    processor: String,
    /// What the MPI library calls itself.
    mpi: Option<String>,
    /// NVIDIA's driver, where modules compute on its GPUs.
    driver: Option<String>,
    /// How messages get from GPU to GPU as asked for; absent: in host memory, where they are computed.
    exchange: Option<Exchange>,
    /// Number format of messages.
    wire: &'static str,
    /// xxh3-64 of the program's file.
    build: String,
}

/// Trains and prints.
///
/// # Errors
/// As training; [`Error::Input`] if the frames' size or the classes are not known.
pub(super) fn run(args: &TrainArgs, world: &World) -> Result<()> {
    let folder = Folder::shared(world)?;
    let config = world.first_error(made_up(&args.config, &args.set, args.classes, world, &folder))?;
    let setup = cut(world.first_error(Setup::new(&config, world.size(), Purpose::Train))?, world)?;
    let depth = setup.grid.modules.div_ceil(config.data.frames) as u64;
    // The first batches fill the pipeline, and the next, with its first update, may still touch memory for the first time;
    // the last ones let it run empty.
    let from = depth + 1;
    let (to, end) = (from + args.batches, from + args.batches + depth);
    let trainer = Trainer::unrecorded(world, setup, end);
    let setup = trainer.setup();
    let mut begun = Instant::now();
    let mut seconds = 0.0;
    let mut time = vec![[0.0f64; PHASES]; setup.grid.workers()];
    let mut observer = |summary: &BatchSummary| {
        if summary.batches == from {
            begun = Instant::now();
        }
        if summary.batches == to {
            seconds = begun.elapsed().as_secs_f64();
        }
        if summary.batches > from && summary.batches <= to {
            for (sum, report) in time.iter_mut().zip(&summary.reports) {
                sum.iter_mut().zip(report.time.to_array()).for_each(|(s, t)| *s += f64::from(t));
            }
        }
    };
    trainer.run(&mut observer)?;
    let peaks = world.gather(&peak_memory().to_le_bytes())?;
    let hosts = world.gather(hostname().as_bytes())?;
    // Behind the peak memory, which measuring layers would raise.
    let gpu = world.first_error(chosen(&config))?;
    let predicted = match args.no_prediction {
        true => None,
        false => {
            let processors = processors(world, &config, gpu.is_some())?;
            times_together(world, setup, Parts::Modules, args.fresh)?
                .map(|profile| predict(setup, &profile, &processors, None))
        }
    };
    if world.rank() > 0 {
        return Ok(());
    }
    let mib = |peak: &Vec<u8>| Some(u64::from_le_bytes(peak.as_slice().try_into().ok()?) as f64 / MIB);
    let peaks: Vec<f64> = peaks.iter().filter_map(mib).collect();
    let place = place(world, &config, &hosts, gpu.is_some());
    let outcome =
        outcome(setup, world, args, &Run { seconds, time: &time, peaks: &peaks, predicted: predicted.as_ref() }, place);
    let outcome = match gpu {
        Some(gpu) => Outcome { rank_slots: vec![1; setup.grid.ranks], gpu: Some(gpu), ..outcome },
        None => outcome,
    };
    if args.json {
        return json(&outcome);
    }
    print(setup, &outcome);
    Ok(())
}

fn place(world: &World, config: &Config, hosts: &[Vec<u8>], on_gpu: bool) -> Place {
    let mut names: Vec<String> = Vec::new();
    for host in hosts.iter().map(|host| String::from_utf8_lossy(host).into_owned()) {
        if !names.contains(&host) {
            names.push(host);
        }
    }
    Place {
        hosts: names,
        processor: processor_name(),
        mpi: world.mpi_library().map(|library| library.trim().to_string()),
        driver: if on_gpu { nvidia_driver() } else { None },
        exchange: on_gpu.then_some(config.run.exchange),
        wire: if config.run.halves_messages() { "bf16" } else { "f32" },
        build: format!("{:016x}", program_hash()),
    }
}

/// What a run came to, on rank 0.
struct Run<'a> {
    /// Of the batches that count.
    seconds: f64,
    /// By worker.
    time: &'a [[f64; PHASES]],
    /// Peak memory by rank, in MiB.
    peaks: &'a [f64],
    predicted: Option<&'a Prediction>,
}

fn outcome(setup: &Setup, world: &World, args: &TrainArgs, run: &Run, place: Place) -> Outcome {
    let (grid, config) = (setup.grid, &setup.config);
    let &Run { seconds, time, peaks, predicted } = run;
    let ticks = (args.batches as usize * config.data.frames) as f64;
    let steps: usize = (1..=grid.modules).map(|i| setup.schedule.steps(i)).sum();
    let backward = (1..=grid.modules).flat_map(|i| setup.schedule.backwards(i)).count();
    let mut busy = vec![0.0; grid.ranks];
    let accounts: Vec<TimeAccount> = time.iter().map(|t| TimeAccount::from_array(t.map(|x| x as f32))).collect();
    accounts.iter().enumerate().for_each(|(w, t)| busy[grid.rank_of(w)] += f64::from(t.busy()));
    let module =
        |t: &TimeAccount| [t.forward, t.backward, t.optimizer, t.data, t.send].map(|s| f64::from(s) * 1e3 / ticks);
    let on_rank = |rank: usize| (0..grid.workers()).filter(|&w| grid.rank_of(w) == rank).count();
    let slots = |rank: usize| at_once(config.run.threads).min(on_rank(rank));
    Outcome {
        modules: grid.modules,
        replicas: grid.replicas,
        ranks: world.size(),
        threads: config.run.threads,
        cores: parallelism(),
        frames: config.data.frames,
        batch: config.data.batch,
        rule: config.train.rule,
        stash: config.train.stash,
        batches: args.batches,
        back_end: cpu::back_end(),
        gpu: None,
        frames_per_second: ticks * (grid.replicas * config.data.batch) as f64 / seconds,
        tick_ms: seconds / ticks * 1e3,
        peak_mib: peaks.iter().sum(),
        peak_mib_rank: peaks.iter().copied().fold(0.0, f64::max),
        backward_share: backward as f64 / steps as f64,
        balance: mean(&busy) / busy.iter().copied().fold(f64::MIN_POSITIVE, f64::max),
        rank_busy_ms: busy.iter().map(|seconds| seconds * 1e3 / ticks).collect(),
        rank_slots: (0..grid.ranks).map(slots).collect(),
        place,
        module_ms: accounts.iter().map(module).collect(),
        all_reduce_ms: accounts.iter().map(|t| f64::from(t.all_reduce) * 1e3 / ticks).collect(),
        cuts: setup.cuts(),
        predicted_tick_ms: predicted.map(|p| p.outcome.tick * 1e3),
        predicted_balance: predicted.map(|p| p.balance),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn print(setup: &Setup, o: &Outcome) {
    outln!(
        "{} modules x {} replicas on {} rank(s) x {} thread(s) ({} core(s) each) of {}, {}; T = {}, B = {}, frames {:?}",
        o.modules,
        o.replicas,
        o.ranks,
        o.threads,
        o.cores,
        hostname(),
        o.back_end,
        o.frames,
        o.batch,
        setup.network.input
    );
    if let Some(on) = &o.gpu {
        let graphs = if on.graphs { "with CUDA graphs" } else { "without CUDA graphs" };
        outln!("modules on {} (rank 0's), cuDNN {}, {:?}, {graphs}", on.name, on.cudnn, on.precision);
    }
    outln!(
        "{:.2} frames/s, {:.2} ms a tick; peak memory of all ranks {:.0} MiB; backward work at {:.1} % of the modules' steps",
        o.frames_per_second,
        o.tick_ms,
        o.peak_mib,
        100.0 * o.backward_share
    );
    outln!("ms a tick (wall, so modules that share a core count each other's):");
    let row = |(w, ms): (usize, &[f64; 5])| {
        let (i, r) = setup.grid.module_and_replica(w);
        let ms = ms.map(|ms| format!("\t{ms:.3}")).concat();
        format!("{i}\t{r}\t{}{ms}", setup.grid.rank_of(w))
    };
    let header = "module\treplica\trank\tforward\tbackward\toptimiser\tdata\tsend";
    table(0, header, o.module_ms.iter().enumerate().map(row));
    if o.replicas > 1 {
        let exposed = o.all_reduce_ms.iter().copied().fold(0.0, f64::max);
        outln!(
            "averaging gradients, not hidden: {exposed:.3} ms a tick at most, {:.2} % of it",
            100.0 * exposed / o.tick_ms
        );
    }
    outln!("balance of the ranks' busy time, mean/max: {:.3}", o.balance);
    if let (Some(tick), Some(balance)) = (o.predicted_tick_ms, o.predicted_balance) {
        outln!(
            "predicted: tick {tick:.2} ms, balance {balance:.3}; measured over predicted tick {:.3}",
            o.tick_ms / tick
        );
    }
}

/// Which ranks share what computes: those of a node that may run on the same processors, or that have the same GPU.
fn processors(world: &World, config: &Config, on_gpu: bool) -> Result<Processors> {
    let slots = if on_gpu { 1 } else { at_once(config.run.threads) };
    let mine = if on_gpu {
        let site = site::choose(world, config.run.device)?;
        format!("{} {site:?}", hostname())
    } else {
        format!("{} {:?}", hostname(), own_processors())
    };
    let all = world.gather(mine.as_bytes())?;
    let mut distinct: Vec<&Vec<u8>> = Vec::new();
    let pool_of_rank = all.iter().map(|place| {
        distinct.iter().position(|known| *known == place).unwrap_or_else(|| {
            distinct.push(place);
            distinct.len() - 1
        })
    });
    Ok(Processors { pool_of_rank: pool_of_rank.collect(), slots: vec![slots; distinct.len()] })
}
