//! What a point will reach, before it runs; and where its network is cut.
//!
//! [`forecast`] is the one function that predicts a point. It plays the schedule with layers' times measured on this machine, and with
//! messages and the all-reduce as the study's cluster has them, or free where it has none.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::fill::share_of_fill;
use super::plan::{Plan, Point, Request};
use super::variant::Variant;
use crate::Result;
use crate::config::Config;
use crate::network::blocks::Blocks;
use crate::plan::cut::{conditions_of, times_of};
use crate::plan::predict::{Parts, Prediction, best_cuts, predict, sums_of_blocks};
use crate::plan::profile::Profile;
use crate::plan::simulate::{Processors, simulate};
use crate::setup::Setup;
use crate::setup::footprint::{gpu_memory, memory};
use crate::sys::cpus::{at_once, parallelism};

/// Where ranks run, as far as prediction needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// All on this machine, whatever the number of nodes: each with its [`share`] of the processors, or, where there are
    /// too few, all on all of them.
    One,
    /// On nodes like this one, so many ranks on each, each with processors of its own.
    Nodes {
        /// Ranks a node.
        ranks: usize,
    },
}

/// Processors that each of so many ranks has to itself on one machine; `None` where there are more ranks than processors.
pub fn share(ranks: usize) -> Option<usize> {
    Some(parallelism() / ranks.max(1)).filter(|&share| share > 0)
}

/// What is predicted of a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Seconds a tick.
    pub tick: f64,
    /// Frames a second, all replicas together.
    pub frames_per_second: f64,
    /// Bytes that the largest rank takes, without the program itself.
    pub memory: u64,
    /// The share of fill in the schedule.
    pub fill: f64,
    /// Seconds of a run: its start, the batches before those that count, these, and those after.
    pub seconds: f64,
    /// The processor, or GPU, whose times it is made of.
    pub processor: String,
}

/// Seconds that the start and the end of ranks are taken to last.
const START: f64 = 5.0;

/// Plans a point of `plan` on `machine`: its configuration with the cut that it will have, and what it will reach. Layers that were
/// not measured before are.
///
/// # Errors
/// [`crate::Error::Input`] for whatever in the point cannot work.
pub fn prepare(plan: &Plan, point: &Point, machine: Machine) -> Result<(Config, Forecast)> {
    let prepare = || {
        let setup = cut(Setup::dry(&plan.config_of(point)?, point.ranks)?, machine)?;
        let forecast = forecast(&setup, machine, &plan.request)?;
        let mut config = setup.config.clone();
        (config.model.modules, config.model.cuts) = (None, Some(setup.cuts()));
        Ok((config, forecast))
    };
    prepare().map_err(|e: crate::Error| e.within(&point.name))
}

/// What points past a study's last would reach, without those that cannot be. Where a point is cut anew, modules that have not been
/// measured are not measured for it: each is taken to be as much slower than its blocks together as the modules of the rule's last
/// point are.
pub fn beyond(plan: &Plan, points: Vec<Point>, machine: Machine) -> Vec<(Point, Forecast)> {
    let mut slower = HashMap::new();
    let known = points.into_iter().filter_map(|point| {
        // How far the network can be cut is found out by trying.
        let forecast = past_the_last(plan, &point, machine, &mut slower);
        let forecast = forecast.inspect_err(|e| log::debug!("{} is not predicted: {e}", point.name)).ok()?;
        Some((point, forecast))
    });
    known.collect()
}

/// The same of one point; `slower` holds [`modules_over_blocks`] of each rule that was asked for.
fn past_the_last(plan: &Plan, point: &Point, machine: Machine, slower: &mut HashMap<String, f64>) -> Result<Forecast> {
    let setup = Setup::dry(&plan.config_of(point)?, point.ranks)?;
    if !is_open(&setup) {
        return forecast(&setup, machine, &plan.request);
    }
    let (setup, sums) = by_blocks(setup, machine)?;
    let measured = Profile::cached(&conditions_of(&setup, Parts::Modules, at_work(&setup, machine))?);
    let profile = match measured {
        Some(measured) => measured,
        None => {
            let rule = point.variant.to_string();
            let by = match slower.get(&rule) {
                Some(&by) => by,
                None => *slower.entry(rule).or_insert(modules_over_blocks(plan, point.variant, machine)?),
            };
            sums.with_passes(by)
        }
    };
    Ok(with_times(&setup, machine, &plan.request, profile))
}

