//! A machine larger than the one at hand: how far apart ranks are, what messages take between them, how even their work is.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::comm::all_reduce::levels;
use crate::setup::Setup;
use crate::sys::files::read_text;
use crate::{Error, Result};

/// The interconnect between two ranks, by the α–β model: a message of n bytes takes `latency + n / bandwidth` seconds (Hockney, 1994),
/// and `handshake` more where it is larger than `eager`: MPI then asks the receiver first (rendezvous).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interconnect {
    /// α, in seconds.
    pub latency: f64,
    /// 1/β, in bytes a second.
    pub bandwidth: f64,
    /// The largest message that is sent without asking, in bytes.
    #[serde(default)]
    pub eager: u64,
    /// What asking takes, in seconds.
    #[serde(default)]
    pub handshake: f64,
}

impl Interconnect {
    /// One without a handshake.
    pub const fn new(latency: f64, bandwidth: f64) -> Self {
        Interconnect { latency, bandwidth, eager: 0, handshake: 0.0 }
    }

    /// Until the first byte of a message of `bytes` is there.
    fn latency(&self, bytes: u64) -> f64 {
        if bytes > self.eager { self.latency + self.handshake } else { self.latency }
    }

    fn seconds(&self, bytes: u64) -> f64 {
        self.latency(bytes) + bytes as f64 / self.bandwidth
    }
}

/// A cluster of like nodes, and what it takes from one rank to another by their distance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Ranks a node; neighbouring ranks share one.
    pub ranks_per_node: usize,
    /// Nodes a switch.
    pub nodes_per_switch: usize,
    /// Between ranks of one node.
    pub core: Interconnect,
    /// Between nodes of one switch.
    pub node: Interconnect,
    /// Between switches.
    pub switch: Interconnect,
    /// Standard deviation of a pass's time over its mean, drawn anew for each pass of each module (log-normal): stragglers.
    #[serde(default)]
    pub spread: f64,
}

impl std::fmt::Display for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |interconnect: Interconnect| {
            let Interconnect { latency, bandwidth, eager, handshake } = interconnect;
            let more = if handshake > 0.0 {
                format!(" (+ {} us above {eager} bytes)", 1e6 * handshake)
            } else {
                String::new()
            };
            format!("{} us{more} + bytes / {} GB/s", 1e6 * latency, bandwidth / 1e9)
        };
        write!(
            f,
            "{} ranks a node, {} nodes a switch; within a node {}, between nodes {}, between switches {}; spread of passes {}",
            self.ranks_per_node,
            self.nodes_per_switch,
            show(self.core),
            show(self.node),
            show(self.switch),
            self.spread
        )
    }
}

impl Cluster {
    /// Nodes of eight ranks on 100 Gbit/s with latencies as RDMA networks have them: an assumption.
    pub fn usual() -> Self {
        Cluster {
            ranks_per_node: 8,
            nodes_per_switch: 32,
            core: Interconnect::new(1e-6, 10e9),
            node: Interconnect::new(2e-6, 12.5e9),
            switch: Interconnect::new(4e-6, 12.5e9),
            spread: 0.0,
        }
    }

    /// Reads one from a TOML file with the fields above.
    ///
    /// # Errors
    /// [`Error::Input`] with the file, and what in it is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let show = path.display();
        let text = read_text(path).map_err(|e| Error::input(format!("--cluster {show}: {e}")))?;
        let cluster: Cluster = toml::from_str(&text)
            .map_err(|e| Error::input(format!("--cluster {show}: {}", e.to_string().trim_end())))?;
        cluster.validate().map_err(|e| e.within(&format!("--cluster {show}")))?;
        Ok(cluster)
    }

    /// # Errors
    /// [`Error::Input`] on a value that cannot be.
    pub fn validate(&self) -> Result<()> {
        if self.ranks_per_node == 0 || self.nodes_per_switch == 0 {
            return Err(Error::input("ranks_per_node and nodes_per_switch must be at least 1"));
        }
        for (name, interconnect) in [("core", self.core), ("node", self.node), ("switch", self.switch)] {
            let Interconnect { latency, bandwidth, handshake, .. } = interconnect;
            let times = [latency, handshake].iter().all(|seconds| *seconds >= 0.0 && seconds.is_finite());
            if !(times && bandwidth > 0.0) {
                return Err(Error::input(format!(
                    "{name}: latency and handshake must be 0 or more (seconds), bandwidth above 0 (bytes a second)"
                )));
            }
        }
        if !(0.0..=10.0).contains(&self.spread) {
            return Err(Error::input(format!("spread = {}: it must be 0 to 10", self.spread)));
        }
        Ok(())
    }

    /// Seconds that `bytes` take from rank `from` to rank `to`; none within a rank.
    pub fn seconds(&self, from: usize, to: usize, bytes: u64) -> f64 {
        if from == to { 0.0 } else { self.interconnect(from, to).seconds(bytes) }
    }

    fn interconnect(&self, from: usize, to: usize) -> Interconnect {
        let node = |rank: usize| rank / self.ranks_per_node;
        let switch = |rank: usize| node(rank) / self.nodes_per_switch;
        match (node(from) == node(to), switch(from) == switch(to)) {
            (true, _) => self.core,
            (false, true) => self.node,
            (false, false) => self.switch,
        }
    }

    /// Seconds that module `module`'s gradient takes to become its mean over replicas, for the replica for which it is longest:
    /// the rounds of [`crate::comm::all_reduce`], of which each sends a part to the others of a group and gets their sums back.
    pub fn all_reduce(&self, setup: &Setup, module: usize) -> f64 {
        let grid = setup.grid;
        let bytes = 4.0 * setup.frozen.learned(module) as f64;
        if bytes == 0.0 {
            return 0.0;
        }
        let rank = |replica: usize| grid.rank_of(grid.worker(module, replica));
        let mut left = bytes;
        let mut sum = 0.0;
        for level in levels(grid.replicas, 1) {
            let part = (left / level.size as f64) as u64;
            let round = |replica: usize| -> f64 {
                let own = level.member(replica);
                let interconnect =
                    |member: usize| self.interconnect(rank(replica), rank(level.replica(replica, member)));
                if level.ring {
                    // A part goes through all members.
                    return (level.size - 1) as f64 * interconnect(level.next(own)).seconds(part);
                }
                // To the others one after another; they are on their way at once.
                let others = (0..level.size).filter(|&other| other != own).map(interconnect);
                let (latency, seconds) = others.fold((0.0f64, 0.0), |(latency, seconds), interconnect| {
                    (latency.max(interconnect.latency(part)), seconds + part as f64 / interconnect.bandwidth)
                });
                latency + seconds
            };
            sum += 2.0 * (0..grid.replicas).map(round).fold(0.0, f64::max);
            left /= level.size as f64;
        }
        sum
    }
}
