//! What several test programs share.

pub mod mpirun;
pub mod runs;
