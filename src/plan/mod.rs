//! Planning before a run: where to cut the network.

pub mod partition;
