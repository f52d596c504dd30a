//! A run that is there already, as an event file for TensorBoard.

use std::fs::Permissions;
use std::io::{BufRead, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use tempfile::NamedTempFile;

use super::run::open_metrics;
use crate::config::{Config, Task};
use crate::sys::files::read_text;
use crate::tensorboard::event::Value;
use crate::tensorboard::{Records, is_event_file, scalars};
use crate::{Error, Result};

/// The file's name, the same at every time: it replaces the one made before.
const NAME: &str = "events.out.tfevents.0000000000.sideways";

/// Writes what `metrics.jsonl` in the run folder `run` says into a folder called `name` below `out`; the file's path. Lines that
/// are damaged are left out. Lines say how long after its attempt's begin they came: the last one is taken to be as old as
/// the file, and attempts to have followed one another at once.
///
/// # Errors
/// [`Error::Input`] where there is nothing to read, or the folder has other event files, which TensorBoard would show as well;
/// [`Error::Io`] if the disk refuses.
pub fn event_file(run: &Path, name: &str, out: &Path) -> Result<PathBuf> {
    let metrics = run.join("metrics.jsonl");
    let unreadable = |e: std::io::Error| Error::input(format!("{}: {e}", metrics.display()));
    let lines = || open_metrics(&metrics).map(|file| file.split(b'\n')).map_err(unreadable);
    let folder = out.join(name);
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    for entry in std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))? {
        let other = entry.map_err(|e| Error::io(&folder, e))?.path();
        if is_event_file(&other) && !other.ends_with(NAME) {
            return Err(Error::input(format!(
                "{}: an event file that is there already, and TensorBoard would show both: choose another folder",
                other.display()
            )));
        }
    }
    let config = read_text(&run.join("config.toml")).ok();
    let config = config.and_then(|text| Config::of_manifest(&text, "config.toml", &[]).ok());
    let recognition = config.is_none_or(|config| config.model.task == Task::Recognition);
    let mut all = 0.0;
    let mut clock = Clock::default();
    for line in lines()? {
        all = parsed(&line.map_err(unreadable)?).map_or(all, |line| clock.seconds(&line));
    }
    let written = std::fs::metadata(&metrics).and_then(|meta| meta.modified()).map_err(unreadable)?;
    let begun = written.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() - all;

    let path = folder.join(NAME);
    let io = |e| Error::io(&path, e);
    let file = tempfile::Builder::new()
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(&folder)
        .map_err(io)?;
    let mut records = Records::begin(BufWriter::new(file), begun, 0).map_err(io)?;
    let mut clock = Clock::default();
    for line in lines()? {
        let Some(line) = parsed(&line.map_err(unreadable)?) else { continue };
        let seconds = begun + clock.seconds(&line);
        if let Some((step, found)) = scalars(&line, recognition) {
            let values = found.into_iter().map(|(tag, value)| Value::scalar(tag, value)).collect();
            records.add(seconds, step, values).map_err(io)?;
        }
    }
    let whole = |mut file: BufWriter<NamedTempFile>| {
        file.flush()?;
        file.into_inner()?.persist(&path)?;
        Ok(())
    };
    whole(records.into_inner()).map_err(io)?;
    Ok(path)
}

fn parsed(line: &[u8]) -> Option<serde_json::Value> {
    serde_json::from_slice(line).ok()
}

/// Seconds since a run's first attempt began, attempts counted as if they had followed one another at once.
#[derive(Default)]
struct Clock {
    /// What earlier attempts took.
    before: f64,
    last: f64,
}

impl Clock {
    fn seconds(&mut self, line: &serde_json::Value) -> f64 {
        // Validations of earlier versions do not say.
        let elapsed = line.get("elapsed").and_then(serde_json::Value::as_f64).unwrap_or(self.last);
        if elapsed < self.last {
            self.before += self.last;
        }
        self.last = elapsed;
        self.before + elapsed
    }
}
