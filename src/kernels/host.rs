//! Tensors seen as slices of host memory, and back.

use std::ops::Deref;

use candle_core::{Device, Shape, Storage, Tensor};

use super::Real;
use crate::{Error, Result};

/// A read lock on a contiguous CPU tensor. Keep it alive for as long as the slice is used.
pub(crate) struct Host<G> {
    guard: G,
    start: usize,
    end: usize,
}

impl Host<()> {
    /// Locks `tensor`, which must be contiguous (call [`Tensor::contiguous`] first where it may not be).
    pub(crate) fn of(tensor: &Tensor) -> Result<Host<impl Deref<Target = Storage> + '_>> {
        let (guard, layout) = tensor.storage_and_layout();
        let (start, end) = layout.contiguous_offsets().ok_or_else(|| {
            Error::Run(format!("a kernel was given a tensor of shape {:?} that is not contiguous", tensor.shape()))
        })?;
        Ok(Host { guard, start, end })
    }
}

impl<G: Deref<Target = Storage>> Host<G> {
    /// The elements, row-major.
    pub(crate) fn slice<T: candle_core::WithDType>(&self) -> Result<&[T]> {
        match &*self.guard {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<T>()?[self.start..self.end]),
            _ => Err(Error::Run(
                "this kernel has no implementation for the tensor's device yet: use device = \"cpu\"".into(),
            )),
        }
    }
}

/// A CPU tensor that owns `data`.
pub(crate) fn tensor<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// Evaluates an expression with `$T` standing for the element type of tensor `$t`.
macro_rules! by_dtype {
    ($t:expr, $T:ident => $body:expr) => {
        match $t.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::Error::Run(format!(
                "the CPU kernels compute in f32 or f64, not {other:?}: use precision = \"f32\""
            ))),
        }
    };
}
pub(crate) use by_dtype;
