//! How fast a pipeline will be: its schedule played with known times, without tensors.
//!
//! Every worker goes through its steps in order. A computation waits for its messages and for a processor; a message waits
//! for a free buffer of its link. All of that is in the schedule and the wiring, so the tick follows by going through them in
//! the order of time.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, LogNormal};

use super::cluster::Cluster;
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

impl StepCost {
    /// The same, so many times as much.
    pub fn scaled(self, by: f64) -> Self {
        let StepCost { forward, backward, backward_leaf, update } = self;
        StepCost {
            forward: by * forward,
            backward: by * backward,
            backward_leaf: by * backward_leaf,
            update: by * update,
        }
    }
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

/// A moment of other workers that must come first.
struct Need {
    /// Of which module: the same replica's, or all other replicas'.
    module: usize,
    replicas: Replicas,
    /// A segment's begin or end.
    segment: usize,
    at_end: bool,
    /// What comes with it: it is there so much later as the link needs.
    bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Replicas {
    Same,
    Others,
}

/// What a module does next.
struct Segment {
    seconds: Seconds,
    needs: Vec<Need>,
    /// It keeps its processor where it need not wait for anything: a backward pass behind its forward pass.
    goes_on: bool,
}

/// What a segment takes a processor for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seconds {
    /// Nothing: a wait.
    None,
    Forward,
    /// With an input's cotangent to make or without, and after the forward pass once more or not.
    Backward {
        leaf: bool,
        again: bool,
    },
    Update,
}

impl Seconds {
    fn of(self, cost: &StepCost) -> f64 {
        match self {
            Seconds::None => 0.0,
            Seconds::Forward => cost.forward,
            Seconds::Backward { leaf, again } => {
                let pass = if leaf { cost.backward_leaf } else { cost.backward };
                if again { pass + cost.forward } else { pass }
            }
            Seconds::Update => cost.update,
        }
    }
}

/// Plays `setup`'s schedule with `costs` (one a worker) until it is steady, on `cluster`: without one, messages take no time and
/// replicas' gradients are there at once.
///
/// Where ranks have processors for all their workers, thousands take seconds; where workers share them, the cost is quadratic.
pub fn simulate(setup: &Setup, costs: &[StepCost], processors: &Processors, cluster: Option<&Cluster>) -> Outcome {
    let (grid, frames) = (setup.grid, setup.schedule.frames());
    let fill = grid.modules.div_ceil(frames) + 1;
    // With uneven passes more batches count, for a mean.
    let counted = if cluster.is_some_and(|c| c.spread > 0.0) { 6 } else { 2 };
    let batches = fill + counted + fill;
    let modules: Vec<Vec<Segment>> = (1..=grid.modules).map(|i| segments(setup, i, batches)).collect();
    let mut play = Play::new(setup, &modules, costs, cluster);
    let pool = |w: usize| processors.pool_of_rank[grid.rank_of(w)];
    let mut workers_of = vec![0; processors.slots.len()];
    (0..grid.workers()).for_each(|w| workers_of[pool(w)] += 1);
    match workers_of.iter().zip(&processors.slots).all(|(workers, slots)| workers <= slots) {
        true => play.each_on_its_own(),
        false => play.sharing(pool, &processors.slots),
    }
    // Where the last worker is when a batch is through.
    let last = grid.workers() - 1;
    let a_batch = modules[grid.modules - 1].len() / batches;
    let through = |batch: usize| play.ends[last][batch * a_batch - 1];
    let steps = (batches * frames) as f64;
    Outcome {
        tick: (through(fill + counted) - through(fill)) / (counted * frames) as f64,
        busy: play.busy.iter().map(|seconds| seconds / steps).collect(),
    }
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

/// What module `i` does in `batches` batches, alike in all replicas.
fn segments(setup: &Setup, i: usize, batches: usize) -> Vec<Segment> {
    let (schedule, network) = (&setup.schedule, &setup.network);
    let length = |m: usize| schedule.window(m).len() * TICK + 1;
    let window = schedule.window(i);
    let again = schedule.recomputes(i);
    let mut list: Vec<Segment> = Vec::with_capacity(batches * length(i));
    for batch in 0..batches {
        for tick in window {
            let forward = if tick.forward.is_some() { Seconds::Forward } else { Seconds::None };
            let backward = tick
                .backward
                .as_ref()
                .map_or(Seconds::None, |backward| Seconds::Backward { leaf: !backward.send.contains(&true), again });
            let parts = [forward, Seconds::None, backward, Seconds::None].into_iter().enumerate();
            list.extend(parts.map(|(n, seconds)| Segment { seconds, needs: Vec::new(), goes_on: n == BACKWARD }));
        }
        // Replicas update together.
        let last = batch * length(i) + window.len() * TICK - 1;
        let others = Need { module: i, replicas: Replicas::Others, segment: last, at_end: true, bytes: 0 };
        let needs = if setup.frozen.learned(i) > 0 { vec![others] } else { Vec::new() };
        list.push(Segment { seconds: Seconds::Update, needs, goes_on: false });
    }
    // `part`: the segment of a tick that makes or takes a message; a sender waits for the message `depth` before its own.
    let mut link = |pairs: &Messages, sender: bool, other: usize, part: usize, depth: usize, bytes: u64| {
        let at = |batch: usize, tick: usize, at_end: bool, bytes: u64| Need {
            module: other,
            replicas: Replicas::Same,
            segment: batch * length(other) + tick * TICK + part,
            at_end,
            bytes,
        };
        for batch in 0..batches {
            for (k, &(sent, taken)) in pairs.iter().enumerate() {
                if !sender {
                    list[batch * length(i) + taken * TICK + part].needs.push(at(batch, sent, true, bytes));
                } else if let Some(before) = (batch * pairs.len() + k).checked_sub(depth) {
                    let (of, k) = (before / pairs.len(), before % pairs.len());
                    // A message of one byte says that the buffer is free.
                    list[batch * length(i) + sent * TICK + part + 1].needs.push(at(of, pairs[k].1, false, 1));
                }
            }
        }
    };
    for e in &network.edges {
        let (from, to) = (e.edge.from, e.edge.to);
        let word = if setup.config.run.halves_messages() { 2 } else { 4 };
        let bytes = (word * setup.config.data.batch * e.shape.iter().product::<usize>()) as u64;
        if from == i {
            link(&activations(setup, e), true, to, FORWARD, e.edge.delay + 1, bytes);
            link(&cotangents(setup, e), false, to, BACKWARD, 2, bytes);
        }
        if to == i {
            link(&activations(setup, e), false, from, FORWARD, e.edge.delay + 1, bytes);
            link(&cotangents(setup, e), true, from, BACKWARD, 2, bytes);
        }
    }
    list
}

fn place(edges: &[&EdgeSpec], of: &EdgeSpec) -> usize {
    edges.iter().position(|e| e.edge == of.edge).unwrap_or(0)
}

/// How far every worker is.
struct Play<'a> {
    setup: &'a Setup,
    modules: &'a [Vec<Segment>],
    costs: &'a [StepCost],
    cluster: Option<&'a Cluster>,
    /// When each segment begins and ends, by worker.
    begins: Vec<Vec<f64>>,
    ends: Vec<Vec<f64>>,
    /// Seconds of computing, by worker.
    busy: Vec<f64>,
    /// Seconds of each module's all-reduce.
    reduce: Vec<f64>,
    /// How uneven each worker's passes are.
    uneven: Vec<Uneven>,
}

impl<'a> Play<'a> {
    fn new(setup: &'a Setup, modules: &'a [Vec<Segment>], costs: &'a [StepCost], cluster: Option<&'a Cluster>) -> Self {
        let workers = setup.grid.workers();
        let ends: Vec<Vec<f64>> =
            (0..workers).map(|w| Vec::with_capacity(modules[setup.grid.module_and_replica(w).0 - 1].len())).collect();
        let reduce = |i: usize| cluster.map_or(0.0, |cluster| cluster.all_reduce(setup, i));
        Play {
            setup,
            modules,
            costs,
            cluster,
            begins: ends.clone(),
            ends,
            busy: vec![0.0; workers],
            reduce: (1..=setup.grid.modules).map(reduce).collect(),
            uneven: (0..workers).map(|w| Uneven::new(cluster.map_or(0.0, |c| c.spread), w)).collect(),
        }
    }

