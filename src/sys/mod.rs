//! The machine and its operating system: processors, memory, files.

pub mod files;
pub mod machine;
