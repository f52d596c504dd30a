//! Cutting networks against exhaustive search on random instances; predictions where the answer is known.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sideways::config::Config;
use sideways::method::graph::{Edge, Graph};
use sideways::network::blocks::Blocks;
use sideways::network::partition::{Piece, partition, pieces};
use sideways::network::{EdgeSpec, Network};
use sideways::plan::cluster::{Cluster, Interconnect};
use sideways::plan::predict::{Parts, best_cuts, conditions, sums_of_blocks};
use sideways::plan::profile::{Profile, Times};
use sideways::plan::simulate::{Processors, StepCost, simulate};
use sideways::setup::Setup;

use crate::common::runs::LAYERS;

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

fn planned(text: &str, ranks: usize) -> Setup {
    Setup::dry(&Config::parse(text, "test", &[]).unwrap(), ranks).unwrap()
}

/// At 112 pixels resnet50's last stage has 4x4 where the one before has 7x7: skips across that cost no balance. Sixteen modules of 18
/// blocks, of which no cut can part one: the costliest holds one block of 7x7 and 1024 to 4x4 and 2048 channels, with its adapter.
#[test]
fn skips_between_sizes_leave_the_cut_balanced() {
    let text = "[data]\ncrop = 112\nframes = 64\nbatch = 1\n[model]\npreset = 'resnet50'\nclasses = 10\nmodules = 16\n";
    let [plain, skips] =
        [String::new(), "skip = { spans = [2] }\n".into()].map(|skip| planned(&(text.to_string() + &skip), 16));
    let sizes = |e: &EdgeSpec| [skips.network.modules[e.edge.from - 1].output, e.shape].map(|s| [s[0], s[1]]);
    assert!(skips.network.edges.iter().any(|e| sizes(e) == [[7, 7], [4, 4]]), "no skip from 7x7 to 4x4");
    let balance = |setup: &Setup| {
        let costs: Vec<f64> = setup.network.modules.iter().map(|m| m.flops as f64).collect();
        costs.iter().sum::<f64>() / costs.len() as f64 / costs.iter().copied().fold(0.0, f64::max)
    };
    // Where such skips were refused, 0.28.
    let (with, without) = (balance(&skips), balance(&plain));
    assert!(with > 0.6 && with > 0.85 * without, "{with}, without skips {without}");
}

