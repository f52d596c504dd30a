//! What runs came to, as one page that needs nothing else: no network, no scripts.
//!
//! [`Run`] reads a run's folder, whatever state it is in; [`Beside`] what other commands have written of it; [`page()`] writes the
//! page.

mod beside;
mod chart;
mod confusion;
mod limits;
mod network;
mod page;
mod run;

pub use beside::Beside;
pub use page::page;
pub use run::Run;
