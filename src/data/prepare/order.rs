//! The order of a split's videos, and which of them become test videos.
//!
//! Videos are ordered by a hash of seed, split and id, so that any run of them is a fair sample, whatever order the lists
//! have. The order holds missing videos too: one that turns up later changes its own shard and no other.

use std::collections::{BTreeMap, HashSet};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::PrepareOptions;
use super::layout::{Listing, Missing, Source, Videos};
use super::report::SplitLedger;
use crate::{Error, Result};

/// A video's place in the order of its split.
fn place_of(seed: u64, split: &str, id: &str) -> u64 {
    xxh3_64_with_seed(format!("{split}/{id}").as_bytes(), seed)
}

/// Moves a part of each class (rounded) into the split `test`. Class folders miss nothing.
pub(super) fn set_apart(listing: &mut Listing, options: &PrepareOptions) {
    let mut classes: BTreeMap<i32, Vec<Source>> = BTreeMap::new();
    for source in listing.splits.drain(..).flat_map(|(_, videos)| videos.there) {
        classes.entry(source.label).or_default().push(source);
    }
    let (mut rest, mut test) = (Vec::new(), Vec::new());
    for (_, mut class) in classes {
        class.sort_by_cached_key(|source| (place_of(options.seed, "test fraction", &source.id), source.id.clone()));
        let n = (class.len() as f64 * options.test_fraction).round() as usize;
        rest.extend(class.split_off(n));
        test.extend(class);
    }
    listing.splits = [(options.splits[0].clone(), rest), ("test".into(), test)]
        .into_iter()
        .filter(|(_, there)| !there.is_empty())
        .map(|(name, there)| (name, Videos { there, missing: Missing::default() }))
        .collect();
}

/// A split's videos in order, each with its place among all that are listed, missing ones too.
pub(super) type Ordered = Vec<(usize, Source)>;

/// The videos of a split that are there and not to be skipped, in order; and the split's account.
pub(super) fn in_order(
    options: &PrepareOptions,
    split: &str,
    videos: Videos,
    skip: &HashSet<String>,
) -> Result<(Ordered, SplitLedger)> {
    let Videos { there, missing } = videos;
    let expected = options.description.splits.get(split).and_then(|s| s.expect);
    let listed = there.len() + missing.len();
    let mut sources = there;
    let places = places(|id| place_of(options.seed, split, id), &mut sources, &missing)?;
    let mut account = SplitLedger { name: split.into(), listed, expected, missing, ..SplitLedger::default() };
    let mut ordered = Ordered::with_capacity(sources.len());
    for (place, source) in places.into_iter().zip(sources) {
        match skip.contains(&*source.id) {
            true => account.skipped += 1,
            false => ordered.push((place, source)),
        }
    }
    if ordered.is_empty() {
        return Err(Error::input(format!(
            "{split}: none of the {listed} videos can be used: {} are missing below {}, {} are to be skipped",
            account.missing.len(),
            options.videos.display(),
            account.skipped
        )));
    }
    Ok((ordered, account))
}

/// Sorts by `key`, of two that have the same by id, and says which place among all, missing ones too, each video has.
fn places(key: impl Fn(&str) -> u64, there: &mut [Source], missing: &Missing) -> Result<Vec<usize>> {
    there.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    there.sort_by_cached_key(|source| key(&source.id));
    let keys: Vec<u64> = there.iter().map(|source| key(&source.id)).collect();
    // The missing ones before each video, and after the one before it.
    let mut places = vec![0; there.len() + 1];
    for id in missing.ids() {
        let id = id?;
        let own = key(&id);
        let first = keys.partition_point(|key| *key < own);
        let same = there[first..].iter().zip(&keys[first..]).take_while(|(_, key)| **key == own);
        places[first + same.filter(|(source, _)| *source.id < *id).count()] += 1;
    }
    places.pop();
    let mut next = 0;
    for place in &mut places {
        next += *place + 1;
        *place = next - 1;
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_videos_have_places_too() {
        // Of a few keys, so that most are another's too.
        let key = |id: &str| id.bytes().map(u64::from).sum::<u64>() * 7 % 5;
        let ids: Vec<String> = (0..60).map(|n| format!("video {}", n * 37 % 60)).collect();
        let mut expected = ids.clone();
        expected.sort_by_key(|id| (key(id), id.clone()));
        for is_there in [|n| n % 3 == 0, |n| n < 2, |_| true] {
            let mut missing = Missing::default();
            let mut there = Vec::new();
            for (n, id) in ids.iter().enumerate() {
                match is_there(n) {
                    true => there.push(Source { id: id.as_str().into(), label: 0, path: "".into() }),
                    false => missing.push(id).unwrap(),
                }
            }
            let places = places(key, &mut there, &missing).unwrap();
            assert!(places.is_sorted() && places.len() == there.len());
            assert!(places.into_iter().zip(there).all(|(place, source)| *expected[place] == *source.id));
        }
    }
}
