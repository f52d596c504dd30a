//! What held a run back, and since when.

use crate::metrics::PHASES;

/// Places in a time account (the order of [`crate::metrics::TimeAccount`]).
const WAITS: [usize; 2] = [1, 3];
/// Waits of a sender for a receiver that is behind, in the main.
const SEND: usize = 6;
/// Stretches of a run that are told apart, at most.
const STRETCHES: usize = 10;

/// What a module's time went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its arithmetic.
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
    /// Messages: no module is busy for half of its time.
    Messages,
}

impl Cause {
    /// With the places in a time account that belong to it.
    const OF_A_MODULE: [(Cause, &[usize]); 6] = [
        (Cause::Work, &[0, 2, 4]),
        (Cause::Data, &[5]),
        (Cause::Cores, &[7]),
        (Cause::AllReduce, &[10]),
        (Cause::Validation, &[9]),
        (Cause::Other, &[8, 11]),
    ];
}

/// What held a batch back most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What for.
    pub cause: Cause,
    /// The module that the others waited for.
    pub module: usize,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let module = self.module;
        match self.cause {
            Cause::Work => write!(f, "the arithmetic of module {module}"),
            Cause::Data => write!(f, "frames: module {module} waited for them to be read and decoded"),
            Cause::Cores => write!(f, "processor cores, which module {module} shares with others"),
            Cause::AllReduce => write!(f, "the all-reduce of module {module}'s gradients"),
            Cause::Validation => write!(f, "validation"),
            Cause::Other => write!(f, "checkpoints and reports of module {module}"),
            Cause::Messages => f.write_str("messages: no module was busy for half of the time"),
        }
    }
}

/// Of a batch: `workers` are modules with their seconds in each phase.
pub fn limit(workers: &[(usize, [f32; PHASES])]) -> Option<Limit> {
    let own = |seconds: &[f32; PHASES]| {
        let away: f32 = WAITS.iter().chain(&[SEND]).map(|&phase| seconds[phase]).sum();
        seconds.iter().sum::<f32>() - away
    };
    let (module, seconds) = workers.iter().max_by(|a, b| own(&a.1).total_cmp(&own(&b.1)))?;
    let all: f32 = seconds.iter().sum();
    if all <= 0.0 {
        return None;
    }
    if own(seconds) < 0.5 * all {
        return Some(Limit { cause: Cause::Messages, module: *module });
    }
    let of = |phases: &[usize]| phases.iter().map(|&phase| seconds[phase]).sum::<f32>();
    let most = Cause::OF_A_MODULE.iter().max_by(|a, b| of(a.1).total_cmp(&of(b.1)))?;
    Some(Limit { cause: most.0, module: *module })
}

/// What held a run back: each limit with the share of the batches, the largest first, and that of its last stretch with the batch from
/// which on it was the same.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// Limits of at least a tenth of the batches.
    pub shares: Vec<(Limit, f64)>,
    /// The last one.
    pub last: Limit,
    /// Since which batch.
    pub since: u64,
}

/// Of batches by their numbers; nothing where none has a limit.
pub fn history(batches: &[(u64, Option<Limit>)]) -> Option<History> {
    let stretches = batches.chunks(batches.len().div_ceil(STRETCHES).max(1));
    let most = stretches.filter_map(|part| Some((part[0].0, counted(part).first()?.0)));
    let (mut since, mut last) = (0, None);
    for (first, limit) in most {
        if last != Some(limit) {
            (since, last) = (first, Some(limit));
        }
    }
    let counts = counted(batches);
    let all: usize = counts.iter().map(|(_, count)| count).sum();
    let shares = counts.into_iter().map(|(limit, count)| (limit, count as f64 / all as f64));
    Some(History { shares: shares.filter(|(_, share)| *share >= 0.1).collect(), last: last?, since })
}

/// How many batches each limit held back, the most first. Messages are one limit, whichever module is the busiest.
fn counted(batches: &[(u64, Option<Limit>)]) -> Vec<(Limit, usize)> {
    let mut counts: Vec<(Limit, usize)> = Vec::new();
    for limit in batches.iter().filter_map(|(_, limit)| *limit) {
        let same = |other: &Limit| *other == limit || (other.cause, limit.cause) == (Cause::Messages, Cause::Messages);
        match counts.iter_mut().find(|(other, _)| same(other)) {
            Some((_, count)) => *count += 1,
            None => counts.push((limit, 1)),
        }
    }
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(places: &[(usize, f32)]) -> [f32; PHASES] {
        let mut seconds = [0.0; PHASES];
        places.iter().for_each(|&(place, value)| seconds[place] = value);
        seconds
    }

    #[test]
    fn the_busiest_module_says_why() {
        let waits = (2, seconds(&[(0, 0.2), (1, 0.8)]));
        let works = (1, seconds(&[(0, 0.4), (2, 0.5), (3, 0.1)]));
        assert_eq!(limit(&[works, waits]), Some(Limit { cause: Cause::Work, module: 1 }));
        let reads = (1, seconds(&[(0, 0.2), (5, 0.7), (3, 0.1)]));
        assert_eq!(limit(&[reads, waits]), Some(Limit { cause: Cause::Data, module: 1 }));
        // A sender that waits for its receiver holds nobody back.
        let blocked = (1, seconds(&[(0, 0.1), (6, 0.9)]));
        assert_eq!(limit(&[blocked, works]), Some(Limit { cause: Cause::Work, module: 1 }));
        assert_eq!(limit(&[waits, waits]).map(|limit| limit.cause), Some(Cause::Messages));
        assert_eq!((limit(&[]), limit(&[(1, [0.0; PHASES])])), (None, None));
    }

    #[test]
    fn a_history_has_shares_and_an_end() {
        let (a, b) = (Limit { cause: Cause::Work, module: 3 }, Limit { cause: Cause::Data, module: 1 });
        let batches: Vec<(u64, Option<Limit>)> =
            (1..=100).map(|n| (n, Some(if n <= 40 || n == 77 { a } else { b }))).collect();
        let found = history(&batches).unwrap();
        assert_eq!((found.last, found.since, found.shares), (b, 41, vec![(b, 0.59), (a, 0.41)]));
        assert_eq!((history(&[(1, None)]), history(&[])), (None, None));
    }
}
