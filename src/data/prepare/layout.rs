//! How a folder of videos is organised: a layout turns it into a list of (file, label).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// The layouts this program knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// One folder a class, with the class's videos in it: `DIR/CLASS/video.mp4`.
    Folders,
}

/// File name endings taken for videos, in lower case.
const ENDINGS: [&str; 13] =
    ["mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "ogv"];

/// One video file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Its class, an index into [`Listing::class_names`].
    pub label: i32,
    /// `CLASS/file name`.
    pub id: String,
}

/// The videos of a folder.
#[derive(Clone, Debug)]
pub struct Listing {
    /// All classes, in label order.
    pub class_names: Vec<String>,
    /// All videos, by class and name.
    pub sources: Vec<Source>,
}

/// Lists the videos of `dir`.
///
/// # Errors
/// [`Error::Input`] when the folder is not there, cannot be read, or has no class folders or no videos; when a class
/// folder is none of `classes`.
pub fn list(layout: Layout, dir: &Path, classes: Option<&[String]>) -> Result<Listing> {
    match layout {
        Layout::Folders => folders(dir, classes),
    }
}

fn folders(dir: &Path, classes: Option<&[String]>) -> Result<Listing> {
    let names: Vec<String> = entries(dir)?.into_iter().filter(|n| dir.join(n).is_dir()).collect();
    if names.is_empty() {
        return Err(Error::input(format!("{}: no class folders in it (expected CLASS/video.mp4)", dir.display())));
    }
    let class_names = match classes {
        None => names.clone(),
        Some(list) => list.to_vec(),
    };
    let index: BTreeMap<&str, usize> = class_names.iter().enumerate().map(|(k, n)| (n.as_str(), k)).collect();
    if index.len() != class_names.len() {
        return Err(Error::input("the list of classes names a class twice"));
    }
    let mut sources = Vec::new();
    for name in &names {
        let Some(&label) = index.get(name.as_str()) else {
            let folder = dir.join(name);
            return Err(Error::input(format!("{}: {name:?} is not in the list of classes", folder.display())));
        };
        for file in entries(&dir.join(name))? {
            let path = dir.join(name).join(&file);
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
            if ENDINGS.contains(&ending.as_str()) && path.is_file() {
                sources.push(Source { path, label: label as i32, id: format!("{name}/{file}") });
            }
        }
    }
    if sources.is_empty() {
        return Err(Error::input(format!(
            "{}: no videos in its {} class folders (known endings: {})",
            dir.display(),
            names.len(),
            ENDINGS.join(", ")
        )));
    }
    Ok(Listing { class_names, sources })
}

/// The names in a folder, sorted, without hidden ones.
fn entries(dir: &Path) -> Result<Vec<String>> {
    let refused = |e: std::io::Error| Error::input(format!("{}: cannot read this folder: {e}", dir.display()));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        match name.to_str() {
            Some(text) if !text.starts_with('.') => names.push(text.to_string()),
            Some(_) => {}
            None => log::warn!("{}: {name:?} is not UTF-8 and is passed over", dir.display()),
        }
    }
    names.sort();
    Ok(names)
}

impl Listing {
    /// The videos of each split, in the order they are to be written: shuffled, so that any run of videos is a sample
    /// of all classes. `fraction` of each class (rounded) goes to `test`, the rest to `split`.
    pub fn split(&self, split: &str, fraction: f64, seed: u64) -> Vec<(String, Vec<&Source>)> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut classes = vec![Vec::new(); self.class_names.len()];
        for source in &self.sources {
            classes[source.label as usize].push(source);
        }
        let (mut rest, mut test) = (Vec::new(), Vec::new());
        for mut class in classes {
            shuffle(&mut class, &mut rng);
            let n = (class.len() as f64 * fraction).round() as usize;
            rest.extend(class.split_off(n));
            test.extend(class);
        }
        shuffle(&mut rest, &mut rng);
        shuffle(&mut test, &mut rng);
        let mut splits = vec![(split.to_string(), rest), ("test".to_string(), test)];
        splits.retain(|(_, sources)| !sources.is_empty());
        splits
    }
}

fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, rng.random_range(0..=i));
    }
}