    /// What worker `w` does next.
    fn next(&self, w: usize) -> Option<&'a Segment> {
        self.modules[self.setup.grid.module_and_replica(w).0 - 1].get(self.ends[w].len())
    }

    /// When worker `w` could begin `segment`, its next; `None` while one that must come first has not been placed.
    fn ready(&self, segment: &Segment, w: usize) -> Option<f64> {
        let grid = self.setup.grid;
        let (i, r) = grid.module_and_replica(w);
        let mut latest = self.ends[w].last().copied().unwrap_or(0.0);
        for need in &segment.needs {
            let times = if need.at_end { &self.ends } else { &self.begins };
            match need.replicas {
                Replicas::Same => {
                    let other = grid.worker(need.module, r);
                    let late =
                        self.cluster.map_or(0.0, |c| c.seconds(grid.rank_of(other), grid.rank_of(w), need.bytes));
                    latest = latest.max(times[other].get(need.segment)? + late);
                }
                Replicas::Others => {
                    for other in 0..grid.replicas {
                        latest = latest.max(*times[grid.worker(i, other)].get(need.segment)?);
                    }
                    latest += self.reduce[i - 1];
                }
            }
        }
        Some(latest)
    }

    fn place(&mut self, w: usize, begin: f64, seconds: f64) {
        self.begins[w].push(begin);
        self.ends[w].push(begin + seconds);
        self.busy[w] += seconds;
    }

