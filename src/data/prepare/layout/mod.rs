//! How datasets are organised: a layout turns annotations and files into a list of videos with labels.

mod folders;
mod hmdb51;
mod kinetics;
mod named;
mod shared;
mod ucf101;

pub(in crate::data) use shared::exclude;
pub(super) use shared::judge;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::description::{Description, Layout, SplitDescription};
use super::files::{self, Unused};
use crate::{Error, Result};

/// One video of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name, unique in the split: `CLASS/file name`, Kinetics: `ID_START_END`.
    pub id: String,
    /// Its class, an index into [`Listing::class_names`].
    pub label: i32,
    /// The file, below the folder of videos; `None` where there is none.
    pub path: Option<String>,
}

/// The videos of some splits.
#[derive(Clone, Debug)]
pub struct Listing {
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// Each split's videos, by id.
    pub splits: Vec<(String, Vec<Source>)>,
    /// What lies below the folder of videos and is in none of them, sorted.
    pub unused: Vec<Unused>,
}

/// Where a dataset lies.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// The folder of videos.
    pub videos: &'a Path,
    /// The folder of annotation files, or the one file.
    pub annotations: Option<&'a Path>,
    /// The classes in label order, if the user gave a list.
    pub classes: Option<&'a [String]>,
    /// A list of the classes from an earlier run, which comes before any order worked out here.
    pub stored_classes: Option<PathBuf>,
    /// The folder of shards, which holds no videos.
    pub out: Option<&'a Path>,
}

impl Place<'_> {
    /// Whether what is called so below the folder of videos is the folder of shards.
    fn is_out(&self, below: &str) -> bool {
        let real = |path: &Path| path.canonicalize().ok();
        self.out.and_then(real).is_some_and(|out| real(&self.videos.join(below)) == Some(out))
    }
}

/// A video as a layout finds it, its class by name. Large datasets list hundreds of thousands, most of which may be missing: small.
struct Row {
    id: Box<str>,
    class: Arc<str>,
    path: Option<Box<str>>,
    /// Where its class is said, for errors.
    at: At,
}

/// Where something is said. What the lines of a list have in common is kept once.
#[derive(Clone, Debug)]
enum At {
    /// A line of a file, counted from 1.
    Line(Arc<str>, u32),
    /// A file and line, an entry, or a folder, in words.
    Place(Box<str>),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            At::Line(file, number) => write!(f, "{file}: line {number}"),
            At::Place(place) => f.write_str(place),
        }
    }
}

/// What a layout finds of a split.
#[derive(Default)]
struct Rows {
    rows: Vec<Row>,
    /// The classes in the layout's own order, if it has one.
    classes: Option<Vec<String>>,
    /// All video files that were found, by path, whether they are in a row or not.
    there: Vec<String>,
    /// What else was found.
    others: Vec<Unused>,
}

impl Rows {
    /// No rows yet of what was found.
    fn of(found: files::Found) -> Self {
        let there = found.videos.into_iter().map(|video| video.path).collect();
        Rows { there, others: found.others, ..Rows::default() }
    }
}

/// Lists the videos of `splits`, found or missing.
///
/// # Errors
/// [`Error::Input`] when a folder or an annotation file is not there or cannot be read; when an annotation makes no sense
/// (with file and line); when a class is in no list of classes; when a split has no videos.
pub fn list(description: &Description, place: &Place, splits: &[String]) -> Result<Listing> {
    let mut found = Vec::new();
    for name in splits {
        let split = description.split(name)?;
        if let Some(file) = place.annotations.filter(|file| file.is_file() && splits.len() > 1)
            && split.subset.is_none()
        {
            let (file, splits) = (file.display(), splits.join(" and "));
            return Err(Error::input(format!(
                "{file}: --annotations is one file, but {splits} have one each: give their folder, or one --split"
            )));
        }
        place.annotations.map_or(Ok(()), |list| shared::refuse_list_of_another(description, name, list))?;
        let mut rows = match description.layout {
            Layout::Folders => folders::rows(description, &split, place)?,
            Layout::Kinetics => kinetics::rows(description, (name, &split), place)?,
            Layout::Ucf101 => ucf101::rows(description, &split, place)?,
            Layout::Hmdb51 => hmdb51::rows(&split, place)?,
        };
        rows.rows.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        if let Some(pair) = rows.rows.windows(2).find(|pair| pair[0].id == pair[1].id) {
            let path = |row: &Row| row.path.as_deref().map_or_else(|| row.at.to_string(), str::to_string);
            let (id, [a, b]) = (&pair[0].id, [path(&pair[0]), path(&pair[1])]);
            return Err(Error::input(format!("{name}: two videos are called {id}, {a} and {b}: rename one of them")));
        }
        found.push((name.clone(), rows));
    }
    shared::refuse_shared(description, &found)?;
    let unused = unused(&mut found);
    let class_names = class_names(description, place, &found)?;
    let classes = Classes::new(description, &class_names)?;
    let splits = found
        .into_iter()
        .map(|(name, rows)| {
            let sources = rows.rows.into_iter().map(|row| {
                let label = classes.label(&row)?;
                Ok(Source { id: row.id.into(), label, path: row.path.map(String::from) })
            });
            Ok((name, sources.collect::<Result<Vec<_>>>()?))
        })
        .collect::<Result<_>>()?;
    Ok(Listing { class_names, splits, unused })
}

