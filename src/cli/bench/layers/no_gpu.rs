//! `sideways bench layers` on a GPU, in a program without CUDA.

use super::LayersArgs;
use crate::plan::profile::Conditions;
use crate::setup::Setup;
use crate::setup::site::WITHOUT_CUDA;
use crate::{Error, Result};

/// Says so.
///
/// # Errors
/// [`Error::Input`], always.
pub(super) fn run(_: &LayersArgs, _: &Setup, _: &Conditions) -> Result<()> {
    Err(Error::input(WITHOUT_CUDA))
}
