//! What runs came to, as one page that needs nothing else: no network, no scripts.
//!
//! [`Run`] reads a run's folder, whatever state it is in; [`page()`] writes the page.

mod chart;
mod page;
mod run;

pub use page::page;
pub use run::Run;
