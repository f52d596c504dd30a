//! How datasets are organised: a layout turns annotations and files into a list of videos with labels.

mod folders;
mod hmdb51;
mod kinetics;
mod missing;
mod named;
mod shared;
mod ucf101;

pub use missing::Missing;
pub(in crate::data) use shared::exclude;
pub(super) use shared::judge;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::description::{Description, Layout, SplitDescription};
use super::files::{self, Unused};
use crate::{Error, Result};

/// One video whose file is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name, unique in the split: `CLASS/file name`, Kinetics: `ID_START_END`.
    pub id: Box<str>,
    /// Its class, an index into [`Listing::class_names`].
    pub label: i32,
    /// The file, below the folder of videos.
    pub path: Arc<str>,
}

/// The videos of one split. Lists of large datasets have hundreds of thousands, most of which may be missing: memory is for those
/// that are there.
#[derive(Debug, Default)]
pub struct Videos {
    /// Those that are there, by id.
    pub there: Vec<Source>,
    /// Those that are not.
    pub missing: Missing,
}

/// The videos of some splits.
#[derive(Debug)]
pub struct Listing {
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// Each split's videos.
    pub splits: Vec<(String, Videos)>,
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

    /// The folder for files that only this process needs: that of shards has room for them, which one in memory need not have.
    fn scratch(&self) -> PathBuf {
        self.out.map_or_else(std::env::temp_dir, Path::to_path_buf)
    }
}

/// What a layout finds of a split.
#[derive(Default)]
struct Rows {
    /// Their labels are numbers of `named` until all classes are known.
    there: Vec<Source>,
    missing: Missing,
    /// The classes of these, each with where it is said first, for errors.
    named: Vec<(Arc<str>, String)>,
    numbers: HashMap<Arc<str>, i32>,
    /// The classes in the layout's own order, if it has one.
    classes: Option<Vec<String>>,
    /// All video files that were found, by path, whether they are in a row or not.
    files: Vec<Arc<str>>,
    /// What else was found.
    others: Vec<Unused>,
}

impl Rows {
    /// No rows yet of what was found at `place`.
    fn of(place: &Place, found: files::Found) -> Self {
        let files = found.videos.into_iter().map(|video| video.path).collect();
        Rows { files, others: found.others, missing: Missing::new(&place.scratch()), ..Rows::default() }
    }

    /// Takes the next video by id: its class by name, its file if there is one, and where its class is said.
    fn add(&mut self, id: &str, class: &str, path: Option<Arc<str>>, at: impl FnOnce() -> String) -> Result<()> {
        let class = self.numbers.get(class).copied().unwrap_or_else(|| {
            let (name, number): (Arc<str>, i32) = (class.into(), self.named.len() as i32);
            self.named.push((name.clone(), at()));
            self.numbers.insert(name, number);
            number
        });
        match path {
            Some(path) => self.there.push(Source { id: id.into(), label: class, path }),
            None => self.missing.push(id)?,
        }
        Ok(())
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
        rows.there.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        if let Some(pair) = rows.there.windows(2).find(|pair| pair[0].id == pair[1].id) {
            let (id, a, b) = (&pair[0].id, &pair[0].path, &pair[1].path);
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
            let labels = rows.named.iter().map(|(class, at)| classes.label(class, at)).collect::<Result<Vec<_>>>()?;
            let Rows { mut there, missing, .. } = rows;
            there.iter_mut().for_each(|source| source.label = labels[source.label as usize]);
            Ok((name, Videos { there, missing }))
        })
        .collect::<Result<_>>()?;
    Ok(Listing { class_names, splits, unused })
}

/// What was found for some split and is used by none.
fn unused(found: &mut [(String, Rows)]) -> Vec<Unused> {
    let (mut files, mut unused) = (Vec::new(), Vec::new());
    for (_, rows) in found.iter_mut() {
        files.append(&mut rows.files);
        unused.append(&mut rows.others);
    }
    let used: HashSet<&str> = found.iter().flat_map(|(_, rows)| &rows.there).map(|row| &*row.path).collect();
    unused.retain(|other| !used.contains(&*other.path));
    let unlisted =
        |path: Arc<str>| Unused { path: (*path).into(), why: "a video in no list, or a copy of one that is" };
    unused.extend(files.into_iter().filter(|path| !used.contains(&**path)).map(unlisted));
    unused.sort_unstable();
    unused.dedup();
    unused
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
                    found.iter().flat_map(|(_, rows)| &rows.named).map(|(class, _)| &**class).collect();
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

/// Finds the label of a class.
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

    /// Of the class that is said `at` some place.
    fn label(&self, class: &str, at: &str) -> Result<i32> {
        let found = self.exact.get(class).copied().or_else(|| {
            let folder = self.description.layout == Layout::Folders;
            let folded = self.description.ignore_case.iter().find(|c| c.eq_ignore_ascii_case(class));
            match folded {
                Some(class) => self.exact.get(class.as_str()).copied(),
                None if folder => self.spelled.get(&spelling(class)).copied().flatten(),
                None => None,
            }
        });
        found.map(|k| k as i32).ok_or_else(|| {
            let near = self.names.iter().map(|n| (strsim::damerau_levenshtein(n, class), n)).min();
            let near = near.filter(|(d, _)| *d <= 3).map(|(_, n)| format!("; did you mean {n:?}?")).unwrap_or_default();
            Error::input(format!("{at}: class {class:?} is not in the list of {} classes{near}", self.names.len()))
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
