//! The files below a folder, listed once.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// File name endings taken for videos, in lower case.
pub const ENDINGS: [&str; 13] =
    ["mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "ogv"];

/// Folders in folders are followed this far: `SPLIT/CLASS/video`, and one more.
const DEPTH: usize = 4;

/// One video file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VideoFile {
    /// Its path below the folder of videos.
    pub path: String,
    /// The name of the folder it is in.
    pub folder: String,
    /// Its name without the ending.
    pub stem: String,
}

/// All video files below the folders `parts` of `root` (below all of `root` where none of them is there), sorted.
///
/// # Errors
/// [`Error::Input`] when a folder is not there or cannot be read.
pub fn videos(root: &Path, parts: &[String]) -> Result<Vec<VideoFile>> {
    let mut found = Vec::new();
    for part in existing(root, parts) {
        walk(root, &part, DEPTH, &mut found)?;
    }
    Ok(found)
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

fn walk(root: &Path, below: &str, depth: usize, found: &mut Vec<VideoFile>) -> Result<()> {
    for (name, is_folder) in entries(&folder(root, below))? {
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        if is_folder {
            if depth > 0 {
                walk(root, &path, depth - 1, found)?;
            }
        } else if let Some(stem) = video_stem(&name) {
            let folder = below.rsplit('/').next().unwrap_or_default().to_string();
            found.push(VideoFile { stem: stem.to_string(), folder, path });
        }
    }
    Ok(())
}

/// A video's name without its ending; `None` for other files.
pub fn video_stem(name: &str) -> Option<&str> {
    let (stem, ending) = name.rsplit_once('.')?;
    (!stem.is_empty() && ENDINGS.contains(&ending.to_ascii_lowercase().as_str())).then_some(stem)
}

/// The names in a folder, sorted, and whether each is a folder. Hidden ones, and links that lead nowhere, are left out.
///
/// # Errors
/// [`Error::Input`] when it is not there or cannot be read.
pub fn entries(dir: &Path) -> Result<Vec<(String, bool)>> {
    let refused = |e: std::io::Error| Error::input(format!("{}: cannot read this folder: {e}", dir.display()));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        let name = entry.file_name();
        let Some(text) = name.to_str() else {
            log::warn!("{}: {name:?} is not UTF-8 and is passed over", dir.display());
            continue;
        };
        if text.starts_with('.') {
            continue;
        }
        let kind = entry.file_type().map_err(refused)?;
        // What a link leads to counts.
        let is_folder = if kind.is_symlink() {
            match std::fs::metadata(entry.path()) {
                Ok(target) => target.is_dir(),
                Err(_) => continue,
            }
        } else {
            kind.is_dir()
        };
        names.push((text.to_string(), is_folder));
    }
    names.sort();
    Ok(names)
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
    if place.is_file() {
        return Ok(place.to_path_buf());
    }
    let listed = entries(place)?;
    names.iter().find(|name| listed.iter().any(|(n, is_folder)| n == *name && !is_folder)).map_or_else(
        || {
            let there: Vec<&str> = listed.iter().take(10).map(|(n, _)| n.as_str()).collect();
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

/// A text file, without a byte order mark.
///
/// # Errors
/// [`Error::Input`] when it cannot be read, is not UTF-8, or is empty.
pub fn text(path: &Path) -> Result<String> {
    let bad = |why: String| Error::input(format!("{}: {why}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| bad(format!("cannot read this file: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        bad(format!("line {line} is not UTF-8"))
    })?;
    let text = text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text);
    if text.trim().is_empty() { Err(bad("this file is empty".into())) } else { Ok(text) }
}
