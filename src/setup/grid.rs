//! Where workers run and the links that join them: pure, computed alike by every rank.
//!
//! A worker is one module i of one replica r, number `w = r·D + i − 1`. Workers fill ranks in this order, so that
//! neighbouring modules share a rank or sit on neighbouring ranks.

use crate::comm::all_reduce::AllReduce;
use crate::comm::{Kind, LinkSpec};
use crate::method::Schedule;
use crate::network::Network;
use crate::network::freeze::Frozen;
use crate::nn::head::{Labels, Target};
use crate::{Error, Result};

/// D modules × R replicas over N ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// D
    pub modules: usize,
    /// R
    pub replicas: usize,
    /// N
    pub ranks: usize,
}

impl Grid {
    /// The grid, if the ranks can be used.
    ///
    /// # Errors
    /// [`Error::Input`] if there are more ranks than workers.
    pub fn new(modules: usize, replicas: usize, ranks: usize) -> Result<Self> {
        let workers = modules * replicas;
        if ranks > workers {
            return Err(Error::input(format!(
                "{ranks} ranks for {modules} modules x {replicas} replicas: at most {workers} can be used (one module \
                 a rank); start fewer ranks, or raise model.modules or train.replicas"
            )));
        }
        Ok(Grid { modules, replicas, ranks })
    }

    /// D × R.
    pub fn workers(&self) -> usize {
        self.modules * self.replicas
    }

    /// The worker of module `i` (1-based) in replica `r`.
    pub fn worker(&self, i: usize, r: usize) -> usize {
        r * self.modules + i - 1
    }

    /// Module (1-based) and replica of worker `w`.
    pub fn module_and_replica(&self, w: usize) -> (usize, usize) {
        (w % self.modules + 1, w / self.modules)
    }

    /// The rank of worker `w`: contiguous blocks of nearly equal size.
    pub fn rank_of(&self, w: usize) -> usize {
        w * self.ranks / self.workers()
    }

    /// The rank of every worker, and of the console behind them, which is rank 0's.
    pub fn placement(&self) -> Vec<usize> {
        (0..self.workers()).map(|w| self.rank_of(w)).chain([0]).collect()
    }

    /// The console's number among the workers.
    pub fn console(&self) -> usize {
        self.workers()
    }
}

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

/// Every link of a run, and which is which.
#[derive(Debug)]
pub struct Wiring {
    /// All links, ids growing from 0.
    pub links: Vec<LinkSpec>,
    /// `[replica][edge in the network's order]`
    pub activations: Vec<Vec<u32>>,
    /// The same for cotangents; `None` where none is ever used.
    pub cotangents: Vec<Vec<Option<u32>>>,
    /// Per replica, the link of labels or targets from module 1 to module D; `None` if they are the same.
    pub truth: Vec<Option<u32>>,
    /// Per worker, its reports to the console.
    pub reports: Vec<u32>,
    /// Per module, the first id of its replicas' all-reduce links (R > 1).
    pub all_reduce: Vec<Option<u32>>,
    /// By replica, the link on which its first module hears what was decided for a clip's end (training, r > 0).
    pub decisions: Vec<Option<u32>>,
}

