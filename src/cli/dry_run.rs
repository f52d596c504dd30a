//! `sideways train --dry-run`: a whole configuration checked on a laptop, without ranks or data.

use bytesize::ByteSize;

use crate::Result;
use crate::cli::output::table;
use crate::cli::train::notes;
use crate::comm::Kind;
use crate::config::{Config, DeviceChoice, Precision};
use crate::network::blocks::Blocks;
use crate::plan::cut::resume_cut;
use crate::plan::predict::{Parts, best_cuts, conditions};
use crate::plan::profile::Profile;
use crate::setup::Setup;
use crate::setup::footprint::{gpu_memory, memory, sent};
use crate::sys::cpus::at_once;

/// Plans the run for `ranks` ranks (default: one a module, or one where the cut is open) and prints each rank's share.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(config: &Config, ranks: Option<usize>) -> Result<()> {
    let mut config = config.clone();
    resume_cut(&mut config)?;
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).unwrap_or(1);
    let wanted = if config.train.rule.is_exact() { 1 } else { ranks.unwrap_or(modules * config.train.replicas) };
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
        let (i, r) = grid.module_and_replica(w);
        let module = &setup.network.modules[i - 1];
        format!(
            "{}\t{r}\t{i}\t{}-{}\t{:?}\t{:?}\t{}\t{:.3}\t{}\t{}",
            grid.rank_of(w),
            module.layers.start,
            module.layers.end - 1,
            module.main,
            module.output,
            module.params,
            // Forward, and as much again for each of the two gradients.
            3.0 * (module.flops * config.data.batch as u64) as f64 / 1e9,
            ByteSize(needed(&setup, w)),
            ByteSize(sent(&setup, w, &[Kind::Activation, Kind::Cotangent, Kind::Target])),
        )
    };
    table(0, header, (0..grid.workers()).map(row));
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

/// Bytes of worker `w`'s memory, where it computes.
fn needed(setup: &Setup, w: usize) -> u64 {
    match (setup.config.run.device, setup.config.run.precision) {
        (DeviceChoice::Cuda, Precision::Bf16) => gpu_memory(setup, w, 2),
        (DeviceChoice::Cuda, _) => gpu_memory(setup, w, 4),
        _ => memory(setup, w),
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
