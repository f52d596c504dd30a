//! `sideways train --dry-run`: a whole configuration checked on a laptop, without ranks or data.

use bytesize::ByteSize;
use serde::Serialize;

use crate::cli::output::{json, table};
use crate::comm::{Kind, World};
use crate::config::{Config, DeviceChoice, Rule};
use crate::network::blocks::Blocks;
use crate::plan::cut::resume_cut;
use crate::plan::predict::{Parts, best_cuts, conditions};
use crate::plan::profile::Profile;
use crate::setup::Setup;
use crate::setup::footprint::{device_memory, sent};
use crate::sys::cpus::at_once;
use crate::trainer::resume;
use crate::{Error, Result};

/// Ranks to plan for, and cores of each, at most.
pub(super) const MOST_RANKS: usize = 1 << 20;

/// A module's share.
#[derive(Clone, PartialEq, Serialize)]
struct Share {
    module: usize,
    /// The first, and the one behind the last.
    layers: [usize; 2],
    /// Height, width, channels.
    input: [usize; 3],
    output: [usize; 3],
    parameters: u64,
    gflop_per_tick: f64,
    memory_bytes: u64,
    sent_bytes_per_tick: u64,
}

impl Share {
    fn of(setup: &Setup, w: usize) -> Self {
        let (i, _) = setup.grid.module_and_replica(w);
        let module = &setup.network.modules[i - 1];
        Share {
            module: i,
            layers: [module.layers.start, module.layers.end],
            input: module.main,
            output: module.output,
            parameters: module.params,
            // Forward, and as much again for each of the two gradients.
            gflop_per_tick: 3.0 * module.flops as f64 * setup.config.data.batch as f64 / 1e9,
            memory_bytes: device_memory(setup, w),
            sent_bytes_per_tick: sent(setup, w, &[Kind::Activation, Kind::Cotangent, Kind::Target]),
        }
    }

    /// Whether they are the same but for bytes that nobody is shown: the first modules of few replicas have some more links than others.
    fn looks_like(&self, other: &Share) -> bool {
        let same = |a: u64, b: u64| a == b || ByteSize(a).to_string() == ByteSize(b).to_string();
        let shown =
            Share { memory_bytes: self.memory_bytes, sent_bytes_per_tick: self.sent_bytes_per_tick, ..other.clone() };
        *self == shown
            && same(self.memory_bytes, other.memory_bytes)
            && same(self.sent_bytes_per_tick, other.sent_bytes_per_tick)
    }

    /// Keeps the larger of both numbers of bytes.
    fn take_most(&mut self, other: &Share) {
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
        self.sent_bytes_per_tick = self.sent_bytes_per_tick.max(other.sent_bytes_per_tick);
    }
}

/// The same module of replicas that follow each other and differ in nothing else.
#[derive(Serialize)]
struct Row {
    ranks: Vec<usize>,
    /// The first, and the last.
    replicas: [usize; 2],
    #[serde(flatten)]
    share: Share,
}

/// Plans the run for `ranks` ranks (default: one a module, or one where the cut is open) and prints each module's share.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(config: &Config, ranks: Option<usize>, as_json: bool) -> Result<()> {
    let mut config = config.clone();
    if let Some(ranks) = ranks.filter(|ranks| !(1..=MOST_RANKS).contains(ranks)) {
        return Err(Error::input(format!("--ranks {ranks}: it must be 1..={MOST_RANKS}")));
    }
    resume_cut(&mut config)?;
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).unwrap_or(1);
    let wanted = if config.train.rule == Rule::Bp { 1 } else { ranks.unwrap_or(modules * config.train.replicas) };
    let mut setup = Setup::dry(&config, wanted)?;
    let mut notes = Vec::new();
    if config.cut_is_open() && setup.grid.modules > 1 {
        let measured = measured_cuts(&setup, wanted)?;
        notes.push(match measured {
            Some(_) => "the cut is open: planned by the layers' times, as measured before".to_string(),
            None => "the cut is open: by arithmetic here; training plans it by the layers' times (see `sideways plan`)"
                .into(),
        });
        if let Some(cuts) = measured {
            setup = setup.recut(cuts)?;
        }
    }
    if let Some(dataset) = &setup.dataset {
        // What the first tick would find.
        setup.stream(0, 0, setup.total_batches()?).fits(dataset)?;
        resume::range(&setup, &World::Alone, None)?;
    }
    notes.extend(super::train::notes(&setup));
    let rows = rows(&setup);
    if as_json {
        let grid = setup.grid;
        return json(&serde_json::json!({
            "modules": grid.modules, "replicas": grid.replicas, "ranks": grid.ranks, "cuts": setup.cuts(),
            "frame": setup.network.input, "frames": config.data.frames, "batch": config.data.batch,
            "notes": notes, "warnings": setup.warnings(), "shares": rows,
        }));
    }
    print(&setup, &notes, &rows);
    Ok(())
}

fn print(setup: &Setup, notes: &[String], rows: &[Row]) {
    let (grid, config) = (setup.grid, &setup.config);
    outln!(
        "{} modules x {} replicas on {} ranks; frames {:?} (height, width, channels), T = {}, B = {}",
        grid.modules,
        grid.replicas,
        grid.ranks,
        setup.network.input,
        config.data.frames,
        config.data.batch
    );
    for note in notes {
        outln!("{note}");
    }
    for warning in setup.warnings() {
        outln!("warning: {warning}");
    }
    let header = "rank\treplica\tmodule\tlayers\tinput\toutput\tparameters\tGFLOP/tick\tmemory\tsent/tick";
    let line = |row: &Row| {
        let Row { ranks, replicas: [first, last], share } = row;
        let replicas = if first == last { first.to_string() } else { format!("{first}-{last}") };
        format!(
            "{}\t{replicas}\t{}\t{}-{}\t{:?}\t{:?}\t{}\t{:.3}\t{}\t{}",
            some(ranks),
            share.module,
            share.layers[0],
            share.layers[1] - 1,
            share.input,
            share.output,
            share.parameters,
            share.gflop_per_tick,
            ByteSize(share.memory_bytes),
            ByteSize(share.sent_bytes_per_tick),
        )
    };
    table(0, header, rows.iter().map(line));
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
}

/// Replica by replica, and within one as its modules are.
fn rows(setup: &Setup) -> Vec<Row> {
    let grid = setup.grid;
    let mut rows: Vec<Row> = Vec::new();
    // By module, the row that is not finished.
    let mut open: Vec<Row> = Vec::new();
    for r in 0..grid.replicas {
        for i in 1..=grid.modules {
            let (share, rank) = (Share::of(setup, grid.worker(i, r)), grid.rank_of(grid.worker(i, r)));
            match open.get_mut(i - 1) {
                Some(row) if row.share.looks_like(&share) => {
                    row.replicas[1] = r;
                    row.share.take_most(&share);
                    if row.ranks.last() != Some(&rank) {
                        row.ranks.push(rank);
                    }
                }
                Some(row) => rows.push(std::mem::replace(row, Row { ranks: vec![rank], replicas: [r; 2], share })),
                None => open.push(Row { ranks: vec![rank], replicas: [r; 2], share }),
            }
        }
    }
    rows.extend(open);
    rows.sort_by_key(|row| row.replicas[0]);
    rows
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
