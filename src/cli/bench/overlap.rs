//! `sideways bench overlap`: the pipeline at work on stages that take a set time, to see what messages cost.
//!
//! A tick is the run's own ([`crate::pipeline`]): y travels while the backward pass takes its time, the cotangents while the next
//! forward pass does. A transfer that hides behind compute costs nothing: the tick is then as long as its two passes.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use candle_core::{DType, Device, Tensor};

use super::{On, OverlapArgs, TIMEOUT, show_bytes, wrong_size};
use crate::backend::cuda;
use crate::backend::stage::{Clock, Stage, StageSpec, TimedStage};
use crate::cli::output::json;
use crate::comm::World;
use crate::config::{Config, DeviceChoice, SkipConfig, Stash};
use crate::data::Frames;
use crate::method::Keep;
use crate::metrics::TimeAccount;
use crate::nn::layers::Pass;
use crate::nn::spec::LayerSpec;
use crate::pipeline::orders::Requests;
use crate::pipeline::{Parts, Reports, RunRange, run as run_pipeline};
use crate::plan::cluster::Cluster;
use crate::plan::simulate::{Processors, StepCost, simulate};
use crate::setup::Setup;
use crate::setup::site::Site;
use crate::sys::cpus::processor_seconds;
use crate::sys::host::hostname;
use crate::{Error, Result};

/// What one worker found, in seconds.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Alone {
    worker: u32,
    /// A pass with no message about.
    pass: f32,
}

/// Milliseconds of a pass, at most.
const MOST_MS: f64 = 1e6;

pub(super) fn run(args: &OverlapArgs, world: &World) -> Result<()> {
    let workers = args.workers.unwrap_or(if world.size() > 1 { world.size() } else { 8 });
    if workers < world.size() {
        let size = world.size();
        return Err(wrong_size("overlap", size, &format!("{workers} workers leave some without work")));
    }
    if !(0.0..=MOST_MS).contains(&args.compute_ms) || args.ticks == 0 {
        return Err(Error::input(format!("--compute-ms must be 0 to {MOST_MS}, and --ticks at least 1")));
    }
    if args.device == On::Cuda && args.busy {
        return Err(Error::input("--busy is for the processor: with --device cuda modules wait on the GPU"));
    }
    if args.device == On::Cuda && args.stash == Stash::Inputs {
        return Err(Error::input("--stash inputs is for the processor: on a GPU give activations, or none"));
    }
    let cluster = world.first_error(args.cluster.as_deref().map(Cluster::load).transpose())?;
    let config = chain(args, workers);
    world.first_error(config.validate())?;
    let setup = world.first_error(Setup::dry(&config, world.size()))?;
    let alone = Mutex::new(Vec::new());
    let pass = Duration::try_from_secs_f64(args.compute_ms / 1e3)
        .map_err(|e| Error::input(format!("--compute-ms {}: {e}", args.compute_ms)))?;
    let own = setup.grid.workers_of(world.rank()).len();
    let stage = |spec: StageSpec, w: usize, site: Site| {
        let mut stage = match site {
            Site::Cpu => Box::new(TimedStage::new(spec, pass, args.busy)),
            Site::Gpu { ordinal, .. } => cuda::timed_stage(spec, ordinal, pass.as_secs_f64(), own == 1)?,
        };
        let pass = pass_alone(stage.as_mut())? as f32;
        alone.lock().unwrap_or_else(PoisonError::into_inner).push(Alone { worker: w as u32, pass });
        Ok(stage)
    };
    let frames = |_| Ok(Box::new(Blank) as Box<dyn Frames>);
    // The first batch fills the pipeline.
    let range = RunRange { first: 0, end: 2, total: 2, from: None, record: false, validates_first: false, trace: None };
    let mut accounts = Vec::new();
    let console = |reports: &mut Reports| {
        for batch in [0, 0, 1] {
            accounts = reports.gather(batch)?.iter().map(|report| report.time).collect();
        }
        Ok(())
    };
    run_pipeline(
        &setup,
        world,
        &range,
        &Parts { stage: &stage, frames: &frames, gradients: None },
        &Requests::default(),
        console,
    )?;
    let cpu = processor_seconds();
    let alone = alone.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut all: Vec<Alone> = world
        .gather(bytemuck::cast_slice(&alone))?
        .iter()
        .flat_map(|bytes| bytemuck::allocation::pod_collect_to_vec::<u8, Alone>(bytes))
        .collect();
    all.sort_by_key(|alone| alone.worker);
    if world.rank() == 0 {
        let simulated = simulated(&setup, &all, cluster.as_ref());
        let measured = 1e3 * slowest(&accounts) / setup.schedule.frames() as f64;
        if args.json {
            return print_json(args, &setup, &accounts, &all, [measured, simulated]);
        }
        print(args, &setup, &accounts, &all, cpu);
        let with = cluster.as_ref().map_or("messages that take no time".into(), Cluster::to_string);
        outln!(
            "simulated: {simulated:.3} ms a frame; measured over simulated {:.4} (with these passes alone, and {with})",
            measured / simulated
        );
    }
    Ok(())
}

