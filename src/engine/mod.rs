//! Training and evaluation: one worker a module, each following its schedule over its links.
//!
//! [`tick`] is the algorithm; read it first, then [`clip`]. [`worker`] is what it works on, [`compute`] where its tensors are, [`grid`] says where workers run and how
//! they are joined, [`stop`] how they agree to end, [`exchange`] how messages get from GPU to GPU, [`environment`] checks the hosts before, [`setup`] plans all of it, [`span`] says from where to where it goes, [`run`] starts them, [`console`] gathers what they report, [`mod@reference`]
//! is exact back-propagation over the same graph and [`bp`] trains with it.

pub mod bp;
pub mod clip;
pub mod compute;
pub mod console;
mod ends;
pub mod environment;
pub mod exchange;
pub mod footprint;
pub mod gpus;
pub mod grid;
pub mod head;
pub mod limits;
pub mod reference;
pub mod report;
pub mod run;
mod see_off;
pub mod setup;
pub mod span;
pub mod state;
pub mod stop;
pub mod tick;
pub mod turns;
pub mod worker;
pub mod writer;
