//! From measured times to cuts, and to what a cut will reach.

use super::cluster::Cluster;
use super::gpu;
use super::profile::{Conditions, Part, Profile, Times};
use super::simulate::{Outcome, Processors, StepCost, simulate};
use crate::network::blocks::Blocks;
use crate::network::partition::{Partition, Piece, pieces};
use crate::nn::module::Fuse;
use crate::nn::spec::Shape;
use crate::setup::Setup;
use crate::{Error, Result};

/// Cuts whose costliest module is this much slower than the best one's count as equal; the one that costs least in all is
/// taken. Measured times are no more certain than that.
const SLACK: f64 = 0.005;

/// Bytes of a batch of `shape`.
fn bytes(setup: &Setup, shape: Shape) -> f64 {
    (4 * setup.config.data.batch * shape.iter().product::<usize>()) as f64
}

/// What of a network is timed.
#[derive(Clone, Copy, Debug)]
pub enum Parts<'a> {
    /// Its blocks, as if they were all in one module.
    Blocks(&'a Blocks),
    /// Its modules, which send one another messages.
    Modules,
}

/// The conditions under which parts of `setup`'s network work, `busy` of them at a time; on a GPU, one.
///
/// # Errors
/// [`crate::Error::Input`] if a GPU is asked for and there is none.
pub fn conditions(setup: &Setup, busy: usize, parts: Parts) -> Result<Conditions> {
    let config = &setup.config;
    let here =
        Conditions::here(config.run.threads, busy, config.data.batch, setup.network.fuse, config.train.optimizer);
    let gpu = gpu::chosen(config)?;
    let here = if gpu.is_some() { Conditions { busy: 1, threads: 1, gpu, ..here } } else { here };
    Ok(match parts {
        Parts::Blocks(blocks) => here.with(block_parts(setup, blocks)),
        Parts::Modules => Conditions { messages: setup.grid.modules > 1, ..here.with(module_parts(setup)) },
    })
}

/// The network's blocks as parts to be timed.
pub fn block_parts(setup: &Setup, blocks: &Blocks) -> Vec<Part> {
    let layers = &setup.network.layers;
    let part = |b: usize| Part {
        layers: blocks.layers(b, b + 1).map(|n| (n, layers[n].clone())).collect(),
        main: blocks.shape(b),
        skips: Vec::new(),
    };
    (0..blocks.len()).map(part).collect()
}

/// The modules as they are cut, as parts to be timed.
pub fn module_parts(setup: &Setup) -> Vec<Part> {
    let network = &setup.network;
    let part = |i: usize| {
        let module = &network.modules[i - 1];
        Part { layers: network.layers_of(i), main: module.main, skips: module.skips.iter().map(|s| s.shape).collect() }
    };
    (1..=network.modules.len()).map(part).collect()
}

/// Operations a second that skips' adapters, and layers that concatenation widens, are taken to reach: as the network's own
/// blocks do forward.
fn usual_rate(profile: &Profile) -> f64 {
    let all = profile.conditions.parts.iter().map(Part::flops).sum::<u64>() as f64 * profile.conditions.batch as f64;
    let seconds: f64 = profile.times.iter().map(|t| t.forward).sum();
    (all / seconds.max(1e-9)).max(1.0)
}

/// Times of a module that is `piece` of the network and gets `skips`, by those of its blocks.
fn times_of_piece(
    setup: &Setup,
    blocks: &Blocks,
    profile: &Profile,
    rate: f64,
    piece: &Piece,
    skips: &[Shape],
) -> Times {
    let mut times = Times::default();
    for t in &profile.times[piece.start..piece.end] {
        times.forward += t.forward;
        times.backward += t.backward;
        times.update += t.update;
    }
    // Without an input's cotangent the first block saves its share of it.
    let first = &profile.times[piece.start];
    times.backward_leaf = times.backward - first.backward + first.backward_leaf;
    let main = blocks.shape(piece.start);
    for skip in skips {
        // Joining: an addition or a copy, another where it is spread before, and a product where channels differ.
        let passes = if skip[..2] == main[..2] { 1.0 } else { 2.0 };
        let moved = passes * bytes(setup, [main[0], main[1], skip[2].max(main[2])]) / profile.copy;
        let flops = match setup.network.fuse {
            Fuse::Sum if skip[2] != main[2] => 2 * (skip[0] * skip[1] * main[2] * skip[2]) as u64,
            Fuse::Sum => 0,
            Fuse::Concat => {
                let first = &setup.network.layers[blocks.layers(piece.start, piece.end).start];
                let wide = [main[0], main[1], main[2] + skip[2]];
                first.flops(wide).saturating_sub(first.flops(main))
            }
        };
        let product = setup.config.data.batch as f64 * flops as f64 / rate;
        times.forward += moved + product;
        times.backward += moved + 2.0 * product;
        times.backward_leaf += product;
    }
    times
}

