//! Where workers run: pure, computed alike by every rank.
//!
//! A worker is one module i of one replica r, number `w = r·D + i − 1`. Workers fill ranks in this order, so that
//! neighbouring modules share a rank or sit on neighbouring ranks.

use std::ops::Range;

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

    /// The workers of rank `rank`.
    pub fn workers_of(&self, rank: usize) -> Range<usize> {
        let first = |rank: usize| (rank * self.workers()).div_ceil(self.ranks).min(self.workers());
        first(rank)..first(rank + 1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_fill_ranks_in_order_and_neighbours_stay_together() {
        let grid = Grid::new(4, 2, 3).unwrap();
        assert_eq!(grid.placement(), [0, 0, 0, 1, 1, 1, 2, 2, 0]);
        assert_eq!(grid.module_and_replica(grid.worker(3, 1)), (3, 1));
        for ranks in 1..=8 {
            let grid = Grid::new(4, 2, ranks).unwrap();
            let placement = grid.placement();
            for rank in 0..ranks {
                let workers: Vec<usize> = (0..8).filter(|&w| placement[w] == rank).collect();
                assert_eq!(grid.workers_of(rank).collect::<Vec<_>>(), workers);
            }
            assert!(grid.workers_of(ranks).is_empty());
            assert!((0..ranks).all(|rank| placement[..8].contains(&rank)), "{ranks}: {placement:?}");
        }
        let text = Grid::new(3, 2, 7).unwrap_err().to_string();
        assert!(text.contains("at most 6"), "{text}");
    }
}
