//! The links that join workers: pure, and computed alike by every rank, for one worker at a time. A run has as many as workers,
//! times some; a rank asks for its own.
//!
//! A replica's links have numbers in a block of their own: two an edge, one of labels or targets, one a worker of reports, one of
//! decisions. Behind all replicas' blocks come those of the all-reduces, module by module. Not every number is in use.

use crate::comm::all_reduce::Group;
use crate::comm::{Kind, LinkSpec};
use crate::method::{Edge, Schedule};
use crate::network::Network;
use crate::network::freeze::Frozen;
use crate::nn::head::{Labels, Target};
use crate::setup::grid::Grid;

/// How many replicas' first modules another's tells at most what was decided.
const TOLD: usize = 4;

/// What the last module needs from the first one's dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// A label a clip; two where clips are mixtures.
    Labels {
        /// Whether they are.
        mixed: bool,
    },
    /// A target frame a step.
    Targets,
}

/// The links of a run.
#[derive(Debug)]
pub struct Wiring {
    grid: Grid,
    /// In the network's order.
    edges: Vec<EdgeLinks>,
    /// Kind, words and name of what module D needs of module 1; `None` if they are the same.
    truth: Option<(Kind, usize, &'static str)>,
    /// Words of a report of module D, and of another.
    reports: (usize, usize),
    /// Whether what is behind a clip is decided, and updates made.
    training: bool,
    /// By module, the values that replicas average; none where there is one replica, or nothing is learned.
    averaged: Vec<usize>,
}

#[derive(Debug)]
struct EdgeLinks {
    edge: Edge,
    words: usize,
    /// Whether a cotangent is ever used.
    returns: bool,
}

impl Wiring {
    /// The links of `network` on `grid` for batches of `batch` clips. `reports` is the size of module D's reports and of
    /// others'; `truth` what module D needs; `frozen`, in training, what does not learn; `halved`: activations and cotangents
    /// travel in 16 bits an element.
    pub fn new(
        network: &Network,
        schedule: &Schedule,
        grid: Grid,
        (batch, truth): (usize, Truth),
        reports: (usize, usize),
        frozen: Option<&Frozen>,
        halved: bool,
    ) -> Self {
        let edges = network.edges.iter().map(|spec| {
            let words = batch * spec.shape.iter().product::<usize>();
            let place = network.inputs(spec.edge.to).iter().position(|e| e.edge == spec.edge);
            EdgeLinks {
                edge: spec.edge,
                words: if halved { words.div_ceil(2) } else { words },
                returns: place.is_some_and(|k| schedule.returns(spec.edge.to, k)),
            }
        });
        let truth = match truth {
            Truth::Labels { mixed } => (Kind::Labels, Labels::words(batch, mixed), "labels"),
            Truth::Targets => (Kind::Target, Target::words(batch, network.input), "target frames"),
        };
        let learned = |i| frozen.filter(|_| grid.replicas > 1).map_or(0, |frozen| frozen.learned(i) as usize);
        Wiring {
            grid,
            edges: edges.collect(),
            truth: (grid.modules > 1).then_some(truth),
            reports,
            training: frozen.is_some(),
            averaged: (1..=grid.modules).map(learned).collect(),
        }
    }

    /// Numbers in a replica's block.
    fn block(&self) -> usize {
        2 * self.edges.len() + 1 + self.grid.modules + 1
    }

    fn number(&self, r: usize, place: usize) -> u32 {
        (r * self.block() + place) as u32
    }

    /// The link of replica `r`'s activations on edge `k` of the network.
    pub fn activations(&self, r: usize, k: usize) -> u32 {
        self.number(r, 2 * k)
    }

    /// That of cotangents; `None` where none is ever used.
    pub fn cotangents(&self, r: usize, k: usize) -> Option<u32> {
        self.edges[k].returns.then(|| self.number(r, 2 * k + 1))
    }

    /// That of labels or targets from replica `r`'s module 1 to its module D; `None` if they are the same.
    pub fn truth(&self, r: usize) -> Option<u32> {
        self.truth.map(|_| self.number(r, 2 * self.edges.len()))
    }

    /// That of worker `w`'s reports to the console.
    pub fn reports(&self, w: usize) -> u32 {
        let (i, r) = self.grid.module_and_replica(w);
        self.number(r, 2 * self.edges.len() + i)
    }

    /// That on which replica `r`'s first module hears what was decided for a clip's end, which is decided in replica 0.
    pub fn decisions(&self, r: usize) -> Option<u32> {
        (self.training && r > 0).then(|| self.number(r, 2 * self.edges.len() + self.grid.modules + 1))
    }

    /// The replicas whose first modules hear it from replica `r`'s.
    pub fn told_by(&self, r: usize) -> impl Iterator<Item = usize> + use<> {
        let (first, replicas) = (TOLD * r + 1, if self.training { self.grid.replicas } else { 0 });
        (first..first + TOLD).filter(move |&r| r < replicas)
    }

    /// The replica from whose first module replica `r`'s hears it.
    fn told_from(r: usize) -> usize {
        (r - 1) / TOLD
    }

