//! Checkpoints: `DIR/step-NNNNNNNN/` with one safetensors file a module and `manifest.json`.
//!
//! Tensors carry global names and the manifest knows no ranks, so a checkpoint loads at any partition. A checkpoint is
//! written under a temporary name, each file synced, and renamed when the manifest is in it: a folder with its final
//! name is complete. `step-00000000` is the start; `best.json` names the one that scored best in validation.

pub mod best;
mod newest;
pub mod writer;

pub use newest::{latest, list, newest_manifest};

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::sys::files::read;
use crate::{Error, Result};

const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "sideways-checkpoint";
const VERSION: u32 = 1;
/// Ends of the names of folders that are being written or removed.
const PARTIAL: &str = ".partial";
const DISCARDED: &str = ".discarded";

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the checkpoint's folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// xxh3-64 of its content, in hexadecimal.
    pub xxh3: String,
    /// The tensors in it.
    pub tensors: Vec<String>,
}

/// `manifest.json`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// `"sideways-checkpoint"`
    pub format: String,
    /// 1
    pub version: u32,
    /// Batches trained on.
    #[serde(alias = "clips")]
    pub batches: u64,
    /// Classes in label order (empty for future frames).
    pub class_names: Vec<String>,
    /// `[H, W, C]` of a frame.
    pub input: [usize; 3],
    /// The layers before which the network was cut: what is remembered, not what is required.
    pub cuts: Vec<usize>,
    /// The resolved configuration, as TOML.
    pub config: String,
    /// [`crate::data::Dataset::digest`] of what was trained on, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Height and width of the frames in the shards trained on, before any crop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<[usize; 2]>,
    /// Their frames a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fps: Option<f64>,
    /// The files.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// A manifest without files yet.
    pub fn new(config: String, class_names: Vec<String>, input: [usize; 3], cuts: Vec<usize>) -> Self {
        let (format, version) = (FORMAT.to_string(), VERSION);
        let (data, stored, fps) = (None, None, None);
        Manifest { format, version, batches: 0, class_names, input, cuts, config, data, stored, fps, files: Vec::new() }
    }
}

fn name_of(batches: u64) -> String {
    format!("step-{batches:08}")
}

/// The folder of the checkpoint of `batches` batches under `dir`, whether it is there or not.
pub fn folder_of(dir: &Path, batches: u64) -> PathBuf {
    dir.join(name_of(batches))
}

