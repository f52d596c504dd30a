//! What a run's speed was limited by: a module that is slower than the others, or a link.

use crate::metrics::TimeAccount;
use crate::setup::Setup;
use crate::trainer::console::Totals;

/// Above this many times the median module's, a module's work makes it a straggler.
const STRAGGLER: f64 = 1.5;
/// Below this share of the time spent working, even the busiest module is kept waiting by links.
const BUSY: f64 = 0.7;
/// A straggler works at least this share of the time: below, its links keep it waiting as well.
const MOSTLY: f64 = 0.5;
/// From this share of the time spent waiting for a core on, there are too few processors.
const SHARED: f64 = 0.2;

/// What limited a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Limit {
    /// A worker works longer than the median one by this factor.
    Straggler {
        /// Which worker.
        worker: usize,
        /// Its seconds of work.
        busy: f64,
        /// The median worker's.
        median: f64,
    },
    /// No worker is busy for long: they wait for messages, longest on this link.
    Link {
        /// Which link.
        link: u32,
        /// Seconds that workers waited there.
        waited: f64,
        /// Share of the time that the busiest worker works.
        busiest: f64,
    },
    /// Workers of a process share its processors and wait for their turns.
    Processors,
    /// A worker spends this share of the time in averaging gradients over replicas, or waiting for them there.
    AllReduce(f64),
    /// Work, spread evenly enough.
    Work,
}

/// Finds it from every worker's time account and the waits by link over `wall` seconds.
pub fn limit(times: &[TimeAccount], waits: &[(u32, f64)], wall: f64) -> Limit {
    let busy: Vec<f64> = times.iter().map(|t| f64::from(t.busy())).collect();
    let mut sorted = busy.clone();
    sorted.sort_by(f64::total_cmp);
    let Some((worker, &most)) = busy.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)) else { return Limit::Work };
    let median = sorted[(sorted.len() - 1) / 2];
    let averaging = times.iter().map(|t| f64::from(t.all_reduce)).fold(0.0, f64::max);
    let longest = waits.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
    match longest {
        _ if busy.len() > 1 && most > STRAGGLER * median && most > MOSTLY * wall => {
            Limit::Straggler { worker, busy: most, median }
        }
        _ if times.iter().any(|t| f64::from(t.wait_core) > SHARED * wall) => Limit::Processors,
        _ if averaging > SHARED * wall => Limit::AllReduce(averaging / wall),
        Some((link, waited)) if most < BUSY * wall => Limit::Link { link, waited, busiest: most / wall },
        _ => Limit::Work,
    }
}

/// The same of a whole run, for its log.
pub fn describe(setup: &Setup, totals: &Totals) -> String {
    let waits: Vec<(u32, f64)> = totals.waits.iter().map(|(&link, &seconds)| (link, seconds)).collect();
    let ticks = (totals.batches as usize * setup.config.data.frames).max(1) as f64;
    match limit(&totals.time, &waits, totals.seconds) {
        Limit::Straggler { worker, busy, median } => {
            let (module, replica) = setup.grid.module_and_replica(worker);
            format!(
                "limited by module {module}, replica {replica} on rank {}: {:.1} ms of work a tick where the median module has \
                 {:.1} (a slow rank, or a cut to balance: sideways plan)",
                setup.grid.rank_of(worker),
                1e3 * busy / ticks,
                1e3 * median / ticks
            )
        }
        Limit::AllReduce(share) => format!(
            "limited by averaging over replicas: up to {:.0} % of the time goes there, waiting for slower replicas included (longer clips, \
             or train.update_every left out, average less often)",
            100.0 * share
        ),
        Limit::Link { link, waited, busiest } => {
            let name = setup.wiring.name_of_edge(link).unwrap_or_else(|| "?".into());
            format!(
                "limited by links: the busiest module works {:.0} % of the time; the longest waits are on \"{name}\", {:.1} ms a tick",
                100.0 * busiest,
                1e3 * waited / ticks
            )
        }
        Limit::Processors => "limited by processors: modules of one process wait for their turns on its cores".into(),
        Limit::Work => "limited by work, spread evenly over the modules".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::PHASES;

    fn busy(forward: f32) -> TimeAccount {
        let mut phases = [0.0; PHASES];
        phases[0] = forward;
        TimeAccount::from_array(phases)
    }

    #[test]
    fn a_straggler_a_link_and_neither() {
        let straggler = limit(&[busy(2.0), busy(9.5), busy(2.1)], &[(3, 7.0)], 10.0);
        assert!(matches!(straggler, Limit::Straggler { worker: 1, .. }), "{straggler:?}");
        let link = limit(&[busy(2.0), busy(2.5), busy(2.1)], &[(3, 7.0), (5, 7.5)], 10.0);
        assert!(matches!(link, Limit::Link { link: 5, .. }), "{link:?}");
        assert_eq!(limit(&[busy(9.0), busy(9.5)], &[(3, 0.5)], 10.0), Limit::Work);
        assert_eq!(limit(&[], &[], 10.0), Limit::Work);
        let averaging = TimeAccount { all_reduce: 4.0, ..busy(5.0) };
        assert_eq!(limit(&[averaging, busy(5.0)], &[(3, 4.0)], 10.0), Limit::AllReduce(0.4));
    }
}
