//! How fast a pipeline will be: its schedule played with known times, without tensors.
//!
//! Every worker goes through its steps in order. A computation waits for its messages and for a processor; a message waits
//! for a free buffer of its link. All of that is in the schedule and the wiring, so the tick follows by going through them in
//! the order of time.

use crate::method::schedule::Tick;
use crate::network::EdgeSpec;
use crate::setup::Setup;

/// What one worker's step costs, in seconds of a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// Taking inputs, the forward pass, handing outputs over.
    pub forward: f64,
    /// Taking cotangents, the vector–Jacobian product, handing cotangents over.
    pub backward: f64,
    /// The same where no input's cotangent is wanted.
    pub backward_leaf: f64,
    /// The update at the end of a batch.
    pub update: f64,
}

/// Where workers compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processors {
    /// The pool of each rank.
    pub pool_of_rank: Vec<usize>,
    /// How many workers of each pool can compute at once.
    pub slots: Vec<usize>,
}

impl Processors {
    /// Every rank has processors of its own, on which `slots` of its workers compute at once.
    pub fn of_ranks(ranks: usize, slots: usize) -> Self {
        Processors { pool_of_rank: (0..ranks).collect(), slots: vec![slots.max(1); ranks] }
    }
}

/// What a simulated pipeline does.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Seconds a tick in the steady state: a batch's time over its frames.
    pub tick: f64,
    /// Seconds of computing a tick, by worker.
    pub busy: Vec<f64>,
}

/// A moment of another worker that must come first: its segment's begin or end.
struct Need {
    worker: usize,
    segment: usize,
    at_end: bool,
}

/// What a worker does next: with `seconds` on a processor, or a wait.
struct Segment {
    seconds: f64,
    needs: Vec<Need>,
    /// It keeps its processor where it need not wait for anything: a backward pass behind its forward pass.
    goes_on: bool,
}

/// Plays `setup`'s schedule with `costs` (one a worker) until it is steady.
pub fn simulate(setup: &Setup, costs: &[StepCost], processors: &Processors) -> Outcome {
    let (grid, frames) = (setup.grid, setup.schedule.frames());
    let fill = grid.modules.div_ceil(frames) + 1;
    let counted = 2;
    let batches = fill + counted + fill;
    let workers: Vec<Vec<Segment>> = (0..grid.workers()).map(|w| segments(setup, w, &costs[w], batches)).collect();
    let ends = play(&workers, |w| processors.pool_of_rank[grid.rank_of(w)], &processors.slots);
    // Where the last worker is when a batch is through.
    let last = grid.workers() - 1;
    let a_batch = workers[last].len() / batches;
    let through = |batch: usize| ends[last][batch * a_batch - 1];
    let busy = workers.iter().map(|list| list.iter().map(|s| s.seconds).sum::<f64>() / (batches * frames) as f64);
    Outcome { tick: (through(fill + counted) - through(fill)) / (counted * frames) as f64, busy: busy.collect() }
}

/// Segments of a tick: forward, wait for buffers, backward, wait for buffers; behind a batch's ticks one for the update.
const FORWARD: usize = 0;
const BACKWARD: usize = 2;
const TICK: usize = 4;

/// Messages on a link in one batch, in order, as places in the windows of those who exchange them: (sender's tick, receiver's).
type Messages = Vec<(usize, usize)>;

/// Activations along an edge.
fn activations(setup: &Setup, e: &EdgeSpec) -> Messages {
    let (out, into) = (place(&setup.network.outputs(e.edge.from), e), place(&setup.network.inputs(e.edge.to), e));
    let (from, to) = (setup.schedule.window(e.edge.from), setup.schedule.window(e.edge.to));
    let sent = from.iter().enumerate().filter_map(|(n, tick)| Some((n, tick.forward.as_ref()?)));
    let taken = |step: usize| {
        let takes = |tick: &Tick| tick.forward.as_ref().is_some_and(|f| f.receive[into] == Some(step));
        to.iter().position(takes)
    };
    sent.filter(|(_, forward)| forward.send[out]).filter_map(|(n, forward)| Some((n, taken(forward.step)?))).collect()
}

/// Cotangents back along an edge.
fn cotangents(setup: &Setup, e: &EdgeSpec) -> Messages {
    let (out, into) = (place(&setup.network.outputs(e.edge.from), e), place(&setup.network.inputs(e.edge.to), e));
    let (from, to) = (setup.schedule.window(e.edge.to), setup.schedule.window(e.edge.from));
    let sent = from.iter().enumerate().filter_map(|(n, tick)| Some((n, tick.backward.as_ref()?)));
    let taken = |step: usize| {
        let takes = |tick: &Tick| tick.cotangents.iter().any(|c| c.output == out && c.sent_at == step);
        to.iter().position(takes)
    };
    sent.filter(|(_, backward)| backward.send[into])
        .filter_map(|(n, backward)| Some((n, taken(backward.step)?)))
        .collect()
}

