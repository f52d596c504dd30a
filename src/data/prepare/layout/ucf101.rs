//! UCF101: `classInd.txt` (`1 ApplyEyeMakeup`, counted from 1), `trainlist01.txt` (`CLASS/file.avi 1`), `testlist01.txt`
//! (`CLASS/file.avi`).
//!
//! The class `HandstandPushups` has files called `v_HandStandPushups_…`, and copies of the dataset disagree on its folder:
//! the description's `ignore_case` names it.

use std::collections::BTreeMap;

use super::named::Named;
use super::{Files, Place, Rows};
use crate::data::prepare::description::{Description, SplitDescription};
use crate::data::prepare::files::{annotation, text};
use crate::{Error, Result};

const CLASSES: &str = "classInd.txt";

pub(super) fn rows(
    description: &Description,
    split: &SplitDescription,
    place: &Place,
    files: &mut Files,
) -> Result<Rows> {
    let list = annotation(place.annotations, &split.annotations)?;
    let index = list.with_file_name(CLASSES);
    let classes = classes(&index)?;
    let found = files.all_videos(split, place)?;
    let mut named = Named::new(&found, &classes, &description.ignore_case);
    // By id: class, file and place.
    let mut listed = BTreeMap::new();
    for (n, line) in text(&list)?.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let at = format!("{}:{}", list.display(), n + 1);
        let bad = |why: String| Error::input(format!("{at}: {why}"));
        let (path, id) = match line.rsplit_once(char::is_whitespace) {
            Some((path, id)) => (path.trim_end(), Some(id)),
            None => (line, None),
        };
        let Some((class, name)) = path.rsplit_once('/') else {
            return Err(bad(format!("{line:?} is not CLASS/video.avi, with or without a class number after it")));
        };
        // As classInd.txt spells it.
        let folds = description.ignore_case.iter().find(|c| c.eq_ignore_ascii_case(class));
        let class = folds.map_or(class, String::as_str);
        if let Some(id) = id {
            let number: Option<usize> = id.parse().ok();
            let said = number.and_then(|k| k.checked_sub(1)).and_then(|k| classes.get(k));
            if said.is_none_or(|said| said != class) {
                let said = said.map_or("no class".into(), |said| format!("{said:?}"));
                return Err(bad(format!(
                    "class number {id} is {said} in {CLASSES} (which counts from 1), but the folder is {class:?}"
                )));
            }
        }
        let id = format!("{class}/{name}");
        let path = named.find(class, name).map_err(|e| e.within(&at))?;
        if listed.insert(id, (class.to_string(), path, at.clone())).is_some() {
            return Err(bad(format!("{class}/{name} is listed twice")));
        }
    }
    named.conclude()?;
    let mut rows = Rows { classes: Some(classes), ..Rows::new(place) };
    for (id, (class, path, at)) in listed {
        rows.add(&id, &class, path.as_deref(), || at)?;
    }
    Ok(rows)
}

/// The classes of `classInd.txt`, in order.
fn classes(path: &std::path::Path) -> Result<Vec<String>> {
    let mut classes = Vec::new();
    for (n, line) in text(path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parts = line.trim().split_once(char::is_whitespace);
        match parts.and_then(|(id, name)| Some((id.parse::<usize>().ok()?, name.trim_start()))) {
            Some((id, name)) if id == classes.len() + 1 => classes.push(name.to_string()),
            _ => {
                return Err(Error::input(format!(
                    "{}:{}: {line:?} is not `{} CLASS`: classes are counted from 1, one a line",
                    path.display(),
                    n + 1,
                    classes.len() + 1
                )));
            }
        }
    }
    Ok(classes)
}
