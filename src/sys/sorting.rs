//! More records than memory should hold, in order: runs of them are sorted and laid into a temporary file, and read back merged.
//!
//! (The crate `extsort` does the same with files that have names, which a killed process leaves behind.)

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytemuck::Pod;

use crate::{Error, Result};

/// Records in memory before a run is laid down, and of each run while all are read.
const RUN: usize = 1 << 16;
const BLOCK: usize = 1 << 8;

/// Takes records in any order.
pub struct Sorter<T> {
    kept: Vec<T>,
    runs: Runs,
    most: usize,
}

/// Sorted runs, one after the other in a file without a name.
struct Runs {
    folder: PathBuf,
    file: Option<File>,
    /// Records of each.
    lengths: Vec<usize>,
}

/// Records in order.
pub struct Sorted<T> {
    kept: Vec<T>,
    runs: Runs,
}

impl<T: Pod + Ord> Sorter<T> {
    /// What does not fit into memory will be laid into `folder`.
    pub fn new(folder: &Path) -> Self {
        let runs = Runs { folder: folder.into(), file: None, lengths: Vec::new() };
        Sorter { kept: Vec::new(), runs, most: RUN }
    }

    /// Takes one more.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder or its disk refuses.
    pub fn push(&mut self, record: T) -> Result<()> {
        self.kept.push(record);
        if self.kept.len() < self.most {
            return Ok(());
        }
        self.kept.sort_unstable();
        self.runs.lay_down(bytemuck::cast_slice(&self.kept)).map_err(|e| Error::io(&self.runs.folder, e))?;
        self.runs.lengths.push(self.kept.len());
        self.kept.clear();
        Ok(())
    }

    /// All that were taken, in order.
    pub fn sorted(mut self) -> Sorted<T> {
        self.kept.sort_unstable();
        self.kept.shrink_to_fit();
        Sorted { kept: self.kept, runs: self.runs }
    }
}

impl Runs {
    fn lay_down(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.folder)?),
        };
        file.write_all(bytes)
    }
}

impl<T: Pod + Ord> Sorted<T> {
    /// Reads them from the first on.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn iter(&self) -> impl Iterator<Item = Result<T>> {
        let mut first = 0;
        let mut runs: Vec<Run<T>> = Vec::with_capacity(self.runs.lengths.len() + 1);
        for &length in &self.runs.lengths {
            runs.push(Run { file: self.runs.file.as_ref(), next: first, end: first + length, block: Vec::new() });
            first += length;
        }
        // Those that were kept are a run that needs no file.
        runs.push(Run { file: None, next: 0, end: 0, block: self.kept.iter().rev().copied().collect() });
        let mut heads = BinaryHeap::with_capacity(runs.len());
        let mut refill: Vec<usize> = (0..runs.len()).collect();
        std::iter::from_fn(move || {
            while let Some(run) = refill.pop() {
                match runs[run].take() {
                    Ok(Some(record)) => heads.push(Reverse((record, run))),
                    Ok(None) => {}
                    Err(e) => return Some(Err(Error::io(&self.runs.folder, e))),
                }
            }
            let Reverse((record, run)) = heads.pop()?;
            refill.push(run);
            Some(Ok(record))
        })
    }
}

/// A run being read.
struct Run<'a, T> {
    file: Option<&'a File>,
    /// The first record that has not been read yet, and where the run ends.
    next: usize,
    end: usize,
    /// What has been, the last first.
    block: Vec<T>,
}

impl<T: Pod> Run<'_, T> {
    fn take(&mut self) -> std::io::Result<Option<T>> {
        if let (true, Some(file), left @ 1..) = (self.block.is_empty(), self.file, self.end - self.next) {
            self.block.resize(left.min(BLOCK), T::zeroed());
            file.read_exact_at(bytemuck::cast_slice_mut(&mut self.block), (self.next * size_of::<T>()) as u64)?;
            self.next += self.block.len();
            self.block.reverse();
        }
        Ok(self.block.pop())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_in_order_from_memory_and_from_files() {
        let folder = tempfile::tempdir().unwrap();
        // Runs of any length, one of them of several blocks; and none at all.
        for (n, most) in [(0, 4), (3, 4), (4, 4), (1000, 7), (1000, 600), (3, 1)] {
            let mut sorter = Sorter { most, ..Sorter::new(folder.path()) };
            let numbers: Vec<u64> = (0..n).map(|i| i * 7919 % 501).collect();
            numbers.iter().for_each(|number| sorter.push(*number).unwrap());
            assert_eq!(sorter.runs.lengths.len(), n as usize / most);
            let (sorted, mut expected) = (sorter.sorted(), numbers);
            expected.sort();
            // As often as is wanted.
            for _ in 0..2 {
                assert_eq!(sorted.iter().collect::<Result<Vec<_>>>().unwrap(), expected, "{n} {most}");
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file has a name");
    }

    #[test]
    fn a_file_cut_short_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut sorter = Sorter { most: 4, ..Sorter::new(folder.path()) };
        (0..8u32).for_each(|n| sorter.push(n).unwrap());
        let sorted = sorter.sorted();
        sorted.runs.file.as_ref().unwrap().set_len(20).unwrap();
        assert!(sorted.iter().any(|record| record.is_err()));
    }
}