fn partial_of(dir: &Path, batches: u64) -> PathBuf {
    dir.join(format!(".{}{PARTIAL}", name_of(batches)))
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// Writes one module's tensors into the unfinished checkpoint of `batches` under `dir`, with a small entry beside them
/// that [`finish`] gathers. Called by the module's rank.
///
/// # Errors
/// [`Error::Io`] if the disk refuses (full, read-only); earlier checkpoints are untouched.
pub fn write_module(dir: &Path, batches: u64, module: usize, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let folder = partial_of(dir, batches);
    fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    let name = format!("module-{module:03}.safetensors");
    let path = folder.join(&name);
    let mut names: Vec<String> = tensors.iter().map(|(n, _)| n.clone()).collect();
    names.sort();
    let refused = |e: std::io::Error| Error::io(&path, e);
    let content = safetensors::serialize(tensors.iter().map(|(name, tensor)| (name, tensor)), None)
        .map_err(|e| refused(std::io::Error::other(e)))?;
    let written = fs::File::create(&path).and_then(|mut file| file.write_all(&content).and_then(|()| file.sync_all()));
    if written.is_err() {
        // Where the run goes on, a part of a file would take the next checkpoint's room.
        let _ = fs::remove_file(&path);
    }
    written.map_err(refused)?;
    let entry =
        FileEntry { name, bytes: content.len() as u64, xxh3: format!("{:016x}", xxh3_64(&content)), tensors: names };
    let beside = folder.join(entry_name(module));
    let text = serde_json::to_vec(&entry).map_err(|e| Error::io(&beside, e.into()))?;
    fs::write(&beside, text).map_err(|e| Error::io(&beside, e))?;
    sync(&beside)
}

fn entry_name(module: usize) -> String {
    format!("module-{module:03}.entry.json")
}

/// Completes the checkpoint of `batches` once all `modules` have been written: manifest, sync, rename. Then removes older
/// ones, so that `keep` are left with this one (and the start, and the `best` one), and what failed before it. Called by one rank.
/// Returns the checkpoint's folder.
///
/// # Errors
/// [`Error::Io`] if the disk refuses or a module's entry is not there; nothing of it is left then.
pub fn finish(
    dir: &Path,
    batches: u64,
    modules: usize,
    manifest: Manifest,
    (keep, best): (usize, Option<u64>),
) -> Result<PathBuf> {
    let complete = complete(dir, batches, modules, manifest).inspect_err(|_| {
        let _ = fs::remove_dir_all(partial_of(dir, batches));
    })?;
    // The checkpoint is there: a run need not end because something else is in the way of tidying up.
    if let Err(e) = remove_old(dir, batches, keep, best) {
        log::warn!("old checkpoints cannot be removed: {e}");
    }
    Ok(complete)
}

fn complete(dir: &Path, batches: u64, modules: usize, mut manifest: Manifest) -> Result<PathBuf> {
    let folder = partial_of(dir, batches);
    manifest.batches = batches;
    manifest.files.clear();
    for module in 1..=modules {
        let beside = folder.join(entry_name(module));
        let text = read(&beside).map_err(|e| Error::io(&beside, e))?;
        manifest.files.push(serde_json::from_slice(&text).map_err(|e| Error::io(&beside, e.into()))?);
        fs::remove_file(&beside).map_err(|e| Error::io(&beside, e))?;
    }
    let path = folder.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::io(&path, e.into()))?;
    fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
    sync(&path)?;
    sync(&folder)?;
    let complete = folder_of(dir, batches);
    if complete.exists() {
        discard(&complete)?;
    }
    fs::rename(&folder, &complete).map_err(|e| Error::io(&complete, e))?;
    sync(dir)?;
    Ok(complete)
}

/// After the checkpoint of `batches`. One that is further on is from before the run went back behind it, since it was damaged:
/// it counts for nothing, or it would take the place of a good one.
fn remove_old(dir: &Path, batches: u64, keep: usize, best: Option<u64>) -> Result<()> {
    for (_, path) in newest::named(dir, ".step-", PARTIAL)?.into_iter().filter(|(of, _)| *of < batches) {
        fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
    }
    let mut found = list(dir)?;
    found.retain(|(of, _)| (1..=batches).contains(of) && best != Some(*of));
    let old = found.len().saturating_sub(keep);
    found.drain(..old).try_for_each(|(_, path)| discard(&path))
}

/// Removes a checkpoint; it loses its name first, so that it is never seen in part.
fn discard(path: &Path) -> Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let nameless = path.with_file_name(format!(".{name}{DISCARDED}"));
    fs::rename(path, &nameless).map_err(|e| Error::io(path, e))?;
    fs::remove_dir_all(&nameless).map_err(|e| Error::io(&nameless, e))
}

