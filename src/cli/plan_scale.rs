//! `sideways plan --scale`: what a pipeline and its replicas would reach on more ranks than there are. A simulation: modules' times
//! are measured here or given, what lies between ranks is given or taken to be usual.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::output::{json, table};
use crate::config::{Config, ModelConfig};
use crate::network::blocks::Blocks;
use crate::plan::assumed::assumed;
use crate::plan::cluster::Cluster;
use crate::plan::cut::times_of;
use crate::plan::predict::{Parts, Prediction, best_cuts, module_parts, predict};
use crate::plan::profile::Profile;
use crate::plan::simulate::Processors;
use crate::setup::Setup;
use crate::setup::footprint::{gpu_memory, memory};
use crate::study::plan::{Axis, Plan, Point, Request};
use crate::study::variant::Variant;
use crate::sys::files::read_text;
use crate::{Error, Result};

/// What `plan --scale` takes beside `plan`'s arguments.
#[derive(Args, Debug)]
pub struct ScaleOptions {
    /// Extrapolate: what runs on MIN to MAX ranks, each twice as many as the one before, would reach. A simulation.
    #[arg(long, value_name = "MIN..MAX", value_parser = parse_ranks, conflicts_with_all = ["ticks", "ranks", "cores", "layers"])]
    pub scale: Option<[usize; 2]>,
    /// With --scale: what grows with the ranks [default: weak]
    #[arg(long, value_enum, requires = "scale")]
    pub axis: Option<Axis>,
    /// With --scale: the rules to compare, such as skip-sideways+stash,1f1b,gpipe [default: the configuration's].
    #[arg(long, value_name = "RULE,...", value_delimiter = ',', requires = "scale")]
    pub rules: Vec<String>,
    /// With --scale: the cluster as a TOML file, with `ranks_per_node`, `nodes_per_switch`, `spread`, and `latency` and `bandwidth`
    /// of `[core]`, `[node]` and `[switch]`. Without: a usual one, which is printed.
    #[arg(long, value_name = "FILE", requires = "scale")]
    pub cluster: Option<PathBuf>,
    /// With --scale: modules' times as `plan --json` has printed them, on another machine for instance, and not measured here.
    #[arg(long, value_name = "FILE", requires = "scale", conflicts_with = "fresh")]
    pub times: Option<PathBuf>,
}

fn parse_ranks(text: &str) -> std::result::Result<[usize; 2], String> {
    let number =
        |s: &str| s.trim().parse::<usize>().map_err(|_| format!("{s:?} is not a number of ranks; use MIN..MAX"));
    let (min, max) = text.split_once("..").ok_or("use MIN..MAX, such as 1..4096")?;
    match (number(min)?, number(max)?) {
        (0, _) => Err("MIN must be at least 1".into()),
        (min, max) if min > max => Err("MIN must be no larger than MAX".into()),
        // The cost is quadratic in replicas.
        (_, max) if max > 1 << 14 => Err("MAX must be at most 16384".into()),
        (min, max) => Ok([min, max]),
    }
}

/// A row of the table.
#[derive(Serialize)]
struct Row {
    rule: String,
    ranks: usize,
    modules: usize,
    replicas: usize,
    batch: usize,
    global_batch: usize,
    #[serde(rename = "tick_seconds")]
    tick: f64,
    frames_per_second: f64,
    speedup: f64,
    /// Speed-up over that of the ranks.
    efficiency: f64,
    /// Mean over maximum of the ranks' busy time.
    load_balance: f64,
    /// The share of the tick in which the busiest rank computes.
    busy: f64,
    /// What the largest module's gradients take to become their mean, once a batch.
    #[serde(rename = "all_reduce_seconds")]
    all_reduce: f64,
    /// Of the largest rank.
    #[serde(rename = "memory_bytes")]
    memory: u64,
}

