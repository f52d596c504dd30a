//! Class folders: `CLASS/video.mp4`.

use super::{Place, Row, Rows, nothing_in};
use crate::data::prepare::description::SplitDescription;
use crate::data::prepare::files::{entries, existing, folder, video_stem};
use crate::{Error, Result};

pub(super) fn rows(split: &SplitDescription, place: &Place) -> Result<Rows> {
    let mut classes = Vec::new();
    let mut rows = Vec::new();
    for part in existing(place.videos, &split.videos) {
        let dir = folder(place.videos, &part);
        for (class, _) in entries(&dir)?.into_iter().filter(|(_, is_folder)| *is_folder) {
            let of_class = dir.join(&class);
            for (file, is_folder) in entries(&of_class)? {
                if is_folder || video_stem(&file).is_none() {
                    continue;
                }
                let below = if part.is_empty() { String::new() } else { format!("{part}/") };
                let path = Some(format!("{below}{class}/{file}"));
                let (id, at) = (format!("{class}/{file}"), of_class.display().to_string());
                rows.push(Row { id, class: class.clone(), path, at });
            }
            classes.push(class);
        }
    }
    classes.sort();
    classes.dedup();
    if classes.is_empty() {
        let dir = place.videos.display();
        return Err(Error::input(format!("{dir}: no class folders in it (expected CLASS/video.mp4)")));
    }
    if rows.is_empty() {
        return Err(nothing_in(place.videos, &format!("in its {} class folders", classes.len())));
    }
    Ok(Rows { rows, classes: Some(classes) })
}
