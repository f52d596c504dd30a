//! What two splits must not share.

use std::path::Path;

use super::{Split, text};
use crate::data::prepare::description::{Description, Layout, SplitDescription};
use crate::{Error, Result};

/// What splits are called in lists and folders: a word a line, and other words for it.
const WORDS: [&[&str]; 3] =
    [&["train", "training"], &["val", "valid", "validate", "validation", "dev"], &["test", "testing"]];

fn group(word: &str) -> Option<usize> {
    WORDS.iter().position(|words| words.contains(&word.to_ascii_lowercase().as_str()))
}

/// Whether `word` of a list means the split `name`.
pub(super) fn means(word: &str, name: &str) -> bool {
    word == name || group(word).is_some_and(|words| group(name) == Some(words))
}

/// The fold that a split belongs to, by the digits its name ends with: folds share videos with one another.
pub(in crate::data) fn fold(name: &str) -> &str {
    &name[name.trim_end_matches(|c: char| c.is_ascii_digit()).len()..]
}

/// Whether two splits are to have no video in common: folds of one dataset share theirs with one another.
pub(in crate::data) fn exclude(a: &str, b: &str) -> bool {
    a != b && fold(a) == fold(b)
}

/// Refuses the one list of another split, by its name.
pub(super) fn refuse_list_of_another(description: &Description, split: &str, list: &Path) -> Result<()> {
    if list.is_dir() {
        return Ok(());
    }
    let Some(file) = list.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
    let of = |split: &SplitDescription| split.annotations.iter().any(|name| name == file);
    let other = match description.splits.get(split) {
        Some(mine) if of(mine) => None,
        Some(_) => description.splits.iter().find(|(_, other)| of(other)).map(|(name, _)| name.as_str()),
        // Without a description a list is called as its split is.
        None => {
            let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
            let differ = group(stem).zip(group(split)).is_some_and(|(list, split)| list != split);
            differ.then_some(stem)
        }
    };
    other.map_or(Ok(()), |other| {
        Err(Error::input(format!(
            "{}: by its name this is the list of {other}, but --split is {split}: give that split's list, or the folder of all lists",
            list.display()
        )))
    })
}

/// Refuses splits that have their files in common.
pub(super) fn refuse_shared(description: &Description, found: &[Split]) -> Result<()> {
    for (n, mine) in found.iter().enumerate() {
        for other in found[..n].iter().filter(|other| exclude(&mine.name, &other.name)) {
            let mut theirs = other.there.by_path().lookup();
            let (mut shared, mut first) = (0, None);
            for record in mine.there.by_path().iter() {
                let path = record?.key;
                if theirs.has(&path)? {
                    shared += 1;
                    first.get_or_insert_with(|| text(&path));
                }
            }
            let counts = (shared, mine.there.len().min(other.there.len()));
            judge(description.layout, (&mine.name, &other.name), counts, first.as_deref())?;
        }
    }
    Ok(())
}

/// What is said where `split` has `shared` of its videos in common with `other`, the smaller of which has `all`: an error where class
/// folders give both the same, or lists give all of one to the other.
pub(in crate::data::prepare) fn judge(
    layout: Layout,
    (split, other): (&str, &str),
    (shared, all): (usize, usize),
    first: Option<&str>,
) -> Result<()> {
    let Some(first) = first else { return Ok(()) };
    let text = format!("{split} and {other} have {shared} videos in common, the first is {first}");
    if layout == Layout::Folders {
        return Err(Error::input(format!(
            "{text}: class folders alone do not tell splits apart. Give --test-fraction 0.2 and one --split, or folders for the splits \
             (datasets/folders); for a split that is meant to have the same videos, another --out"
        )));
    }
    if shared >= all {
        return Err(Error::input(format!(
            "{text}, all that one of them has: is a list the wrong one? For a split that is meant to have the same videos give \
             another --out"
        )));
    }
    log::warn!("{text}: what is trained on is then tested on");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_splits_and_folds() {
        assert!(means("validate", "val") && means("TRAINING", "train") && means("mine", "mine"));
        assert!(!means("val", "train") && !means("mine", "train") && !means("test1", "test"));
        assert!(exclude("train1", "test1") && exclude("train", "test") && !exclude("train1", "test2"));
        assert!(!exclude("train", "train") && !exclude("train", "test1"));
    }
}
