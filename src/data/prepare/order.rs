//! The order of a split's videos, and which of them become test videos.
//!
//! Videos are ordered by a hash of seed, split and id, so that any run of them is a fair sample, whatever order the lists
//! have. The order holds missing videos too: one that turns up later changes its own shard and no other.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::PrepareOptions;
use super::layout::{AddThere, Listing, Missing, Source, There, Videos, text};
use super::report::SplitLedger;
use crate::sys::sorting::{Record, Sorted, Sorter};
use crate::{Error, Result};

/// A video's place in the order of its split.
fn place_of(seed: u64, split: &str, id: &str) -> u64 {
    xxh3_64_with_seed(format!("{split}/{id}").as_bytes(), seed)
}

/// Moves a part of each class (rounded) into the split `test`. Class folders miss nothing.
pub(super) fn set_apart(listing: &mut Listing, options: &PrepareOptions) -> Result<()> {
    let scratch = &options.out;
    let mut by_class = Sorter::new(scratch);
    let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
    for (_, videos) in listing.splits.drain(..) {
        for source in videos.there.iter() {
            let Source { id, label, path } = source?;
            let place = place_of(options.seed, "test fraction", &id);
            let key = [&label.to_be_bytes()[..], &place.to_be_bytes(), id.as_bytes()].concat();
            by_class.push(&key, &Source::to_value(label, &path))?;
            *counts.entry(label).or_default() += 1;
        }
    }
    // Of each class so many as are still to become test videos.
    let fraction = |n: &mut usize| *n = (*n as f64 * options.test_fraction).round() as usize;
    counts.values_mut().for_each(fraction);
    let [mut rest, mut test] = [AddThere::new(scratch), AddThere::new(scratch)];
    for record in by_class.sorted().iter() {
        let Record { key, value } = record?;
        let Source { id, label, path } = Source::of_value(text(&key[4 + 8..]), &value)?;
        let left = counts.entry(label).or_default();
        let part = if *left > 0 { &mut test } else { &mut rest };
        *left = left.saturating_sub(1);
        part.push(&id, label, &path)?;
    }
    listing.splits = [(options.splits[0].clone(), rest.sorted()), ("test".into(), test.sorted())]
        .into_iter()
        .filter(|(_, there)| !there.is_empty())
        .map(|(name, there)| (name, Videos { there, missing: Missing::default() }))
        .collect();
    Ok(())
}

/// A split's videos in order, those that are missing or to be skipped too.
pub(super) struct Ordered {
    /// By place in the order; without a value where there is nothing to decode.
    all: Sorted,
    /// How many there are to decode.
    pub usable: usize,
}

impl Ordered {
    /// Each place's video, if there is one to decode.
    pub(super) fn iter(&self) -> impl Iterator<Item = Result<Option<Source>>> {
        self.all.iter().map(|record| {
            let Record { key, value } = record?;
            match value[..] {
                [] => Ok(None),
                _ => Source::of_value(text(&key[8..]), &value).map(Some),
            }
        })
    }
}

/// The videos of a split in order; and the split's account.
pub(super) fn in_order(
    options: &PrepareOptions,
    split: &str,
    Videos { there, missing }: Videos,
    skip: &HashSet<String>,
) -> Result<(Ordered, There, SplitLedger)> {
    let expected = options.description.splits.get(split).and_then(|s| s.expect);
    let listed = there.len() + missing.len();
    let key = |id: &str| place_of(options.seed, split, id);
    let ordered = order(&options.out, key, (&there, &missing), skip)?;
    let skipped = there.len() - ordered.usable;
    if ordered.usable == 0 {
        return Err(Error::input(format!(
            "{split}: none of the {listed} videos can be used: {} are missing below {}, {skipped} are to be skipped",
            missing.len(),
            options.videos.display(),
        )));
    }
    let account = SplitLedger { name: split.into(), listed, expected, missing, skipped, ..SplitLedger::default() };
    Ok((ordered, there, account))
}

/// Sorts by `key`, those that have the same by id.
fn order(
    scratch: &Path,
    key: impl Fn(&str) -> u64,
    (there, missing): (&There, &Missing),
    skip: &HashSet<String>,
) -> Result<Ordered> {
    let (mut all, mut usable) = (Sorter::new(scratch), 0);
    let key = |id: &str| [&key(id).to_be_bytes()[..], id.as_bytes()].concat();
    for source in there.iter() {
        let Source { id, label, path } = source?;
        let value = if skip.contains(&id) { Vec::new() } else { Source::to_value(label, &path) };
        usable += usize::from(!value.is_empty());
        all.push(&key(&id), &value)?;
    }
    for id in missing.ids() {
        all.push(&key(&id?), &[])?;
    }
    Ok(Ordered { all: all.sorted(), usable })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_skipped_videos_have_places_too() {
        // Of a few keys, so that most are another's too.
        let key = |id: &str| id.bytes().map(u64::from).sum::<u64>() * 7 % 5;
        let scratch = tempfile::tempdir().unwrap();
        let ids: Vec<String> = (0..60).map(|n| format!("video {}", n * 37 % 60)).collect();
        let mut expected = ids.clone();
        expected.sort_by_key(|id| (key(id), id.clone()));
        let skip = HashSet::from([ids[1].clone(), ids[6].clone()]);
        for is_there in [|n| n % 3 == 0, |n| n < 2, |_| true] {
            let (mut there, mut missing) = (AddThere::new(scratch.path()), Sorter::new(scratch.path()));
            for (n, id) in ids.iter().enumerate() {
                match is_there(n) {
                    true => there.push(id, n as i32, &format!("{id}.mp4")).unwrap(),
                    false => missing.push(id.as_bytes(), &[]).unwrap(),
                }
            }
            let (there, missing) = (there.sorted(), Missing::of(missing));
            let ordered = order(scratch.path(), key, (&there, &missing), &skip).unwrap();
            let videos: Vec<_> = ordered.iter().map(Result::unwrap).collect();
            let wanted = expected.iter().map(|id| {
                let n = ids.iter().position(|other| other == id).unwrap();
                let source = || Source { id: id.clone(), label: n as i32, path: format!("{id}.mp4") };
                (is_there(n) && !skip.contains(id)).then(source)
            });
            assert_eq!(videos, wanted.collect::<Vec<_>>());
            assert_eq!(ordered.usable, videos.iter().flatten().count());
        }
    }
}
