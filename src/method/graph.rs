//! The network as a graph of modules with a clock (Skip-Sideways, arXiv 2106.08318, figure 1).
//!
//! Modules are numbered 1..=D. Every edge carries outputs forward and cotangents backward. A *main* edge joins
//! neighbours; a *skip* edge (j → i) has a span s = i − j ≥ 2. An output takes one tick along any edge, or `delay`
//! ticks where a skip says so: a skip therefore brings features `span − delay` frames newer than the main path's.

use crate::{Error, Result};

/// A directed edge between two modules (1-based).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Edge {
    /// The module whose output travels.
    pub from: usize,
    /// The module that reads it.
    pub to: usize,
    /// Ticks the output takes: 1 on main edges, 1..=span on skips. Cotangents always take one.
    pub delay: usize,
}

impl Edge {
    /// `to − from`: 1 on the main path.
    pub fn span(&self) -> usize {
        self.to - self.from
    }

    /// How many frames newer than the main path's the features on this edge are: `span − delay`.
    pub fn lead(&self) -> usize {
        self.span() - self.delay
    }

    /// Whether this edge joins neighbours.
    pub fn is_main(&self) -> bool {
        self.span() == 1
    }
}

impl std::fmt::Display for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.is_main() { "main" } else { "skip" };
        write!(f, "module {} -> {} ({kind})", self.from, self.to)
    }
}

/// D modules and the edges between them, in the order every part of the program uses: by receiving module, then by
/// growing span, so that a module's main input comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    modules: usize,
    edges: Vec<Edge>,
}

impl Graph {
    /// A chain of `modules` modules with `skips` added.
    ///
    /// # Errors
    /// [`Error::Input`] for no modules, a skip out of range, of span below 2, given twice, or with a delay outside
    /// 1..=span.
    pub fn new(modules: usize, skips: &[Edge]) -> Result<Self> {
        if modules == 0 {
            return Err(Error::input("a network needs at least one module"));
        }
        let mut edges: Vec<Edge> = (2..=modules).map(|to| Edge { from: to - 1, to, delay: 1 }).collect();
        for skip in skips {
            let Edge { from, to, delay } = *skip;
            if from < 1 || to > modules || from + 2 > to {
                return Err(Error::input(format!(
                    "skip edge [{from}, {to}]: a skip goes from a module to one at least 2 further on, within 1..={modules}"
                )));
            }
            if delay < 1 || delay > skip.span() {
                return Err(Error::input(format!(
                    "skip edge [{from}, {to}]: delay = {delay}, but a delay is 1 (the default) to the span, {}",
                    skip.span()
                )));
            }
            if edges.iter().any(|e| (e.from, e.to) == (from, to)) {
                return Err(Error::input(format!("skip edge [{from}, {to}] is given twice")));
            }
            edges.push(*skip);
        }
        edges.sort_by_key(|e| (e.to, e.span()));
        Ok(Graph { modules, edges })
    }

    /// The skip edges that a list of spans stands for: span s adds every (i − s → i) with i − s ≥ 1.
    ///
    /// # Errors
    /// [`Error::Input`] for a span below 2 or one that fits nowhere in `modules` modules.
    pub fn skips_of_spans(modules: usize, spans: &[usize], delay: usize) -> Result<Vec<Edge>> {
        let mut skips = Vec::new();
        for &span in spans {
            if span < 2 || span >= modules {
                return Err(Error::input(format!(
                    "skip span {span}: with {modules} modules a span is 2 to {}",
                    modules.saturating_sub(1)
                )));
            }
            skips.extend((span + 1..=modules).map(|to| Edge { from: to - span, to, delay }));
        }
        Ok(skips)
    }

    /// D, the number of modules.
    pub fn modules(&self) -> usize {
        self.modules
    }

    /// All edges, by receiving module, then by growing span.
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// The edges into module `i`, main first, then skips of growing span. Module 1 has none: it reads frames.
    pub fn inputs(&self, i: usize) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |e| e.to == i)
    }

    /// The edges out of module `i`, main first, then skips of growing span.
    pub fn outputs(&self, i: usize) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |e| e.from == i)
    }

    /// Lmin: the fewest modules on a path from 1 to D.
    pub fn fewest_modules(&self) -> usize {
        let mut best = vec![1; self.modules + 1];
        for i in 2..=self.modules {
            best[i] = 1 + self.inputs(i).map(|e| best[e.from]).min().unwrap_or(0);
        }
        best[self.modules]
    }

    /// How many frames newer than the main path's the newest frame is that module D sees: the largest sum of leads
    /// on a path. With delays of 1 this is D − Lmin.
    pub fn newest_lead(&self) -> usize {
        let mut best = vec![0; self.modules + 1];
        for i in 2..=self.modules {
            best[i] = self.inputs(i).map(|e| best[e.from] + e.lead()).max().unwrap_or(0);
        }
        best[self.modules]
    }

    /// The shortest clip that trains module 1: D + Lmin − 1 frames (2D − 1 without skips).
    pub fn shortest_clip(&self) -> usize {
        self.modules + self.fewest_modules() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_spans(modules: usize, spans: &[usize]) -> Graph {
        Graph::new(modules, &Graph::skips_of_spans(modules, spans, 1).unwrap()).unwrap()
    }

    #[test]
    fn edges_come_by_receiver_and_growing_span() {
        let g = with_spans(4, &[3, 2]);
        let pairs: Vec<_> = g.edges().iter().map(|e| (e.from, e.to)).collect();
        assert_eq!(pairs, [(1, 2), (2, 3), (1, 3), (3, 4), (2, 4), (1, 4)]);
    }

    #[test]
    fn shortest_paths_and_leads() {
        let chain = with_spans(6, &[]);
        assert_eq!((chain.fewest_modules(), chain.newest_lead(), chain.shortest_clip()), (6, 0, 11));
        let skips = with_spans(6, &[2, 3]);
        // 1 -> 3 -> 6: three modules; leads 1 + 2 = D - Lmin.
        assert_eq!((skips.fewest_modules(), skips.newest_lead(), skips.shortest_clip()), (3, 3, 8));
        let aligned = Graph::new(6, &Graph::skips_of_spans(6, &[2], 2).unwrap()).unwrap();
        assert_eq!((aligned.fewest_modules(), aligned.newest_lead()), (4, 0));
    }

    #[test]
    fn impossible_skips_are_refused() {
        for (edge, word) in [
            (Edge { from: 1, to: 2, delay: 1 }, "at least 2"),
            (Edge { from: 1, to: 5, delay: 1 }, "within 1..=4"),
            (Edge { from: 1, to: 3, delay: 3 }, "delay = 3"),
            (Edge { from: 1, to: 3, delay: 0 }, "delay = 0"),
        ] {
            let text = Graph::new(4, &[edge]).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        let twice = [Edge { from: 1, to: 3, delay: 1 }, Edge { from: 1, to: 3, delay: 2 }];
        assert!(Graph::new(4, &twice).unwrap_err().to_string().contains("twice"));
        assert!(Graph::skips_of_spans(4, &[4], 1).is_err());
    }
}
