//! The program under test.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Its path.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_sideways");
/// Longer than anything that is started here takes.
pub const MINUTE: Duration = Duration::from_secs(60);

/// Runs it without mpirun.
pub fn alone(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Waits for something that other processes bring about.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < MINUTE, "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