/// Simulates every point and prints the table.
///
/// # Errors
/// [`Error::Input`] for whatever cannot be simulated.
pub fn run(config: &Config, options: &ScaleOptions, range: [usize; 2], source: Source, as_json: bool) -> Result<()> {
    let cluster = options.cluster.as_deref().map_or_else(|| Ok(Cluster::usual()), Cluster::load)?;
    let given = options.times.as_deref().map(Given::load).transpose()?;
    let source = given.as_ref().map_or(source, Source::Given);
    let plan = points(config, options, range)?;
    let mut rows: Vec<Row> = Vec::new();
    for point in &plan.points {
        let row = simulate(&plan, point, &cluster, source)
            .map_err(|e| e.within(&format!("{} on {} ranks", point.variant, point.ranks)))?;
        let first = rows.iter().find(|other| other.rule == row.rule);
        let (speed, ranks) = first.map_or((row.frames_per_second, row.ranks), |f| (f.frames_per_second, f.ranks));
        let speedup = row.frames_per_second / speed;
        let efficiency = speedup * ranks as f64 / row.ranks as f64;
        rows.push(Row { speedup, efficiency, ..row });
    }
    if as_json {
        return json(&serde_json::json!({ "simulated": true, "cluster": cluster, "points": rows }));
    }
    let origin =
        options.cluster.as_ref().map_or("assumed (--cluster FILE says another)".into(), |f| f.display().to_string());
    let times = match source {
        Source::Measured { .. } => "measured here".into(),
        Source::Assumed(rate) => format!("by arithmetic, at {:.1} TFLOP/s", rate / 1e12),
        Source::Given(given) => given.name.clone(),
    };
    outln!("A simulation, not a measurement. Times: {times}.");
    outln!("Cluster: {cluster}; {origin}.");
    let header = "rule\tranks\tmodules\treplicas\tB\tglobal B\ttick\tframes/s\tspeed-up\tefficiency\tbalance\tbusy\tall-reduce\tmemory";
    let line = |row: &Row| {
        format!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{:.3}\t{:.1}\t{:.2}\t{:.3}\t{:.3}\t{:.3}\t{:.3}\t{}",
            row.rule,
            row.ranks,
            row.modules,
            row.replicas,
            row.batch,
            row.global_batch,
            1e3 * row.tick,
            row.frames_per_second,
            row.speedup,
            row.efficiency,
            row.load_balance,
            row.busy,
            1e3 * row.all_reduce,
            ByteSize(row.memory),
        )
    };
    table(1, header, rows.iter().map(line));
    outln!(
        "tick, all-reduce: ms (the latter once a batch); speed-up and efficiency to the rule's first row; balance: mean over maximum of \
         the ranks' busy time; busy: the busiest rank's share of a tick; memory of the largest rank"
    );
    Ok(())
}

/// The points: ranks doubled from the first that can be, and the range's end.
fn points(config: &Config, options: &ScaleOptions, [min, max]: [usize; 2]) -> Result<Plan> {
    let axis = options.axis.unwrap_or(Axis::Weak);
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|cuts| cuts.len() + 1)).unwrap_or(1);
    // A "node" of the study is what a step of the axis adds: a rank, or a pipeline.
    let ranks = if axis == Axis::Modules { config.train.replicas } else { modules };
    let mut config = config.clone();
    if axis == Axis::Strong {
        config.data.batch *= config.train.replicas;
    }
    let batch = config.data.batch;
    let (first, last) = (min.div_ceil(ranks), max / ranks);
    let doubled = std::iter::successors(Some(first), |n| n.checked_mul(2)).take_while(|&n| n < last);
    let mut nodes: Vec<usize> = doubled.chain([last]).collect();
    let all = nodes.len();
    if axis == Axis::Modules {
        // A module has at least one block.
        let setup = Setup::dry(&Config { model: one_module(&config), ..config.clone() }, 1)?;
        let blocks = Blocks::new(&setup.network.layers, setup.network.input)?.len();
        nodes.retain(|&modules| modules <= blocks);
    }
    if axis == Axis::Strong {
        // The global batch is the configuration's, and shared.
        nodes.retain(|&replicas| batch.is_multiple_of(replicas));
    }
    if first > last || nodes.is_empty() {
        return Err(Error::input(format!(
            "--scale {min}..{max}: no number of ranks in it, doubled from the first, is one of {modules} modules x replicas along --axis \
             {axis}, for a global batch of {batch} clips"
        )));
    }
    if nodes.len() < all {
        log::warn!(
            "{} of {all} numbers of ranks are left out: {}",
            all - nodes.len(),
            match axis {
                Axis::Modules => "the network has fewer blocks".into(),
                _ => format!("a global batch of {batch} clips cannot be shared by so many replicas"),
            }
        );
    }
    if axis != Axis::Modules {
        config.train.replicas = nodes[0];
    }
    if axis == Axis::Strong {
        config.data.batch = batch / nodes[0];
    }
    let rules = options.rules.iter().map(|rule| Variant::parse(rule)).collect::<Result<_>>()?;
    let request =
        Request { axis, nodes, ranks_per_node: Some(ranks), rules, repeat: 1, batches: 1, limit: 1, cluster: None };
    Plan::new(&config, &request)
}

