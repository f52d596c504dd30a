//! `sideways bench layers` on a GPU, in a program without CUDA.

use super::LayersArgs;
use crate::engine::gpus::WITHOUT_CUDA;
use crate::engine::setup::Setup;
use crate::plan::profile::Conditions;
use crate::{Error, Result};

/// Says so.
///
/// # Errors
/// [`Error::Input`], always.
pub(super) fn run(_: &LayersArgs, _: &Setup, _: &Conditions) -> Result<()> {
    Err(Error::input(WITHOUT_CUDA))
}
