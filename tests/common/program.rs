//! The program under test.

use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Its path, as cargo built it with the tests.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_sideways");

/// The same, or the copy that `SIDEWAYS_TEST_PROGRAM` names: where the tests were carried elsewhere, or cargo builds meanwhile.
pub fn program() -> &'static str {
    static COPY: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("SIDEWAYS_TEST_PROGRAM").ok());
    COPY.as_deref().unwrap_or(PROGRAM)
}

/// Longer than anything that is started here takes.
pub const MINUTE: Duration = Duration::from_secs(60);

/// Runs it without mpirun.
pub fn alone(args: &[&str]) -> Output {
    Command::new(program()).args(args).stdin(Stdio::null()).output().unwrap()
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
