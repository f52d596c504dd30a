//! The method and its arithmetic, in one process: schedules, cuts, layers and their products, update rules, and the engine
//! beside exact back-propagation.

mod back_propagation;
#[path = "../common/mod.rs"]
mod common;
mod comparisons;
mod documents;
mod exact;
mod fidelity;
mod kernels;
mod keys;
mod optim;
mod options;
mod plan;
mod rooms;
mod schedule;
mod skips;
mod spec;
mod vjp;
