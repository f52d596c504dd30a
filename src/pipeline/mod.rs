//! Training and evaluation: one worker a module, each following its schedule over its links.
//!
//! [`tick`] is the algorithm; read it first, then [`clip`]. [`worker`] is what it works on, [`compute`] where its tensors are,
//! [`stop`] how workers agree to end, [`mod@reference`] is exact back-propagation over the same graph and [`bp`] trains with it.

pub mod bp;
pub mod clip;
pub mod compute;
pub(crate) mod ends;
pub mod head;
pub mod metrics;
pub mod reference;
pub mod report;
mod see_off;
pub mod stop;
pub mod tick;
pub mod turns;
pub mod worker;
