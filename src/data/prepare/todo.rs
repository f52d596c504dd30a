//! What the shards that are to be made will hold: a file a split beside the records, of which each process reads a shard's part when
//! it makes it. So none has all videos in memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::record::{FileState, State};
use crate::{Error, Result};

/// One video of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVideo {
    /// Its id.
    pub id: String,
    /// Its class.
    pub label: i32,
    /// The file, below the folder of videos.
    pub file: FileState,
}

/// Where a shard's videos are written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Todo {
    /// The file, in the folder of records.
    file: String,
    at: u64,
    bytes: usize,
}

/// Each run's file has a name of its own: a file system of many machines may know an old one's content for a while.
const PREFIX: &str = "todo-";

/// Writes down one split's videos, shard by shard.
pub(super) struct TodoWriter<'a> {
    state: &'a State,
    file: Option<BufWriter<tempfile::NamedTempFile>>,
    at: u64,
}

impl<'a> TodoWriter<'a> {
    pub(super) fn new(state: &'a State) -> Self {
        TodoWriter { state, file: None, at: 0 }
    }

    pub(super) fn write(&mut self, videos: &[PlannedVideo]) -> Result<Todo> {
        let text = serde_json::to_vec(videos).map_err(|e| Error::Run(format!("writing down the plan: {e}")))?;
        let mut write = || {
            let file = match &mut self.file {
                Some(file) => file,
                none => {
                    none.insert(BufWriter::new(tempfile::Builder::new().prefix(PREFIX).tempfile_in(self.state.dir())?))
                }
            };
            file.write_all(&text)?;
            Ok(file.get_ref().path().file_name().unwrap_or_default().to_string_lossy().into_owned())
        };
        let file = write().map_err(|e: std::io::Error| Error::io(self.state.dir(), e))?;
        let todo = Todo { file, at: self.at, bytes: text.len() };
        self.at += text.len() as u64;
        Ok(todo)
    }

    /// Leaves the file to those who read it.
    pub(super) fn finish(self) -> Result<()> {
        let Some(file) = self.file else { return Ok(()) };
        let keep = || -> std::io::Result<()> { Ok(file.into_inner()?.keep().map(drop)?) };
        keep().map_err(|e| Error::io(self.state.dir(), e))
    }
}

/// The videos of a shard, in the order they are to be written.
pub(super) fn read(state: &State, todo: &Todo) -> Result<Vec<PlannedVideo>> {
    let path = state.dir().join(&todo.file);
    let mut text = vec![0; todo.bytes];
    File::open(&path).and_then(|file| file.read_exact_at(&mut text, todo.at)).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::Run(format!("{}: {e}", path.display())))
}

/// Removes what this run, or one that was killed, has written down.
pub(super) fn forget(state: &State) -> Result<()> {
    state.remove(|name| name.starts_with(PREFIX))
}
