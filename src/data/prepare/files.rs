//! The files below a folder.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::sys::files::{open, read, what};
use crate::{Error, Result};

/// File name endings taken for videos, in lower case.
pub const ENDINGS: [&str; 13] =
    ["mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "ogv"];

/// Folders in folders are followed this far: `SPLIT/CLASS/video`, and one more.
const DEPTH: usize = 4;

/// One video file, by its path below the folder of videos.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VideoFile {
    /// That path.
    pub path: String,
}

impl VideoFile {
    /// Its name.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The name of the folder it is in; empty for the folder of videos itself.
    pub fn folder(&self) -> &str {
        self.path.rsplit('/').nth(1).unwrap_or_default()
    }

    /// Its name without the ending.
    pub fn stem(&self) -> &str {
        let name = self.name();
        name.rsplit_once('.').map_or(name, |(stem, _)| stem)
    }
}

/// Something below a folder of videos: its path below it, and why it is no video; `None` for a video.
pub type Found = (String, Option<&'static str>);

/// Hands on all video files below the folders `parts` of `root` (below all of `root` where none of them is there), and what else is
/// there, in no order: a folder may hold more files than memory should. The folder `out` holds no videos.
///
/// # Errors
/// [`Error::Input`] when a folder is not there or cannot be read; what `take` returns.
pub fn walk(
    root: &Path,
    parts: &[String],
    out: Option<&Path>,
    take: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let out = out.and_then(|out| out.canonicalize().ok());
    existing(root, parts).iter().try_for_each(|part| walk_folder(root, part, (DEPTH, out.as_deref()), take))
}

/// The order of files: folders as `parts` names them, then by path, folder by folder.
pub struct Order(Vec<String>);

impl Order {
    /// Of the files below the folders `parts` of `root`.
    pub fn new(root: &Path, parts: &[String]) -> Self {
        Order(existing(root, parts))
    }

    /// Bytes in whose order files are.
    pub fn bytes(&self, path: &str) -> Vec<u8> {
        let below =
            |part: &String| part.is_empty() || path.strip_prefix(part).is_some_and(|rest| rest.starts_with('/'));
        let part = self.0.iter().position(below).unwrap_or(self.0.len());
        // No name holds a zero, which comes before all that one may hold.
        [&(part as u32).to_be_bytes()[..], path.replace('/', "\0").as_bytes()].concat()
    }

    /// The path that such bytes are of.
    pub fn path(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes.get(4..).unwrap_or_default()).replace('\0', "/")
    }
}

/// The folders among `parts` that are there; the root itself (`""`) where none is.
pub fn existing(root: &Path, parts: &[String]) -> Vec<String> {
    let there: Vec<String> = parts.iter().filter(|part| root.join(part).is_dir()).cloned().collect();
    if there.is_empty() { vec![String::new()] } else { there }
}

/// A folder below `root`; `root` itself for `""`.
pub fn folder(root: &Path, below: &str) -> PathBuf {
    if below.is_empty() { root.to_path_buf() } else { root.join(below) }
}

fn walk_folder(
    root: &Path,
    below: &str,
    (depth, out): (usize, Option<&Path>),
    take: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let dir = folder(root, below);
    let is_out = |path: &Path| out.is_some_and(|out| path.canonicalize().is_ok_and(|path| path == out));
    // Shards beside class folders: what this program writes there is its own.
    let own = is_out(&dir);
    let mut folders = Vec::new();
    for entry in read_folder(&dir)? {
        let Entry { name, kind } = entry?;
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        let why = match kind {
            Kind::Folder if is_out(&root.join(&path)) => continue,
            Kind::Folder if depth > 0 => {
                folders.push(path);
                continue;
            }
            Kind::Folder => Some("a folder too deep in folders"),
            // The last is how a file without a name looks on NFS.
            Kind::Other(_) if own && (name == ".prepare" || name.starts_with(".nfs")) => continue,
            Kind::Other(what) => Some(what),
            Kind::File if is_video(&name) => None,
            Kind::File if own && is_own(&name) => continue,
            Kind::File => Some(UNKNOWN_ENDING),
        };
        take((path, why))?;
    }
    folders.iter().try_for_each(|path| walk_folder(root, path, (depth - 1, out), take))
}

/// Why a file that is no video is not used.
const UNKNOWN_ENDING: &str = "its ending is none of a video";

/// A name of what is written into the folder of shards.
fn is_own(name: &str) -> bool {
    name == "classes.txt" || [".h5", ".partial", ".tsv"].iter().any(|ending| name.ends_with(ending))
}

/// Whether a file of this name is taken for a video.
fn is_video(name: &str) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(stem, ending)| !stem.is_empty() && ENDINGS.contains(&ending.to_ascii_lowercase().as_str()))
}

/// What something in a folder is. What a link leads to counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A file.
    File,
    /// Neither, or of no use: why.
    Other(&'static str),
}

