//! Cutting a chain of layers into contiguous modules whose largest cost is as small as possible.

use crate::{Error, Result};

/// The places (layer numbers, counted from 0) before which to cut `costs` into `modules` contiguous parts so that the
/// costliest part is as cheap as possible. A cut is made only before a layer whose `allowed` entry is true.
///
/// Dynamic programming over (parts, candidate places): O(modules · n²) for n candidates.
///
/// # Errors
/// [`Error::Input`] if there are more modules than places allow.
pub fn balanced_cuts(costs: &[f64], allowed: &[bool], modules: usize) -> Result<Vec<usize>> {
    // Blocks of layers between allowed places; the first block starts at layer 0 in any case.
    let starts: Vec<usize> = (0..costs.len()).filter(|&n| n == 0 || allowed[n]).collect();
    let blocks = starts.len();
    if modules == 0 || modules > blocks {
        return Err(Error::input(format!(
            "model.modules = {modules}: the network's {} layers can be cut into 1 to {blocks} modules (before layers \
             with weights); lower model.modules or give model.cuts",
            costs.len()
        )));
    }
    let mut before = vec![0.0; blocks + 1];
    for b in 0..blocks {
        let end = starts.get(b + 1).copied().unwrap_or(costs.len());
        before[b + 1] = before[b] + costs[starts[b]..end].iter().sum::<f64>();
    }
    // best[m][e]: the least possible maximum when blocks 0..e make m parts; from[m][e]: where the last part starts.
    let mut best = vec![vec![f64::INFINITY; blocks + 1]; modules + 1];
    let mut from = vec![vec![0; blocks + 1]; modules + 1];
    best[0][0] = 0.0;
    for m in 1..=modules {
        for end in m..=blocks {
            for start in m - 1..end {
                let cost = best[m - 1][start].max(before[end] - before[start]);
                if cost < best[m][end] {
                    best[m][end] = cost;
                    from[m][end] = start;
                }
            }
        }
    }
    let mut cuts = Vec::with_capacity(modules - 1);
    let mut end = blocks;
    for m in (2..=modules).rev() {
        end = from[m][end];
        cuts.push(starts[end]);
    }
    cuts.reverse();
    Ok(cuts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_part_is_as_small_as_exhaustive_search_finds() {
        let costs = [5.0, 1.0, 1.0, 7.0, 2.0, 2.0, 3.0, 1.0];
        let allowed = [true, false, true, true, true, false, true, true];
        let largest = |cuts: &[usize]| {
            let mut ends = cuts.to_vec();
            ends.push(costs.len());
            let mut start = 0;
            let mut max: f64 = 0.0;
            for end in ends {
                max = max.max(costs[start..end].iter().sum());
                start = end;
            }
            max
        };
        for modules in 1..=6 {
            let cuts = balanced_cuts(&costs, &allowed, modules).unwrap();
            assert_eq!(cuts.len(), modules - 1);
            assert!(cuts.windows(2).all(|w| w[0] < w[1]) && cuts.iter().all(|&c| c > 0 && allowed[c]));
            let mut best = f64::INFINITY;
            for mask in 0u32..1 << costs.len() {
                let trial: Vec<usize> = (1..costs.len()).filter(|&n| mask >> n & 1 == 1 && allowed[n]).collect();
                if trial.len() == modules - 1 && mask & 1 == 0 {
                    best = best.min(largest(&trial));
                }
            }
            assert_eq!(largest(&cuts), best, "{modules} modules: {cuts:?}");
        }
        assert!(balanced_cuts(&costs, &allowed, 7).unwrap_err().to_string().contains("1 to 6 modules"));
    }
}
