//! `sideways train --dry-run`: a whole configuration checked on a laptop, without ranks or data.

use crate::Result;
use crate::config::Config;
use crate::engine::setup::Setup;
use crate::optim::OptimizerSpec;
use crate::transport::{HEADER_WORDS, Kind};

/// Plans the run for `ranks` ranks (default: one a module) and prints each rank's share.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(config: &Config, ranks: Option<usize>) -> Result<()> {
    let wanted = match (ranks, config.model.modules, &config.model.cuts) {
        (Some(ranks), ..) => ranks,
        (None, Some(modules), _) => modules * config.train.replicas,
        (None, None, Some(cuts)) => (cuts.len() + 1) * config.train.replicas,
        (None, None, None) => config.train.replicas,
    };
    let bp = config.train.rule == crate::config::Rule::Bp;
    let setup = Setup::dry(config, if bp { 1 } else { wanted })?;
    let grid = setup.grid;
    println!(
        "{} modules x {} replicas on {} ranks; frames {:?} (height, width, channels), T = {}, B = {}",
        grid.modules, grid.replicas, grid.ranks, setup.network.input, config.data.frames, config.data.batch
    );
    for warning in setup.warnings() {
        println!("warning: {warning}");
    }
    println!(
        "{:>4} {:>7} {:>4} {:>10} {:>15} {:>15} {:>11} {:>10} {:>10} {:>10}",
        "rank", "replica", "mod", "layers", "input", "output", "parameters", "GFLOP/tick", "memory", "sent/tick"
    );
    for w in 0..grid.workers() {
        let (i, r) = grid.module_and_replica(w);
        let module = &setup.network.modules[i - 1];
        println!(
            "{:>4} {:>7} {:>4} {:>10} {:>15} {:>15} {:>11} {:>10.3} {:>10} {:>10}",
            grid.rank_of(w),
            r,
            i,
            format!("{}-{}", module.layers.start, module.layers.end - 1),
            format!("{:?}", module.main),
            format!("{:?}", module.output),
            module.params,
            // Forward, and as much again for each of the two gradients.
            3.0 * (module.flops * config.data.batch as u64) as f64 / 1e9,
            bytes(memory(&setup, w)),
            bytes(sent(&setup, w, &[Kind::Activation, Kind::Cotangent, Kind::Target])),
        );
    }
    println!("memory: parameters, gradient, optimizer, one step's activations, message buffers; without the program");
    Ok(())
}

/// Bytes worker `w` keeps: what is allocated at the start and does not grow with the clip's length.
pub(super) fn memory(setup: &Setup, w: usize) -> u64 {
    let (i, _) = setup.grid.module_and_replica(w);
    let module = &setup.network.modules[i - 1];
    let copies = 2 + match setup.config.train.optimizer {
        OptimizerSpec::Sgd { momentum: 0.0, .. } => 0,
        OptimizerSpec::Sgd { .. } => 1,
        OptimizerSpec::Adamw { .. } => 2,
        OptimizerSpec::Rmsprop { momentum: 0.0, .. } => 1,
        OptimizerSpec::Rmsprop { .. } => 2,
    };
    let links = setup.wiring.links.iter().filter(|l| l.from == w || l.to == w);
    let buffers: usize = links.map(|l| l.depth * (l.words + HEADER_WORDS)).sum();
    4 * (copies * module.params + setup.config.data.batch as u64 * module.tape + buffers as u64)
}

/// Bytes of messages of these kinds that worker `w` sends at a tick at which it sends on every edge.
pub(super) fn sent(setup: &Setup, w: usize, kinds: &[Kind]) -> u64 {
    let links = setup.wiring.links.iter().filter(|l| l.from == w && kinds.contains(&l.kind));
    links.map(|l| 4 * (l.words + HEADER_WORDS) as u64).sum()
}

/// `12.3 MiB`
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}