/// Seconds of the batch of the slowest worker.
fn slowest(accounts: &[TimeAccount]) -> f64 {
    accounts.iter().map(|time| f64::from(time.total())).fold(0.0, f64::max)
}

/// What each worker found, in milliseconds a tick.
fn print_json(
    args: &OverlapArgs,
    setup: &Setup,
    accounts: &[TimeAccount],
    alone: &[Alone],
    [measured, simulated]: [f64; 2],
) -> Result<()> {
    let ms = |seconds: f32| f64::from(seconds) / setup.schedule.frames() as f64 * 1e3;
    let worker = |(time, alone): (&TimeAccount, &Alone)| {
        let (tick, passes) = (ms(time.total()), 2e3 * f64::from(alone.pass));
        serde_json::json!({
            "tick_ms": tick, "passes_alone_ms": passes, "exposed_ms": (tick - passes).max(0.0),
            "wait_activations_ms": ms(time.wait_activations), "wait_cotangents_ms": ms(time.wait_cotangents),
            "send_ms": ms(time.send),
        })
    };
    let workers: Vec<serde_json::Value> = accounts.iter().zip(alone).map(worker).collect();
    json(&serde_json::json!({
        "ranks": setup.grid.ranks, "host": hostname(), "rule": args.rule, "stash": args.stash,
        "message_bytes": args.bytes, "frames": setup.schedule.frames(), "compute_ms": args.compute_ms,
        "bubble": setup.schedule.bubble(), "workers": workers,
        "tick_ms": measured, "simulated_tick_ms": simulated,
    }))
}

/// Milliseconds of a tick by the simulator, with each worker's passes as they are alone.
fn simulated(setup: &Setup, alone: &[Alone], cluster: Option<&Cluster>) -> f64 {
    let cost = |alone: &Alone| {
        let pass = f64::from(alone.pass);
        StepCost { forward: pass, backward: pass, backward_leaf: pass, update: 0.0 }
    };
    let costs: Vec<StepCost> = alone.iter().map(cost).collect();
    // Who waits for a set time needs no processor of their own.
    let processors = Processors::of_ranks(setup.grid.ranks, setup.grid.workers());
    1e3 * simulate(setup, &costs, &processors, cluster).tick
}

/// One module of the chain after another, joined by messages of the size asked for.
fn chain(args: &OverlapArgs, workers: usize) -> Config {
    let mut config = Config::default();
    let between = LayerSpec::Linear { out: args.bytes / 4, bias: false };
    let last = LayerSpec::Linear { out: 2, bias: false };
    config.model.layers = Some(std::iter::repeat_n(between, workers - 1).chain([last]).collect());
    config.model.preset = None;
    config.model.modules = Some(workers);
    config.model.classes = Some(2);
    (config.data.crop, config.data.batch) = (Some(1), 1);
    (config.train.rule, config.train.stash) = (args.rule, args.stash);
    config.model.skip =
        (!args.spans.is_empty()).then(|| SkipConfig { spans: args.spans.clone(), ..SkipConfig::default() });
    let way_back = if args.rule.is_exact() { 0 } else { 2 * workers };
    config.data.frames = way_back + args.ticks as usize;
    config.run.timeout = TIMEOUT.as_secs();
    config.run.device = if args.device == On::Cuda { DeviceChoice::Cuda } else { DeviceChoice::Cpu };
    config
}

