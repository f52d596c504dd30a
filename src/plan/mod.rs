//! Planning before a run: where to cut the network.

pub mod blocks;
pub mod partition;
