//! Training as users run it: under mpirun, planned, disturbed, on data that go away.

#[path = "../common/mod.rs"]
mod common;
mod container;
mod data;
mod eval;
mod faults;
mod numbers;
mod plan;
mod ranks;
mod recipes;
mod report;
mod scale;
mod tensorboard;
mod terminal;
mod torch;
mod trace;
mod tutorial;
mod validation;
mod warnings;
