//! HMDB51: a file a class and split, `CLASS_test_split1.txt`, with lines `video.avi FLAG`: 1 train, 2 test, 0 neither. The
//! class is in the list's name, never in the video's.

use std::collections::BTreeMap;

use super::named::Named;
use super::{Files, Place, Rows};
use crate::data::prepare::description::SplitDescription;
use crate::data::prepare::files::{entries, text};
use crate::{Error, Result};

pub(super) fn rows(split: &SplitDescription, place: &Place, files: &mut Files) -> Result<Rows> {
    let Some(dir) = place.annotations else {
        let pattern = split.annotations.join(" or ");
        return Err(Error::input(format!("--annotations is missing: the folder with the dataset's {pattern}")));
    };
    let annotations = entries(dir)?;
    let lists = |pattern: &String| -> Vec<(String, String)> {
        let (before, after) = pattern.split_once('*').unwrap_or((pattern, ""));
        let class = |name: &str| name.strip_prefix(before)?.strip_suffix(after).map(str::to_string);
        let mut lists: Vec<_> =
            annotations.iter().filter_map(|file| Some((class(&file.name)?, file.name.clone()))).collect();
        lists.sort();
        lists
    };
    let lists = split.annotations.iter().map(lists).find(|lists| !lists.is_empty()).unwrap_or_default();
    if lists.is_empty() {
        let pattern = split.annotations.join(" or ");
        return Err(Error::input(format!("{}: no {pattern} in this folder of annotations", dir.display())));
    }
    let found = files.all_videos(split, place)?;
    let classes: Vec<String> = lists.iter().map(|(class, _)| class.clone()).collect();
    let mut named = Named::new(&found, &classes, &[]);
    // By id: class, file and place.
    let mut listed = BTreeMap::new();
    for (class, file) in &lists {
        let list = dir.join(file);
        for (n, line) in text(&list)?.lines().enumerate() {
            let line = line.trim_end();
            if line.is_empty() {
                continue;
            }
            let at = format!("{}:{}", list.display(), n + 1);
            let bad = |why: String| Error::input(format!("{at}: {why}"));
            let flag = line.rsplit_once(char::is_whitespace);
            let Some((name, flag)) = flag.and_then(|(name, flag)| Some((name.trim_end(), flag.parse::<u8>().ok()?)))
            else {
                return Err(bad(format!("{line:?} is not `video.avi FLAG`")));
            };
            if flag > 2 {
                return Err(bad(format!("flag {flag}: it must be 0 (unused), 1 (train) or 2 (test)")));
            }
            if Some(flag) != split.flag {
                continue;
            }
            let id = format!("{class}/{name}");
            let path = named.find(class, name).map_err(|e| e.within(&at))?;
            if listed.insert(id, (class, path, at.clone())).is_some() {
                return Err(bad(format!("{name} is listed twice")));
            }
        }
    }
    named.conclude()?;
    let mut rows = Rows { classes: Some(classes), ..Rows::new(place) };
    for (id, (class, path, at)) in listed {
        rows.add(&id, class, path.as_deref(), || at)?;
    }
    Ok(rows)
}
