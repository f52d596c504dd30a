//! `sideways plan`: where the network is cut, what each module costs on this machine, and the schedule as a picture.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;

use crate::cli::dry_run::MOST_RANKS;
use crate::cli::output::{json, table, whole};
use crate::cli::plan_scale::{self, ScaleOptions, Source};
use crate::cli::ticks::{csv, picture};
use crate::comm::Kind;
use crate::config::Config;
use crate::method::Rule;
use crate::network::ModuleSpec;
use crate::network::blocks::Blocks;
use crate::plan::assumed::assumed;
use crate::plan::cut::{resume_cut, times_of};
use crate::plan::predict::{Parts, Prediction, best_cuts, predict};
use crate::plan::profile::Profile;
use crate::plan::simulate::Processors;
use crate::setup::Setup;
use crate::setup::footprint::{gpu_memory, memory, sent};
use crate::{Error, Result};

/// Arguments of `sideways plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The run's configuration (TOML).
    pub config: PathBuf,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Ranks to plan for [default: one a module, or one where model.modules and model.cuts are not set].
    #[arg(long, value_name = "N", value_parser = whole(1, 1 << 20))]
    pub ranks: Option<usize>,
    /// Cores each rank has to itself [default: run.threads, so that one of its modules computes at a time].
    #[arg(long, value_name = "N", value_parser = whole(1, 1 << 16))]
    pub cores: Option<usize>,
    /// Measure the layers anew, whatever was measured before.
    #[arg(long)]
    pub fresh: bool,
    /// Operations a second that modules are taken to reach, such as 90e12, in place of measured times: for a machine that is not at hand.
    #[arg(long, value_name = "OPERATIONS", conflicts_with_all = ["fresh", "times"], value_parser = parse_rate)]
    pub rate: Option<f64>,
    /// Say how long an epoch of so many videos takes, one clip of each.
    #[arg(long, value_name = "N", conflicts_with_all = ["scale", "ticks", "json"])]
    pub videos: Option<u64>,
    /// List each module's layers, as a configuration has them.
    #[arg(long)]
    pub layers: bool,
    /// Print the plan as one JSON object.
    #[arg(long, conflicts_with = "ticks")]
    pub json: bool,
    /// Draw who does what at which tick (nothing is measured).
    #[arg(long)]
    pub ticks: bool,
    /// With --ticks: as CSV, a line an action.
    #[arg(long, requires = "ticks")]
    pub csv: bool,
    /// With --ticks: how many clips to draw.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "ticks", value_parser = clap::value_parser!(u64).range(1..=100))]
    pub clips: u64,
    #[command(flatten)]
    pub extrapolate: ScaleOptions,
}

/// Another cut is proposed where its predicted tick is below this share of the present one's.
const WORTH_IT: f64 = 0.98;

/// Where a cut comes from.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Origin {
    /// model.cuts
    Given,
    /// model.modules
    Arithmetic,
    /// Measured times.
    Measured,
    /// The run folder's checkpoint.
    Checkpoint,
}

/// Runs it.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(args: &PlanArgs) -> Result<()> {
    let mut config = Config::load(&args.config, &args.set)?;
    if let Some(range) = args.extrapolate.scale {
        resume_cut(&mut config)?;
        let source = args.rate.map_or(Source::Measured { fresh: args.fresh }, Source::Assumed);
        return plan_scale::run(&config, &args.extrapolate, range, source, args.json);
    }
    let mut origin = match (&config.model.cuts, config.model.modules) {
        (Some(_), _) => Origin::Given,
        (None, Some(_)) => Origin::Arithmetic,
        (None, None) => Origin::Measured,
    };
    if resume_cut(&mut config)? {
        origin = Origin::Checkpoint;
    }
    for (option, value) in [("--ranks", args.ranks), ("--cores", args.cores)] {
        if let Some(value) = value.filter(|value| !(1..=MOST_RANKS).contains(value)) {
            return Err(Error::input(format!("{option} {value}: it must be 1..={MOST_RANKS}")));
        }
    }
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1));
    let ranks = match config.train.rule == Rule::Bp {
        true => 1,
        false => args.ranks.unwrap_or(modules.unwrap_or(1) * config.train.replicas),
    };
    let mut setup = Setup::dry(&config, ranks)?;
    if args.ticks {
        let drawn = if args.csv { csv(&setup, args.clips)? } else { picture(&setup, args.clips) };
        outln!("{}", drawn.trim_end());
        return Ok(());
    }
    let threads = config.run.threads;
    let slots = args.cores.map_or(1, |cores| (cores / threads).max(1));
    let busy = (ranks * slots).min(setup.grid.workers());
    let times = |setup: &Setup, parts: Parts| match args.rate {
        Some(rate) => Ok(assumed(setup, parts, rate)),
        None => times_of(setup, parts, busy, args.fresh),
    };
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let a_module_a_rank = ranks == setup.grid.workers() && setup.grid.modules > 1;
    let mut better = None;
    // A cut by arithmetic is compared with the one that the times give.
    let plans = match origin {
        Origin::Measured => setup.grid.modules > 1,
        Origin::Arithmetic => a_module_a_rank,
        Origin::Given | Origin::Checkpoint => false,
    };
    if plans {
        let profile = times(&setup, Parts::Blocks(&blocks))?;
        let (cuts, found) = best_cuts(&setup, &blocks, &profile)?;
        if !found.exact {
            log::warn!("there were too many ways to cut for a complete search: a better one may exist");
        }
        match origin {
            Origin::Measured => setup = setup.recut(cuts)?,
            _ if cuts != setup.cuts() => better = Some(cuts),
            _ => {}
        }
    }
    let profile = times(&setup, Parts::Modules)?;
    let prediction = predict(&setup, &profile, &Processors::of_ranks(ranks, slots), None);
    show(args, &setup, origin, &profile, &prediction)?;
    if let Some(cuts) = better.filter(|_| !args.json) {
        let other = setup.recut(cuts.clone())?;
        let times = times(&other, Parts::Modules)?;
        let reached = predict(&other, &times, &Processors::of_ranks(ranks, slots), None);
        if reached.outcome.tick < WORTH_IT * prediction.outcome.tick {
            outln!(
                "by these times, model.cuts = {cuts:?} in place of model.modules: tick {:.2} ms, {:.1} frames/s, \
                 efficiency {:.3}",
                1e3 * reached.outcome.tick,
                reached.frames_per_second,
                reached.balance
            );
        }
    }
    Ok(())
}

