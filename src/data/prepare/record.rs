//! What is known of finished shards: a small file a shard, in `.prepare/SPLIT` of the folder of shards.
//!
//! A shard counts as finished once its record is there, which is written (whole, under a temporary name first) after the
//! shard has its own name. Whatever moment a run is killed at, the next one finds a shard finished or makes it anew.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::sys::files::write_whole;
use crate::{Error, Result};

/// What became of one video.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is in the shard; what ffmpeg had to say about it, if anything.
    Written {
        /// Frames.
        frames: u64,
        /// The last line of ffmpeg's errors.
        complaint: Option<String>,
    },
    /// It has too few frames.
    Short {
        /// Frames.
        frames: u64,
    },
    /// It could not be decoded.
    Broken {
        /// ffmpeg's reason.
        why: String,
    },
}

/// One video that a shard was to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its id.
    pub id: String,
    /// Size of its file, by which a replaced one is told.
    pub bytes: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Size of the shard's file; 0 where no video was any good, and there is no file.
    pub bytes: u64,
    /// Its videos, in order, those that are not in it too.
    pub videos: Vec<Entry>,
}

/// The folder with the records of one split.
#[derive(Clone, Debug)]
pub struct State {
    dir: PathBuf,
}

impl State {
    /// The folder for `split` below the folder of shards.
    pub fn new(out: &Path, split: &str) -> Self {
        State { dir: out.join(".prepare").join(split) }
    }

    /// Makes the folder, and keeps other runs out of it as long as the file returned lives. (A file system without locks
    /// lets them in.)
    ///
    /// # Errors
    /// [`Error::Input`] when the folder cannot be made or another run is at work.
    pub fn lock(&self) -> Result<File> {
        let refused = |e: std::io::Error| Error::input(format!("{}: cannot write here: {e}", self.dir.display()));
        std::fs::create_dir_all(&self.dir).map_err(refused)?;
        let file = File::options().create(true).append(true).open(self.dir.join("lock")).map_err(refused)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let dir = self.dir.display();
                return Err(Error::input(format!("{dir}: another `sideways data` command is at work on this split")));
            }
            Err(TryLockError::Error(e)) => log::debug!("{}: no lock: {e}", self.dir.display()),
            Ok(()) => {}
        }
        Ok(file)
    }

    /// Reads `name`; `None` where it is not there or not whole.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let bytes = std::fs::read(self.dir.join(name)).ok()?;
        serde_json::from_slice(&bytes).inspect_err(|e| log::warn!("{}: {e}", self.dir.join(name).display())).ok()
    }

    /// Writes `name`, so that it is there whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let bytes = serde_json::to_vec(value).map_err(|e| Error::Run(format!("{name}: {e}")))?;
        write_whole(&self.dir.join(name), &bytes)
    }

    /// Forgets everything but the lock.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be removed.
    pub fn clear(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))? {
            let path = entry.map_err(|e| Error::io(&self.dir, e))?.path();
            if path.file_name().is_some_and(|name| name != "lock") {
                std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
            }
        }
        Ok(())
    }

    /// Is this the same folder as another rank sees?
    pub fn is_there(&self) -> bool {
        self.dir.join("lock").is_file()
    }
}

/// The name of a shard's record.
pub fn name(shard: usize) -> String {
    format!("{shard:05}.json")
}
