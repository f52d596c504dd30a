//! More records than memory should hold, in order: runs of them are sorted and laid into a temporary file, and read back merged.
//!
//! (The crate `extsort` does the same with files that have names, which a killed process leaves behind.)

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::iter::Peekable;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Bytes of records in memory before a run is laid down, and of each run while all are read.
const RUN: usize = 1 << 20;
const BLOCK: usize = 1 << 13;

/// What is sorted: by key, of two with the same key by value, byte by byte.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// What comes first in the order.
    pub key: Vec<u8>,
    /// What comes with it.
    pub value: Vec<u8>,
}

/// Takes records in any order.
#[derive(Debug)]
pub struct Sorter {
    kept: Kept,
    runs: Runs,
    most: usize,
}

/// Records in memory, one after the other.
#[derive(Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    places: Vec<Place>,
}

/// Where a record is in [`Kept::bytes`]: its key begins and ends, its value ends.
#[derive(Clone, Copy, Debug)]
struct Place(usize, usize, usize);

/// Sorted runs, one after the other in a file without a name: of each record the lengths of key and value (4 bytes each), and these.
#[derive(Debug, Default)]
struct Runs {
    folder: PathBuf,
    file: Option<File>,
    /// Where each ends.
    ends: Vec<u64>,
    /// How many records there are in all.
    records: usize,
}

/// Records in order.
#[derive(Debug, Default)]
pub struct Sorted {
    kept: Kept,
    runs: Runs,
}

impl Sorter {
    /// What does not fit into memory will be laid into `folder`.
    pub fn new(folder: &Path) -> Self {
        let runs = Runs { folder: folder.into(), ..Runs::default() };
        Sorter { kept: Kept::default(), runs, most: RUN }
    }

    /// Takes one more.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder or its disk refuses.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let start = self.kept.bytes.len();
        self.kept.bytes.extend_from_slice(key);
        self.kept.bytes.extend_from_slice(value);
        let middle = start + key.len();
        self.kept.places.push(Place(start, middle, middle + value.len()));
        self.runs.records += 1;
        if self.kept.bytes.len() + size_of_val(&self.kept.places[..]) < self.most {
            return Ok(());
        }
        self.kept.sort();
        self.runs.lay_down(&self.kept).map_err(|e| Error::io(&self.runs.folder, e))?;
        self.kept.bytes.clear();
        self.kept.places.clear();
        Ok(())
    }

    /// All that were taken, in order.
    pub fn sorted(mut self) -> Sorted {
        self.kept.sort();
        self.kept.bytes.shrink_to_fit();
        self.kept.places.shrink_to_fit();
        Sorted { kept: self.kept, runs: self.runs }
    }
}

impl Kept {
    fn parts(&self, place: Place) -> (&[u8], &[u8]) {
        let Place(start, middle, end) = place;
        (&self.bytes[start..middle], &self.bytes[middle..end])
    }

    fn sort(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        places.sort_unstable_by_key(|place| self.parts(*place));
        self.places = places;
    }
}

impl Runs {
    fn lay_down(&mut self, records: &Kept) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.folder)?),
        };
        let mut end = self.ends.last().copied().unwrap_or(0);
        let mut out = BufWriter::new(&*file);
        for place in &records.places {
            let (key, value) = records.parts(*place);
            for part in [key, value] {
                out.write_all(&u32::try_from(part.len()).map_err(std::io::Error::other)?.to_le_bytes())?;
            }
            out.write_all(key)?;
            out.write_all(value)?;
            end += (8 + key.len() + value.len()) as u64;
        }
        out.flush()?;
        self.ends.push(end);
        Ok(())
    }
}

