//! Cutting a chain of blocks into contiguous modules: the costliest module as cheap as can be, then the least in all.
//!
//! What a module costs may depend on where its skips come from, that is on earlier cuts. The search therefore goes
//! through the modules in order and keeps, beside the last cut, the ends of those modules that still feed a later one
//! by a skip. Without skips that is plain dynamic programming over (modules, last cut).

use std::collections::BTreeMap;

use crate::method::graph::Graph;
use crate::{Error, Result};

/// One module of a partition under trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its number, from 1.
    pub module: usize,
    /// Its first block.
    pub start: usize,
    /// The block behind its last.
    pub end: usize,
    /// For each of its skip inputs, in the graph's order, the block behind the last one of the module it comes from.
    pub skips: Vec<usize>,
}

/// A way to cut, and what it costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Partition {
    /// The first block of every module but the first, growing.
    pub cuts: Vec<usize>,
    /// The costliest module.
    pub largest: f64,
    /// All modules together.
    pub total: f64,
    /// Whether no better one exists; false where the search had to leave states out ([`MOST_STATES`]).
    pub exact: bool,
}

/// States kept a module; beyond, the cheapest. A chain has as many as it has blocks, n; each skip that is open across a
/// cut multiplies that by up to n.
pub const MOST_STATES: usize = 100_000;

/// A state's value and the state it came from, for the way back.
struct Entry {
    value: f64,
    from: Vec<u32>,
}

/// Cuts `blocks` blocks into the modules of `graph` so that the costliest module is as cheap as possible, and among all ways
/// whose costliest module is within `slack` (relative) of that, the sum of all costs is smallest. `cost` is `None` for a
/// module that cannot be.
///
/// # Errors
/// [`Error::Input`] if there are more modules than blocks, or no way to cut is possible.
pub fn partition(
    blocks: usize,
    graph: &Graph,
    slack: f64,
    cost: &mut dyn FnMut(&Piece) -> Option<f64>,
) -> Result<Partition> {
    let modules = graph.modules();
    if modules > blocks {
        return Err(Error::input(format!("{modules} modules cannot be cut from {blocks} blocks of layers")));
    }
    let impossible = || Error::input(format!("no way to cut into {modules} modules fits all skips"));
    let (largest, first_exact) = search(blocks, graph, f64::INFINITY, f64::max, cost).ok_or_else(impossible)?;
    let limit = largest.last * (1.0 + slack);
    let (best, exact) = search(blocks, graph, limit, |sum, cost| sum + cost, cost).ok_or_else(impossible)?;
    // The limit only lets through what is near the best; the largest module is counted anew.
    let largest = pieces(&best.cuts, blocks, graph).iter().filter_map(&mut *cost).fold(0.0, f64::max);
    Ok(Partition { cuts: best.cuts, largest, total: best.last, exact: exact && first_exact })
}

/// The modules that `cuts` make.
pub fn pieces(cuts: &[usize], blocks: usize, graph: &Graph) -> Vec<Piece> {
    let end = |i: usize| if i == 0 { 0 } else { cuts.get(i - 1).copied().unwrap_or(blocks) };
    let skips = |i: usize| graph.inputs(i).filter(|e| !e.is_main()).map(|e| end(e.from)).collect();
    (1..=graph.modules()).map(|i| Piece { module: i, start: end(i - 1), end: end(i), skips: skips(i) }).collect()
}

/// What a search found: cuts and the value of the last state.
struct Found {
    cuts: Vec<usize>,
    last: f64,
}

/// Dynamic programming over the modules; `join` adds a module's cost to a value and must grow with both. Modules that cost
/// more than `limit` are left out. The flag tells whether no state was dropped.
fn search(
    blocks: usize,
    graph: &Graph,
    limit: f64,
    join: impl Fn(f64, f64) -> f64,
    cost: &mut dyn FnMut(&Piece) -> Option<f64>,
) -> Option<(Found, bool)> {
    let modules = graph.modules();
    // A state behind module m: the end of m, then the ends of the earlier modules that still feed a later one.
    let open = |m: usize| -> Vec<usize> {
        let feeds = |j: &usize| graph.outputs(*j).any(|e| e.to > m && !e.is_main());
        (1..m).rev().filter(feeds).collect()
    };
    let mut stages: Vec<BTreeMap<Vec<u32>, Entry>> = Vec::with_capacity(modules + 1);
    stages.push(BTreeMap::from([(vec![0], Entry { value: 0.0, from: Vec::new() })]));
    let mut exact = true;
    for m in 1..=modules {
        let (before, after) = (open(m - 1), open(m));
        let skips: Vec<usize> = graph.inputs(m).filter(|e| !e.is_main()).map(|e| e.from).collect();
        let mut next: BTreeMap<Vec<u32>, Entry> = BTreeMap::new();
        for (state, entry) in &stages[m - 1] {
            let end_of = |j: usize| match before.iter().position(|&k| k == j) {
                Some(place) => state[place + 1],
                None => state[0],
            };
            let start = state[0] as usize;
            let skips: Vec<usize> = skips.iter().map(|&j| end_of(j) as usize).collect();
            // Every later module needs a block too, and the last takes all that is left.
            let ends = if m == modules { blocks..=blocks } else { start + 1..=blocks - (modules - m) };
            let mut key = vec![0];
            key.extend(after.iter().map(|&j| end_of(j)));
            for end in ends {
                let piece = Piece { module: m, start, end, skips: skips.clone() };
                let Some(cost) = cost(&piece).filter(|c| *c <= limit) else { continue };
                let value = join(entry.value, cost);
                key[0] = end as u32;
                match next.get_mut(&key) {
                    Some(known) if known.value <= value => {}
                    Some(known) => *known = Entry { value, from: state.clone() },
                    None => {
                        next.insert(key.clone(), Entry { value, from: state.clone() });
                    }
                }
            }
        }
        if next.len() > MOST_STATES {
            exact = false;
            let mut values: Vec<f64> = next.values().map(|e| e.value).collect();
            let (_, &mut most, _) = values.select_nth_unstable_by(MOST_STATES, f64::total_cmp);
            next.retain(|_, e| e.value <= most);
        }
        stages.push(next);
    }
    let (mut state, entry) = stages[modules].iter().min_by(|a, b| a.1.value.total_cmp(&b.1.value))?;
    let last = entry.value;
    let mut cuts = Vec::with_capacity(modules - 1);
    for m in (2..=modules).rev() {
        state = &stages[m][state].from;
        cuts.push(state[0] as usize);
    }
    cuts.reverse();
    Some((Found { cuts, last }, exact))
}
