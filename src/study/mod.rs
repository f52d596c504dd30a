//! Scaling studies: the same training on more and more nodes, measured, beside what was predicted.
//!
//! [`plan`] makes points of a configuration: nodes times rules ([`variant`]) along one axis. [`folder`] keeps a study: its plan, and a folder a
//! point with status, log and measurements. [`forecast`] says what a point will reach before anything runs, and where its network is
//! cut. [`launch`] starts a point's ranks, [`conduct`] goes through the points until all are through, and can be stopped and go on.
//! [`submit`] writes the command lines that make jobs of it. [`table`] gathers what there is, [`plot`] and [`page`] show it, [`publish`]
//! writes it.

pub mod conduct;
pub mod fill;
pub mod folder;
pub mod forecast;
pub mod launch;
pub mod page;
pub mod plan;
pub mod plot;
pub mod publish;
pub mod submit;
pub mod table;
pub mod variant;
