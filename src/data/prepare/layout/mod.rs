//! How datasets are organised: a layout turns annotations and files into a list of videos with labels.

mod folders;
mod found;
mod hmdb51;
mod kinetics;
mod named;
mod shared;
mod ucf101;

pub(super) use found::{AddThere, text};
pub use found::{AllUnused, Missing, Source, There, Unused};
pub(in crate::data) use shared::exclude;
pub(super) use shared::judge;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::description::{Description, Layout};
use super::files;
use crate::sys::sorting::Sorter;
use crate::{Error, Result};
use found::Files;

/// The videos of one split.
#[derive(Debug, Default)]
pub struct Videos {
    /// Those that are there.
    pub there: There,
    /// Those that are listed and not there.
    pub missing: Missing,
}

/// The videos of some splits.
#[derive(Debug)]
pub struct Listing {
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// Each split's videos.
    pub splits: Vec<(String, Videos)>,
    /// What lies below the folder of videos and is in none of them.
    pub unused: AllUnused,
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
    pub(super) fn scratch(&self) -> PathBuf {
        self.out.map_or_else(std::env::temp_dir, Path::to_path_buf)
    }
}

/// What a layout finds of a split.
struct Rows {
    /// Their labels are numbers of `named` until all classes are known.
    there: AddThere,
    are_there: usize,
    missing: Sorter,
    /// The classes of these, each with where it is said first, for errors.
    named: Vec<(Arc<str>, String)>,
    numbers: HashMap<Arc<str>, i32>,
    /// The classes in the layout's own order, if it has one.
    classes: Option<Vec<String>>,
}

impl Rows {
    /// None yet.
    fn new(place: &Place) -> Self {
        let scratch = place.scratch();
        Rows {
            there: AddThere::new(&scratch),
            are_there: 0,
            missing: Sorter::new(&scratch),
            named: Vec::new(),
            numbers: HashMap::new(),
            classes: None,
        }
    }

    /// Takes a video: its class by name, its file if there is one, and where its class is said.
    fn add(&mut self, id: &str, class: &str, path: Option<&str>, at: impl FnOnce() -> String) -> Result<()> {
        let class = self.numbers.get(class).copied().unwrap_or_else(|| {
            let (name, number): (Arc<str>, i32) = (class.into(), self.named.len() as i32);
            self.named.push((name.clone(), at()));
            self.numbers.insert(name, number);
            number
        });
        self.are_there += usize::from(path.is_some());
        match path {
            Some(path) => self.there.push(id, class, path),
            None => self.missing.push(id.as_bytes(), &[]),
        }
    }
}

/// What was found of a split, in order.
struct Split {
    name: String,
    there: There,
    missing: Missing,
    named: Vec<(Arc<str>, String)>,
    classes: Option<Vec<String>>,
}

/// Lists the videos of `splits`, found or missing.
///
/// # Errors
/// [`Error::Input`] when a folder or an annotation file is not there or cannot be read; when an annotation makes no sense
/// (with file and line); when a class is in no list of classes; when a split has no videos.
pub fn list(description: &Description, place: &Place, splits: &[String]) -> Result<Listing> {
    let scratch = place.scratch();
    let (mut found, mut files) = (Vec::new(), Files::new(&scratch));
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
        let Rows { there, missing, named, classes, .. } = match description.layout {
            Layout::Folders => folders::rows(description, &split, place, &mut files)?,
            Layout::Kinetics => kinetics::rows(description, (name, &split), place, &mut files)?,
            Layout::Ucf101 => ucf101::rows(description, &split, place, &mut files)?,
            Layout::Hmdb51 => hmdb51::rows(&split, place, &mut files)?,
        };
        let there = there.sorted();
        refuse_twice(name, &there)?;
        found.push(Split { name: name.clone(), there, missing: Missing::of(missing), named, classes });
    }
    shared::refuse_shared(description, &found)?;
    let unused = files.unused(&scratch, found.iter().map(|split| &split.there))?;
    let class_names = class_names(description, place, &found)?;
    let classes = Classes::new(description, &class_names)?;
    let splits = found
        .into_iter()
        .map(|Split { name, mut there, missing, named, .. }| {
            let label = |(class, at): &(Arc<str>, String)| classes.label(class, at);
            // Files are found in any order: of several errors the first class's is said.
            let mut order: Vec<usize> = (0..named.len()).collect();
            order.sort_by_key(|&k| &named[k].0);
            let mut labels = vec![0; named.len()];
            order.into_iter().try_for_each(|k| label(&named[k]).map(|label| labels[k] = label))?;
            there.set_labels(labels);
            Ok((name, Videos { there, missing }))
        })
        .collect::<Result<_>>()?;
    Ok(Listing { class_names, splits, unused })
}

/// Refuses a split with two videos of one name.
fn refuse_twice(split: &str, there: &There) -> Result<()> {
    let mut before: Option<Source> = None;
    for source in there.iter() {
        let source = source?;
        if let Some(other) = before.filter(|other| other.id == source.id) {
            let (id, a, b) = (&source.id, &other.path, &source.path);
            return Err(Error::input(format!("{split}: two videos are called {id}, {a} and {b}: rename one of them")));
        }
        before = Some(source);
    }
    Ok(())
}

/// The classes in label order: as the user, the description, an earlier run or the layout has them; else sorted.
fn class_names(description: &Description, place: &Place, found: &[Split]) -> Result<Vec<String>> {
    let stored = place.stored_classes.as_ref().filter(|path| path.is_file());
    let (names, whence) = match (place.classes, description.classes.as_ref().or(stored)) {
        (Some(given), _) => (given.to_vec(), "--classes".to_string()),
        (None, Some(file)) => (read_classes(file)?, file.display().to_string()),
        // A split may lack videos of some class.
        (None, None) if description.layout == Layout::Folders => {
            let all: BTreeSet<String> = found.iter().filter_map(|split| split.classes.clone()).flatten().collect();
            (all.into_iter().collect(), "the class folders".to_string())
        }
        (None, None) => match found.iter().find_map(|split| split.classes.clone()) {
            Some(own) => (own, "the annotations".to_string()),
            None => {
                let all: BTreeSet<&str> =
                    found.iter().flat_map(|split| &split.named).map(|(class, _)| &**class).collect();
                let splits: Vec<&str> = found.iter().map(|split| split.name.as_str()).collect();
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
