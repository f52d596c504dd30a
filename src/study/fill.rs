//! The share of a schedule that goes into filling and emptying the pipeline, counted from its lists.

use crate::method::schedule::{Schedule, Tick};
use crate::setup::Setup;

/// What a backward pass costs where a forward pass costs 1.
const BACKWARD: f64 = 2.0;

/// The share of the time in which even the busiest rank waits, if ticks come in lock-step and last as long as the busiest rank's
/// work: 0 where clips follow one another without a gap, (D − 1)/(T + D − 1) for blocking schedules of balanced modules.
pub fn share_of_fill(setup: &Setup) -> f64 {
    let grid = setup.grid;
    let places = (0..grid.workers()).map(|w| (grid.rank_of(w), grid.module_and_replica(w).0));
    share(&setup.schedule, grid.ranks, places)
}

/// The same for a rank and a module a worker.
fn share(schedule: &Schedule, ranks: usize, places: impl Iterator<Item = (usize, usize)>) -> f64 {
    let period = schedule.period();
    let mut work = vec![vec![0.0; period]; ranks];
    for (rank, i) in places {
        for tick in schedule.window(i) {
            // A clip's end may lie beside the next one's begin.
            work[rank][tick.at % period] += cost(tick);
        }
    }
    let busiest = work.iter().map(|rank| rank.iter().sum::<f64>()).fold(0.0, f64::max);
    let time: f64 = (0..period).map(|at| work.iter().map(|rank| rank[at]).fold(0.0, f64::max)).sum();
    if time > 0.0 { 1.0 - busiest / time } else { 0.0 }
}

fn cost(tick: &Tick) -> f64 {
    f64::from(u8::from(tick.forward.is_some())) + BACKWARD * f64::from(u8::from(tick.backward.is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::schedule::LossAt;
    use crate::method::{Boundary, Graph, Rule, Stash};

    #[test]
    fn blocking_schedules_have_their_bubble_and_others_none() {
        let graph = Graph::new(3, &[]).unwrap();
        let of = |rule, boundary, ranks: usize| {
            let schedule = Schedule::training(&graph, 5, rule, Stash::None, boundary, LossAt::EveryStep).unwrap();
            share(&schedule, ranks, (1..=3).map(|i| ((i - 1) * ranks / 3, i)))
        };
        // All steps forward, all back, on a rank each: (D - 1)/(T + D - 1).
        assert!((of(Rule::Bp, Boundary::Flow, 3) - 2.0 / 7.0).abs() < 1e-12);
        assert_eq!(of(Rule::Bp, Boundary::Flow, 1), 0.0);
        assert_eq!(of(Rule::Sideways, Boundary::Flow, 3), 0.0);
        // With `cut`, the last module waits two of five ticks; the first two of these are forward passes alone.
        let cut = of(Rule::Sideways, Boundary::Cut, 3);
        assert!((cut - 2.0 / 11.0).abs() < 1e-12, "{cut}");
    }
}
