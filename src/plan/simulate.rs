//! How fast a pipeline will be: its schedule played with known times, without tensors.
//!
//! Every worker goes through its steps in order. A computation waits for its messages and for a processor; a message waits
//! for a free buffer of its link. All of that is in the schedule and the wiring, so the tick follows by going through them in
//! the order of time.

use crate::method::schedule::StepPlan;
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
    /// The update at the end of a clip.
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
    /// Seconds a tick in the steady state: a clip's time over its frames.
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
    let clips = fill + counted + fill;
    let workers: Vec<Vec<Segment>> = (0..grid.workers()).map(|w| segments(setup, w, &costs[w], clips)).collect();
    let ends = play(&workers, |w| processors.pool_of_rank[grid.rank_of(w)], &processors.slots);
    // Where the last worker is when a clip is through.
    let last = grid.workers() - 1;
    let a_clip = workers[last].len() / clips;
    let through = |clip: usize| ends[last][clip * a_clip - 1];
    let busy = workers.iter().map(|list| list.iter().map(|s| s.seconds).sum::<f64>() / (clips * frames) as f64);
    Outcome { tick: (through(fill + counted) - through(fill)) / (counted * frames) as f64, busy: busy.collect() }
}

/// Segments of a step: forward, wait for buffers, backward, wait for buffers; behind a clip's steps one for the update.
const FORWARD: usize = 0;
const BACKWARD: usize = 2;
const STEP: usize = 4;

/// Messages on a link in one clip: (sender's step, receiver's step).
fn messages(
    from: &[StepPlan],
    sends: impl Fn(&StepPlan) -> bool,
    to: &[StepPlan],
    takes: impl Fn(&StepPlan) -> Option<usize>,
) -> Vec<(usize, usize)> {
    let sent = from.iter().enumerate().filter(|(_, s)| sends(s)).map(|(t, _)| t);
    sent.filter_map(|t| Some((t, to.iter().position(|s| takes(s) == Some(t))?))).collect()
}

fn segments(setup: &Setup, w: usize, cost: &StepCost, clips: usize) -> Vec<Segment> {
    let (grid, schedule, network) = (setup.grid, &setup.schedule, &setup.network);
    let (i, r) = grid.module_and_replica(w);
    let length = |m: usize| schedule.steps(m).len() * STEP + 1;
    let at = |m: usize, clip: usize, t: usize, part: usize, at_end: bool| Need {
        worker: grid.worker(m, r),
        segment: clip * length(m) + t * STEP + part,
        at_end,
    };
    // What an edge sends and when it is taken, of the edges that begin or end here.
    let activations = |e: &crate::network::EdgeSpec| {
        let (from, to) = (e.edge.from, e.edge.to);
        let (out, into) = (place(&network.outputs(from), e), place(&network.inputs(to), e));
        messages(schedule.steps(from), |s| s.send[out], schedule.steps(to), |s| s.receive[into])
    };
    let cotangents = |e: &crate::network::EdgeSpec| {
        let (from, to) = (e.edge.from, e.edge.to);
        let (out, into) = (place(&network.outputs(from), e), place(&network.inputs(to), e));
        messages(schedule.steps(to), |s| s.wanted[into], schedule.steps(from), |s| s.cotangent[out])
    };
    let steps = schedule.steps(i);
    let mut list: Vec<Segment> = Vec::with_capacity(clips * length(i));
    for clip in 0..clips {
        for step in steps {
            let backward = match (step.backward, step.wanted.iter().any(|&w| w)) {
                (false, _) => 0.0,
                (true, true) => cost.backward,
                (true, false) => cost.backward_leaf,
            };
            let parts = [cost.forward, 0.0, backward, 0.0].into_iter().enumerate();
            list.extend(parts.map(|(n, seconds)| Segment { seconds, needs: Vec::new(), goes_on: n == BACKWARD }));
        }
        // Replicas update together.
        let last = steps.len() - 1;
        let others = (0..grid.replicas).filter(|&other| other != r).map(|other| Need {
            worker: grid.worker(i, other),
            segment: clip * length(i) + last * STEP + STEP - 1,
            at_end: true,
        });
        list.push(Segment { seconds: cost.update, needs: others.collect(), goes_on: false });
    }
    // `mine`: the segment that takes; `theirs`: the one that made; a sender waits for the message `depth` before its own.
    let mut link = |pairs: &[(usize, usize)], sender: bool, other: usize, parts: [usize; 2], depth: usize| {
        for clip in 0..clips {
            for (k, &(sent, taken)) in pairs.iter().enumerate() {
                if !sender {
                    let need = at(other, clip, sent, parts[0], true);
                    list[clip * length(i) + taken * STEP + parts[1]].needs.push(need);
                } else if let Some(before) = (clip * pairs.len() + k).checked_sub(depth) {
                    let (of, k) = (before / pairs.len(), before % pairs.len());
                    let need = at(other, of, pairs[k].1, parts[1], false);
                    list[clip * length(i) + sent * STEP + parts[0] + 1].needs.push(need);
                }
            }
        }
    };
    for e in &network.edges {
        let (from, to) = (e.edge.from, e.edge.to);
        if from == i {
            link(&activations(e), true, to, [FORWARD, FORWARD], e.edge.delay + 1);
            link(&cotangents(e), false, to, [BACKWARD, BACKWARD], 2);
        }
        if to == i {
            link(&activations(e), false, from, [FORWARD, FORWARD], e.edge.delay + 1);
            link(&cotangents(e), true, from, [BACKWARD, BACKWARD], 2);
        }
    }
    list
}

fn place(edges: &[&crate::network::EdgeSpec], of: &crate::network::EdgeSpec) -> usize {
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
