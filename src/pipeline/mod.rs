//! The pipeline: one worker a module, each following its schedule over its links.
//!
//! `tick` is the algorithm; read it first, then `batch`. [`worker`] is what it works on, [`role`] what only the first and
//! last module have, [`training`] how parameters change, `validation` how they are scored meanwhile, [`orders`] how workers agree to end, [`cores`] which of them compute
//! where there are more than processor cores, [`record`] which batches are recorded moment by moment; `build` and `run` make and start them.

mod batch;
pub mod build;
pub mod cores;
mod links;
pub mod orders;
pub mod pixels;
pub mod record;
pub mod role;
pub mod run;
mod tick;
pub mod training;
mod validation;
pub mod worker;

pub use build::{Parts, frames_of, stage_of};
pub use links::Reports;
pub use record::Traced;
pub use run::{End, Origin, RunRange, run};
pub use training::Gradient;
