//! The machine and its operating system: processors, memory, files.

pub mod cpus;
pub mod files;
pub mod host;
pub mod memory;
