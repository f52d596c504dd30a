//! A recording of some batches as one trace, in the JSON that Perfetto and Chrome open.
//!
//! Workers leave a file each ([`crate::metrics::recording`]), in their ranks' own time. [`Recorded::read`] gathers them, and
//! [`Recorded::json`] puts them on rank 0's clock: a process is a rank, a thread a module, and an arrow a message.

mod clocks;
mod events;
mod messages;

use std::path::{Path, PathBuf};

use crate::config::Batches;
use crate::metrics::Recording;
use crate::metrics::recording::{Clocks, FOLDER, read_json};
use crate::{Error, Result};

/// What a run recorded of some batches, all workers together.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// The parts, by replica and module.
    pub parts: Vec<Recording>,
    /// All ranks' clocks when the run ended, if it has.
    pub clocks: Option<Clocks>,
    /// What is missing, in words.
    pub problems: Vec<String>,
}

/// What a trace came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Stretches of time.
    pub slices: usize,
    /// Arrows.
    pub arrows: usize,
    /// From the first moment to the last, in nanoseconds.
    pub length: u64,
    /// How wrong the ranks' clocks may be beside rank 0's, at most, in nanoseconds.
    pub uncertainty: u64,
}

/// The recordings in run folder `run`, in the order of batches.
///
/// # Errors
/// [`Error::Input`] where there is none.
pub fn recordings(run: &Path) -> Result<Vec<(Batches, PathBuf)>> {
    let folder = run.join(FOLDER);
    let names = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let known = names.filter_map(|entry| Some((batches_of(entry.file_name().to_str()?)?, entry.path())));
    let mut found: Vec<(Batches, PathBuf)> = known.collect();
    found.sort_by_key(|(batches, _)| (batches.first, batches.end));
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::input(format!(
            "{}: nothing is recorded there: set run.trace = \"FIRST..END\" before a run, or make a file {} while it trains, which asks \
             for the next batches",
            folder.display(),
            run.join("TRACE").display()
        ))),
    }
}

/// Workers of a run, at most: more are a damaged file's.
const WORKERS: usize = 1 << 30;

fn read_part(path: &Path) -> Result<Recording> {
    let part: Recording = read_json(path)?;
    let [modules, replicas] = part.grid;
    let workers = modules.checked_mul(replicas).is_some_and(|workers| workers <= WORKERS);
    match workers && (1..=modules).contains(&part.module) && part.replica < replicas {
        true => Ok(part),
        false => Err(Error::input(format!(
            "{}: not a part of a recording: module {} and replica {} of {modules} x {replicas} modules and replicas",
            path.display(),
            part.module,
            part.replica
        ))),
    }
}

/// Batches from the name of a recording's folder.
fn batches_of(name: &str) -> Option<Batches> {
    let (first, end) = name.strip_prefix("batches-")?.split_once('-')?;
    Some(Batches { first: first.parse().ok()?, end: end.parse().ok()? })
}

impl Recorded {
    /// Reads the parts in the folder of a recording. If there are several launches', the last one's count.
    ///
    /// # Errors
    /// [`Error::Input`] if one cannot be read, or there is none.
    pub fn read(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).map_err(|e| Error::input(format!("{}: {e}", folder.display())))?;
        let is_part = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("module-") && name.ends_with(".json"))
        };
        let paths = entries.flatten().map(|entry| entry.path()).filter(is_part);
        let parts = paths.map(|path| read_part(&path)).collect::<Result<Vec<Recording>>>()?;
        let clocks = folder.join(Clocks::FILE);
        let clocks = if clocks.exists() { Some(read_json(&clocks)?) } else { None };
        Self::of(parts, clocks).ok_or_else(|| {
            Error::input(format!(
                "{}: no module's record is there: is the run still at these batches?",
                folder.display()
            ))
        })
    }

    /// Those of `parts` that the last launch made, if there is one.
    pub fn of(mut parts: Vec<Recording>, clocks: Option<Clocks>) -> Option<Self> {
        let launch = parts.iter().map(|part| part.launch).max()?;
        parts.retain(|part| part.launch == launch);
        parts.sort_by_key(|part| (part.replica, part.module));
        let clocks = clocks.filter(|clocks| clocks.launch == launch);
        let mut problems = Vec::new();
        let [modules, replicas] = parts[0].grid;
        let workers = modules * replicas;
        if parts.len() < workers {
            problems.push(format!(
                "{} of {workers} modules' records are missing: they are still at it, or could not write",
                workers - parts.len()
            ));
        }
        for part in parts.iter().filter(|part| part.dropped > 0) {
            problems.push(format!(
                "module {} of replica {} had no room for its last {} slices and messages: record fewer batches",
                part.module, part.replica, part.dropped
            ));
        }
        Some(Recorded { parts, clocks, problems })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_known_by_their_batches() {
        assert_eq!(batches_of("batches-00000100-00000103"), Some(Batches { first: 100, end: 103 }));
        assert!(batches_of("batches-x-1").is_none() && batches_of("step-00000100").is_none());
    }
}
