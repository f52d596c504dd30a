//! An exponential moving average of parameters: often a better network than the parameters of any one update.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Visit;
use crate::Result;
use crate::backend::cpu::{Host, Real, by_dtype, overwritten, tensor, vectorized};
use crate::nn::param::Param;

/// The moving average of everything in a module that learns; buffers and frozen parameters have none.
pub struct Average {
    decay: f64,
    values: BTreeMap<String, Tensor>,
}

impl Average {
    /// One that begins at the present values and keeps the part `decay`, between 0 and 1, of itself at every update.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn new(decay: f64, visit: Visit) -> Result<Self> {
        let mut average = Average { decay, values: BTreeMap::new() };
        average.load(visit, &mut |_| None)?;
        Ok(average)
    }

    /// The part of itself that it keeps at an update.
    pub fn decay(&self) -> f64 {
        self.decay
    }

    /// Takes in the parameters' present values: `average = decay average + (1 - decay) value`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] for parameters in other memory than the host's.
    pub fn update(&mut self, visit: Visit) -> Result<()> {
        visit(&mut |p| {
            // What was lent to a checkpoint keeps its values: a new tensor takes the place.
            if let Some(average) = self.values.get_mut(&p.name) {
                *average = by_dtype!(p.value, T => blended::<T>(self.decay, average, &p.value))?;
            }
            Ok(())
        })
    }

    /// Parameters and averages change places, for evaluation in the midst of training; and back.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn swap(&mut self, visit: Visit) -> Result<()> {
        visit(&mut |p| {
            if let Some(average) = self.values.get_mut(&p.name) {
                std::mem::swap(average, &mut p.value);
            }
            Ok(())
        })
    }

    /// The averages by the parameters' names.
    pub fn values(&self) -> &BTreeMap<String, Tensor> {
        &self.values
    }

    /// Goes on from what `get` finds for a parameter's name, of its shape; where it finds none, from the present value.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn load(&mut self, visit: Visit, get: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<()> {
        self.values.clear();
        visit(&mut |p: &mut Param| {
            if p.trainable {
                let found = get(&p.name).filter(|found| found.dims() == p.value.dims());
                let value = found.map_or_else(|| Ok(p.value.clone()), |found| found.to_dtype(p.value.dtype()))?;
                self.values.insert(p.name.clone(), value);
            }
            Ok(())
        })
    }
}

fn blended<T: Real>(decay: f64, average: &Tensor, value: &Tensor) -> Result<Tensor> {
    let (average, value) = (average.contiguous()?, value.contiguous()?);
    let mut new = overwritten::<T>(value.elem_count());
    let (keep, take) = (T::of(decay), T::of(1.0 - decay));
    let (old, present) = (Host::of(&average)?, Host::of(&value)?);
    let (old, present) = (old.slice::<T>()?, present.slice::<T>()?);
    vectorized(
        #[inline(always)]
        || new.iter_mut().zip(old).zip(present).for_each(|((new, &old), &value)| *new = keep * old + take * value),
    );
    tensor(new, value.dims())
}
