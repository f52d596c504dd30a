//! What runs came to, as one page that needs nothing else: no network, no scripts.
//!
//! [`run`] reads a run's folder, whatever state it is in; [`chart`] draws; [`page`] writes the page.

mod chart;
mod page;
mod run;

pub use page::page;
pub use run::Run;