    /// Calls `then` with the replicas of module `i`, if their gradients are averaged.
    pub fn averaging<T>(&self, i: usize, then: impl FnOnce(&Group) -> T) -> Option<T> {
        let (words, replicas) = (self.averaged[i - 1], self.grid.replicas);
        let worker = |r| self.grid.worker(i, r);
        let first = replicas * (self.block() + (i - 1) * Group::numbers(replicas));
        let group = Group { first: first as u32, name: format!("module {i}"), replicas, words, worker: &worker };
        (words > 0).then(|| then(&group))
    }

    /// Numbers of links, in use or not: all are below.
    pub fn numbers(&self) -> u32 {
        let replicas = self.grid.replicas;
        (replicas * (self.block() + self.grid.modules * Group::numbers(replicas))) as u32
    }

    /// The links of replica `r`'s edge `k`.
    pub fn of_edge(&self, r: usize, k: usize) -> impl Iterator<Item = LinkSpec> + use<> {
        let EdgeLinks { edge, words, .. } = self.edges[k];
        let suffix = self.suffix(r);
        let (from, to) = (self.grid.worker(edge.from, r), self.grid.worker(edge.to, r));
        // `delay` messages are on their way in lock-step; one more may be filled meanwhile.
        let (kind, depth, name) = (Kind::Activation, edge.delay + 1, format!("{edge}{suffix}"));
        let there = LinkSpec { id: self.activations(r, k), kind, from, to, words, depth, name };
        let back = self.cotangents(r, k).map(|id| {
            let name = format!("cotangent module {} -> {}{suffix}", edge.to, edge.from);
            LinkSpec { id, kind: Kind::Cotangent, from: to, to: from, words, depth: 2, name }
        });
        [Some(there), back].into_iter().flatten()
    }

    fn suffix(&self, r: usize) -> String {
        if self.grid.replicas > 1 { format!(" of replica {r}") } else { String::new() }
    }

    fn link_of_truth(&self, r: usize) -> Option<LinkSpec> {
        let ((kind, words, what), id, d) = (self.truth?, self.truth(r)?, self.grid.modules);
        let (from, to) = (self.grid.worker(1, r), self.grid.worker(d, r));
        let name = format!("{what} module 1 -> {d}{}", self.suffix(r));
        // Module 1 is D − 1 ticks ahead of module D.
        Some(LinkSpec { id, kind, from, to, words, depth: d, name })
    }

    fn link_of_reports(&self, w: usize) -> LinkSpec {
        let (i, r) = self.grid.module_and_replica(w);
        let words = if i == self.grid.modules { self.reports.0 } else { self.reports.1 };
        let name = format!("reports of module {i}, replica {r}");
        LinkSpec { id: self.reports(w), kind: Kind::Report, from: w, to: self.grid.console(), words, depth: 4, name }
    }

    fn link_of_decisions(&self, r: usize) -> Option<LinkSpec> {
        let id = self.decisions(r)?;
        let (from, to) = (self.grid.worker(1, Self::told_from(r)), self.grid.worker(1, r));
        let name = format!("decisions for replica {r}");
        // The clip's end is some ticks after the decision, so the replicas need not keep the same time.
        Some(LinkSpec { id, kind: Kind::Control, from, to, words: 1, depth: 2, name })
    }

    /// The links that begin or end at worker `w`.
    pub fn of_worker(&self, w: usize) -> Vec<LinkSpec> {
        let (i, r) = self.grid.module_and_replica(w);
        let mut links: Vec<LinkSpec> = Vec::new();
        let own = self.edges.iter().enumerate().filter(|(_, e)| e.edge.from == i || e.edge.to == i);
        own.for_each(|(k, _)| links.extend(self.of_edge(r, k)));
        if i == 1 || i == self.grid.modules {
            links.extend(self.link_of_truth(r));
        }
        links.push(self.link_of_reports(w));
        if i == 1 {
            links.extend(self.link_of_decisions(r));
            links.extend(self.told_by(r).filter_map(|r| self.link_of_decisions(r)));
        }
        links.extend(self.averaging(i, |group| group.links(r)).into_iter().flatten());
        links
    }

    /// The links that begin or end on rank `rank`, the console's among them on rank 0.
    pub fn of_rank(&self, rank: usize) -> Vec<LinkSpec> {
        let own = self.grid.workers_of(rank);
        // A link within the rank is listed where it begins.
        let listed = |w: usize| {
            self.of_worker(w)
                .into_iter()
                .filter(move |link| link.from == w || !self.grid.workers_of(rank).contains(&link.from))
        };
        let mut links: Vec<LinkSpec> = own.clone().flat_map(listed).collect();
        if rank == 0 {
            links.extend((0..self.grid.workers()).filter(|w| !own.contains(w)).map(|w| self.link_of_reports(w)));
        }
        links
    }

    /// The name of link `id`, one of an edge's.
    pub fn name_of_edge(&self, id: u32) -> Option<String> {
        let (r, place) = (id as usize / self.block(), id as usize % self.block());
        let known = r < self.grid.replicas && place / 2 < self.edges.len();
        known.then(|| self.of_edge(r, place / 2).find(|link| link.id == id)).flatten().map(|link| link.name)
    }
}