    fn seconds(&mut self, segment: &Segment, w: usize) -> f64 {
        let seconds = segment.seconds.of(&self.costs[w]);
        if seconds > 0.0 { seconds * self.uneven[w].factor() } else { 0.0 }
    }

    /// Every worker has a processor to itself: whoever is ready goes on.
    fn each_on_its_own(&mut self) {
        // Only used messages are sent, so nobody waits for ever: where nobody can go on all are through.
        let mut went_on = true;
        while went_on {
            went_on = false;
            for w in 0..self.ends.len() {
                while let Some(segment) = self.next(w)
                    && let Some(begin) = self.ready(segment, w)
                {
                    let seconds = self.seconds(segment, w);
                    self.place(w, begin, seconds);
                    went_on = true;
                }
            }
        }
    }

    /// Goes through all segments in the order of time. Those that are ready first get a processor first, but for those that go on.
    fn sharing(&mut self, pool_of: impl Fn(usize) -> usize, slots: &[usize]) {
        // When each processor of each pool is free.
        let mut free: Vec<Vec<f64>> = slots.iter().map(|&n| vec![0.0; n]).collect();
        loop {
            // Waits that are over take no processor, and may end others.
            let mut waits_ended = true;
            while waits_ended {
                waits_ended = false;
                for w in 0..self.ends.len() {
                    while let Some(segment) = self.next(w).filter(|s| s.seconds.of(&self.costs[w]) == 0.0)
                        && let Some(ready) = self.ready(segment, w)
                    {
                        self.place(w, ready, 0.0);
                        waits_ended = true;
                    }
                }
            }
            let computes = (0..self.ends.len()).filter_map(|w| {
                let segment = self.next(w)?;
                let mut ready = self.ready(segment, w)?;
                let processor = free[pool_of(w)].iter().copied().fold(f64::INFINITY, f64::min);
                let begin = ready.max(processor);
                if segment.goes_on && self.ends[w].last() == Some(&ready) {
                    ready = 0.0;
                }
                Some((begin, ready, w, segment))
            });
            let first = computes.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
            // Nobody waits for ever, as above.
            let Some((begin, _, w, segment)) = first else { return };
            let seconds = self.seconds(segment, w);
            if let Some(processor) = free[pool_of(w)].iter_mut().min_by(|a, b| a.total_cmp(b)) {
                *processor = begin + seconds;
            }
            self.place(w, begin, seconds);
        }
    }
}

/// Draws how much longer than the mean one worker's passes take: log-normal, of mean 1.
struct Uneven {
    rng: ChaCha8Rng,
    factors: Option<LogNormal<f64>>,
}

impl Uneven {
    fn new(spread: f64, worker: usize) -> Self {
        let factors = if spread > 0.0 { LogNormal::from_mean_cv(1.0, spread).ok() } else { None };
        Uneven { rng: ChaCha8Rng::seed_from_u64(worker as u64), factors }
    }

    fn factor(&mut self) -> f64 {
        self.factors.map_or(1.0, |factors| factors.sample(&mut self.rng))
    }
}