fn show(args: &PlanArgs, setup: &Setup, origin: Origin, profile: &Profile, prediction: &Prediction) -> Result<()> {
    if args.json {
        return print_json(setup, origin, profile, prediction);
    }
    print(setup, origin, profile, prediction, args.layers);
    if let Some(videos) = args.videos {
        let hours = videos as f64 * setup.config.data.frames as f64 / prediction.frames_per_second / 3600.0;
        let ranks = setup.grid.ranks;
        outln!(
            "an epoch of {videos} videos, {} frames of each: {hours:.2} hours, {:.1} rank hours",
            setup.config.data.frames,
            hours * ranks as f64
        );
    }
    Ok(())
}

fn parse_rate(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err("a number above 0, such as 90e12".into()),
    }
}

fn print(setup: &Setup, origin: Origin, profile: &Profile, prediction: &Prediction, layers: bool) {
    let (grid, network, config) = (setup.grid, &setup.network, &setup.config);
    outln!(
        "{} modules x {} replicas on {} ranks x {} thread(s); frames {:?} (height, width, channels), T = {}, B = {}",
        grid.modules,
        grid.replicas,
        grid.ranks,
        config.run.threads,
        network.input,
        config.data.frames,
        config.data.batch
    );
    let origin = match origin {
        Origin::Given => "as model.cuts says",
        Origin::Arithmetic => "by arithmetic, into as many modules as model.modules says",
        Origin::Measured if grid.modules == 1 => "one module; --ranks N plans more",
        Origin::Measured => "by these times",
        Origin::Checkpoint => "as the run folder's checkpoint was",
    };
    outln!("model.cuts = {:?}: {origin}", setup.cuts());
    let c = &profile.conditions;
    match &c.gpu {
        _ if profile.assumed.is_some() => outln!(
            "times: by arithmetic, at {:.1} TFLOP/s, twice a forward pass for a backward pass; nothing was measured",
            profile.assumed.unwrap_or_default() / 1e12
        ),
        Some(on) => outln!(
            "times: {}, cuDNN {}, {:?}, {}, a module at a time; {}",
            on.name,
            on.cudnn,
            on.precision,
            if on.graphs { "as CUDA graphs" } else { "without graphs" },
            age(profile)
        ),
        None => outln!(
            "times: {}, {}, {} thread(s) a module, {} at a time; {}",
            c.cpu,
            c.kernels,
            c.threads,
            c.busy,
            age(profile)
        ),
    }
    for warning in setup.warnings() {
        outln!("warning: {warning}");
    }
    let header =
        "rank\tmodule\tlayers\toutput\tparameters\tmemory\tforward\tbackward\tupdate\tbusy/tick\tdown/tick\tup/tick";
    let row = |(w, module): (usize, &ModuleSpec)| {
        let times = &profile.times[w];
        format!(
            "{}\t{}\t{}-{}\t{:?}\t{}\t{}\t{:.3}\t{:.3}\t{:.3}\t{:.3}\t{}\t{}",
            grid.rank_of(w),
            w + 1,
            module.layers.start,
            module.layers.end - 1,
            module.output,
            module.params,
            ByteSize(needed(setup, profile, w)),
            1e3 * times.forward,
            1e3 * if w == 0 { times.backward_leaf } else { times.backward },
            1e3 * times.update,
            1e3 * prediction.outcome.busy[w],
            ByteSize(sent(setup, w, &[Kind::Activation, Kind::Target])),
            ByteSize(sent(setup, w, &[Kind::Cotangent])),
        )
    };
    table(0, header, network.modules.iter().enumerate().map(row));
    for (w, module) in network.modules.iter().enumerate() {
        for skip in &module.skips {
            outln!("module {}: skip from module {}, {:?} as sent", w + 1, skip.from, skip.shape);
        }
        for n in module.layers.clone().filter(|_| layers) {
            let layer = toml::to_string(&network.layers[n]).unwrap_or_default().replace('\n', "  ");
            outln!("module {}: layer {n}: {layer}", w + 1);
        }
    }
    outln!(
        "ms: a forward pass, a vector-Jacobian product, an update (once a batch); all of it a tick{}",
        match c.gpu {
            Some(_) => {
                ", beside which messages are copied and sent. Memory: the GPU's, without cuDNN's workspace; parameters, \
                 gradient and optimizer with a copy to go back to, outputs, cotangents, messages"
            }
            None => {
                ", with messages. Memory: parameters, gradient, optimizer, the activations kept, message buffers"
            }
        }
    );
    let tick = prediction.outcome.tick;
    outln!(
        "predicted: tick {:.2} ms, {:.1} frames/s; efficiency {:.3} (mean over maximum of the ranks' busy time)",
        1e3 * tick,
        prediction.frames_per_second,
        prediction.balance
    );
    let bubble = setup.schedule.bubble();
    if bubble > 0.0 && grid.ranks > 1 {
        outln!(
            "a tick is a batch's time over its {} frames, with the bubble in which the pipeline fills and drains: \
             (D - 1) / (T + D - 1) = {:.1} % of balanced work, one module a rank",
            setup.schedule.frames(),
            100.0 * bubble
        );
    }
}

