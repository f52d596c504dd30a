//! Videos that are listed and not there. Of a large dataset most may be: their names are kept in a file, not in memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Bytes of names that are kept in memory.
const KEPT: usize = 1 << 16;

/// The ids of a split's missing videos, in their order.
#[derive(Debug, Default)]
pub struct Missing {
    /// Where the file without a name is made.
    folder: PathBuf,
    /// The ids that no longer fit into memory, a line each.
    file: Option<File>,
    /// And those that came after them.
    kept: Vec<u8>,
    count: usize,
}

impl Missing {
    /// None yet; many will be laid into `folder`.
    pub(super) fn new(folder: &Path) -> Self {
        Missing { folder: folder.into(), ..Missing::default() }
    }

    /// Takes one more.
    pub(in crate::data::prepare) fn push(&mut self, id: &str) -> Result<()> {
        self.kept.extend_from_slice(id.as_bytes());
        self.kept.push(b'\n');
        self.count += 1;
        if self.kept.len() < KEPT {
            return Ok(());
        }
        let mut lay_down = || {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(tempfile::tempfile_in(&self.folder)?),
            };
            file.write_all(&self.kept)
        };
        lay_down().map_err(|e| Error::io(&self.folder, e))?;
        self.kept.clear();
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Their ids, from the first on.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn ids(&self) -> impl Iterator<Item = Result<String>> {
        let all = FromStart { file: self.file.as_ref(), at: 0 }.chain(&self.kept[..]);
        BufReader::new(all).lines().map(|id| id.map_err(|e| Error::io(&self.folder, e)))
    }
}

/// Reads a file, of which others may be at another place.
struct FromStart<'a> {
    file: Option<&'a File>,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.map_or(Ok(0), |file| file.read_at(buffer, self.at))?;
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_come_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for n in [0, 1, 20_000] {
            let mut missing = Missing::new(folder.path());
            let ids: Vec<String> = (0..n).map(|n| format!("video {n}")).collect();
            ids.iter().for_each(|id| missing.push(id).unwrap());
            assert_eq!((missing.len(), missing.file.is_some()), (n, n > 1));
            let (one, other) = (missing.ids(), missing.ids());
            assert!(one.map(Result::unwrap).eq(ids.iter().cloned()) && other.count() == n);
            assert!(missing.kept.len() < KEPT);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file has a name");
    }
}