/// Frames of 1x8 pixels that become 1x3 and 2x6, so that a skip would have to shrink one way and grow the other: cuts go around it, and
/// where there is no way the error says which skip and why.
#[test]
fn cuts_go_around_skips_that_do_not_fit() {
    let text = "[model]\nlayers = [{ kind = 'conv2d', out = 16, kernel = 1 }, \
        { kind = 'conv2d', out = 4, kernel = 3, stride = 4, padding = 2 }, { kind = 'upsample', factor = 2 }, \
        { kind = 'conv2d', out = 8, kernel = 1 }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]\n";
    let network = |modules: usize, skip: &str| {
        let text = format!("{text}modules = {modules}\n{skip}");
        Network::new(&Config::parse(&text, "test", &[]).unwrap(), [1, 8, 3], 4, modules)
    };
    let starts = |n: &Network| n.modules.iter().map(|m| m.layers.start).collect::<Vec<_>>();
    assert_eq!(starts(&network(3, "").unwrap()), [0, 1, 3]);
    let around = network(3, "skip = { spans = [2] }").unwrap();
    assert_ne!(starts(&around), [0, 1, 3]);
    assert_eq!(around.modules.iter().map(|m| m.layers.len()).sum::<usize>(), around.layers.len());
    let error = network(4, "skip = { spans = [2] }").unwrap_err();
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2);
    for part in ["module 1 -> 3 (skip)", "1x8 pixels", "module 3 has 2x6", "both shrink", "other skips or cuts"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Modules of the small test network, `frames` frames a clip.
fn chain(modules: usize, frames: usize, skip: &str) -> Setup {
    chain_of(modules, frames, skip, modules)
}

fn chain_of(modules: usize, frames: usize, skip: &str, ranks: usize) -> Setup {
    let layers = LAYERS.replace('\n', " ");
    let text = format!(
        "[data]\ncrop = 8\nframes = {frames}\nbatch = 2\n[model]\nlayers = {layers}\nclasses = 4\n\
         modules = {modules}\n{skip}\n"
    );
    planned(&text, ranks)
}

/// A module takes as long as its blocks, and to join a skip.
#[test]
fn modules_times_are_sums_of_their_blocks() {
    let times = |b: usize| {
        let k = (b + 1) as f64;
        Times { forward: k, backward: 10.0 * k, backward_leaf: 4.0 * k, update: 100.0 * k }
    };
    for (skip, joins) in [("", false), ("skip = { spans = [2] }", true)] {
        let setup = chain(3, 8, skip);
        let blocks = Blocks::new(&setup.network.layers, setup.network.input).unwrap();
        let profile = Profile {
            conditions: conditions(&setup, 1, Parts::Blocks(&blocks)).unwrap(),
            taken: 0,
            copy: 1e9,
            times: (0..blocks.len()).map(times).collect(),
            assumed: None,
            file: None,
            cached: false,
        };
        let (cuts, found) = best_cuts(&setup, &blocks, &profile).unwrap();
        let setup = setup.recut(cuts).unwrap();
        let sums = sums_of_blocks(&setup, &blocks, &profile, &found.cuts).unwrap();
        assert_eq!(sums.conditions, conditions(&setup, 1, Parts::Modules).unwrap());
        let bounds: Vec<usize> = [0].into_iter().chain(found.cuts).chain([blocks.len()]).collect();
        for (i, of) in sums.times.iter().enumerate() {
            let inside: Vec<Times> = (bounds[i]..bounds[i + 1]).map(times).collect();
            let sum = |part: fn(&Times) -> f64| inside.iter().map(part).sum::<f64>();
            let leaf = sum(|t| t.backward) - inside[0].backward + inside[0].backward_leaf;
            let pairs = [
                (of.forward, sum(|t| t.forward)),
                (of.backward, sum(|t| t.backward)),
                (of.backward_leaf, leaf),
                (of.update, sum(|t| t.update)),
            ];
            for (k, (found, wanted)) in pairs.into_iter().enumerate() {
                let longer = joins && i == 2 && k < 3;
                assert!(if longer { found > wanted } else { found == wanted }, "module {}: {found} {wanted}", i + 1);
            }
        }
    }
}

/// With equal modules a batch takes as long as T + D - 1 steps, whatever joins them: the bubble is (D - 1) / (T + D - 1).
#[test]
fn a_simulated_bubble_is_that_of_the_method() {
    let cost = StepCost { forward: 1.0, backward: 1.0, backward_leaf: 1.0, update: 0.0 };
    for skip in ["", "skip = { spans = [2, 3, 4] }", "skip = { spans = [2, 4], delay = 'aligned' }"] {
        for (rule, frames) in [("1f1b", 20), ("1f1b", 8), ("1f1b", 3), ("gpipe", 20), ("gpipe", 3)] {
            let setup = chain(5, frames, &format!("{skip}\n[train]\nrule = \"{rule}\""));
            let outcome = simulate(&setup, &[cost; 5], &Processors::of_ranks(5, 1), None);
            let steps = (frames + 4) as f64;
            assert!((outcome.tick * frames as f64 - 2.0 * steps).abs() < 1e-9, "{rule} {frames} {skip}: {outcome:?}");
            let bubble = 1.0 - outcome.busy[0] / outcome.tick;
            assert!((bubble - 4.0 / steps).abs() < 1e-9 && (setup.schedule.bubble() - bubble).abs() < 1e-9, "{bubble}");
        }
    }
}

#[test]
fn a_simulated_tick_is_that_of_the_slowest_or_of_all() {
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9 * b.max(1.0), "{a} is not {b}");
    let cost = |forward: f64, backward: f64| StepCost { forward, backward, backward_leaf: backward, update: 0.0 };
    for skip in ["", "skip = { spans = [2, 3] }", "skip = { spans = [2], delay = 'aligned' }"] {
        // Long clips: nearly all steps have backward work, and the last module's always.
        let setup = chain(5, 400, skip);
        let mut costs = vec![cost(1.0, 2.0); 5];
        costs[4] = cost(3.0, 5.0);
        let own = Processors::of_ranks(5, 1);
        near(simulate(&setup, &costs, &own, None).tick, 8.0);
        // On one processor everything adds up: forward at every step, backward where the schedule has it.
        let one = chain(5, 40, skip);
        let expected: f64 = (1..=5)
            .map(|i| {
                let share = one.schedule.backwards(i).count() as f64 / 40.0;
                costs[i - 1].forward + share * costs[i - 1].backward
            })
            .sum();
        let shared = Processors { pool_of_rank: vec![0; 5], slots: vec![1] };
        let outcome = simulate(&one, &costs, &shared, None);
        near(outcome.tick, expected);
        near(outcome.busy.iter().sum(), expected);
        // Two processors for five modules: no faster than half, no slower than one.
        let two = simulate(&one, &costs, &Processors { pool_of_rank: vec![0; 5], slots: vec![2] }, None);
        assert!(two.tick >= expected / 2.0 - 1e-9 && two.tick < expected, "{}", two.tick);
    }
    // One module: forward, backward, and an update a clip.
    let alone = chain(1, 10, "");
    let cost = StepCost { forward: 1.0, backward: 9.0, backward_leaf: 2.0, update: 5.0 };
    near(simulate(&alone, &[cost], &Processors::of_ranks(1, 1), None).tick, 3.0 + 0.5);
}

