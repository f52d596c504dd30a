//! The files that lists name as `CLASS/file name`.
//!
//! A file stands for an entry where it lies in the folder of the entry's class. In no class's folder (a folder of all videos, or folders
//! of another kind) its name alone has to tell: there must be one file of that name, and one class that lists it.

use std::collections::{HashMap, HashSet};

use super::spelling;
use crate::data::prepare::files::VideoFile;
use crate::{Error, Result};

/// Files by name.
pub(super) struct Named<'a> {
    by_name: HashMap<&'a str, Vec<&'a VideoFile>>,
    /// By name in lower case.
    folded: HashMap<String, Vec<&'a VideoFile>>,
    /// By name without its ending.
    by_stem: HashMap<&'a str, &'a VideoFile>,
    /// The classes' folders, by spelling.
    classes: HashSet<String>,
    /// Whether any file lies in a class's folder.
    in_folders: bool,
    ignore_case: &'a [String],
    /// Entries that are missing but for their ending, and an example of one: `v.avi`, `CLASS/v.mp4`.
    other_ending: (usize, Option<(String, String)>),
    /// Entries whose name alone does not tell which class's file it is, and the first.
    ambiguous: (usize, Option<String>),
    /// Classes by the name of a file that they list.
    listed: HashMap<String, String>,
}

impl<'a> Named<'a> {
    /// Of the classes `ignore_case`, names may differ in upper and lower case.
    pub(super) fn new(found: &'a [VideoFile], classes: &[String], ignore_case: &'a [String]) -> Self {
        let (mut by_name, mut folded, mut by_stem) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut classes: HashSet<String> = classes.iter().map(|class| spelling(class)).collect();
        classes.extend(ignore_case.iter().map(|class| spelling(class).to_ascii_lowercase()));
        for file in found {
            let name = file.name();
            by_name.entry(name).or_insert_with(Vec::new).push(file);
            by_stem.entry(file.stem()).or_insert(file);
            if !ignore_case.is_empty() {
                folded.entry(name.to_ascii_lowercase()).or_insert_with(Vec::new).push(file);
            }
        }
        let mut named = Named {
            by_name,
            folded,
            by_stem,
            classes,
            in_folders: false,
            ignore_case,
            other_ending: (0, None),
            ambiguous: (0, None),
            listed: HashMap::new(),
        };
        named.in_folders = found.iter().any(|file| named.is_of_class(file));
        named
    }

    fn is_of_class(&self, file: &VideoFile) -> bool {
        let folder = spelling(file.folder());
        let folds = self.ignore_case.iter().any(|class| class.eq_ignore_ascii_case(file.folder()));
        self.classes.contains(&folder) || folds
    }

    /// The file of `name` in `class`, if there is one.
    ///
    /// # Errors
    /// [`Error::Input`] where there are several.
    pub(super) fn find(&mut self, class: &str, name: &str) -> Result<Option<String>> {
        let folds = self.ignore_case.iter().any(|c| c.eq_ignore_ascii_case(class));
        let files = match (self.by_name.get(name), folds) {
            (Some(files), _) => &files[..],
            (None, true) => self.folded.get(&name.to_ascii_lowercase()).map_or(&[][..], Vec::as_slice),
            (None, false) => &[],
        };
        let wanted = spelling(class);
        let of_class = |file: &&&VideoFile| {
            spelling(file.folder()) == wanted || folds && file.folder().eq_ignore_ascii_case(class)
        };
        let own: Vec<&&VideoFile> = files.iter().filter(of_class).collect();
        let exact = format!("{class}/{name}");
        if let Some(file) = own.iter().find(|file| *file.path == *exact) {
            return Ok(Some(file.path.clone()));
        }
        // In a class's folder it is that class's, or none's that is listed.
        let free = |file: &&&VideoFile| !file.path.contains('/') || !self.in_folders;
        let candidates = if own.is_empty() { files.iter().filter(free).collect() } else { own.clone() };
        match candidates[..] {
            [] => self.note_other_ending(class, name),
            [file] if !own.is_empty() => return Ok(Some(file.path.clone())),
            [file] => {
                let path = file.path.clone();
                let other = self.listed.insert(name.to_string(), class.to_string());
                if other.is_none_or(|other| other == class) {
                    return Ok(Some(path));
                }
                self.ambiguous.0 += 1;
                self.ambiguous.1.get_or_insert(path);
            }
            [first, second, ..] => {
                return Err(Error::input(format!(
                    "{class}/{name} is listed, and two files are called so, {} and {}: remove one of them, or give --videos \
                     the folder of the right one",
                    first.path, second.path
                )));
            }
        }
        Ok(None)
    }

    fn note_other_ending(&mut self, class: &str, name: &str) {
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        let same = self
            .by_stem
            .get(stem)
            .filter(|file| spelling(file.folder()) == spelling(class) || !file.path.contains('/') || !self.in_folders);
        if let Some(file) = same {
            self.other_ending.0 += 1;
            self.other_ending.1.get_or_insert((format!("{class}/{name}"), file.path.to_string()));
        }
    }

    /// Says what the search came upon.
    ///
    /// # Errors
    /// [`Error::Input`] where a file would stand for entries of two classes.
    pub(super) fn conclude(self) -> Result<()> {
        if let (n @ 1.., Some(first)) = self.ambiguous {
            return Err(Error::input(format!(
                "{first}: two classes list a file of this name, and it lies in neither's folder (so do {n} files in all): put \
                 the videos into folders by class"
            )));
        }
        if let (n @ 1.., Some((entry, file))) = self.other_ending {
            log::warn!(
                "{n} videos that are listed are missing, but there with another ending: {entry} is listed, {file} is there. If they \
                 are the same videos, change the endings in a copy of the lists (sed)"
            );
        }
        Ok(())
    }
}
