//! Training on made-up frames, without a dataset and without a run folder. The frames go the way of real ones: a shard in the
//! temporary folder, the loader, module 1.

use std::path::{Path, PathBuf};

use crate::comm::World;
use crate::config::{Config, Globs, Task};
use crate::data::{Encoding, ShardHeader, ShardWriter};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// The configuration at `path` with `set`, on shards of `classes` classes made up in `folder`.
///
/// # Errors
/// [`Error::Input`] if the configuration cannot work, or the frames' size or the classes are not known.
pub(super) fn made_up(
    path: &Path,
    set: &[String],
    classes: Option<usize>,
    world: &World,
    folder: &Folder,
) -> Result<Config> {
    let mut config = Config::load(path, set)?;
    config.validate()?;
    let side = config.data.crop.ok_or_else(|| {
        Error::input("data.crop is not set: made-up frames have no size of their own, set it to the side in pixels")
    })?;
    let classes = match (config.model.task, classes.or(config.model.classes)) {
        (Task::FutureFrames, _) => 1,
        (Task::Recognition, Some(classes)) => classes,
        (Task::Recognition, None) => {
            return Err(Error::input("the number of classes is not known: give --classes K, or set model.classes"));
        }
    };
    config.model.classes = (config.model.task == Task::Recognition).then_some(classes);
    let path = folder.path.join("train.h5");
    if world.local_rank() == 0 {
        write_shard(&path, &config, side, classes)?;
    }
    config.data.train = Globs::One(path.display().to_string());
    Ok(config)
}

/// As many videos as a batch takes, of noise: every pixel costs what it would cost in a real frame.
fn write_shard(path: &Path, config: &Config, side: usize, classes: usize) -> Result<()> {
    let header = ShardHeader {
        encoding: Encoding::Raw,
        fps: 25.0,
        height: side,
        width: side,
        dataset: "bench".into(),
        split: "train".into(),
        class_names: (0..classes).map(|k| format!("class {k}")).collect(),
    };
    let mut writer = ShardWriter::create(path, header)?;
    let frames = config.data.frames * config.data.stride;
    let mut state = 1u32;
    let mut pixel = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for v in 0..config.data.batch * config.train.replicas {
        let video = (0..frames).map(|_| (0..side * side * 3).map(|_| pixel()).collect::<Vec<u8>>());
        writer.append(&format!("video {v}"), (v % classes) as i32, video)?;
    }
    writer.finish().map(|_| ())
}

/// A temporary folder under the same name on every node, removed when dropped.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    owner: bool,
}

impl Folder {
    /// Makes it. Collective.
    pub(super) fn shared(world: &World) -> Result<Self> {
        let mine = format!("sideways-{}-{}", hostname(), std::process::id());
        let names = world.gather(mine.as_bytes())?;
        let path = std::env::temp_dir().join(String::from_utf8_lossy(&names[0]).as_ref());
        let owner = world.local_rank() == 0;
        if owner {
            std::fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
        Ok(Folder { path, owner })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.owner {
            // What is left in the temporary folder hurts nobody.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