fn cluster(latency: f64, bandwidth: f64, spread: f64) -> Cluster {
    let way = Interconnect::new(latency, bandwidth);
    Cluster { ranks_per_node: 4, nodes_per_switch: 2, core: way, node: way, switch: way, spread }
}

/// Where links are slow, three ticks are a message's way there and back: module 1's forward pass of step t + 3 comes behind its
/// backward pass of step t + 2, which needs what module 2 makes of step t.
#[test]
fn a_simulated_tick_is_no_shorter_than_a_message_s_way() {
    let near = |a: f64, b: f64| assert!((a - b).abs() < 0.02 * b, "{a} is not {b}");
    let cost = StepCost { forward: 1e-9, backward: 1e-9, backward_leaf: 1e-9, update: 0.0 };
    let setup = chain(2, 50, "");
    let own = Processors::of_ranks(2, 1);
    near(simulate(&setup, &[cost; 2], &own, Some(&cluster(1.0, 1e30, 0.0))).tick, 2.0 / 3.0);
    // A message of 2 samples of 8 x 8 (or fewer) pixels: bytes over bandwidth.
    let bytes = 4.0 * 2.0 * setup.network.edges[0].shape.iter().product::<usize>() as f64;
    let bound = simulate(&setup, &[cost; 2], &own, Some(&cluster(0.0, bytes, 0.0))).tick;
    assert!((0.6..0.7).contains(&bound), "{bound} of one second a message");
    // Work that is longer than the way hides it; nothing is free of it under 1f1b, which fills and drains through all links.
    let cost = StepCost { forward: 5.0, backward: 5.0, backward_leaf: 5.0, update: 0.0 };
    near(simulate(&setup, &[cost; 2], &own, Some(&cluster(1.0, 1e30, 0.0))).tick, 10.0);
    let exact = chain(2, 50, "[train]\nrule = \"1f1b\"");
    let tick = |cluster: Option<&Cluster>| simulate(&exact, &[cost; 2], &own, cluster).tick;
    assert!(tick(Some(&cluster(1.0, 1e30, 0.0))) > tick(None) + 1.9 / 50.0);
}

