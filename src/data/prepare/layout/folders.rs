//! Class folders: `CLASS/video.mp4`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Place, Rows, nothing_in};
use crate::data::prepare::description::{Description, SplitDescription};
use crate::data::prepare::files::{Kind, Unused, entries, existing, folder, videos};
use crate::{Error, Result};

pub(super) fn rows(description: &Description, split: &SplitDescription, place: &Place) -> Result<Rows> {
    let parts = existing(place.videos, &split.videos);
    if !split.videos.is_empty() && parts == [String::new()] {
        refuse_those_of_others(description, split, place)?;
    }
    let found = videos(place.videos, &split.videos, place.out)?;
    let (mut of_classes, mut others) = (Vec::new(), found.others);
    for file in found.videos {
        let of_part = |part: &&String| part.is_empty() || file.path.starts_with(&format!("{part}/"));
        let part = parts.iter().find(of_part).map_or("", String::as_str);
        let below = file.path[part.len()..].trim_start_matches('/');
        match below.split('/').collect::<Vec<_>>()[..] {
            [_, _] => of_classes.push((part, file.path)),
            [_] => others.push(Unused { path: (*file.path).into(), why: "beside the class folders, in none" }),
            _ => others.push(Unused { path: (*file.path).into(), why: "in a folder below its class's" }),
        }
    }
    fn id<'a>((part, path): &'a (&str, Arc<str>)) -> &'a str {
        path[part.len()..].trim_start_matches('/')
    }
    of_classes.sort_unstable_by(|a, b| id(a).cmp(id(b)).then_with(|| a.1.cmp(&b.1)));
    let mut rows = Rows::default();
    for video in of_classes {
        let (class, _) = id(&video).split_once('/').unwrap_or_default();
        let at = || place.videos.join(video.0).join(class).display().to_string();
        rows.add(id(&video), class, Some(video.1.clone()), at)?;
    }
    let classes: BTreeSet<String> = rows.named.iter().map(|(class, _)| class.to_string()).collect();
    let mut folders = 0;
    for part in &parts {
        for entry in entries(&folder(place.videos, part))?.into_iter().filter(|entry| entry.kind == Kind::Folder) {
            folders += 1;
            let path = if part.is_empty() { entry.name.clone() } else { format!("{part}/{}", entry.name) };
            if !classes.contains(&entry.name) && !place.is_out(&path) {
                others.push(Unused { path, why: "a folder without a video in it is no class" });
            }
        }
    }
    if folders == 0 {
        let dir = place.videos.display();
        return Err(Error::input(format!("{dir}: no class folders in it (expected CLASS/video.mp4)")));
    }
    if rows.there.is_empty() {
        let deeper = others.iter().find(|other| other.why.contains("below its class"));
        let hint = deeper.map(|file| {
            format!(
                ". {} lies deeper: give --videos the folder with the classes in it, or describe the splits' folders \
                 (datasets/folders)",
                file.path
            )
        });
        let nothing = nothing_in(place.videos, &format!("in its {folders} class folders"));
        return Err(Error::input(format!("{nothing}{}", hint.unwrap_or_default())));
    }
    Ok(Rows { classes: Some(classes.into_iter().collect()), others, ..rows })
}

/// Where a split has no folder of its own, all of the folder of videos is its own: but not if other splits have theirs there.
fn refuse_those_of_others(description: &Description, split: &SplitDescription, place: &Place) -> Result<()> {
    let of_others =
        description.splits.values().flat_map(|other| &other.videos).find(|part| place.videos.join(part).is_dir());
    of_others.map_or(Ok(()), |other| {
        Err(Error::input(format!(
            "{}: no folder {} in it, though there is {other} of another split",
            place.videos.display(),
            split.videos.join(" or ")
        )))
    })
}
