//! What is computed, before a tensor moves: the graph of modules, and who does what at which tick. Pure; uses nothing else.

pub mod graph;
pub mod schedule;