/// The mean of gradients over replicas, as literals: a pair exchanges halves twice; fours of pairs in two rounds.
#[test]
fn an_all_reduce_takes_its_rounds() {
    let replicas = |n: usize| {
        let layers = LAYERS.replace('\n', " ");
        let text = format!(
            "[data]\ncrop = 8\nframes = 8\nbatch = 2\n[model]\nlayers = {layers}\nclasses = 4\nmodules = 1\n[train]\nreplicas = {n}\n"
        );
        planned(&text, n)
    };
    let bytes = 4.0 * replicas(2).network.modules[0].params as f64;
    let near = |a: f64, b: f64| assert!((a - b).abs() < 0.01 * b, "{a} is not {b}");
    let slow = cluster(0.0, 1.0, 0.0);
    assert_eq!(slow.all_reduce(&replicas(1), 1), 0.0);
    for n in [2, 3, 4, 8] {
        near(slow.all_reduce(&replicas(n), 1), 2.0 * bytes * (n - 1) as f64 / n as f64);
    }
    // Rounds: one of two members or four, or one of four and one of two; there and back.
    let far = cluster(1.0, 1e30, 0.0);
    assert_eq!([2, 4, 8].map(|n| far.all_reduce(&replicas(n), 1).round()), [2.0, 2.0, 4.0]);
    // It is in the tick: once a batch of 8 frames.
    let cost = StepCost { forward: 1.0, backward: 1.0, backward_leaf: 1.0, update: 0.0 };
    let outcome = simulate(&replicas(8), &[cost; 8], &Processors::of_ranks(8, 1), Some(&far));
    near(outcome.tick, 2.0 + 4.0 / 8.0);
}

/// Ranks differ in distance; and uneven steps cost more, the more ranks wait for each other.
#[test]
fn stragglers_cost_more_on_more_ranks() {
    let uneven = Cluster { spread: 0.2, ..cluster(0.0, 1e30, 0.0) };
    let way = |latency| Interconnect::new(latency, 1e30);
    let far = Cluster { core: way(1.0), node: way(2.0), switch: way(4.0), ..uneven.clone() };
    assert_eq!([1, 3, 4, 7, 8, 100].map(|to| far.seconds(0, to, 0)), [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]);
    assert_eq!(far.seconds(5, 5, 1), 0.0);
    let cost = StepCost { forward: 1.0, backward: 1.0, backward_leaf: 1.0, update: 0.0 };
    let tick = |modules: usize, replicas: usize| {
        let setup = chain_of(modules, 40, &format!("[train]\nreplicas = {replicas}"), modules * replicas);
        simulate(&setup, &vec![cost; modules * replicas], &Processors::of_ranks(modules * replicas, 1), Some(&uneven))
            .tick
    };
    let (one, few, many) = (tick(1, 1), tick(4, 1), tick(4, 256));
    assert!((one - 2.0).abs() < 0.05, "one rank waits for nobody: {one}");
    assert!(few > one + 0.02 && many > few + 0.05, "{one} {few} {many}");
    assert!(many < 3.0, "{many}");
}

#[test]
fn a_cluster_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cluster.toml");
    let good = "ranks_per_node = 4\nnodes_per_switch = 2\ncore = { latency = 1e-6, bandwidth = 1e10 }\n\
                node = { latency = 2e-6, bandwidth = 1e10 }\nswitch = { latency = 2e-6, bandwidth = 1e10 }\n";
    std::fs::write(&path, good).unwrap();
    assert_eq!(Cluster::load(&path).unwrap().ranks_per_node, 4);
    for (from, to, what) in [
        ("ranks_per_node = 4", "ranks_per_node = 0", "at least 1"),
        ("latency = 1e-6", "latency = -1.0", "core"),
        ("ranks_per_node", "ranks_a_node", "ranks_a_node"),
    ] {
        std::fs::write(&path, good.replace(from, to)).unwrap();
        let error = Cluster::load(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(what) && error.to_string().contains("cluster.toml"), "{error}");
    }
}
