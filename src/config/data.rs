//! `[data]`: what is read, and how a clip is made of it.

use serde::{Deserialize, Serialize};

use crate::data::Augmentation;

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Glob(s) of training shards.
    pub train: Globs,
    /// Glob(s) of test shards.
    pub test: Globs,
    /// Glob(s) of the shards that `train.validate_every` is about; without, those of `test`.
    pub validation: Globs,
    /// T, frames of a clip.
    pub frames: usize,
    /// Source frames from one frame of a clip to the next.
    pub stride: usize,
    /// B, the clips a replica works on in lock-step.
    pub batch: usize,
    /// Side of the square crop in pixels; absent: the whole frame. Random in training, centred in evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<usize>,
    /// Mirror clips left to right at random (not for labels that depend on direction).
    pub flip: bool,
    /// Random resized crop in training: the part of a frame's area that is kept, from and to; absent: crops are not resized.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop_scale: Option<[f64; 2]>,
    /// Random resized crop: width to height of what is kept, from and to.
    pub crop_ratio: [f64; 2],
    /// Colour jitter in training: brightness is multiplied by a factor out of 1 ± this, one for all frames of a clip.
    pub brightness: f64,
    /// As `brightness`, of the distance to mid-grey.
    pub contrast: f64,
    /// As `brightness`, of the distance to the pixel's grey.
    pub saturation: f64,
    /// Recognition: in training, mix every clip of a batch, and its label, with another one's, by a weight out of Beta(mixup, mixup);
    /// absent: clips are as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixup: Option<f64>,
    /// Draw the order of clips and their windows anew each epoch; otherwise shard order from frame 0.
    pub shuffle: bool,
    /// Compare each video with its checksum when it is first met (all of it is read then); damaged ones are skipped in
    /// training. Without, damage is met where the JPEG decoder stumbles, and the clip counts with black frames from there.
    pub verify: bool,
    /// Threads that decode, crop and scale frames, on each first module's rank.
    pub decode_threads: usize,
    /// Frames of each clip that are made ahead of the one in use, about.
    pub prefetch: usize,
    /// Per-channel mean of u8/255.
    pub mean: [f32; 3],
    /// Per-channel standard deviation of u8/255.
    pub std: [f32; 3],
}

impl DataConfig {
    /// The random changes of clips in training.
    pub fn augmentation(&self) -> Augmentation {
        let &DataConfig { flip, crop_scale, crop_ratio, brightness, contrast, saturation, .. } = self;
        Augmentation { flip, crop_scale, crop_ratio, brightness, contrast, saturation }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        let augmentation = Augmentation::default();
        DataConfig {
            train: Globs::default(),
            test: Globs::default(),
            validation: Globs::default(),
            frames: 16,
            stride: 1,
            batch: 16,
            crop: None,
            flip: false,
            crop_scale: None,
            crop_ratio: augmentation.crop_ratio,
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
            mixup: None,
            shuffle: true,
            verify: true,
            decode_threads: 1,
            prefetch: 16,
            // Kinetics-400's, as torchvision's video models use them.
            mean: [0.43216, 0.394666, 0.37645],
            std: [0.22803, 0.22145, 0.216989],
        }
    }
}

/// One glob or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a glob of shards or a list of them")]
pub enum Globs {
    /// `"data/train-*.h5"`
    One(String),
    /// `["a/*.h5", "b/*.h5"]`
    Many(Vec<String>),
}

impl Default for Globs {
    fn default() -> Self {
        Globs::Many(Vec::new())
    }
}

impl Globs {
    /// The globs as a list; empty if none was given.
    pub fn list(&self) -> Vec<String> {
        match self {
            Globs::One(g) => vec![g.clone()],
            Globs::Many(g) => g.clone(),
        }
    }
}
