//! Cutting networks: against exhaustive search on random instances.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sideways::graph::{Edge, Graph};
use sideways::plan::partition::{Piece, partition, pieces};

/// A number from 0 to below 1 that depends on nothing but its arguments.
fn noise(seed: u64, of: &[usize]) -> f64 {
    let bytes: Vec<u8> = of.iter().flat_map(|n| n.to_le_bytes()).collect();
    (xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, seed) >> 11) as f64 / (1u64 << 53) as f64
}

/// Every way to choose `count` growing cuts from 1..blocks.
fn all_cuts(blocks: usize, count: usize) -> Vec<Vec<usize>> {
    let masks = 0u32..1 << (blocks - 1);
    let chosen = masks.filter(|mask| mask.count_ones() as usize == count);
    chosen.map(|mask| (1..blocks).filter(|n| mask >> (n - 1) & 1 == 1).collect()).collect()
}

/// Random chains with random skips; costs that depend on the module's number, on its blocks and on where skips come from, some
/// of them impossible.
#[test]
fn no_way_to_cut_is_better_than_the_one_found() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut below = |n: usize| (rng.next_u64() % n as u64) as usize;
    let (mut possible, mut refused, mut with_skips) = (0, 0, 0);
    for case in 0..400u64 {
        let blocks = 1 + below(10);
        let modules = 1 + below(blocks);
        let mut skips = Vec::new();
        for to in 3..=modules {
            for from in 1..=to - 2 {
                if below(4) == 0 {
                    skips.push(Edge { from, to, delay: 1 });
                }
            }
        }
        with_skips += usize::from(!skips.is_empty());
        let graph = Graph::new(modules, &skips).unwrap();
        let block: Vec<f64> = (0..blocks).map(|b| noise(case, &[b])).collect();
        let mut cost = |p: &Piece| {
            let own: f64 = block[p.start..p.end].iter().sum();
            let mut cost = own * (1.0 + 0.2 * noise(case, &[p.module, 77])) + 0.2 * noise(case, &[p.start, p.end]);
            for &from in &p.skips {
                assert!(from <= p.start && from > 0);
                let extra = noise(case, &[from, p.start, 9]);
                if extra > 0.8 {
                    return None;
                }
                cost += 0.3 * extra;
            }
            Some(cost)
        };
        let mut judge = |cuts: &[usize]| -> Option<(f64, f64)> {
            let costs: Option<Vec<f64>> = pieces(cuts, blocks, &graph).iter().map(&mut cost).collect();
            costs.map(|c| (c.iter().copied().fold(0.0, f64::max), c.iter().sum()))
        };
        let all: Vec<(f64, f64)> = all_cuts(blocks, modules - 1).iter().filter_map(|c| judge(c)).collect();
        let least = all.iter().map(|(largest, _)| *largest).fold(f64::INFINITY, f64::min);
        let slack = [0.0, 0.1][below(2)];
        let near = all.iter().filter(|(largest, _)| *largest <= least * (1.0 + slack));
        let total = near.map(|(_, total)| *total).fold(f64::INFINITY, f64::min);
        match partition(blocks, &graph, slack, &mut cost) {
            Ok(found) => {
                possible += 1;
                assert!(found.exact);
                assert_eq!(found.cuts.len(), modules - 1);
                // Whole and in order: no block is dropped, none is in two modules.
                let covered: Vec<usize> =
                    pieces(&found.cuts, blocks, &graph).iter().flat_map(|p| p.start..p.end).collect();
                assert_eq!(covered, (0..blocks).collect::<Vec<_>>());
                assert!(pieces(&found.cuts, blocks, &graph).iter().all(|p| p.start < p.end));
                let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs().max(1.0);
                assert!(found.largest <= least * (1.0 + slack) + 1e-12, "case {case}: {found:?}, least {least}");
                assert!(close(found.total, total), "case {case}: {found:?}, total {total}");
            }
            Err(e) => {
                refused += 1;
                assert!(all.is_empty(), "case {case}: {e}");
            }
        }
    }
    assert!(possible > 200 && refused > 20 && with_skips > 100, "{possible} {refused} {with_skips}");
}
