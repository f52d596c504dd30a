//! What runs came to, as one page that needs nothing else: no network, no scripts; and what they recorded, as a trace.
//!
//! [`Run`] reads a run's folder, whatever state it is in; [`Beside`] what other commands have written of it; [`page()`] writes the
//! page, [`event_file`] what TensorBoard reads. [`trace`] is apart from these.

mod beside;
mod chart;
mod confusion;
mod limits;
mod network;
mod page;
mod run;
mod tensorboard;
pub mod trace;

pub use beside::Beside;
pub use page::page;
pub use run::Run;
pub use tensorboard::event_file;