fn one_module(config: &Config) -> ModelConfig {
    let mut model = config.model.clone();
    (model.modules, model.cuts, model.skip) = (Some(1), None, None);
    model
}

fn simulate(plan: &Plan, point: &Point, cluster: &Cluster, source: Source) -> Result<Row> {
    let mut setup = Setup::dry(&plan.config_of(point)?, point.ranks)?;
    let profile = match source {
        Source::Given(given) => given.of(&setup)?.clone(),
        Source::Assumed(rate) => assumed(&setup, Parts::Modules, rate),
        Source::Measured { fresh } => {
            if setup.config.cut_is_open() && setup.grid.modules > 1 {
                let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
                let times = times_of(&setup, Parts::Blocks(&blocks), 1, fresh)?;
                setup = setup.recut(best_cuts(&setup, &blocks, &times)?.0)?;
            }
            times_of(&setup, Parts::Modules, 1, fresh)?
        }
    };
    let Prediction { outcome, frames_per_second, balance, .. } =
        predict(&setup, &profile, &Processors::of_ranks(point.ranks, 1), Some(cluster));
    let grid = setup.grid;
    let mut of_rank = vec![0; grid.ranks];
    // Replicas take alike.
    let needed = |w: usize| match &profile.conditions.gpu {
        Some(on) => gpu_memory(&setup, w, on.element_bytes()),
        None => memory(&setup, w),
    };
    let of_module: Vec<u64> = (1..=grid.modules).map(|i| needed(grid.worker(i, 0))).collect();
    let mut busy = vec![0.0; grid.ranks];
    for w in 0..grid.workers() {
        of_rank[grid.rank_of(w)] += of_module[grid.module_and_replica(w).0 - 1];
        busy[grid.rank_of(w)] += outcome.busy[w];
    }
    Ok(Row {
        rule: point.variant.to_string(),
        ranks: point.ranks,
        modules: grid.modules,
        replicas: grid.replicas,
        batch: point.batch,
        global_batch: point.global_batch(),
        tick: outcome.tick,
        frames_per_second,
        speedup: 1.0,
        efficiency: 1.0,
        load_balance: balance,
        busy: busy.into_iter().fold(0.0, f64::max) / outcome.tick,
        all_reduce: (1..=grid.modules).map(|i| cluster.all_reduce(&setup, i)).fold(0.0, f64::max),
        memory: of_rank.into_iter().max().unwrap_or(0),
    })
}

/// Where modules' times come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// From this machine, anew or as measured before.
    Measured {
        /// Anew.
        fresh: bool,
    },
    /// From so many operations a second.
    Assumed(f64),
    /// From a file.
    Given(&'a Given),
}

/// Modules' times that `plan --json` has printed.
#[derive(Deserialize)]
pub struct Given {
    #[serde(skip)]
    name: String,
    profile: Profile,
}

impl Given {
    fn load(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let wrong =
            |e: &dyn std::fmt::Display| Error::input(format!("--times {name}: {e}; it is what `plan --json` prints"));
        let text = read_text(path).map_err(|e| wrong(&e))?;
        let given: Given = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
        let profile = &given.profile;
        let all = profile.times.iter().flat_map(|t| [t.forward, t.backward, t.backward_leaf, t.update]);
        let possible = all.into_iter().all(|x| x >= 0.0 && x.is_finite()) && profile.copy > 0.0;
        if !possible || profile.times.len() != profile.conditions.parts.len() {
            return Err(wrong(&"its times cannot be"));
        }
        Ok(Given { name, ..given })
    }

    /// The times, where they are those of `setup`'s modules.
    fn of(&self, setup: &Setup) -> Result<&Profile> {
        let conditions = &self.profile.conditions;
        let (config, fuse) = (&setup.config, setup.network.fuse);
        let measured = (conditions.batch, conditions.optimizer, conditions.fuse);
        if conditions.parts != module_parts(setup) || measured != (config.data.batch, config.train.optimizer, fuse) {
            return Err(Error::input(format!(
                "--times {}: they are of {} modules at B = {}, and the point's modules, batch, optimizer or fuse are others: give what \
                 was measured (model.cuts, data.batch), and --axis weak",
                self.name,
                conditions.parts.len(),
                conditions.batch
            )));
        }
        Ok(&self.profile)
    }
}
