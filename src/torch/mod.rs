//! PyTorch: networks written for it, and initial weights taken from what it saved.
//!
//! Both sides have safetensors in common, in which convolutions are `[O, I, kH, kW]` and linear maps `[O, I]`. An exported file keeps
//! this program's names; of others' those of torchvision's ResNets are known.

mod export;
mod import;
mod program;
mod torchvision;

pub use export::export;
pub use import::Import;