/// The modules' times as sums of the blocks' in `profile`, for `setup` cut before the blocks `cuts`: nearly what modules would be
/// measured to take, and nothing is measured.
///
/// # Errors
/// [`crate::Error::Input`] where skips do not fit, or as [`conditions`].
pub fn sums_of_blocks(setup: &Setup, blocks: &Blocks, profile: &Profile, cuts: &[usize]) -> Result<Profile> {
    let rate = usual_rate(profile);
    let of_piece =
        |piece: Piece| Some(times_of_piece(setup, blocks, profile, rate, &piece, &blocks.skip_shapes(&piece)?));
    let pieces = pieces(cuts, blocks.len(), &setup.network.graph);
    let times = pieces.into_iter().map(of_piece).collect::<Option<Vec<_>>>();
    let times = times.ok_or_else(|| Error::input("a skip fits nowhere in this cut"))?;
    Ok(Profile { conditions: conditions(setup, profile.conditions.busy, Parts::Modules)?, times, ..profile.clone() })
}

/// Cuts `setup`'s network anew into as many modules as it has, by the measured times of its blocks.
///
/// # Errors
/// [`crate::Error::Input`] if skips fit nowhere.
pub fn best_cuts(setup: &Setup, blocks: &Blocks, profile: &Profile) -> Result<(Vec<usize>, Partition)> {
    let graph = &setup.network.graph;
    let rate = usual_rate(profile);
    let shares: Vec<Shares> = (1..=graph.modules()).map(|i| Shares::of(setup, i)).collect();
    let mut cost = |piece: &Piece| -> Option<f64> {
        let skips = blocks.skip_shapes(piece)?;
        let times = times_of_piece(setup, blocks, profile, rate, piece, &skips);
        let inputs: Vec<Shape> = std::iter::once(blocks.shape(piece.start)).chain(skips).collect();
        let output = blocks.shape(piece.end);
        // How far a skip will be averaged down is not known yet: its size before that counts.
        let outputs = vec![(output, false); graph.outputs(piece.module).count()];
        let traffic = Traffic { inputs, outputs, y: output, cross: setup.grid.ranks > 1 };
        let step = step_cost(setup, profile, piece.module, &times, &traffic);
        let share = &shares[piece.module - 1];
        Some(
            step.forward
                + share.backward * step.backward
                + share.leaf * step.backward_leaf
                + step.update / setup.schedule.frames() as f64,
        )
    };
    blocks.cut(graph, SLACK, &mut cost)
}

/// At which share of a module's steps there is backward work.
struct Shares {
    /// With a cotangent to send.
    backward: f64,
    /// Without.
    leaf: f64,
}

impl Shares {
    fn of(setup: &Setup, i: usize) -> Self {
        let steps = setup.schedule.steps(i) as f64;
        let with = setup.schedule.backwards(i).filter(|backward| backward.send.contains(&true)).count();
        let all = setup.schedule.backwards(i).count();
        Shares { backward: with as f64 / steps, leaf: (all - with) as f64 / steps }
    }
}

/// What comes to a module and goes from it at a step.
struct Traffic {
    /// Its inputs as sent.
    inputs: Vec<Shape>,
    /// Each edge's shape as sent, and whether `y` is averaged down to it.
    outputs: Vec<(Shape, bool)>,
    /// Its output.
    y: Shape,
    /// Whether messages go to other ranks.
    cross: bool,
}

