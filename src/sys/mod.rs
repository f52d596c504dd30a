//! The machine and its operating system: processors, memory, files, clock.

pub mod clock;
pub mod cpus;
pub mod files;
pub mod host;
pub mod memory;
pub mod sorting;
