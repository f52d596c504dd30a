//! Data: layouts of datasets, preparation, shards, the stream of frames, synthetic videos.

#[path = "../common/mod.rs"]
mod common;
mod layouts;
mod prepare;
mod prepare_runs;
mod shard;
mod stream;
mod support;
mod synth;
