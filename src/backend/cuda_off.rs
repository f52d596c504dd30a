//! What stands in for [`crate::backend::cuda`] in a program built without CUDA: the same names, of which none works.

use std::ops::Range;

use super::stage::{CpuStage, Stage, StageSpec};
use super::{GpuPlacement, Peaks};
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::{Error, Result};

/// What to do where a program without CUDA meets GPUs.
const WITHOUT_CUDA: &str =
    "this program was built without CUDA; build it with `cargo build --release --features cuda` (docs/gpus.md)";

fn without_cuda<T>() -> Result<T> {
    Err(Error::input(WITHOUT_CUDA))
}

/// A moment of a GPU: there is none.
#[derive(Clone, Debug)]
pub enum Event {}

impl Event {
    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn is_complete(&self) -> Result<bool> {
        match *self {}
    }
}

/// A GPU's clock: there is none.
pub enum Clock {}

impl Clock {
    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn until(&self, _: &Clock) -> Result<f64> {
        match *self {}
    }
}

/// Host memory that a GPU copies from and to: there is none.
pub enum Locked {}

impl Locked {
    /// As with CUDA.
    pub fn length(&self) -> usize {
        match *self {}
    }

    /// As with CUDA.
    pub fn part(&mut self, _: Range<usize>) -> &mut [f32] {
        match *self {}
    }
}

/// Sums of gradients in GPU memory: there are none.
pub enum Flat {}

impl Flat {
    /// As with CUDA.
    pub fn words(&self) -> usize {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn write(&mut self, _: Range<usize>, _: SlotMut<'_>) -> Result<Done> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn sum(&mut self, _: Range<usize>, _: &[Option<Slot<'_>>], _: f32) -> Result<Done> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn read(&mut self, _: Range<usize>, _: Slot<'_>) -> Result<Done> {
        match *self {}
    }
}

/// A message's place in device memory: there is none.
#[derive(Clone, Debug)]
pub enum Place {}

impl Place {
    /// As with CUDA.
    ///
    /// # Errors
    /// [`Error::Input`], always.
    pub fn allocate(_: usize, _: usize) -> Result<Place> {
        without_cuda()
    }
}

/// An array on a GPU that travels in messages: there is none.
pub enum Probe {}

impl Probe {
    /// As with CUDA.
    ///
    /// # Errors
    /// [`Error::Input`], always.
    pub fn new(_: usize, _: usize) -> Result<Probe> {
        without_cuda()
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn bind(&self) -> Result<()> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn write(&mut self, _: SlotMut<'_>) -> Result<Done> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn read(&mut self, _: Slot<'_>) -> Result<Done> {
        match *self {}
    }

    /// As with CUDA.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn host_copies(&mut self) -> Result<[f64; 2]> {
        match *self {}
    }
}

/// As with CUDA.
///
/// # Errors
/// [`Error::Input`], always.
pub fn peaks(_: usize) -> Result<Peaks> {
    without_cuda()
}

/// As with CUDA.
///
/// # Errors
/// [`Error::Input`], always.
pub fn stage(_: CpuStage, _: &GpuPlacement) -> Result<Box<dyn Stage>> {
    without_cuda()
}

/// As with CUDA.
///
/// # Errors
/// [`Error::Input`], always.
pub fn timed_stage(_: StageSpec, _: usize, _: f64, _: bool) -> Result<Box<dyn Stage>> {
    without_cuda()
}

/// As with CUDA.
///
/// # Errors
/// [`Error::Input`], always.
pub fn describe(_: usize) -> Result<(String, usize)> {
    without_cuda()
}

/// The GPUs that the program could use here: none, and why.
pub fn usable() -> (usize, String) {
    (0, WITHOUT_CUDA.into())
}
