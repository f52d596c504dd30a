//! What a dataset looks like as its users have it on disk: `dataset.toml`, one a dataset. A new dataset of a known layout
//! needs such a file and no code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::sys::files::read_text;
use crate::{Error, Result};

/// The layouts this program knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One folder a class, with the class's videos in it: CLASS/video.mp4
    Folders,
    /// Annotation files (CSV or JSON) with label, YouTube id and times; videos named ID_START_END.mp4 anywhere
    Kinetics,
    /// classInd.txt, trainlist01.txt … and CLASS/v_CLASS_gGG_cCC.avi
    Ucf101,
    /// CLASS_test_split1.txt … with flags, and CLASS/video.avi
    Hmdb51,
}

/// A dataset, as `dataset.toml` describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Its name, stored in the shards.
    pub name: String,
    /// How it is organised.
    pub layout: Layout,
    /// A file with one class name a line, in label order, beside `dataset.toml`. Absent: the layout's own order
    /// (`classInd.txt`), or else the names sorted by their bytes.
    #[serde(default)]
    pub classes: Option<PathBuf>,
    /// How many classes there are; any other number is refused.
    #[serde(default)]
    pub expect_classes: Option<usize>,
    /// Classes in whose folder and file names upper and lower case may differ from the lists.
    #[serde(default)]
    pub ignore_case: Vec<String>,
    /// Kinetics: the columns of annotation files that have no header line.
    #[serde(default)]
    pub columns: Option<Vec<String>>,
    /// The splits by name, which becomes part of the shards' names.
    pub splits: BTreeMap<String, SplitDescription>,
}

/// One split of a [`Description`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitDescription {
    /// Names of its annotation file, of which the first one that is there is read. HMDB51: the classes' files, with a `*`
    /// in the class's place.
    #[serde(default)]
    pub annotations: Vec<String>,
    /// Kinetics: take only entries whose `split` (JSON: `subset`) has this value.
    #[serde(default)]
    pub subset: Option<String>,
    /// HMDB51: take videos with this flag (1 train, 2 test).
    #[serde(default)]
    pub flag: Option<u8>,
    /// Folders below the folder of videos in which to look; those that are not there are passed over, and where none is,
    /// all of the folder of videos is looked through.
    #[serde(default)]
    pub videos: Vec<String>,
    /// How many videos the annotations list, for the report.
    #[serde(default)]
    pub expect: Option<usize>,
}

impl Description {
    /// Reads `dataset.toml`, given as the file or its folder.
    ///
    /// # Errors
    /// [`Error::Input`] when it is not there, or says something that makes no sense (with the line).
    pub fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("dataset.toml") } else { path.to_path_buf() };
        let bad = |why: String| Error::input(format!("{}: {why}", file.display()));
        let text = read_text(&file).map_err(|e| bad(format!("cannot read this description of a dataset: {e}")))?;
        let mut description: Self = toml::from_str(&text).map_err(|e| bad(e.to_string().trim_end().into()))?;
        description.validate().map_err(bad)?;
        if let Some(classes) = &mut description.classes {
            *classes = file.parent().unwrap_or(Path::new(".")).join(&*classes);
        }
        Ok(description)
    }

    /// A dataset that has no description: the layout's usual file names.
    pub fn plain(layout: Layout, name: &str) -> Self {
        let split = |annotations: &str, flag| SplitDescription {
            annotations: if annotations.is_empty() { Vec::new() } else { vec![annotations.into()] },
            flag,
            ..SplitDescription::default()
        };
        let mut splits = BTreeMap::new();
        match layout {
            // These take any split there is a word for.
            Layout::Folders | Layout::Kinetics => {}
            Layout::Ucf101 | Layout::Hmdb51 => {
                for fold in 1..=3 {
                    for (part, flag) in [("train", 1), ("test", 2)] {
                        let split = match layout {
                            Layout::Ucf101 => split(&format!("{part}list0{fold}.txt"), None),
                            _ => split(&format!("*_test_split{fold}.txt"), Some(flag)),
                        };
                        splits.insert(format!("{part}{fold}"), split);
                    }
                }
            }
        }
        let ignore_case = if layout == Layout::Ucf101 { vec!["HandstandPushups".into()] } else { Vec::new() };
        Description {
            name: name.into(),
            layout,
            classes: None,
            expect_classes: None,
            ignore_case,
            columns: None,
            splits,
        }
    }

    /// The split of this name.
    ///
    /// # Errors
    /// [`Error::Input`] listing the splits there are.
    pub fn split(&self, name: &str) -> Result<SplitDescription> {
        match (self.splits.get(name), self.splits.is_empty(), self.layout) {
            (Some(split), ..) => Ok(split.clone()),
            (None, true, Layout::Kinetics) => Ok(SplitDescription {
                annotations: ["csv", "json", "txt"].map(|ending| format!("{name}.{ending}")).to_vec(),
                ..SplitDescription::default()
            }),
            (None, true, _) => Ok(SplitDescription::default()),
            (None, false, _) => {
                let known: Vec<&str> = self.splits.keys().map(String::as_str).collect();
                Err(Error::input(format!(
                    "--split {name:?}: {} has no such split; it has {}",
                    self.name,
                    known.join(", ")
                )))
            }
        }
    }

    fn validate(&self) -> std::result::Result<(), String> {
        if self.splits.is_empty() {
            return Err("it describes no splits: add a [splits.NAME]".into());
        }
        for (name, split) in &self.splits {
            let wrong = |why: &str| Err(format!("splits.{name}: {why}"));
            if self.layout != Layout::Folders && split.annotations.is_empty() {
                return wrong("annotations is missing: which file lists the videos?");
            }
            if self.layout == Layout::Folders && !split.annotations.is_empty() {
                return wrong("annotations makes no sense for class folders");
            }
            if self.layout == Layout::Hmdb51 {
                if split.annotations.iter().any(|a| a.matches('*').count() != 1) {
                    return wrong("annotations needs one * in the class's place, for instance *_test_split1.txt");
                }
                if !matches!(split.flag, Some(1 | 2)) {
                    return wrong("flag is missing: 1 takes the train videos, 2 the test videos");
                }
            } else if split.flag.is_some() {
                return wrong("flag belongs to the layout hmdb51");
            }
            if self.layout != Layout::Kinetics && split.subset.is_some() {
                return wrong("subset belongs to the layout kinetics");
            }
        }
        Ok(())
    }
}