/// How much longer the modules of a rule's last point take than their blocks together; 1 where that is one module.
fn modules_over_blocks(plan: &Plan, variant: Variant, machine: Machine) -> Result<f64> {
    let last = plan.points.iter().filter(|point| point.variant == variant).max_by_key(|point| point.nodes);
    let last = last.map(|last| Setup::dry(&plan.config_of(last)?, last.ranks)).transpose()?;
    let Some(last) = last.filter(is_open) else { return Ok(1.0) };
    let (last, sums) = by_blocks(last, machine)?;
    let measured = times_of(&last, Parts::Modules, at_work(&last, machine), false)?;
    Ok(measured.passes() / sums.passes().max(f64::MIN_POSITIVE))
}

/// Cut as training would, and the modules' times as sums of the blocks'.
fn by_blocks(setup: Setup, machine: Machine) -> Result<(Setup, Profile)> {
    let (blocks, times) = blocks_of(&setup, machine)?;
    let (cuts, found) = best_cuts(&setup, &blocks, &times)?;
    let setup = setup.recut(cuts)?;
    let profile = sums_of_blocks(&setup, &blocks, &times, &found.cuts)?;
    Ok((setup, profile))
}

/// Checks that a point can be, without measuring anything.
///
/// # Errors
/// As [`prepare`].
pub fn check(plan: &Plan, point: &Point) -> Result<()> {
    let setup = plan.config_of(point).and_then(|config| Setup::dry(&config, point.ranks));
    setup.map(|_| ()).map_err(|e| e.within(&point.name))
}

/// Cuts a network that is left open as training would.
fn cut(setup: Setup, machine: Machine) -> Result<Setup> {
    if !is_open(&setup) {
        return Ok(setup);
    }
    let (blocks, times) = blocks_of(&setup, machine)?;
    setup.recut(best_cuts(&setup, &blocks, &times)?.0)
}

/// Whether it is to be found out where the network is cut.
fn is_open(setup: &Setup) -> bool {
    setup.config.cut_is_open() && setup.grid.modules > 1
}

/// The blocks that a network can be cut between, and their times.
fn blocks_of(setup: &Setup, machine: Machine) -> Result<(Blocks, Profile)> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let times = times_of(setup, Parts::Blocks(&blocks), at_work(setup, machine), false)?;
    Ok((blocks, times))
}

/// Modules that compute at a time on one machine.
fn at_work(setup: &Setup, machine: Machine) -> usize {
    let ranks = match machine {
        Machine::One => setup.grid.ranks,
        Machine::Nodes { ranks } => ranks,
    };
    setup.grid.workers().min(ranks * setup.grid.workers().div_ceil(setup.grid.ranks))
}

/// What `setup` will reach on `machine`, in runs as `request` has them.
///
/// # Errors
/// [`crate::Error::Input`] if layers cannot be measured.
pub fn forecast(setup: &Setup, machine: Machine, request: &Request) -> Result<Forecast> {
    let profile = times_of(setup, Parts::Modules, at_work(setup, machine), false)?;
    Ok(with_times(setup, machine, request, profile))
}

/// Layers' times, measured again while a study runs: a machine may be slower then than it was before.
#[derive(Default)]
pub struct Again(Vec<Profile>);

