//! Data: layouts of datasets, preparation, shards, the stream of frames, synthetic videos.

#[path = "../common/mod.rs"]
mod common;
mod found;
mod kept;
mod layouts;
mod prepare;
mod prepare_memory;
mod prepare_runs;
mod references;
mod shard;
mod shard_types;
mod stream;
mod streams;
mod support;
mod synth;