fn segments(setup: &Setup, w: usize, cost: &StepCost, batches: usize) -> Vec<Segment> {
    let (grid, schedule, network) = (setup.grid, &setup.schedule, &setup.network);
    let (i, r) = grid.module_and_replica(w);
    let length = |m: usize| schedule.window(m).len() * TICK + 1;
    let at = |m: usize, batch: usize, tick: usize, part: usize, at_end: bool| Need {
        worker: grid.worker(m, r),
        segment: batch * length(m) + tick * TICK + part,
        at_end,
    };
    let window = schedule.window(i);
    let mut list: Vec<Segment> = Vec::with_capacity(batches * length(i));
    for batch in 0..batches {
        for tick in window {
            let forward = if tick.forward.is_some() { cost.forward } else { 0.0 };
            let again = if schedule.recomputes(i) { cost.forward } else { 0.0 };
            let backward = match &tick.backward {
                None => 0.0,
                Some(backward) if backward.send.contains(&true) => again + cost.backward,
                Some(_) => again + cost.backward_leaf,
            };
            let parts = [forward, 0.0, backward, 0.0].into_iter().enumerate();
            list.extend(parts.map(|(n, seconds)| Segment { seconds, needs: Vec::new(), goes_on: n == BACKWARD }));
        }
        // Replicas update together.
        let last = window.len() - 1;
        let others = (0..grid.replicas).filter(|&other| other != r).map(|other| Need {
            worker: grid.worker(i, other),
            segment: batch * length(i) + last * TICK + TICK - 1,
            at_end: true,
        });
        list.push(Segment { seconds: cost.update, needs: others.collect(), goes_on: false });
    }
    // `part`: the segment of a tick that makes or takes a message; a sender waits for the message `depth` before its own.
    let mut link = |pairs: &Messages, sender: bool, other: usize, part: usize, depth: usize| {
        for batch in 0..batches {
            for (k, &(sent, taken)) in pairs.iter().enumerate() {
                if !sender {
                    let need = at(other, batch, sent, part, true);
                    list[batch * length(i) + taken * TICK + part].needs.push(need);
                } else if let Some(before) = (batch * pairs.len() + k).checked_sub(depth) {
                    let (of, k) = (before / pairs.len(), before % pairs.len());
                    let need = at(other, of, pairs[k].1, part, false);
                    list[batch * length(i) + sent * TICK + part + 1].needs.push(need);
                }
            }
        }
    };
    for e in &network.edges {
        let (from, to) = (e.edge.from, e.edge.to);
        if from == i {
            link(&activations(setup, e), true, to, FORWARD, e.edge.delay + 1);
            link(&cotangents(setup, e), false, to, BACKWARD, 2);
        }
        if to == i {
            link(&activations(setup, e), false, from, FORWARD, e.edge.delay + 1);
            link(&cotangents(setup, e), true, from, BACKWARD, 2);
        }
    }
    list
}

fn place(edges: &[&EdgeSpec], of: &EdgeSpec) -> usize {
    edges.iter().position(|e| e.edge == of.edge).unwrap_or(0)
}

/// Goes through all segments in the order of time; returns when each ends. Those that are ready first get a processor first, but
/// for those that go on.
fn play(workers: &[Vec<Segment>], pool_of: impl Fn(usize) -> usize, slots: &[usize]) -> Vec<Vec<f64>> {
    let mut begins: Vec<Vec<f64>> = workers.iter().map(|list| Vec::with_capacity(list.len())).collect();
    let mut ends = begins.clone();
    // When each processor of each pool is free.
    let mut free: Vec<Vec<f64>> = slots.iter().map(|&n| vec![0.0; n]).collect();
    loop {
        // Waits that are over take no processor, and may end others.
        let mut waits_ended = true;
        while waits_ended {
            waits_ended = false;
            for (w, list) in workers.iter().enumerate() {
                while let Some(segment) = list.get(ends[w].len()).filter(|s| s.seconds == 0.0)
                    && let Some(ready) = ready(segment, w, &begins, &ends)
                {
                    begins[w].push(ready);
                    ends[w].push(ready);
                    waits_ended = true;
                }
            }
        }
        let computes = workers.iter().enumerate().filter_map(|(w, list)| {
            let segment = list.get(ends[w].len())?;
            let mut ready = ready(segment, w, &begins, &ends)?;
            let processor = free[pool_of(w)].iter().copied().fold(f64::INFINITY, f64::min);
            let begin = ready.max(processor);
            if segment.goes_on && ends[w].last() == Some(&ready) {
                ready = 0.0;
            }
            Some((begin, ready, w))
        });
        let first = computes.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        // Only used messages are sent, so nobody waits for ever: without a next one all are through.
        let Some((begin, _, w)) = first else { return ends };
        let end = begin + workers[w][ends[w].len()].seconds;
        if let Some(processor) = free[pool_of(w)].iter_mut().min_by(|a, b| a.total_cmp(b)) {
            *processor = end;
        }
        begins[w].push(begin);
        ends[w].push(end);
    }
}

/// When a worker's next segment could begin; `None` while one that must come first has not been placed.
fn ready(segment: &Segment, worker: usize, begins: &[Vec<f64>], ends: &[Vec<f64>]) -> Option<f64> {
    let own = ends[worker].last().copied().unwrap_or(0.0);
    segment.needs.iter().try_fold(own, |latest, need| {
        let times = if need.at_end { ends } else { begins };
        Some(latest.max(*times[need.worker].get(need.segment)?))
    })
}
