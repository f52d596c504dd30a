//! Which checkpoint of a run scored best in validation: `checkpoints/best.json`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{MANIFEST, folder_of, name_of};
use crate::config::Until;
use crate::sys::files::{read, write_whole};
use crate::{Error, Result};

const FILE: &str = "best.json";
/// What stands for the best checkpoint in a path: `RUN/checkpoints/best`, or `RUN/best`.
const NAME: &str = "best";

/// By what checkpoints are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Share of clips whose label came first: the higher the better.
    Top1,
    /// Mean squared error of pixels: the lower the better.
    Mse,
}

/// The best checkpoint so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Batches trained on.
    pub batches: u64,
    /// The name of its folder, beside this file.
    pub checkpoint: String,
    /// What counts.
    pub metric: Metric,
    /// And what it came to.
    pub value: f64,
}

impl Best {
    /// The checkpoint of `batches` with its score.
    pub fn new(batches: u64, metric: Metric, value: f64) -> Self {
        Best { batches, checkpoint: name_of(batches), metric, value }
    }

    /// Whether it scores better than the best before; what is no number never does. Of equals the earlier one stays.
    pub fn beats(&self, before: Option<&Best>) -> bool {
        let Some(before) = before.filter(|before| before.metric == self.metric && before.batches != self.batches)
        else {
            return !self.value.is_nan();
        };
        match self.metric {
            Metric::Top1 => self.value > before.value,
            Metric::Mse => self.value < before.value,
        }
    }

    /// Whether it is what training was to go on `until`.
    pub fn reaches(&self, until: Until) -> bool {
        match (until, self.metric) {
            (Until::Top1(share), Metric::Top1) => self.value >= share,
            (Until::Mse(error), Metric::Mse) => self.value <= error,
            _ => false,
        }
    }

    /// Says under `dir` that this is the best; the checkpoint must be there.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses; what was the best before still is.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::io(&path, e.into()))?;
        write_whole(&path, &text)
    }

    /// The best under `dir`, if there is one, it can be read and its checkpoint is there.
    pub fn read(dir: &Path) -> Option<Best> {
        let best: Best = serde_json::from_slice(&read(&dir.join(FILE)).ok()?).ok()?;
        (best.checkpoint == name_of(best.batches) && folder_of(dir, best.batches).join(MANIFEST).exists())
            .then_some(best)
    }

    /// Forgets the best of a run that begins anew, or went back behind it.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be removed.
    pub fn forget(dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path, e)),
            _ => Ok(()),
        }
    }
}

/// The checkpoint that a path means: itself, or the best of a run where it ends in `best`.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    if path.exists() || path.file_name().is_none_or(|name| name != NAME) {
        return Ok(path.to_path_buf());
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    let dirs = [parent.to_path_buf(), parent.join("checkpoints")];
    let found = dirs.iter().find_map(|dir| Best::read(dir).map(|best| dir.join(best.checkpoint)));
    found.ok_or_else(|| {
        if let Some(file) = dirs.iter().map(|dir| dir.join(FILE)).find(|file| file.exists()) {
            return Error::input(format!(
                "{}: {} cannot be read, or names a checkpoint that is not there or not whole (was a copy cut short?)",
                path.display(),
                file.display()
            ));
        }
        Error::input(format!(
            "{}: there is no best checkpoint: training keeps it where train.validate_every is set, from the first validation on",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_higher_accuracy_or_the_lower_error_is_better() {
        let top1 = |batches, value| Best::new(batches, Metric::Top1, value);
        let mse = |batches, value| Best::new(batches, Metric::Mse, value);
        assert!(top1(1, 0.0).beats(None) && !top1(1, f64::NAN).beats(None));
        assert!(top1(2, 0.5).beats(Some(&top1(1, 0.4))) && !top1(2, 0.4).beats(Some(&top1(1, 0.4))));
        assert!(mse(2, 0.3).beats(Some(&mse(1, 0.4))) && !mse(2, 0.5).beats(Some(&mse(1, 0.4))));
        assert!(!mse(2, f64::NAN).beats(Some(&mse(1, 0.4))));
        // Written anew, it is what it is now.
        assert!(top1(2, 0.1).beats(Some(&top1(2, 0.4))));
    }

    #[test]
    fn a_best_checkpoint_that_is_gone_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (checkpoints, best) = (dir.path().join("checkpoints"), Best::new(3, Metric::Top1, 0.25));
        std::fs::create_dir_all(folder_of(&checkpoints, 3)).unwrap();
        best.write(&checkpoints).unwrap();
        assert_eq!(Best::read(&checkpoints), None, "without its manifest");
        let error = resolve(&checkpoints.join("best")).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("best.json cannot be read, or names"), "{error}");
        std::fs::write(folder_of(&checkpoints, 3).join(MANIFEST), "").unwrap();
        assert_eq!(Best::read(&checkpoints), Some(best));
        for path in [checkpoints.join("best"), dir.path().join("best")] {
            assert_eq!(resolve(&path).unwrap(), folder_of(&checkpoints, 3));
        }
        Best::forget(&checkpoints).unwrap();
        Best::forget(&checkpoints).unwrap();
        assert_eq!(Best::read(&checkpoints), None);
        assert!(resolve(&checkpoints.join("best")).unwrap_err().to_string().contains("no best checkpoint"));
    }
}