/// A step's cost: computing, and moving what comes and goes.
fn step_cost(setup: &Setup, profile: &Profile, module: usize, times: &Times, traffic: &Traffic) -> StepCost {
    let Traffic { inputs, outputs, y, cross } = traffic;
    let &Times { forward, backward, backward_leaf, update } = times;
    // On a GPU messages are copied beside the passes, in streams of their own.
    if profile.conditions.gpu.is_some() {
        return StepCost { forward, backward, backward_leaf, update };
    }
    let copy = profile.copy;
    let seconds = |shape: Shape| bytes(setup, shape) / copy;
    // A message is copied into its buffer and out of it; between ranks once more on its way.
    let taken = if *cross { 2.0 } else { 1.0 };
    let messages: f64 = inputs.iter().map(|&shape| seconds(shape)).sum();
    // Module 1 has frames, and sends no cotangent.
    let (arrive, leave) = match module {
        1 => (FRAME * seconds(setup.network.input), 0.0),
        _ => (taken * messages, messages),
    };
    let outward: f64 = outputs.iter().map(|&(shape, _)| seconds(shape)).sum();
    let pooled: f64 = outputs.iter().filter(|(_, pooled)| *pooled).map(|_| seconds(*y)).sum();
    let sums = outputs.len().saturating_sub(1) as f64 * 1.5 * seconds(*y);
    let come = taken * outward + pooled + sums;
    StepCost {
        forward: forward + arrive + outward + pooled,
        backward: backward + come + leave,
        backward_leaf: backward_leaf + come,
        update,
    }
}

/// Scaling a frame from bytes, in copies of it.
const FRAME: f64 = 2.5;

/// What each worker's steps cost, from its module's measured times.
pub fn step_costs(setup: &Setup, profile: &Profile) -> Vec<StepCost> {
    let (grid, network) = (setup.grid, &setup.network);
    let cost = |w: usize| {
        let (i, r) = grid.module_and_replica(w);
        let inputs: Vec<Shape> = network.inputs(i).iter().map(|e| e.shape).collect();
        let outputs: Vec<(Shape, bool)> = network.outputs(i).iter().map(|e| (e.shape, e.pooled)).collect();
        let neighbour = |m: usize| grid.rank_of(grid.worker(m, r));
        let here = grid.rank_of(w);
        let cross = network.edges.iter().any(|e| {
            (e.edge.from == i && neighbour(e.edge.to) != here) || (e.edge.to == i && neighbour(e.edge.from) != here)
        });
        let y = network.modules[i - 1].output;
        let times = &profile.times[i - 1];
        // Module 1 never computes its input's cotangent.
        let times = if i == 1 { &Times { backward: times.backward_leaf, ..*times } } else { times };
        step_cost(setup, profile, i, times, &Traffic { inputs, outputs, y, cross })
    };
    (0..grid.workers()).map(cost).collect()
}

/// What a pipeline will reach.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// Each worker's step.
    pub costs: Vec<StepCost>,
    /// Tick and busy time.
    pub outcome: Outcome,
    /// Frames a second, all replicas together.
    pub frames_per_second: f64,
    /// Mean over maximum of the ranks' busy time: how well the cut balances them.
    pub balance: f64,
}

/// Predicts `setup`'s tick from the measured times of its modules.
pub fn predict(setup: &Setup, profile: &Profile, processors: &Processors, cluster: Option<&Cluster>) -> Prediction {
    let costs = step_costs(setup, profile);
    let outcome = simulate(setup, &costs, processors, cluster);
    let grid = setup.grid;
    let mut busy = vec![0.0; grid.ranks];
    outcome.busy.iter().enumerate().for_each(|(w, seconds)| busy[grid.rank_of(w)] += seconds);
    let largest = busy.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    Prediction {
        frames_per_second: (grid.replicas * setup.config.data.batch) as f64 / outcome.tick,
        balance: busy.iter().sum::<f64>() / busy.len() as f64 / largest,
        costs,
        outcome,
    }
}
