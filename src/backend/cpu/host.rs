//! Tensors seen as slices of host memory, and back.

use std::cell::Cell;
use std::ops::Deref;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Shape, Storage, Tensor};

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

/// A vector of `n` elements of no particular value: for output that is written in full before it is read. Where each
/// call would clear its output first, cheap kernels would take half as long again.
pub(crate) fn overwritten<T: Real>(n: usize) -> Vec<T> {
    let memory = Box::<[T]>::new_uninit_slice(n);
    // SAFETY: `Real` is f32 or f64, of which every bit pattern is a value; callers write every element before they
    // read it.
    unsafe { memory.assume_init() }.into_vec()
}

/// As [`overwritten`], of bytes.
pub(crate) fn overwritten_bytes(n: usize) -> Vec<u8> {
    let memory = Box::<[u8]>::new_uninit_slice(n);
    // SAFETY: every bit pattern is a byte; callers write every one before they read it.
    unsafe { memory.assume_init() }.into_vec()
}

/// Changes a contiguous CPU tensor's elements in place. Whoever shares the tensor sees the change.
pub(crate) fn update<T: Real>(tensor: &Tensor, f: impl Fn(&mut [T])) -> Result<()> {
    struct Update<F, T>(F, std::marker::PhantomData<fn(T)>);
    impl<T: Real, F: Fn(&mut [T])> InplaceOp1 for Update<F, T> {
        fn name(&self) -> &'static str {
            "update"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (start, end) =
                layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op: "update" })?;
            let wrong = || candle_core::Error::Msg("a tensor was updated as one of another type".into());
            (self.0)(&mut T::stored(storage).ok_or_else(wrong)?[start..end]);
            Ok(())
        }
    }
    Ok(tensor.inplace_op1(&Update(f, std::marker::PhantomData::<fn(T)>))?)
}

/// [`update`] of several tensors at once; no two of them share memory.
pub(crate) fn update_together<T: Real>(tensors: &[&Tensor], f: &mut dyn FnMut(&mut [&mut [T]])) -> Result<()> {
    fn descend<T: Real>(
        tensors: &[&Tensor],
        mut held: Vec<&mut [T]>,
        f: &mut dyn FnMut(&mut [&mut [T]]),
    ) -> Result<()> {
        let Some((first, others)) = tensors.split_first() else {
            f(&mut held);
            return Ok(());
        };
        let (job, result) = (Cell::new(Some((held, f))), Cell::new(Ok(())));
        update::<T>(first, |slice| {
            if let Some((mut held, f)) = job.take() {
                held.push(slice);
                result.set(descend(others, held, f));
            }
        })?;
        result.into_inner()
    }
    descend(tensors, Vec::with_capacity(tensors.len()), f)
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
