//! Videos: how they are stored, made, checked and streamed.
//!
//! In reading order:
//!
//! | module | subject |
//! |---|---|
//! | [`shard`] | one HDF5 file of videos: written once, read in any order (the only file that names HDF5) |
//! | [`jpeg`] | one frame to and from JPEG |
//! | [`dataset`] | many shards seen as one list of videos |
//! | [`sampler`] | which videos and windows make up batch number n: a pure function |
//! | [`augment`] | from a decoded frame to the values that module 1 reads |
//! | [`mixup`] | clips of a batch mixed with one another, and their labels |
//! | [`loader`] | a thread that reads ahead and hands out batches of frames |
//! | [`synth`] | a made-up dataset in which only motion tells the label |
//! | [`prepare`] | video files to shards, through `ffmpeg` |
//! | [`inspect`] | what is in shards, checked; contact sheets |
//!
//! Frames are `[H, W, 3]` bytes, RGB, everywhere until [`augment::View`] makes values of them.

pub mod augment;
pub mod dataset;
pub mod inspect;
pub mod jpeg;
pub mod loader;
pub mod mixup;
pub mod prepare;
mod reader;
pub mod sampler;
pub mod shard;
pub mod synth;

pub use augment::Augmentation;
pub use dataset::{Dataset, Video, missing_shards};
pub use loader::{BatchVideos, FrameStream, Frames, StreamOptions};
pub use mixup::{Mixture, Mixup};
pub use sampler::{Sampler, SamplerOptions, VideoWindow, Views};
pub use shard::{Encoding, ShardHeader, ShardReader, ShardWriter};
