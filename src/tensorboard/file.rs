//! The event file of an attempt at a run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::event::Value;
use super::records::Records;
use crate::sys::host::hostname;
use crate::{Error, Result};

/// What the names of event files begin with; TensorBoard takes a folder's files in the order of their names.
const PREFIX: &str = "events.out.tfevents.";

/// An event file, written while a run goes on.
pub struct EventFile {
    records: Records<File>,
    path: PathBuf,
}

impl EventFile {
    /// Begins a file in `folder` for an attempt that goes on where `done` batches are done. Its name is behind those of earlier
    /// attempts, whatever this host's clock says.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn begin(folder: &Path, done: u64) -> Result<Self> {
        let io = |e| Error::io(folder, e);
        let mut second = now() as u64;
        for entry in std::fs::read_dir(folder).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            let earlier = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok());
            second = second.max(earlier.map_or(0, |earlier: u64| earlier.saturating_add(1)));
        }
        let path = folder.join(format!("{PREFIX}{second:010}.{}.{}", hostname(), std::process::id()));
        let records = File::create_new(&path).and_then(|file| Records::begin(file, now(), done));
        Ok(EventFile { records: records.map_err(|e| Error::io(&path, e))?, path })
    }

    /// Adds what was measured when `step` batches were done.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written. Nothing is to be added any more: what would follow a record in part is never read.
    pub fn add(&mut self, step: u64, values: Vec<Value>) -> Result<()> {
        self.records.add(now(), step, values).map_err(|e| Error::io(&self.path, e))
    }
}

/// Whether a file is TensorBoard's, by its name.
pub fn is_event_file(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains("tfevents"))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
