//! What is known of finished shards: a small file a shard, in `.prepare/SPLIT` of the folder of shards.
//!
//! A shard counts as finished once its record is there, which is written (whole, under a temporary name first) after the
//! shard has its own name. Whatever moment a run is killed at, the next one finds a shard finished or makes it anew.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::Xxh3;

use crate::sys::files::{read, write_whole};
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
    /// Its class; `None` in records of earlier versions, as what follows.
    #[serde(default)]
    pub label: Option<i32>,
    /// Its file.
    #[serde(flatten)]
    pub file: FileState,
    /// What became of it.
    pub outcome: Outcome,
}

/// By what a video's file is told from one that has replaced it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// Its path below the folder of videos.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// When it was changed, in nanoseconds since 1970; 0: unknown.
    #[serde(default)]
    pub modified: u64,
    /// XXH3-64 of its content; 0: unknown.
    #[serde(default)]
    pub content: u64,
}

impl FileState {
    /// The file `path` below `videos`, its content unread. What cannot be looked at is for ffmpeg to complain about.
    pub fn of(videos: &Path, path: &str) -> Self {
        let meta = std::fs::metadata(videos.join(path)).ok();
        let modified = meta.as_ref().and_then(|meta| meta.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        FileState {
            path: path.into(),
            bytes: meta.map_or(0, |meta| meta.len()),
            modified: modified.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0)),
            content: 0,
        }
    }

    /// Whether the file `now` has the content that this one had. Its bytes are read only where its time has changed, or its path.
    pub fn is_same(&self, now: &FileState, videos: &Path) -> bool {
        let untouched = self.path == now.path && self.modified == now.modified;
        // Of an earlier version's record the size is all there is.
        let unknown = self.content == 0;
        self.bytes == now.bytes && (untouched || unknown || content(&videos.join(&now.path)) == self.content)
    }
}

/// XXH3-64 of a file's content, 0 where it cannot be read.
pub fn content(path: &Path) -> u64 {
    let hashed = || -> std::io::Result<u64> {
        let (mut hash, mut file) = (Xxh3::new(), File::open(path)?);
        let mut block = vec![0; 1 << 20];
        loop {
            match file.read(&mut block)? {
                0 => return Ok(hash.digest()),
                n => hash.update(&block[..n]),
            }
        }
    };
    if std::fs::metadata(path).is_ok_and(|meta| meta.is_file()) { hashed().unwrap_or(0) } else { 0 }
}

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Size of the shard's file; 0 where no video was any good, and there is no file.
    pub bytes: u64,
    /// Its videos, in order, those that are not in it too.
    pub videos: Vec<Entry>,
    /// How they were decoded: [`RECIPE`].
    #[serde(default)]
    pub recipe: u32,
}

/// Which picture of a file is a video's, by number; an earlier one took a cover for the video.
pub const RECIPE: u32 = 1;

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

    /// Those of all splits in the folder of shards, by name.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read.
    pub fn all(out: &Path) -> Result<Vec<(String, Self)>> {
        let dir = out.join(".prepare");
        let entries = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io(&dir, e))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.map_err(|e| Error::io(&dir, e))?.file_name();
            all.extend(name.to_str().map(|name| (name.to_string(), State::new(out, name))));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Reads `name`; `None` where it is not there or not whole.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let bytes = read(&self.dir.join(name)).ok()?;
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
        self.remove(|name| name != "lock")
    }

    /// Removes the files of such names.
    pub(super) fn remove(&self, these: impl Fn(&str) -> bool) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))? {
            let path = entry.map_err(|e| Error::io(&self.dir, e))?.path();
            if path.file_name().is_some_and(|name| these(&name.to_string_lossy())) {
                std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
            }
        }
        Ok(())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
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