impl Sorted {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.runs.records
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads them from the first on.
    ///
    /// # Errors
    /// Each may be an [`Error::Io`].
    pub fn iter(&self) -> impl Iterator<Item = Result<Record>> {
        let mut first = 0;
        let mut runs = Vec::with_capacity(self.runs.ends.len() + 1);
        if let Some(file) = &self.runs.file {
            for &end in &self.runs.ends {
                runs.push(Run::File(BufReader::with_capacity(BLOCK, Section { file, at: first, end })));
                first = end;
            }
        }
        runs.push(Run::Kept(&self.kept, 0));
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

    /// To ask for keys in ascending order.
    pub fn lookup(&self) -> Lookup<impl Iterator<Item = Result<Record>>> {
        Lookup { records: self.iter().peekable(), last: Vec::new() }
    }
}

/// A run being read.
enum Run<'a> {
    File(BufReader<Section<'a>>),
    /// Those that were kept in memory, and how many of them are read.
    Kept(&'a Kept, usize),
}

impl Run<'_> {
    fn take(&mut self) -> std::io::Result<Option<Record>> {
        match self {
            Run::Kept(kept, next) => Ok(kept.places.get(*next).map(|place| {
                *next += 1;
                let (key, value) = kept.parts(*place);
                Record { key: key.into(), value: value.into() }
            })),
            Run::File(file) => {
                if file.get_ref().is_through() && file.buffer().is_empty() {
                    return Ok(None);
                }
                let mut lengths = [[0; 4]; 2];
                file.read_exact(lengths.as_flattened_mut())?;
                let [mut key, mut value] = lengths.map(|length| vec![0; u32::from_le_bytes(length) as usize]);
                file.read_exact(&mut key)?;
                file.read_exact(&mut value)?;
                Ok(Some(Record { key, value }))
            }
        }
    }
}

/// A part of a file, of which others may be at another place.
struct Section<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Section<'_> {
    fn is_through(&self) -> bool {
        self.at >= self.end
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Finds records by keys that are asked for in ascending order.
pub struct Lookup<I: Iterator<Item = Result<Record>>> {
    records: Peekable<I>,
    last: Vec<u8>,
}

impl<I: Iterator<Item = Result<Record>>> Lookup<I> {
    /// Whether there is a record with this key.
    ///
    /// # Errors
    /// [`Error::Io`] when records cannot be read; [`Error::Run`] after a larger key, whose records are passed.
    pub fn has(&mut self, key: &[u8]) -> Result<bool> {
        if *key < *self.last {
            return Err(Error::Run("sorted records were asked for out of order (a bug)".into()));
        }
        self.last.clear();
        self.last.extend_from_slice(key);
        while self.records.next_if(|next| next.as_ref().is_ok_and(|next| *next.key < *key)).is_some() {}
        match self.records.peek() {
            Some(Ok(next)) => Ok(next.key == key),
            Some(Err(_)) => self.records.next().transpose().map(|_| false),
            None => Ok(false),
        }
    }

    /// Takes the next record with this key, if there is one more.
    ///
    /// # Errors
    /// As [`Lookup::has`].
    pub fn take(&mut self, key: &[u8]) -> Result<Option<Record>> {
        if self.has(key)? { self.records.next().transpose() } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(folder: &Path, most: usize, records: &[Record]) -> Sorted {
        let mut sorter = Sorter { most, ..Sorter::new(folder) };
        records.iter().for_each(|record| sorter.push(&record.key, &record.value).unwrap());
        sorter.sorted()
    }

    fn record(n: u32) -> Record {
        // Of any length, none among them, and each key twice.
        let key = (n / 2 * 7919 % 501).to_be_bytes()[..].repeat((n / 2 % 3) as usize);
        Record { key, value: vec![n as u8; (n % 40) as usize] }
    }

    #[test]
    fn records_come_in_order_from_memory_and_from_files() {
        let folder = tempfile::tempdir().unwrap();
        // Runs of any length, one of them of several blocks; and none at all.
        for (n, most) in [(0, 100), (3, 1000), (40, 100), (2000, 700), (2000, 100_000), (3, 1)] {
            let mut records: Vec<Record> = (0..n).map(record).collect();
            let sorted = sorted(folder.path(), most, &records);
            assert_eq!(sorted.runs.ends.len() > 1, n > 10 && most < 1000 || most == 1);
            records.sort();
            assert_eq!((sorted.len(), sorted.is_empty()), (n as usize, n == 0));
            // As often as is wanted, and two at a time.
            let (one, other) = (sorted.iter(), sorted.iter());
            assert_eq!(other.collect::<Result<Vec<_>>>().unwrap(), records, "{n} {most}");
            assert_eq!(one.collect::<Result<Vec<_>>>().unwrap(), records, "{n} {most}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file has a name");
    }

    #[test]
    fn keys_are_found_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let records: Vec<Record> = (0..500).map(record).collect();
        let sorted = sorted(folder.path(), 300, &records);
        let mut keys: Vec<Vec<u8>> = (0..1000).map(|n| record(n).key).collect();
        keys.sort();
        keys.dedup();
        let (mut one, mut other) = (sorted.lookup(), sorted.lookup());
        for key in keys {
            let mut expected: Vec<&Record> = records.iter().filter(|record| record.key == key).collect();
            expected.sort();
            // Asking takes nothing.
            for _ in 0..2 {
                assert_eq!(one.has(&key).unwrap(), !expected.is_empty());
            }
            for record in expected {
                assert_eq!(other.take(&key).unwrap().as_ref(), Some(record));
            }
            assert_eq!(other.take(&key).unwrap(), None);
        }
        assert!(one.has(&[]).is_err(), "passed by now");
    }

    #[test]
    fn a_file_cut_short_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let records: Vec<Record> = (0..80).map(record).collect();
        let sorted = sorted(folder.path(), 400, &records);
        let file = sorted.runs.file.as_ref().unwrap();
        let length = file.metadata().unwrap().len();
        for cut in [1, 9, length / 2] {
            file.set_len(length - cut).unwrap();
            assert!(sorted.iter().any(|record| record.is_err()));
            let mut lookup = sorted.lookup();
            assert!(lookup.has(&[0xff; 99]).is_err());
        }
    }
}