/// What was found for some split and is used by none.
fn unused(found: &mut [(String, Rows)]) -> Vec<Unused> {
    let mut unused: BTreeSet<Unused> = BTreeSet::new();
    for (_, rows) in found.iter_mut() {
        unused.extend(rows.others.drain(..));
        let unlisted = |path| Unused { path, why: "a video in no list, or a copy of one that is" };
        unused.extend(rows.there.drain(..).map(unlisted));
    }
    let used: HashSet<&str> = found.iter().flat_map(|(_, rows)| &rows.rows).filter_map(|r| r.path.as_deref()).collect();
    unused.into_iter().filter(|other| !used.contains(other.path.as_str())).collect()
}

/// The classes in label order: as the user, the description, an earlier run or the layout has them; else sorted.
fn class_names(description: &Description, place: &Place, found: &[(String, Rows)]) -> Result<Vec<String>> {
    let stored = place.stored_classes.as_ref().filter(|path| path.is_file());
    let (names, whence) = match (place.classes, description.classes.as_ref().or(stored)) {
        (Some(given), _) => (given.to_vec(), "--classes".to_string()),
        (None, Some(file)) => (read_classes(file)?, file.display().to_string()),
        // A split may lack videos of some class.
        (None, None) if description.layout == Layout::Folders => {
            let all: BTreeSet<String> = found.iter().filter_map(|(_, rows)| rows.classes.clone()).flatten().collect();
            (all.into_iter().collect(), "the class folders".to_string())
        }
        (None, None) => match found.iter().find_map(|(_, rows)| rows.classes.clone()) {
            Some(own) => (own, "the annotations".to_string()),
            None => {
                let all: BTreeSet<&str> =
                    found.iter().flat_map(|(_, rows)| &rows.rows).map(|row| &*row.class).collect();
                let splits: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
                (all.into_iter().map(str::to_string).collect(), format!("the annotations of {}", splits.join(" and ")))
            }
        },
    };
    match description.expect_classes {
        Some(expected) if expected != names.len() => Err(Error::input(format!(
            "{whence}: {} classes, but {} has {expected}: is a file incomplete, or of another version of the dataset?",
            names.len(),
            description.name
        ))),
        _ => Ok(names),
    }
}

/// A list of classes, one a line, each byte for byte.
///
/// # Errors
/// [`Error::Input`] when the file cannot be read.
pub fn read_classes(path: &Path) -> Result<Vec<String>> {
    Ok(files::text(path)?.lines().filter(|line| !line.is_empty()).map(str::to_string).collect())
}

/// Finds the class of a row.
struct Classes<'a> {
    description: &'a Description,
    names: &'a [String],
    exact: HashMap<&'a str, usize>,
    /// By folder spelling; `None` where two classes share one.
    spelled: HashMap<String, Option<usize>>,
}

impl<'a> Classes<'a> {
    fn new(description: &'a Description, names: &'a [String]) -> Result<Self> {
        let exact: HashMap<&str, usize> = names.iter().enumerate().map(|(k, n)| (n.as_str(), k)).collect();
        if exact.len() != names.len() {
            let mut seen = BTreeSet::new();
            let twice = names.iter().find(|n| !seen.insert(*n)).map_or("", |n| n.as_str());
            return Err(Error::input(format!("the list of classes names a class twice: {twice:?}")));
        }
        let mut spelled: HashMap<String, Option<usize>> = HashMap::new();
        for (k, name) in names.iter().enumerate() {
            spelled.entry(spelling(name)).and_modify(|other| *other = None).or_insert(Some(k));
        }
        Ok(Classes { description, names, exact, spelled })
    }

    fn label(&self, row: &Row) -> Result<i32> {
        let found = self.exact.get(&*row.class).copied().or_else(|| {
            let folder = self.description.layout == Layout::Folders;
            let folded = self.description.ignore_case.iter().find(|c| c.eq_ignore_ascii_case(&row.class));
            match folded {
                Some(class) => self.exact.get(class.as_str()).copied(),
                None if folder => self.spelled.get(&spelling(&row.class)).copied().flatten(),
                None => None,
            }
        });
        found.map(|k| k as i32).ok_or_else(|| {
            let near = self.names.iter().map(|n| (strsim::damerau_levenshtein(n, &row.class), n)).min();
            let near = near.filter(|(d, _)| *d <= 3).map(|(_, n)| format!("; did you mean {n:?}?")).unwrap_or_default();
            Error::input(format!(
                "{}: class {:?} is not in the list of {} classes{near}",
                row.at,
                row.class,
                self.names.len()
            ))
        })
    }
}

/// A class name as downloaders write it as a folder's name: spaces may be underscores, quotes and parentheses may be
/// missing. Upper and lower case stay, for Kinetics-600 has two classes that else differ little.
pub fn spelling(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '"' | '\'' | '(' | ')')).map(|c| if c == ' ' { '_' } else { c }).collect()
}

/// No videos at all: says where they were looked for.
fn nothing_in(dir: &Path, what: &str) -> Error {
    Error::input(format!("{}: no videos {what} (known endings: {})", dir.display(), files::ENDINGS.join(", ")))
}

/// The split's files below the folder of videos.
fn found_videos(split: &SplitDescription, place: &Place) -> Result<files::Found> {
    let found = files::videos(place.videos, &split.videos, place.out)?;
    if found.videos.is_empty() { Err(nothing_in(place.videos, "below this folder")) } else { Ok(found) }
}
