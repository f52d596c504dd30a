//! What several test programs share; not every one needs all of it.
#![allow(dead_code)]

use std::io::Write;

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod jobs;
pub mod mpirun;
pub mod numbers;
pub mod program;
pub mod reference;
pub mod runs;
pub mod tmpfs;

/// Says that a test, or a part of it, cannot be done on this machine. In continuous integration (`CI=true`) that is a failure:
/// everything that tests need is to be there.
#[track_caller]
pub fn skip_unless_ci(why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "cannot be tested here, and CI=true: {why}");
    // Past the test harness, which shows nothing that a test prints unless it fails.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
