//! What is computed, before a tensor moves: the graph of modules, the rule, and who does what at which tick. Pure: this room
//! uses nothing of the rest.

pub mod graph;
pub mod rule;
pub mod schedule;

pub use graph::{Edge, Graph};
pub use rule::{Rule, Stash};
pub use schedule::{Boundary, Keep, LossAt, Schedule};
