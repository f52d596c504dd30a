//! Parameters in device memory: 32-bit values and gradients, and for bfloat16 activations a copy of the values.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::gpu::{Array, Element, Gpu};
use super::ops;
use crate::nn::module::Module;
use crate::{Error, Result};

/// A parameter, or a buffer that is saved with it.
pub struct Param {
    /// Its name in the whole network.
    pub name: String,
    /// Its shape as checkpoints have it.
    pub dims: Vec<usize>,
    /// The present value. Filters are `[O, kH, kW, C/g]` here and `[O, C/g, kH, kW]` in checkpoints.
    pub value: Array,
    /// The sum of pseudo-gradients since the last update; absent for buffers and what is frozen.
    pub grad: Option<Array>,
    /// Where the gradient of a frozen bias or norm goes, which comes with what is wanted, to be forgotten.
    pub forgotten: Option<Array>,
    /// The value in the type of the activations, where that is another.
    pub rounded: Option<Array>,
    /// The gradient of one backward pass in that type, which the module adds to the sum.
    pub fresh: Option<Array>,
}

impl Param {
    /// The value in the type of the activations.
    pub fn operand(&self) -> &Array {
        self.rounded.as_ref().unwrap_or(&self.value)
    }

    /// The gradient, or where it is to be forgotten.
    ///
    /// # Errors
    /// [`Error::Run`] for a buffer.
    pub fn gradient(&self) -> Result<&Array> {
        self.grad
            .as_ref()
            .or(self.forgotten.as_ref())
            .ok_or_else(|| Error::Run(format!("{} has no gradient", self.name)))
    }

    /// Renews the rounded value, if there is one, after the value changed.
    ///
    /// # Errors
    /// [`Error::Run`] if the launch fails.
    pub fn changed(&self, gpu: &Gpu) -> Result<()> {
        self.rounded.as_ref().map_or(Ok(()), |rounded| ops::from_f32(gpu, &self.value, rounded))
    }

    /// Writes a value as checkpoints have it, of this parameter or of something with its shape, into `array`.
    ///
    /// # Errors
    /// [`Error::Run`] if the shape is another one.
    pub fn write(&self, gpu: &Gpu, tensor: &Tensor, array: &Array) -> Result<()> {
        if tensor.dims() != self.dims {
            return Err(Error::Run(format!("{} has shape {:?}, not {:?}", self.name, self.dims, tensor.dims())));
        }
        let tensor = if self.dims.len() == 4 { tensor.permute((0, 2, 3, 1))? } else { tensor.clone() };
        gpu.write(array, &tensor.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?)
    }

    /// The value of `array`, which is this parameter's or has its shape, as checkpoints have it.
    ///
    /// # Errors
    /// [`Error::Run`] if the copy fails.
    pub fn read(&self, gpu: &Gpu, array: &Array) -> Result<Tensor> {
        let values = gpu.download(array)?;
        match *self.dims.as_slice() {
            [o, c, h, w] => {
                let tensor = Tensor::from_vec(values, (o, h, w, c), &Device::Cpu)?;
                Ok(tensor.permute((0, 3, 1, 2))?.contiguous()?)
            }
            _ => Ok(Tensor::from_vec(values, self.dims.as_slice(), &Device::Cpu)?),
        }
    }
}

/// The parameters of a module of the host, to be moved to the device by name.
pub struct HostParams {
    values: HashMap<String, (Tensor, bool)>,
    element: Element,
    training: bool,
}

impl HostParams {
    /// Those of `module`, for activations of `element`; with gradients if there is `training`.
    ///
    /// # Errors
    /// None of its own.
    pub fn of(module: &mut Module, element: Element, training: bool) -> Result<Self> {
        let mut values = HashMap::new();
        module.visit(&mut |p| {
            values.insert(p.name.clone(), (p.value.clone(), p.trainable));
            Ok(())
        })?;
        Ok(HostParams { values, element, training })
    }

    /// Moves `name` to the device.
    ///
    /// # Errors
    /// [`Error::Run`] if there is no such parameter or no memory for it.
    pub fn take(&mut self, gpu: &Gpu, name: &str) -> Result<Param> {
        let mut param = self.take_buffer(gpu, name)?;
        if self.training && param.grad.is_none() {
            param.forgotten = Some(gpu.zeros(param.value.len(), Element::F32)?);
        }
        Ok(param)
    }

    /// Moves `name`, which never has a gradient, to the device.
    ///
    /// # Errors
    /// As [`HostParams::take`].
    pub fn take_buffer(&mut self, gpu: &Gpu, name: &str) -> Result<Param> {
        self.taken(gpu, name, false)
    }

    /// Moves `name`, a filter that convolutions read, to the device.
    ///
    /// # Errors
    /// As [`HostParams::take`].
    pub fn take_operand(&mut self, gpu: &Gpu, name: &str) -> Result<Param> {
        self.taken(gpu, name, self.element != Element::F32)
    }

    fn taken(&mut self, gpu: &Gpu, name: &str, rounded: bool) -> Result<Param> {
        let (value, trainable) =
            self.values.remove(name).ok_or_else(|| Error::Run(format!("there is no parameter {name}")))?;
        let (elements, learns) = (value.elem_count(), trainable && self.training);
        let param = Param {
            name: name.into(),
            dims: value.dims().to_vec(),
            value: gpu.array(elements, Element::F32)?,
            grad: learns.then(|| gpu.zeros(elements, Element::F32)).transpose()?,
            forgotten: None,
            rounded: rounded.then(|| gpu.array(elements, self.element)).transpose()?,
            fresh: (rounded && learns).then(|| gpu.array(elements, self.element)).transpose()?,
        };
        param.write(gpu, &value, &param.value)?;
        param.changed(gpu)?;
        Ok(param)
    }

    /// Whether all were taken.
    ///
    /// # Errors
    /// [`Error::Run`] naming one that was not.
    pub fn all_taken(&self) -> Result<()> {
        self.values.keys().next().map_or(Ok(()), |name| Err(Error::Run(format!("{name} was not moved to the GPU"))))
    }
}
