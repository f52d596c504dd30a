//! What a run's speed was limited by, in words for its log.

use crate::metrics::limit::{Cause, limit};
use crate::setup::Setup;
use crate::trainer::console::Totals;

/// What held the whole run back; nothing where it did no batch.
pub fn describe(setup: &Setup, totals: &Totals) -> Option<String> {
    let limit = limit(&totals.time)?;
    let (worker, time) = (limit.worker, totals.time[limit.worker]);
    let (module, replica) = setup.grid.module_and_replica(worker);
    let ticks = (totals.batches as usize * setup.config.data.frames).max(1) as f64;
    let share = |seconds: f32| 100.0 * seconds / time.total();
    Some(match limit.cause {
        Cause::Straggler => {
            let mut work: Vec<f32> = totals.time.iter().map(|time| time.busy()).collect();
            work.sort_by(f32::total_cmp);
            format!(
                "limited by module {module}, replica {replica} on rank {}: {:.1} ms of work a tick where the median module has \
                 {:.1} (a slow rank, or a cut to balance: sideways plan)",
                setup.grid.rank_of(worker),
                1e3 * f64::from(time.busy()) / ticks,
                1e3 * f64::from(work[(work.len() - 1) / 2]) / ticks
            )
        }
        Cause::Work => "limited by work, spread evenly over the modules".into(),
        Cause::Data => format!(
            "limited by frames: module {module} waits for them {:.0} % of the time (more cores for its rank, smaller frames: sideways \
             bench data)",
            share(time.data)
        ),
        Cause::Cores => "limited by processors: modules of one process wait for their turns on its cores".into(),
        Cause::AllReduce => format!(
            "limited by averaging over replicas: up to {:.0} % of the time goes there, waiting for slower replicas included (longer clips, \
             or train.update_every left out, average less often)",
            share(time.all_reduce)
        ),
        Cause::Validation => {
            format!("limited by validation, {:.0} % of the time (train.validate_every)", share(time.validation))
        }
        Cause::Other => format!(
            "limited by checkpoints and reports: {:.0} % of module {module}'s time (run.checkpoint_every)",
            share(time.other + time.checkpoint)
        ),
        Cause::Messages => {
            let longest = totals.waits.iter().max_by(|a, b| a.1.total_cmp(b.1));
            let waits = longest.map_or_else(String::new, |(&link, seconds)| {
                let name = setup.wiring.name_of_edge(link).unwrap_or_else(|| "?".into());
                format!("; the longest waits are on \"{name}\", {:.1} ms a tick", 1e3 * seconds / ticks)
            });
            format!("limited by links: the busiest module works {:.0} % of the time{waits}", share(time.busy()))
        }
    })
}
