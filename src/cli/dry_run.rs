//! `sideways train --dry-run`: a whole configuration checked on a laptop, without ranks or data.

use crate::Result;
use crate::config::{Config, Rule};
use crate::engine::setup::Setup;
use crate::optim::OptimizerSpec;
use crate::plan::blocks::Blocks;
use crate::plan::cut::resume_cut;
use crate::plan::machine::at_once;
use crate::plan::predict::{Parts, best_cuts, conditions};
use crate::plan::profile::Profile;
use crate::transport::{HEADER_WORDS, Kind};

/// Plans the run for `ranks` ranks (default: one a module, or one where the cut is open) and prints each rank's share.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(config: &Config, ranks: Option<usize>) -> Result<()> {
    let mut config = config.clone();
    resume_cut(&mut config)?;
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).unwrap_or(1);
    let wanted = if config.train.rule == Rule::Bp { 1 } else { ranks.unwrap_or(modules * config.train.replicas) };
    let mut setup = Setup::dry(&config, wanted)?;
    if config.cut_is_open() && setup.grid.modules > 1 {
        let measured = measured_cuts(&setup, wanted)?;
        println!(
            "the cut is open: {}",
            if measured.is_some() {
                "planned by the layers' times, as measured before"
            } else {
                "by arithmetic here; training plans it by the layers' times (see `sideways plan`)"
            }
        );
        if let Some(cuts) = measured {
            setup = setup.recut(cuts)?;
        }
    }
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

/// The cut that training would plan, where the layers have been measured for it before.
fn measured_cuts(setup: &Setup, ranks: usize) -> Result<Option<Vec<usize>>> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let busy = ranks.min(at_once(setup.config.run.threads));
    let times = Profile::cached(&conditions(setup, busy, Parts::Blocks(&blocks)));
    times.map(|times| Ok(best_cuts(setup, &blocks, &times)?.0)).transpose()
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
