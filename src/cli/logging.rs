//! Log lines: to the terminal, and to a run's log file once there is one. `RUST_LOG` sets the level.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use indicatif::ProgressBar;

use crate::{Error, Result};

static FILE: Mutex<Option<File>> = Mutex::new(None);
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Starts logging to standard error (level `info` unless `RUST_LOG` says otherwise).
pub fn init() {
    let environment = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(environment)
        .format(|out, record| {
            let level = match record.level() {
                log::Level::Info => String::new(),
                level => format!("{}: ", level.as_str().to_lowercase()),
            };
            writeln!(out, "{level}{}", record.args())
        })
        .target(env_logger::Target::Pipe(Box::new(Tee)))
        .init();
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

struct Tee;

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if let Some(file) = lock(&FILE).as_mut() {
            let _ = file.write_all(bytes);
        }
        match lock(&BAR).as_ref() {
            Some(bar) => bar.suspend(|| std::io::stderr().write_all(bytes))?,
            None => std::io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}
