//! TensorBoard's event files: the numbers of `metrics.jsonl` as scalars, and pictures.
//!
//! | module | subject |
//! |---|---|
//! | [`event`] | one event: the protobuf messages that TensorBoard reads |
//! | [`records`] | events one after another, each in a TFRecord's frame |
//! | [`file`](mod@file) | the event file of an attempt, in a run's folder |
//! | [`scalars`](mod@scalars) | what a line of `metrics.jsonl` says, by tag |
//!
//! A *step* is a number of batches done, as in `metrics.jsonl`.

pub mod event;
pub mod file;
pub mod records;
pub mod scalars;

pub use file::{EventFile, is_event_file};
pub use records::Records;
pub use scalars::scalars;
