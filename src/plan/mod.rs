//! Planning before a run: where to cut the network, and how fast the pipeline will be.
//!
//! [`crate::network::blocks`] says where cuts may be, [`crate::network::partition`] finds the best ones for given costs,
//! [`mod@measure`] times layers here ([`gpu`] on a GPU), [`profile`] remembers it, [`simulate`] plays a schedule with such
//! costs, on a [`cluster`] too, [`predict`] joins them, and [`mod@cut`] is what training calls.

pub mod assumed;
pub mod cluster;
pub mod cut;
pub mod gpu;
pub mod measure;
pub mod predict;
pub mod profile;
pub mod simulate;
