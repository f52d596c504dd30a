//! Log lines: to the terminal, and to a run's log file once there is one. `RUST_LOG` sets the level.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::ProgressBar;
use log::{Level, Log, Metadata, Record};

use crate::{Error, Result};

static FILE: Mutex<Option<File>> = Mutex::new(None);
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);
static QUIET: AtomicBool = AtomicBool::new(false);

/// Starts logging to standard error (level `info` unless `RUST_LOG` says otherwise); if `quiet`, errors alone. A log file has all
/// the same.
pub fn init(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
    let filter = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).build();
    log::set_max_level(filter.filter());
    // Whoever logs already goes on.
    let _ = log::set_boxed_logger(Box::new(Tee { filter }));
}

/// Whether nothing but results and errors is to be seen.
pub(super) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Also appends log lines to `path` from now on.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened.
pub fn also_to(path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::io(path, e))?;
    *lock(&FILE) = Some(file);
    Ok(())
}

/// Lines go above this progress bar while it is there.
pub(super) fn around(bar: Option<ProgressBar>) {
    *lock(&BAR) = bar;
}

/// Writes a line into the log file alone.
pub(super) fn to_file(line: &str) {
    if let Some(file) = lock(&FILE).as_mut() {
        // A full disk must not end a run for its log's sake.
        let _ = writeln!(file, "{line}");
    }
}

/// A poisoned lock's content is a file or a bar, as good as before.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Tee {
    filter: env_logger::Logger,
}

impl Log for Tee {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.filter.matches(record) {
            return;
        }
        let (level, said) = (record.level(), record.args());
        let mark = match level {
            Level::Info => String::new(),
            level => format!("{}: ", level.as_str().to_lowercase()),
        };
        to_file(&format!("{mark}{said}"));
        if is_quiet() && level != Level::Error {
            return;
        }
        let mark = match level {
            Level::Error => console::style(mark).for_stderr().red().bold(),
            Level::Warn => console::style(mark).for_stderr().yellow(),
            _ => console::style(mark).for_stderr(),
        };
        // In one piece: ranks write to the same terminal. What cannot be written cannot be told either.
        let line = format!("{mark}{said}\n");
        let write = || drop(std::io::stderr().write_all(line.as_bytes()));
        match lock(&BAR).as_ref() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn flush(&self) {}
}