impl Wiring {
    /// The links of `network` on `grid` for batches of `batch` clips. `report_words(w)` is the size of worker w's
    /// reports; `truth` what module D needs; `frozen`, in training, what does not learn.
    pub fn new(
        network: &Network,
        schedule: &Schedule,
        grid: Grid,
        batch: usize,
        truth: Truth,
        report_words: impl Fn(usize) -> usize,
        frozen: Option<&Frozen>,
    ) -> Self {
        let mut links: Vec<LinkSpec> = Vec::new();
        let mut add = |kind, from, to, words, depth, name: String| {
            let id = links.len() as u32;
            links.push(LinkSpec { id, kind, from, to, words, depth, name });
            id
        };
        let d = grid.modules;
        let (mut activations, mut cotangents, mut truths) = (Vec::new(), Vec::new(), Vec::new());
        for r in 0..grid.replicas {
            let suffix = if grid.replicas > 1 { format!(" of replica {r}") } else { String::new() };
            let (mut forward, mut backward) = (Vec::new(), Vec::new());
            for spec in &network.edges {
                let edge = spec.edge;
                let words = batch * spec.shape.iter().product::<usize>();
                let (from, to) = (grid.worker(edge.from, r), grid.worker(edge.to, r));
                // `delay` messages are on their way in lock-step; one more may be filled meanwhile.
                forward.push(add(Kind::Activation, from, to, words, edge.delay + 1, format!("{edge}{suffix}")));
                let place = network.inputs(edge.to).iter().position(|e| e.edge == edge);
                let used = place.is_some_and(|k| schedule.returns(edge.to, k));
                backward.push(used.then(|| {
                    let name = format!("cotangent module {} -> {}{suffix}", edge.to, edge.from);
                    add(Kind::Cotangent, to, from, words, 2, name)
                }));
            }
            activations.push(forward);
            cotangents.push(backward);
            truths.push((d > 1).then(|| {
                let (kind, words, what) = match truth {
                    Truth::Labels { mixed } => (Kind::Labels, Labels::words(batch, mixed), "labels"),
                    Truth::Targets => (Kind::Target, Target::words(batch, network.input), "target frames"),
                };
                // Module 1 is D − 1 ticks ahead of module D.
                add(kind, grid.worker(1, r), grid.worker(d, r), words, d, format!("{what} module 1 -> {d}{suffix}"))
            }));
        }
        let reports = (0..grid.workers())
            .map(|w| {
                let (i, r) = grid.module_and_replica(w);
                let name = format!("reports of module {i}, replica {r}");
                add(Kind::Report, w, grid.console(), report_words(w), 4, name)
            })
            .collect();
        let decisions = (0..grid.replicas)
            .map(|r| {
                let name = format!("decisions for replica {r}");
                // The clip's end is some ticks after the decision, so the replicas need not keep the same time.
                (frozen.is_some() && r > 0)
                    .then(|| add(Kind::Control, grid.worker(1, 0), grid.worker(1, r), 1, 2, name))
            })
            .collect();
        let mut all_reduce = vec![None; d];
        if let Some(frozen) = frozen.filter(|_| grid.replicas > 1) {
            for i in (1..=d).filter(|&i| frozen.learned(i) > 0) {
                let workers: Vec<usize> = (0..grid.replicas).map(|r| grid.worker(i, r)).collect();
                let first = links.len() as u32;
                let words = frozen.learned(i) as usize;
                links.extend(AllReduce::links(first, &format!("module {i}"), &workers, words));
                all_reduce[i - 1] = Some(first);
            }
        }
        Wiring { links, activations, cotangents, truth: truths, reports, all_reduce, decisions }
    }

    /// Makes activations and cotangents travel in 16 bits an element.
    pub fn halve_messages(&mut self) {
        let halved = self.links.iter_mut().filter(|l| matches!(l.kind, Kind::Activation | Kind::Cotangent));
        halved.for_each(|link| link.words = link.words.div_ceil(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_fill_ranks_in_order_and_neighbours_stay_together() {
        let grid = Grid::new(4, 2, 3).unwrap();
        assert_eq!(grid.placement(), [0, 0, 0, 1, 1, 1, 2, 2, 0]);
        assert_eq!(grid.module_and_replica(grid.worker(3, 1)), (3, 1));
        for ranks in 1..=8 {
            let placement = Grid::new(4, 2, ranks).unwrap().placement();
            assert!((0..ranks).all(|rank| placement[..8].contains(&rank)), "{ranks}: {placement:?}");
        }
        let text = Grid::new(3, 2, 7).unwrap_err().to_string();
        assert!(text.contains("at most 6"), "{text}");
    }
}