/// Seconds of a forward pass of which nothing is sent: the median of some.
fn pass_alone(stage: &mut dyn Stage) -> Result<f64> {
    let pass = Pass { training: true, key: 0, again: false };
    let mut seconds = Vec::new();
    for _ in 0..5 {
        let begin: Clock = stage.clock()?;
        stage.forward(0, &pass, Keep::Nothing, &[])?;
        let end = stage.clock()?;
        seconds.push(begin.until(&end)?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[2])
}

/// Frames of zeros.
struct Blank;

impl Frames for Blank {
    fn begin(&mut self, _: u64) -> Result<Vec<i32>> {
        Ok(vec![0])
    }

    fn frame(&mut self, _: usize) -> Result<Tensor> {
        Ok(Tensor::zeros((1, 1, 1, 3), DType::F32, &Device::Cpu)?)
    }

    fn skipped(&self) -> &[usize] {
        &[]
    }
}

fn print(args: &OverlapArgs, setup: &Setup, accounts: &[TimeAccount], alone: &[Alone], cpu: f64) {
    let how = match (args.device, args.busy) {
        (On::Cuda, _) => "on a GPU",
        (On::Cpu, true) => "busy",
        (On::Cpu, false) => "asleep",
    };
    outln!(
        "{} workers on {} ranks of {}, rule {}: {} down and {} up a tick, {} ticks, passes of {} ms, two a tick ({how})",
        accounts.len(),
        setup.grid.ranks,
        hostname(),
        args.rule,
        show_bytes(args.bytes),
        show_bytes(args.bytes),
        setup.schedule.frames(),
        args.compute_ms
    );
    outln!(
        "ms a tick  {:>9} {:>13} {:>9} {:>10} {:>16} {:>15} {:>7}",
        "tick",
        "passes alone",
        "exposed",
        "of a tick",
        "wait activation",
        "wait cotangent",
        "send"
    );
    let ms = |seconds: f32| f64::from(seconds) / setup.schedule.frames() as f64 * 1e3;
    let (mut slowest, mut worst, mut compute) = (0.0f64, 0.0f64, 0.0f64);
    for (worker, (time, alone)) in accounts.iter().zip(alone).enumerate() {
        let (tick, passes) = (ms(time.total()), 2e3 * f64::from(alone.pass));
        let exposed = (tick - passes).max(0.0);
        (slowest, compute) = (slowest.max(tick), compute.max(passes));
        worst = worst.max(exposed / tick);
        outln!(
            "worker {worker:<3} {tick:>9.3} {passes:>13.3} {exposed:>9.3} {:>9.2}% {:>16.3} {:>15.3} {:>7.3}",
            100.0 * exposed / tick,
            ms(time.wait_activations),
            ms(time.wait_cotangents),
            ms(time.send)
        );
    }
    if args.rule.is_exact() {
        let (frames, steps) = (setup.schedule.frames() as f64, (setup.schedule.frames() + accounts.len() - 1) as f64);
        let (batch, asked) = (slowest * frames, 2.0 * args.compute_ms);
        outln!(
            "slowest worker's batch {batch:.1} ms: {:.4} of T + D - 1 = {steps} times the {asked} ms asked for; bubble {:.2} %, \
             where (D - 1) / (T + D - 1) is {:.2} %; processor time of rank 0, warm-up included: {cpu:.2} s",
            batch / (steps * asked),
            100.0 * (1.0 - asked / slowest),
            100.0 * setup.schedule.bubble()
        );
        return;
    }
    outln!(
        "slowest worker's tick {slowest:.3} ms: {:.4} of the {} ms asked for, {:.4} of its passes alone; \
         processor time of rank 0, warm-up included: {cpu:.2} s",
        slowest / (2.0 * args.compute_ms),
        2.0 * args.compute_ms,
        slowest / compute
    );
    outln!("exposed communication: {:.2} % of the tick at most", 100.0 * worst);
}
