//! Class folders: `CLASS/video.mp4`.

use std::collections::BTreeSet;

use super::{Files, Place, Rows, nothing_in};
use crate::data::prepare::description::{Description, SplitDescription};
use crate::data::prepare::files::{existing, folder, folders, walk};
use crate::{Error, Result};

pub(super) fn rows(
    description: &Description,
    split: &SplitDescription,
    place: &Place,
    files: &mut Files,
) -> Result<Rows> {
    let parts = existing(place.videos, &split.videos);
    if !split.videos.is_empty() && parts == [String::new()] {
        refuse_those_of_others(description, split, place)?;
    }
    let mut rows = Rows::new(place);
    // The first by name of the files that lie in folders in the classes' folders.
    let mut deeper: Option<String> = None;
    walk(place.videos, &split.videos, place.out, &mut |(path, why)| {
        if let Some(why) = why {
            return files.other(&path, why);
        }
        let of_part = |part: &&String| part.is_empty() || path.starts_with(&format!("{part}/"));
        let part = parts.iter().find(of_part).map_or("", String::as_str);
        let id = path[part.len()..].trim_start_matches('/');
        match id.split('/').collect::<Vec<_>>()[..] {
            [class, _] => {
                let at = || place.videos.join(part).join(class).display().to_string();
                rows.add(id, class, Some(&path), at)
            }
            [_] => files.other(&path, "beside the class folders, in none"),
            _ => {
                files.other(&path, "in a folder below its class's")?;
                if deeper.as_ref().is_none_or(|first| path < *first) {
                    deeper = Some(path);
                }
                Ok(())
            }
        }
    })?;
    let classes: BTreeSet<String> = rows.named.iter().map(|(class, _)| class.to_string()).collect();
    let mut count = 0;
    for part in &parts {
        for name in folders(&folder(place.videos, part))? {
            count += 1;
            let path = if part.is_empty() { name.clone() } else { format!("{part}/{name}") };
            if !classes.contains(&name) && !place.is_out(&path) {
                files.other(&path, "a folder without a video in it is no class")?;
            }
        }
    }
    if count == 0 {
        let dir = place.videos.display();
        return Err(Error::input(format!("{dir}: no class folders in it (expected CLASS/video.mp4)")));
    }
    if rows.are_there == 0 {
        let hint = deeper.map(|file| {
            format!(
                ". {file} lies deeper: give --videos the folder with the classes in it, or describe the splits' folders \
                 (datasets/folders)"
            )
        });
        let nothing = nothing_in(place.videos, &format!("in its {count} class folders"));
        return Err(Error::input(format!("{nothing}{}", hint.unwrap_or_default())));
    }
    Ok(Rows { classes: Some(classes.into_iter().collect()), ..rows })
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
