//! What held a run back, and since when.

use crate::metrics::TimeAccount;
use crate::metrics::limit::{self, Cause};

/// Stretches of a run that are told apart, at most.
const STRETCHES: usize = 10;

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
            Cause::Straggler => write!(f, "the arithmetic of module {module}, far more than the others'"),
            Cause::Work => write!(f, "the arithmetic of module {module}"),
            Cause::Data => write!(f, "frames: module {module} waited for them to be read and decoded"),
            Cause::Cores => write!(f, "processor cores, which module {module} shares with others"),
            Cause::AllReduce => write!(f, "the all-reduce of module {module}'s gradients"),
            Cause::Validation => write!(f, "validation"),
            Cause::Other => write!(f, "checkpoints and reports of module {module}"),
            Cause::Messages => f.write_str("messages, which even the busiest module waited for"),
        }
    }
}

/// Of a batch: `workers` are modules with their time.
pub fn limit(workers: &[(usize, TimeAccount)]) -> Option<Limit> {
    let times: Vec<TimeAccount> = workers.iter().map(|worker| worker.1).collect();
    limit::limit(&times).map(|limit| Limit { cause: limit.cause, module: workers[limit.worker].0 })
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

    #[test]
    fn a_batch_names_the_module() {
        let time = |forward, wait_cotangents| TimeAccount { forward, wait_cotangents, ..TimeAccount::default() };
        let found = limit(&[(4, time(0.8, 0.2)), (5, time(0.9, 0.1))]);
        assert_eq!(found, Some(Limit { cause: Cause::Work, module: 5 }));
        assert_eq!(limit(&[]), None);
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