/// Something in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name; where that is no text, as near as can be.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// What is in a folder, sorted by name.
///
/// # Errors
/// [`Error::Input`] when it is not there or cannot be read.
pub fn entries(dir: &Path) -> Result<Vec<Entry>> {
    let mut found = read_folder(dir)?.collect::<Result<Vec<_>>>()?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The folders in a folder, sorted by name.
///
/// # Errors
/// As [`entries`].
pub fn folders(dir: &Path) -> Result<Vec<String>> {
    let is_folder = |entry: &Result<Entry>| entry.as_ref().map_or(true, |entry| entry.kind == Kind::Folder);
    let names = read_folder(dir)?.filter(is_folder).map(|entry| Ok(entry?.name));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// What is in a folder, one after the other as the file system has it.
fn read_folder(dir: &Path) -> Result<impl Iterator<Item = Result<Entry>>> {
    let refused = |e: std::io::Error| Error::input(format!("{}: cannot read this folder: {e}", dir.display()));
    let listed = std::fs::read_dir(dir).map_err(refused)?;
    Ok(listed.map(move |entry| entry.and_then(|entry| Entry::of(&entry)).map_err(refused)))
}

impl Entry {
    fn of(entry: &std::fs::DirEntry) -> std::io::Result<Self> {
        let name = entry.file_name();
        let kind = entry.file_type()?;
        let kind = match name.to_str() {
            None => Kind::Other("its name is not UTF-8"),
            Some(text) if text.starts_with('.') => Kind::Other("hidden, as its name begins with a dot"),
            Some(_) if kind.is_dir() => Kind::Folder,
            Some(_) if kind.is_file() => Kind::File,
            Some(_) => match std::fs::metadata(entry.path()) {
                Ok(target) if target.is_dir() => Kind::Folder,
                Ok(target) => what(&target).map_or(Kind::File, Kind::Other),
                Err(_) => Kind::Other("a link that leads nowhere"),
            },
        };
        Ok(Entry { name: name.to_string_lossy().into_owned(), kind })
    }
}

/// The annotation file of a split: `annotations` itself if it is a file, else the first of `names` in that folder.
///
/// # Errors
/// [`Error::Input`] when none is given or there.
pub fn annotation(annotations: Option<&Path>, names: &[String]) -> Result<PathBuf> {
    let Some(place) = annotations else {
        return Err(Error::input(format!(
            "--annotations is missing: the folder with the dataset's annotation files (here {})",
            names.join(" or ")
        )));
    };
    if !place.is_dir() && place.exists() {
        return Ok(place.to_path_buf());
    }
    if !place.exists() {
        let place = place.display();
        return Err(Error::input(format!("{place}: --annotations names neither a file nor a folder that is there")));
    }
    let listed = entries(place)?;
    names.iter().find(|name| listed.iter().any(|entry| entry.name == **name && entry.kind == Kind::File)).map_or_else(
        || {
            let there: Vec<&str> = listed.iter().take(10).map(|entry| entry.name.as_str()).collect();
            Err(Error::input(format!(
                "{}: no {} in this folder of annotations; it has {}",
                place.display(),
                names.join(" or "),
                if there.is_empty() { "no files".into() } else { there.join(", ") }
            )))
        },
        |name| Ok(place.join(name)),
    )
}

/// A text file of any length, of which the beginning has been read.
pub struct Beginning {
    /// Its first lines, without a byte order mark. What is not UTF-8 is as near as can be.
    pub text: String,
    read: Vec<u8>,
    rest: File,
}

impl Beginning {
    /// All of it, to be read from its start on, without a byte order mark.
    pub fn whole(self) -> impl Read {
        std::io::Cursor::new(self.read).chain(self.rest)
    }
}

/// So much of a file tells of what kind it is.
const BEGINNING: u64 = 1 << 16;

/// Opens a text file that may be long.
///
/// # Errors
/// [`Error::Input`] when it cannot be read or is empty.
pub fn beginning(path: &Path) -> Result<Beginning> {
    let bad = |why: String| Error::input(format!("{}: {why}", path.display()));
    let mut read = Vec::new();
    let mut begin = || {
        let rest = open(path)?;
        (&rest).take(BEGINNING).read_to_end(&mut read)?;
        Ok(rest)
    };
    let rest = begin().map_err(|e: std::io::Error| bad(format!("cannot read this file: {e}")))?;
    let whole = (read.len() as u64) < BEGINNING;
    if read.starts_with(MARK.as_bytes()) {
        read.drain(..MARK.len());
    }
    let text = String::from_utf8_lossy(&read).into_owned();
    if whole && text.trim().is_empty() {
        Err(bad("this file is empty".into()))
    } else {
        Ok(Beginning { text, read, rest })
    }
}

/// A byte order mark.
const MARK: &str = "\u{feff}";

/// A text file, without a byte order mark.
///
/// # Errors
/// [`Error::Input`] when it cannot be read, is not UTF-8, or is empty.
pub fn text(path: &Path) -> Result<String> {
    let bad = |why: String| Error::input(format!("{}: {why}", path.display()));
    let bytes = read(path).map_err(|e| bad(format!("cannot read this file: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        bad(format!("line {line} is not UTF-8"))
    })?;
    let text = text.strip_prefix(MARK).map(str::to_string).unwrap_or(text);
    if text.trim().is_empty() { Err(bad("this file is empty".into())) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_ordered_by_part_and_folder_by_folder() {
        let root = tempfile::tempdir().unwrap();
        let parts = ["z".to_string(), "none".to_string(), "a".to_string()];
        ["z", "a"].iter().for_each(|part| std::fs::create_dir(root.path().join(part)).unwrap());
        let order = Order::new(root.path(), &parts);
        let sorted = ["z/c/2.mp4", "z/c/3.mp4", "z/c (1)/1.mp4", "z/c-2/1.mp4", "a/b/1.mp4", "az/1.mp4"];
        let bytes: Vec<_> = sorted.iter().map(|path| order.bytes(path)).collect();
        assert!(bytes.is_sorted());
        assert!(bytes.iter().map(|bytes| Order::path(bytes)).eq(sorted));
    }
}