/// Removes what an earlier run left unfinished: checkpoints half written or half removed. Called by one rank, before any
/// writes.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read or changed; a missing folder holds nothing.
pub fn clear_unfinished(dir: &Path) -> Result<()> {
    for ending in [PARTIAL, DISCARDED] {
        for (_, path) in newest::named(dir, ".step-", ending)? {
            fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

fn read_manifest(path: &Path) -> Result<Manifest> {
    let at = path.join(MANIFEST);
    let text = read(&at).map_err(|e| {
        let wanted = "name a checkpoint (a folder step-NNNNNNNN) or a run folder that holds one";
        match path.exists() {
            true if batches_of(path).is_some() => Error::input(format!(
                "{}: {e}: this checkpoint is not whole (was a copy cut short?); name another one, or copy it again",
                at.display()
            )),
            true => Error::input(format!("{}: not a checkpoint: {e}; {wanted}", at.display())),
            false => Error::input(format!("{}: there is no such folder; {wanted}", path.display())),
        }
    })?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|e| Error::input(format!("{}: damaged checkpoint manifest: {e}", at.display())))?;
    if manifest.format != FORMAT || manifest.version != VERSION {
        return Err(Error::input(format!(
            "{}: format {} version {}; this program reads {FORMAT} version {VERSION}",
            at.display(),
            manifest.format,
            manifest.version
        )));
    }
    if let Some(batches) = batches_of(path).filter(|batches| *batches != manifest.batches) {
        return Err(Error::input(format!(
            "{}: the checkpoint of {} batches in a folder called as that of {batches}: give the folder its own name back",
            at.display(),
            manifest.batches
        )));
    }
    // Each is a file of this folder.
    if let Some(file) =
        manifest.files.iter().find(|file| Path::new(&file.name).components().count() != 1 || file.name.contains('/'))
    {
        return Err(Error::input(format!(
            "{}: damaged checkpoint manifest: it names a file {:?}",
            at.display(),
            file.name
        )));
    }
    Ok(manifest)
}

/// The batches that a checkpoint's folder is called by.
fn batches_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// A complete checkpoint, opened for reading.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path` without reading its files, which another rank has verified. What is
    /// loaded later is verified then.
    ///
    /// # Errors
    /// [`Error::Input`] if it is no checkpoint.
    pub fn trusted(path: &Path) -> Result<Self> {
        Ok(Checkpoint { path: path.to_path_buf(), manifest: read_manifest(path)? })
    }

    /// Opens `path` (a `step-NNNNNNNN` folder, a run folder, whose newest checkpoint is meant, or its `checkpoints/best`, which
    /// is the one that scored best in validation) and verifies sizes and checksums.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file that is missing or damaged: another checkpoint than the one meant is never taken.
    pub fn open(path: &Path) -> Result<Self> {
        let path = &best::resolve(path)?;
        let runs = path.join("checkpoints");
        if !path.join(MANIFEST).exists() && runs.is_dir() {
            let newest = newest::of_any_state(&runs)?.ok_or_else(|| {
                Error::input(format!("{}: there is no checkpoint in this run folder yet", path.display()))
            })?;
            return Self::open(&newest).map_err(|e| {
                Error::input(format!(
                    "{e}. It is the newest of {}; an older one has to be named, for instance {}",
                    path.display(),
                    newest::whole_before(&runs, &newest).unwrap_or_else(|| runs.join("step-NNNNNNNN")).display()
                ))
            });
        }
        let checkpoint = Self::trusted(path)?;
        for file in &checkpoint.manifest.files {
            checkpoint.read_verified(file)?;
        }
        Ok(checkpoint)
    }

    fn read_verified(&self, file: &FileEntry) -> Result<Vec<u8>> {
        let path = self.path.join(&file.name);
        let content = read(&path)
            .map_err(|e| Error::input(format!("{}: checkpoint file cannot be read: {e}", path.display())))?;
        if content.len() as u64 != file.bytes || format!("{:016x}", xxh3_64(&content)) != file.xxh3 {
            return Err(Error::input(format!(
                "{}: damaged checkpoint file ({} bytes, {} expected; checksums compared): use an older checkpoint",
                path.display(),
                content.len(),
                file.bytes
            )));
        }
        Ok(content)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// All tensors whose names `wanted` accepts; only files that hold some are read.
    ///
    /// # Errors
    /// [`Error::Input`] for a damaged file.
    pub fn load(&self, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Tensor>> {
        let mut found = HashMap::new();
        for file in &self.manifest.files {
            if file.tensors.iter().any(|name| wanted(name)) {
                let content = self.read_verified(file)?;
                let tensors = candle_core::safetensors::load_buffer(&content, &Device::Cpu)
                    .map_err(|e| Error::input(format!("{}: {e}", self.path.join(&file.name).display())))?;
                found.extend(tensors.into_iter().filter(|(name, _)| wanted(name)));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(x: f32) -> Tensor {
        Tensor::new(&[x, x + 1.0], &Device::Cpu).unwrap()
    }

    fn write(dir: &Path, batches: u64, keep: usize) -> PathBuf {
        write_module(dir, batches, 1, vec![("layers.0.conv2d.weight".into(), tensor(batches as f32))]).unwrap();
        write_module(dir, batches, 2, vec![("layers.1.linear.weight".into(), tensor(7.0))]).unwrap();
        finish(dir, batches, 2, Manifest::new("".into(), vec![], [1, 1, 3], vec![1]), (keep, None)).unwrap()
    }

    #[test]
    fn round_trip_and_keep() {
        let dir = tempfile::tempdir().unwrap();
        for batches in [0, 1, 2, 3] {
            write(dir.path(), batches, 2);
        }
        let left: Vec<u64> = list(dir.path()).unwrap().into_iter().map(|(c, _)| c).collect();
        assert_eq!(left, [0, 2, 3], "the start and the newest two");
        let newest = latest(dir.path()).unwrap().unwrap();
        assert_eq!(newest.manifest().batches, 3);
        let tensors = newest.load(|n| n.starts_with("layers.0")).unwrap();
        assert_eq!(tensors.len(), 1);
        assert_eq!(tensors["layers.0.conv2d.weight"].to_vec1::<f32>().unwrap(), [3.0, 4.0]);
    }

    #[test]
    fn the_best_is_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        for (batches, best) in [(1, None), (2, Some(1)), (3, Some(1)), (4, Some(3))] {
            write_module(dir.path(), batches, 1, vec![("a".into(), tensor(0.0))]).unwrap();
            let manifest = Manifest::new("".into(), vec![], [1, 1, 3], vec![]);
            finish(dir.path(), batches, 1, manifest, (1, best)).unwrap();
            let left: Vec<u64> = list(dir.path()).unwrap().into_iter().map(|(c, _)| c).collect();
            assert_eq!(left, [best, Some(batches)].into_iter().flatten().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_damaged_newest_one_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 2);
        let newest = write(dir.path(), 2, 2);
        let file = newest.join("module-001.safetensors");
        let mut content = fs::read(&file).unwrap();
        let last = content.len() - 1;
        content[last] ^= 1;
        fs::write(&file, content).unwrap();
        let error = Checkpoint::open(&newest).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("module-001.safetensors: damaged"), "{error}");
        assert_eq!(latest(dir.path()).unwrap().unwrap().manifest().batches, 1);
    }

    /// A run goes back behind a damaged checkpoint; what it writes then must not be removed for being the older one.
    #[test]
    fn a_damaged_newer_one_costs_no_good_one() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 10, 1);
        let newer = write(dir.path(), 20, 2);
        fs::write(newer.join("module-001.safetensors"), "damaged").unwrap();
        assert_eq!(latest(dir.path()).unwrap().unwrap().manifest().batches, 10);
        let written = write(dir.path(), 15, 1);
        assert_eq!(latest(dir.path()).unwrap().unwrap().path(), written);
        write(dir.path(), 25, 1);
        assert_eq!(list(dir.path()).unwrap().len(), 1, "it goes when its time comes");
    }

    /// What stands in the way of removing an old checkpoint fails no new one.
    #[test]
    fn an_old_one_that_cannot_be_removed_fails_nothing() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1);
        fs::create_dir_all(dir.path().join(format!(".step-00000001{DISCARDED}/held"))).unwrap();
        write(dir.path(), 2, 1);
        assert_eq!(latest(dir.path()).unwrap().unwrap().manifest().batches, 2);
    }

    #[test]
    fn what_failed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = || Manifest::new("".into(), vec![], [1, 1, 3], vec![1]);
        for batches in [3, 4, 6] {
            write_module(dir.path(), batches, 2, vec![("a".into(), tensor(0.0))]).unwrap();
        }
        finish(dir.path(), 4, 2, manifest(), (1, None)).unwrap_err();
        write(dir.path(), 5, 1);
        let left = newest::named(dir.path(), ".step-", PARTIAL).unwrap();
        assert_eq!(left, [(6, partial_of(dir.path(), 6))], "another rank is ahead");
    }

    #[test]
    fn an_unfinished_one_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        write_module(dir.path(), 5, 1, vec![("a".into(), tensor(0.0))]).unwrap();
        assert!(latest(dir.path()).unwrap().is_none());
        assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("not a checkpoint"));
        let nowhere = Checkpoint::open(&dir.path().join("step-00000009")).unwrap_err();
        assert!(nowhere.exit_code() == 2 && nowhere.to_string().contains("no such folder"), "{nowhere}");
    }
}
