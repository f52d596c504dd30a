//! The folder that shards are written into.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::record::State;
use crate::{Error, Result};

/// Videos of a shard, at most.
const MAX_PER_SHARD: usize = 1 << 24;

/// The name of shard `number` of a split: `train-00000.h5`.
pub fn shard_path(out: &Path, split: &str, number: usize) -> PathBuf {
    out.join(format!("{split}-{number:05}.h5"))
}

/// Checks what all writers of shards have in common.
pub(crate) fn check(per_shard: usize, quality: u8) -> Result<()> {
    if !(1..=MAX_PER_SHARD).contains(&per_shard) {
        return Err(Error::input(format!("--per-shard {per_shard}: it must be 1..={MAX_PER_SHARD}")));
    }
    if !(1..=100).contains(&quality) {
        return Err(Error::input(format!("--quality {quality}: it must be 1..=100")));
    }
    Ok(())
}

/// A split's name becomes part of file names.
pub(crate) fn check_split(split: &str) -> Result<()> {
    let edges = split.trim() != split;
    let of_file = split.contains(['/', '*', '?', '[', ']', '\t', '\n', '\r', '\0']) || split.starts_with(['.', '-']);
    if split.is_empty() || edges || of_file {
        return Err(Error::input(format!("{split:?} cannot name a split: it becomes part of a file name")));
    }
    Ok(())
}

/// Makes the folder and checks that it can be written.
pub(crate) fn make_folder(out: &Path) -> Result<()> {
    let refused = |e: std::io::Error| Error::input(format!("{}: cannot write into this folder: {e}", out.display()));
    std::fs::create_dir_all(out).map_err(refused)?;
    tempfile::NamedTempFile::new_in(out).map(drop).map_err(refused)
}

/// Makes the folder, checks that it can be written, and deals with shards of these splits that it holds: refused, or
/// with `overwrite` removed (what another split left there stays). Others stay out of these splits as long as what is
/// returned lives: unfinished shards of two writers would have the same names.
///
/// # Errors
/// [`Error::Input`] for a folder that cannot be made or written, a split name that is no file name, shards that are
/// there already, another writer at work.
pub(crate) fn prepare_folder(out: &Path, splits: &[&str], overwrite: bool) -> Result<Vec<File>> {
    for split in splits {
        check_split(split)?;
    }
    make_folder(out)?;
    let locks = splits.iter().map(|split| State::new(out, split).lock()).collect::<Result<_>>()?;
    let mut old = 0;
    for split in splits {
        old += shards(out, split)?.len();
    }
    if old > 0 && !overwrite {
        return Err(Error::input(format!(
            "{}: {old} shards of {} are there already: give another --out, or --overwrite to replace them",
            out.display(),
            splits.join(" and ")
        )));
    }
    splits.iter().try_for_each(|split| tidy(out, split, overwrite))?;
    Ok(locks)
}

/// The shards of a split.
pub(crate) fn shards(out: &Path, split: &str) -> Result<Vec<PathBuf>> {
    Ok(of_split(out, split)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "h5")).collect())
}

/// Removes a split's unfinished shards, and with `all` every one.
pub(crate) fn tidy(out: &Path, split: &str, all: bool) -> Result<()> {
    for path in of_split(out, split)? {
        if all || path.extension().is_some_and(|e| e == "partial") {
            std::fs::remove_file(&path)
                .map_err(|e| Error::input(format!("{}: cannot remove this old shard: {e}", path.display())))?;
        }
    }
    Ok(())
}

fn of_split(out: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let refused = |e: std::io::Error| Error::input(format!("{}: cannot read this folder: {e}", out.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(out).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        if entry.file_name().to_str().is_some_and(|name| is_shard_of(name, split)) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Is this `SPLIT-NNNNN.h5`, or one that was never finished?
fn is_shard_of(name: &str, split: &str) -> bool {
    let name = name.strip_suffix(".partial").unwrap_or(name);
    name.strip_prefix(split)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.strip_suffix(".h5"))
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}
