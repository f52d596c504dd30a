//! `sideways train --dry-run`: a whole configuration checked on a laptop, without ranks or data.

use bytesize::ByteSize;

use crate::cli::output::table;
use crate::cli::train::notes;
use crate::comm::{Kind, World};
use crate::config::{Config, DeviceChoice, Rule};
use crate::network::blocks::Blocks;
use crate::plan::cut::resume_cut;
use crate::plan::predict::{Parts, best_cuts, conditions};
use crate::plan::profile::Profile;
use crate::setup::Setup;
use crate::setup::footprint::{device_memory, sent};
use crate::setup::grid::Grid;
use crate::sys::cpus::at_once;
use crate::trainer::resume;
use crate::{Error, Result};

/// Ranks to plan for, and cores of each, at most.
pub(super) const MOST_RANKS: usize = 1 << 20;

/// Plans the run for `ranks` ranks (default: one a module, or one where the cut is open) and prints each module's share.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(config: &Config, ranks: Option<usize>) -> Result<()> {
    let mut config = config.clone();
    if let Some(ranks) = ranks.filter(|ranks| !(1..=MOST_RANKS).contains(ranks)) {
        return Err(Error::input(format!("--ranks {ranks}: it must be 1..={MOST_RANKS}")));
    }
    resume_cut(&mut config)?;
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).unwrap_or(1);
    let wanted = if config.train.rule == Rule::Bp { 1 } else { ranks.unwrap_or(modules * config.train.replicas) };
    let mut setup = Setup::dry(&config, wanted)?;
    if config.cut_is_open() && setup.grid.modules > 1 {
        let measured = measured_cuts(&setup, wanted)?;
        outln!(
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
    if let Some(dataset) = &setup.dataset {
        // What the first tick would find.
        setup.stream(0, 0, setup.total_batches()?).fits(dataset)?;
        resume::range(&setup, &World::Alone, None)?;
    }
    let grid = setup.grid;
    outln!(
        "{} modules x {} replicas on {} ranks; frames {:?} (height, width, channels), T = {}, B = {}",
        grid.modules,
        grid.replicas,
        grid.ranks,
        setup.network.input,
        config.data.frames,
        config.data.batch
    );
    for note in notes(&setup) {
        outln!("{note}");
    }
    for warning in setup.warnings() {
        outln!("warning: {warning}");
    }
    let header = "rank\treplica\tmodule\tlayers\tinput\toutput\tparameters\tGFLOP/tick\tmemory\tsent/tick";
    let row = |w: usize| {
        let (i, _) = grid.module_and_replica(w);
        let module = &setup.network.modules[i - 1];
        format!(
            "{i}\t{}-{}\t{:?}\t{:?}\t{}\t{:.3}\t{}\t{}",
            module.layers.start,
            module.layers.end - 1,
            module.main,
            module.output,
            module.params,
            // Forward, and as much again for each of the two gradients.
            3.0 * module.flops as f64 * config.data.batch as f64 / 1e9,
            ByteSize(device_memory(&setup, w)),
            ByteSize(sent(&setup, w, &[Kind::Activation, Kind::Cotangent, Kind::Target])),
        )
    };
    table(0, header, folded(grid, row));
    match config.run.device {
        DeviceChoice::Cuda => outln!(
            "memory: the GPU's, for parameters, gradient, optimizer and a copy of these, activations, messages; without cuDNN's \
             workspace and the driver's own"
        ),
        _ => {
            outln!(
                "memory: parameters, gradient, optimizer, the activations kept, message buffers; without the program"
            )
        }
    }
    Ok(())
}

/// A row for each module of each replica, `row` but for its first two columns: ranks and replicas. Replicas that follow each other
/// and differ in nothing else share one.
fn folded(grid: Grid, row: impl Fn(usize) -> String) -> Vec<String> {
    let mut rows = Vec::new();
    // By module, the first replica of the row that is not finished.
    let mut open: Vec<(usize, String)> = Vec::new();
    let finish = |i: usize, (first, row): &(usize, String), end: usize| {
        let mut ranks: Vec<usize> = (*first..end).map(|r| grid.rank_of(grid.worker(i, r))).collect();
        ranks.dedup();
        let replicas = if end - first == 1 { first.to_string() } else { format!("{first}-{}", end - 1) };
        (*first, format!("{}\t{replicas}\t{row}", some(&ranks)))
    };
    for r in 0..grid.replicas {
        for i in 1..=grid.modules {
            let row = row(grid.worker(i, r));
            match open.get_mut(i - 1) {
                None => open.push((r, row)),
                Some(other) if other.1 == row => {}
                Some(other) => {
                    rows.push(finish(i, other, r));
                    *other = (r, row);
                }
            }
        }
    }
    rows.extend(open.iter().enumerate().map(|(n, last)| finish(n + 1, last, grid.replicas)));
    // Replica by replica, and within one as its modules are.
    rows.sort_by_key(|(first, _)| *first);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// `0`, `0, 6`, or `0, 16 … 4080`.
fn some(ranks: &[usize]) -> String {
    match ranks {
        [first, second, _, .., last] => format!("{first}, {second} … {last}"),
        few => few.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// The cut that training would plan, where the layers have been measured for it before.
fn measured_cuts(setup: &Setup, ranks: usize) -> Result<Option<Vec<usize>>> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let busy = ranks.min(at_once(setup.config.run.threads));
    let times =
        conditions(setup, busy, Parts::Blocks(&blocks)).ok().and_then(|conditions| Profile::cached(&conditions));
    times.map(|times| Ok(best_cuts(setup, &blocks, &times)?.0)).transpose()
}
