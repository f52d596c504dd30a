//! What held training back: one rule, over a batch for the report and over a whole run for its log.

use super::TimeAccount;

/// From this share of the time on, what is not arithmetic is named before it.
const MUCH: f32 = 0.2;
/// Below this share of the time, even the busiest worker is kept waiting by messages ...
const BUSY: f32 = 0.7;
/// ... or below this, where it works far longer than the others.
const BUSY_ALONE: f32 = 0.5;
/// Above this many times the median worker's, a worker's arithmetic makes it a straggler.
const STRAGGLER: f32 = 1.5;

/// What a worker's time went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its arithmetic, of which it has far more than the others.
    Straggler,
    /// Arithmetic, spread evenly enough.
    Work,
    /// Frames: reading and decoding them.
    Data,
    /// Other workers on its processor cores.
    Cores,
    /// Gradients of other replicas.
    AllReduce,
    /// Validation.
    Validation,
    /// Checkpoints, reports.
    Other,
    /// Messages: even the busiest worker waits for them.
    Messages,
}

/// What held the workers back most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What for.
    pub cause: Cause,
    /// The busiest worker, by its place: the others waited for it.
    pub worker: usize,
}

impl TimeAccount {
    /// Seconds that no other worker caused. A sender that waits for its receiver holds nobody back either.
    fn own(&self) -> f32 {
        self.total() - self.wait_activations - self.wait_cotangents - self.send
    }

    /// What is not arithmetic, by its cause.
    fn overheads(&self) -> [(Cause, f32); 5] {
        [
            (Cause::Data, self.data),
            (Cause::Cores, self.wait_core),
            (Cause::AllReduce, self.all_reduce),
            (Cause::Validation, self.validation),
            (Cause::Other, self.other + self.checkpoint),
        ]
    }
}

/// Finds it from every worker's time account of the same stretch of time; nothing where they are empty.
pub fn limit(workers: &[TimeAccount]) -> Option<Limit> {
    let (worker, busiest) = workers.iter().enumerate().max_by(|a, b| a.1.own().total_cmp(&b.1.own()))?;
    let all = busiest.total();
    if all <= 0.0 {
        return None;
    }
    let mut work: Vec<f32> = workers.iter().map(|time| time.busy()).collect();
    work.sort_by(f32::total_cmp);
    let straggles = work.len() > 1 && busiest.busy() > STRAGGLER * work[(work.len() - 1) / 2];
    let [first, rest @ ..] = busiest.overheads();
    let (overhead, seconds) = rest.into_iter().fold(first, |most, other| if other.1 > most.1 { other } else { most });
    let cause = match () {
        () if seconds >= MUCH * all => overhead,
        () if straggles && busiest.busy() > BUSY_ALONE * all => Cause::Straggler,
        () if busiest.own() < BUSY * all => Cause::Messages,
        () => Cause::Work,
    };
    Some(Limit { cause, worker })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of ten seconds, so many in each kind; the rest in waiting for cotangents.
    fn ten(forward: f32, data: f32, all_reduce: f32) -> TimeAccount {
        TimeAccount {
            forward,
            data,
            all_reduce,
            wait_cotangents: 10.0 - forward - data - all_reduce,
            ..TimeAccount::default()
        }
    }

    #[test]
    fn the_busiest_worker_says_why() {
        let cause = |workers: &[TimeAccount]| limit(workers).map(|limit| (limit.cause, limit.worker));
        assert_eq!(cause(&[ten(2.0, 0.0, 0.0), ten(9.5, 0.0, 0.0), ten(2.1, 0.0, 0.0)]), Some((Cause::Straggler, 1)));
        assert_eq!(cause(&[ten(9.0, 0.0, 0.0), ten(9.5, 0.0, 0.0)]), Some((Cause::Work, 1)));
        assert_eq!(cause(&[ten(2.0, 0.0, 0.0), ten(2.5, 0.0, 0.0), ten(2.1, 0.0, 0.0)]), Some((Cause::Messages, 1)));
        assert_eq!(cause(&[ten(5.0, 0.0, 4.0), ten(5.0, 0.0, 0.0)]), Some((Cause::AllReduce, 0)));
        assert_eq!(cause(&[ten(2.0, 7.0, 0.0), ten(2.0, 0.0, 0.0)]), Some((Cause::Data, 0)));
        // A sender that waits for its receiver holds nobody back.
        let blocked = TimeAccount { forward: 0.1, send: 9.9, ..TimeAccount::default() };
        assert_eq!(cause(&[blocked, ten(9.0, 0.0, 0.0)]).map(|found| found.1), Some(1));
        let shared = TimeAccount { forward: 5.0, wait_core: 5.0, ..TimeAccount::default() };
        assert_eq!(cause(&[shared, shared]).map(|found| found.0), Some(Cause::Cores));
        assert_eq!((cause(&[]), cause(&[TimeAccount::default()])), (None, None));
    }
}
