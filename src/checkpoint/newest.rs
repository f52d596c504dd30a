//! Which of a run's checkpoints is the newest, and which one is whole.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Checkpoint, MANIFEST, Manifest};
use crate::sys::files::read;
use crate::{Error, Result};

/// The complete checkpoints under `dir`, oldest first.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read; a missing folder holds none.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = named(dir, "step-", "")?;
    found.retain(|(_, path)| path.join(MANIFEST).exists());
    Ok(found)
}

/// What is called `beginning`, batches, `ending` under `dir`, in their order.
pub(super) fn named(dir: &Path, beginning: &str, ending: &str) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(Error::io(dir, e)),
    };
    for entry in entries {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str());
        let batches = name.and_then(|n| n.strip_prefix(beginning)?.strip_suffix(ending)?.parse().ok());
        found.extend(batches.map(|batches| (batches, path)));
    }
    found.sort();
    Ok(found)
}

/// The newest checkpoint under `dir` that verifies: one to go on from. A damaged one, or one that is not whole, is reported and the one
/// before it taken.
///
/// # Errors
/// [`Error::Input`] if there are checkpoints and none verifies.
pub fn latest(dir: &Path) -> Result<Option<Checkpoint>> {
    let mut last = None;
    for (_, path) in named(dir, "step-", "")?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(e) => {
                log::warn!("{e}; trying the checkpoint before it");
                last = Some(e);
            }
        }
    }
    last.map_or(Ok(None), Err)
}

/// The newest checkpoint under `dir`, whether it is whole or not.
pub(super) fn of_any_state(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(named(dir, "step-", "")?.pop().map(|(_, path)| path))
}

/// The newest under `dir` before `path` that verifies.
pub(super) fn whole_before(dir: &Path, path: &Path) -> Option<PathBuf> {
    let before = list(dir).ok()?.into_iter().map(|(_, path)| path).take_while(|other| other != path);
    before.collect::<Vec<_>>().into_iter().rev().find(|path| Checkpoint::open(path).is_ok())
}

/// The manifest of the newest checkpoint under `dir`, without a look at its tensors; `None` where there is no readable one.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read.
pub fn newest_manifest(dir: &Path) -> Result<Option<Manifest>> {
    let manifest = |path: &PathBuf| serde_json::from_slice(&read(&path.join(MANIFEST)).ok()?).ok();
    Ok(list(dir)?.iter().rev().find_map(|(_, path)| manifest(path)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::super::{finish, folder_of, write_module};
    use super::*;

    fn write(dir: &Path, batches: u64, keep: usize) {
        for module in [1, 2] {
            let ones = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
            write_module(dir, batches, module, vec![(format!("layers.{module}.linear.bias"), ones)]).unwrap();
        }
        finish(dir, batches, 2, Manifest::new("".into(), vec![], [1, 1, 3], vec![1]), (keep, None)).unwrap();
    }

    /// What is scored is the newest, or nothing; what is gone on from may be an older one, which a warning names.
    #[test]
    fn another_one_than_the_newest_is_not_scored() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("checkpoints");
        for batches in [0, 10, 20] {
            write(&runs, batches, 3);
        }
        assert_eq!(Checkpoint::open(dir.path()).unwrap().manifest().batches, 20);
        let refused = || {
            let error = Checkpoint::open(dir.path()).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("step-00000010"), "{error}");
            assert_eq!(latest(&runs).unwrap().unwrap().manifest().batches, 10);
            error.to_string()
        };
        let newest = folder_of(&runs, 20);
        let manifest = fs::read(newest.join(MANIFEST)).unwrap();
        fs::write(newest.join(MANIFEST), &manifest[..manifest.len() / 2]).unwrap();
        assert!(refused().contains("damaged checkpoint manifest"));
        fs::remove_file(newest.join(MANIFEST)).unwrap();
        assert!(refused().contains("step-00000020/manifest.json: No such file or directory"));
        fs::write(newest.join(MANIFEST), &manifest).unwrap();
        fs::remove_file(newest.join("module-002.safetensors")).unwrap();
        assert!(refused().contains("module-002.safetensors: checkpoint file cannot be read"));
        // One checkpoint under the name of another.
        fs::remove_dir_all(&newest).unwrap();
        fs::rename(folder_of(&runs, 0), &newest).unwrap();
        assert!(refused().contains("the checkpoint of 0 batches in a folder called as that of 20"));
        fs::remove_dir_all(&runs).unwrap();
        fs::create_dir(&runs).unwrap();
        assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("no checkpoint in this run folder yet"));
    }
}
