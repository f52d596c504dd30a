//! The two element types the CPU kernels are written for.

use std::iter::Sum;
use std::ops::Neg;

use candle_core::{CpuStorage, WithDType};

/// A 32- or 64-bit float, with the few functions the kernels need.
pub trait Real: WithDType + Neg<Output = Self> + Sum {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The nearest value to `v`.
    fn of(v: f64) -> Self;
    /// Square root.
    fn root(self) -> Self;
    /// e to this power.
    fn exponential(self) -> Self;
    /// The error function, to the type's precision.
    fn error_function(self) -> Self;
    /// The elements in a tensor's storage, if they are of this type.
    fn stored(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// The same slice if the type is f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// As [`Real::as_f32`], to be written.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn of(v: f64) -> Self {
        v as Self
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn exponential(self) -> Self {
        self.exp()
    }
    fn error_function(self) -> Self {
        libm::erff(self)
    }
    fn stored(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(values) = storage { Some(values) } else { None }
    }
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn of(v: f64) -> Self {
        v as Self
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn exponential(self) -> Self {
        self.exp()
    }
    fn error_function(self) -> Self {
        libm::erf(self)
    }
    fn stored(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(values) = storage { Some(values) } else { None }
    }
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}
