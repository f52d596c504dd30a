//! One shard: an HDF5 file of videos, written once and then only read. The only folder that names HDF5.
//!
//! Root attributes: `format = "sideways-shard"`, `version`, `encoding` (`raw` or `jpeg`), `fps`, `height`, `width`,
//! `dataset`, `split`, `class_names` (all classes, in label order). With N videos and F frames in all:
//!
//! | dataset | shape | holds |
//! |---|---|---|
//! | `/labels` | i32 `[N]` | each video's class, an index into `class_names` |
//! | `/video_ids` | utf-8 `[N]` | each video's name |
//! | `/video_offsets` | u64 `[N+1]` | video v is frames `video_offsets[v]..video_offsets[v+1]` |
//! | `/video_checksums` | u64 `[N]` | XXH3-64 of the video's stored bytes |
//! | `/frames` (raw) | u8 `[F, H, W, 3]` | RGB |
//! | `/jpeg` (jpeg) | u8 `[bytes]` | the frames' JPEG files one after the other |
//! | `/frame_offsets` (jpeg) | u64 `[F+1]` | frame f is bytes `frame_offsets[f]..frame_offsets[f+1]` |
//!
//! No filters, no groups: `h5py` and `h5dump` read it without help. Chunks are small and bypass HDF5's cache, so
//! reading a few frames reads those bytes and no others.

mod attributes;
mod check;
mod heap;
mod names;
mod reader;
mod references;
mod rows;
mod values;
mod writer;

pub use reader::ShardReader;
pub use writer::ShardWriter;

/// The `format` attribute of every shard.
pub const FORMAT: &str = "sideways-shard";
/// The version of the format this program writes and reads.
pub const VERSION: i64 = 1;
/// How frames are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Encoding {
    /// Plain RGB bytes.
    Raw,
    /// One JPEG file a frame.
    Jpeg,
}

impl Encoding {
    /// The name written into the `encoding` attribute.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Raw => "raw",
            Encoding::Jpeg => "jpeg",
        }
    }
}

/// What a shard says of itself in its root attributes.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardHeader {
    /// How frames are stored.
    pub encoding: Encoding,
    /// Frames a second.
    pub fps: f64,
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
    /// The dataset's name.
    pub dataset: String,
    /// `train`, `test`, …
    pub split: String,
    /// All classes of the dataset, in label order.
    pub class_names: Vec<String>,
}

impl ShardHeader {
    /// Bytes of one RGB frame.
    pub fn frame_bytes(&self) -> usize {
        self.height * self.width * 3
    }
}
