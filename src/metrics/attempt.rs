//! What a run was started as, each time: where its modules went, and what they are joined by.

use serde::{Deserialize, Serialize};

/// In the run folder: a line of JSON a start.
pub const FILE: &str = "attempts.jsonl";

/// A start of a run: a line of [`FILE`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attempt {
    /// When, in seconds since 1970 (UTC).
    pub begun: u64,
    /// Batches done before.
    pub first: u64,
    /// This program's version.
    pub version: String,
    /// Slurm's number of the job.
    pub job: Option<String>,
    /// How often Slurm had requeued it.
    pub requeues: u64,
    /// Rank 0's processor.
    pub processor: String,
    /// NVIDIA's driver on rank 0's host.
    pub driver: Option<String>,
    /// What the MPI library calls itself.
    pub mpi: Option<String>,
    /// Hosts with their numbers of ranks, in the order of ranks.
    pub hosts: Vec<(String, usize)>,
    /// R
    pub replicas: usize,
    /// Modules, first to last.
    pub modules: Vec<PlacedModule>,
    /// What travels between them.
    pub edges: Vec<PlacedEdge>,
}

/// A module and where it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlacedModule {
    /// Kinds of its layers, in order.
    pub layers: Vec<String>,
    /// `[H, W, C]` of a sample.
    pub output: [usize; 3],
    /// Parameters.
    pub parameters: u64,
    /// The rank of its first replica.
    pub rank: usize,
    /// Bytes that a replica of it takes, as planned.
    pub memory: u64,
}

/// An edge between modules, counted from 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlacedEdge {
    /// Whose output travels.
    pub from: usize,
    /// Who reads it.
    pub to: usize,
    /// Ticks that it takes.
    pub delay: usize,
    /// Bytes of a batch's activations as sent.
    pub bytes: u64,
}

impl Attempt {
    /// The host of a rank.
    pub fn host(&self, rank: usize) -> Option<&str> {
        let mut end = 0;
        let host = self.hosts.iter().find(|(_, ranks)| {
            end += ranks;
            rank < end
        });
        host.map(|(name, _)| name.as_str())
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.hosts.iter().map(|(_, ranks)| ranks).sum()
    }
}

/// Names in the order of ranks, those that follow each other as one.
pub fn counted(hosts: impl IntoIterator<Item = String>) -> Vec<(String, usize)> {
    let mut counted: Vec<(String, usize)> = Vec::new();
    for host in hosts {
        match counted.last_mut().filter(|(last, _)| *last == host) {
            Some((_, ranks)) => *ranks += 1,
            None => counted.push((host, 1)),
        }
    }
    counted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_found_by_rank() {
        let hosts = counted(["a", "a", "b", "a"].map(String::from));
        assert_eq!(hosts, [("a".into(), 2), ("b".into(), 1), ("a".into(), 1)]);
        let attempt = Attempt { hosts, ..Attempt::default() };
        assert_eq!([0, 1, 2, 3].map(|rank| attempt.host(rank)), [Some("a"), Some("a"), Some("b"), Some("a")]);
        assert_eq!((attempt.host(4), attempt.ranks()), (None, 4));
    }
}