impl Again {
    /// Seconds a tick of a point of `plan` that has been prepared as `config`, by times measured now, or for another point since this
    /// was made.
    ///
    /// # Errors
    /// As [`forecast`].
    pub fn tick(&mut self, plan: &Plan, point: &Point, config: &Config, machine: Machine) -> Result<f64> {
        let setup = Setup::dry(config, point.ranks)?;
        let wanted = conditions_of(&setup, Parts::Modules, at_work(&setup, machine))?;
        let profile = match self.0.iter().find(|known| known.conditions == wanted) {
            Some(known) => known.clone(),
            None => {
                self.0.push(Profile::get(wanted, true)?);
                self.0[self.0.len() - 1].clone()
            }
        };
        Ok(with_times(&setup, machine, &plan.request, profile).tick)
    }
}

/// Seconds a tick that the schedule takes where every rank computes `busy` milliseconds of a tick, as it did in a run of a point that
/// has been prepared as `config`: the simulator by itself, whatever the machine's speed was. `None` where ranks share processors, as
/// others' work is in these times then, or no layers' times are kept that say how a rank's are shared out among its steps.
///
/// # Errors
/// As [`forecast`].
pub fn schedule_alone(
    plan: &Plan,
    point: &Point,
    config: &Config,
    machine: Machine,
    busy: &[f64],
) -> Result<Option<f64>> {
    let setup = Setup::dry(config, point.ranks)?;
    let conditions = conditions_of(&setup, Parts::Modules, at_work(&setup, machine))?;
    let processors = processors(&setup, machine, conditions.gpu.is_some());
    let grid = setup.grid;
    if processors.slots.len() < grid.ranks || busy.len() != grid.ranks {
        return Ok(None);
    }
    let Some(profile) = Profile::cached(&conditions) else { return Ok(None) };
    let cluster = plan.request.cluster.as_ref();
    let Prediction { mut costs, outcome, .. } = predict(&setup, &profile, &processors, cluster);
    let mut predicted = vec![0.0; grid.ranks];
    for (w, seconds) in outcome.busy.iter().enumerate() {
        predicted[grid.rank_of(w)] += seconds;
    }
    for (w, cost) in costs.iter_mut().enumerate() {
        let rank = grid.rank_of(w);
        *cost = cost.scaled(1e-3 * busy[rank] / predicted[rank].max(f64::MIN_POSITIVE));
    }
    Ok(Some(simulate(&setup, &costs, &processors, cluster).tick))
}

fn processors(setup: &Setup, machine: Machine, on_gpu: bool) -> Processors {
    let (ranks, threads) = (setup.grid.ranks, setup.config.run.threads);
    match machine {
        _ if on_gpu => Processors::of_ranks(ranks, 1),
        Machine::One => match share(ranks) {
            Some(share) => Processors::of_ranks(ranks, share / threads.max(1)),
            None => Processors { pool_of_rank: vec![0; ranks], slots: vec![at_once(threads)] },
        },
        Machine::Nodes { .. } => Processors::of_ranks(ranks, 1),
    }
}

fn with_times(setup: &Setup, machine: Machine, request: &Request, profile: Profile) -> Forecast {
    let (grid, config) = (setup.grid, &setup.config);
    let processors = processors(setup, machine, profile.conditions.gpu.is_some());
    let prediction = predict(setup, &profile, &processors, request.cluster.as_ref());
    let mut of_rank = vec![0; grid.ranks];
    for w in 0..grid.workers() {
        of_rank[grid.rank_of(w)] += match &profile.conditions.gpu {
            Some(on) => gpu_memory(setup, w, on.element_bytes()),
            None => memory(setup, w),
        };
    }
    let tick = prediction.outcome.tick;
    let fill = grid.modules.div_ceil(config.data.frames) as u64;
    let all = (request.batches + 2 * fill + 1) * config.data.frames as u64;
    Forecast {
        tick,
        frames_per_second: prediction.frames_per_second,
        memory: of_rank.into_iter().max().unwrap_or(0),
        fill: share_of_fill(setup),
        seconds: START + tick * all as f64,
        processor: profile.conditions.gpu.map_or(profile.conditions.cpu, |on| on.name),
    }
}