/// Bytes of memory that worker `w` takes where its module computes.
fn needed(setup: &Setup, profile: &Profile, w: usize) -> u64 {
    profile.conditions.gpu.as_ref().map_or_else(|| memory(setup, w), |on| gpu_memory(setup, w, on.element_bytes()))
}

#[derive(Serialize)]
struct Module<'a> {
    module: usize,
    rank: usize,
    /// The first, and the one behind the last.
    layers: [usize; 2],
    parameters: u64,
    memory_bytes: u64,
    forward_seconds: f64,
    backward_seconds: f64,
    /// Once a batch.
    update_seconds: f64,
    /// All of it a tick.
    busy_seconds: f64,
    /// A tick.
    bytes_down: u64,
    bytes_up: u64,
    skips_from: Vec<usize>,
    output: &'a [usize; 3],
}

fn print_json(setup: &Setup, origin: Origin, profile: &Profile, prediction: &Prediction) -> Result<()> {
    let modules: Vec<Module> = setup
        .network
        .modules
        .iter()
        .enumerate()
        .map(|(w, module)| Module {
            module: w + 1,
            rank: setup.grid.rank_of(w),
            layers: [module.layers.start, module.layers.end],
            parameters: module.params,
            memory_bytes: needed(setup, profile, w),
            forward_seconds: profile.times[w].forward,
            backward_seconds: if w == 0 { profile.times[w].backward_leaf } else { profile.times[w].backward },
            update_seconds: profile.times[w].update,
            busy_seconds: prediction.outcome.busy[w],
            bytes_down: sent(setup, w, &[Kind::Activation, Kind::Target]),
            bytes_up: sent(setup, w, &[Kind::Cotangent]),
            skips_from: module.skips.iter().map(|s| s.from).collect(),
            output: &module.output,
        })
        .collect();
    let plan = serde_json::json!({
        "cuts": setup.cuts(),
        "origin": origin,
        "ranks": setup.grid.ranks,
        "replicas": setup.grid.replicas,
        "modules": modules,
        "tick_seconds": prediction.outcome.tick,
        "frames_per_second": prediction.frames_per_second,
        "efficiency": prediction.balance,
        "bubble": setup.schedule.bubble(),
        "cpu": profile.conditions.cpu,
        "gpu": profile.conditions.gpu,
        "kernels": profile.conditions.kernels,
        "threads": profile.conditions.threads,
        "busy": profile.conditions.busy,
        "warnings": setup.warnings(),
        "profile": profile,
    });
    json(&plan)
}

/// `measured now`, or when and where from.
fn age(profile: &Profile) -> String {
    let path = profile.file.as_ref().map_or("not kept".into(), |f| f.display().to_string());
    if !profile.cached {
        return format!("measured now ({path})");
    }
    let minutes = (UNIX_EPOCH + Duration::from_secs(profile.taken)).elapsed().map_or(0, |d| d.as_secs() / 60);
    format!("measured {minutes} min ago ({path})")
}
