//! The network: layers with explicit vector–Jacobian products, gathered into modules.
//!
//! Activations are NHWC tensors `[B, H, W, C]`; vectors are `[B, 1, 1, C]`.

pub mod cost;
pub mod head;
pub mod layers;
mod limits;
pub mod loss;
pub mod module;
pub mod optim;
pub mod param;
pub mod presets;
pub mod spec;
pub mod tape_size;
pub mod tensors;
