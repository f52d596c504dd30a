//! The optimiser on the device: the rules of [`crate::nn::optim`], their memory beside the parameters.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::gpu::{Array, Element, Gpu};
use super::module::Module;
use super::ops::{Parameter, Parameters};
use crate::Result;
use crate::nn::optim::{self, Average, OptimizerSpec};

/// What is remembered of one parameter.
struct Memory {
    name: String,
    buffers: Vec<Array>,
    /// The parameter's moving average.
    average: Option<Array>,
}

/// An update rule with its memory, for the parameters of one module.
pub struct Optimizer {
    spec: OptimizerSpec,
    memory: Vec<Memory>,
    parameters: Parameters,
    /// Steps made, the same for all parameters.
    steps: u64,
    /// What moving averages keep of themselves.
    decay: Option<f64>,
    /// Whether parameters and their averages have changed places.
    averaged: bool,
    /// For that, as large as the largest parameter; made when first needed.
    aside: Option<Array>,
}

impl Optimizer {
    /// One for `module` that remembers what the host's does, with the moving `average` of the parameters, if there is one.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(gpu: &Gpu, host: &optim::Optimizer, average: Option<&Average>, module: &mut Module) -> Result<Self> {
        let spec = host.spec();
        let state: HashMap<String, Tensor> = host.state()?.into_iter().collect();
        let (mut memory, mut arrays, mut steps) = (Vec::new(), Vec::new(), 0u64);
        module.visit(&mut |p| {
            let Some(gradient) = p.grad.clone() else { return Ok(()) };
            let mut buffers = Vec::new();
            for buffer in spec.buffers() {
                let array = gpu.zeros(p.value.len(), Element::F32)?;
                if let Some(tensor) = state.get(&format!("{}.{buffer}", p.name)) {
                    p.write(gpu, tensor, &array)?;
                }
                buffers.push(array);
            }
            if let Some(count) = state.get(&format!("{}.step", p.name)) {
                steps = steps.max(count.to_vec1::<f64>()?.first().copied().unwrap_or(0.0) as u64);
            }
            arrays.push((p.value.clone(), gradient, p.rounded.clone(), spec.decays(p.dims.len())));
            let moved = |average: &Average| -> Result<Array> {
                let array = gpu.array(p.value.len(), Element::F32)?;
                match average.values().get(&p.name) {
                    Some(value) => p.write(gpu, value, &array)?,
                    None => gpu.copy(&p.value, &array)?,
                }
                Ok(array)
            };
            memory.push(Memory { name: p.name.clone(), buffers, average: average.map(moved).transpose()? });
            Ok(())
        })?;
        let buffers: Vec<Vec<&Array>> = memory.iter().map(|m| m.buffers.iter().collect()).collect();
        let parameters: Vec<Parameter> = arrays
            .iter()
            .zip(&buffers)
            .zip(&memory)
            .map(|(((value, gradient, rounded, decays), buffers), memory)| Parameter {
                value,
                gradient,
                buffers,
                rounded: rounded.as_ref(),
                decays: *decays,
                average: memory.average.as_ref(),
            })
            .collect();
        let parameters = Parameters::new(gpu, &spec, &parameters)?;
        Ok(Optimizer {
            spec,
            memory,
            parameters,
            steps,
            decay: average.map(Average::decay),
            averaged: false,
            aside: None,
        })
    }

    /// Launches an update of every parameter by its gradient over `divisor`, and clears the gradients; nothing changes where
    /// their norm is not finite. `scale` multiplies the learning rate.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if a launch fails.
    pub fn step(&mut self, gpu: &Gpu, scale: f64, divisor: f64, clip_norm: Option<f64>) -> Result<()> {
        self.steps += 1;
        if self.memory.is_empty() {
            return Ok(());
        }
        self.parameters.norm(gpu, divisor, clip_norm)?;
        self.parameters.step(gpu, &self.spec, scale, self.steps)?;
        self.decay.map_or(Ok(()), |decay| self.parameters.average(gpu, decay))
    }

    /// The norm of the last update's gradient, and whether it was finite; waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the copy fails.
    pub fn outcome(&self, gpu: &Gpu) -> Result<(f64, bool)> {
        if self.memory.is_empty() {
            return Ok((0.0, true));
        }
        let state = gpu.download(self.parameters.state())?;
        Ok((f64::from(state[0]), state[2] != 0.0))
    }

    /// An update was not made after all.
    pub fn undo_count(&mut self) {
        self.steps = self.steps.saturating_sub(1);
    }

    /// Everything remembered, as [`optim::Optimizer::state`] says it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if a copy fails.
    pub fn state(&self, gpu: &Gpu, module: &mut Module) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        if self.steps == 0 {
            return Ok(state);
        }
        let mut memory = self.memory.iter();
        module.visit(&mut |p| {
            if p.grad.is_none() {
                return Ok(());
            }
            let Some(Memory { name, buffers, .. }) = memory.next() else { return Ok(()) };
            state.insert(format!("{name}.step"), Tensor::from_vec(vec![self.steps as f64], 1, &Device::Cpu)?);
            for (buffer, array) in self.spec.buffers().into_iter().zip(buffers) {
                state.insert(format!("{name}.{buffer}"), p.read(gpu, array)?);
            }
            Ok(())
        })?;
        Ok(state)
    }

    /// The moving averages by the parameters' names, as [`Average::values`] has them.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if a copy fails.
    pub fn averages(&self, gpu: &Gpu, module: &mut Module) -> Result<Vec<(String, Tensor)>> {
        let (mut averages, mut memory) = (Vec::new(), self.memory.iter());
        module.visit(&mut |p| {
            if p.grad.is_some()
                && let Some(Memory { name, average: Some(average), .. }) = memory.next()
            {
                averages.push((name.clone(), p.read(gpu, average)?));
            }
            Ok(())
        })?;
        Ok(averages)
    }

    /// Lets parameters and moving averages, if there are any, change places, or back.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory, or a copy fails.
    pub fn use_average(&mut self, gpu: &Gpu, module: &mut Module, averaged: bool) -> Result<()> {
        if self.averaged == averaged || self.decay.is_none() {
            return Ok(());
        }
        let largest = self.memory.iter().filter_map(|m| m.average.as_ref()).map(Array::len).max().unwrap_or(0);
        let aside = match &self.aside {
            Some(aside) => aside.clone(),
            None => self.aside.insert(gpu.array(largest, Element::F32)?).clone(),
        };
        let mut memory = self.memory.iter();
        module.visit(&mut |p| {
            if p.grad.is_some()
                && let Some(Memory { average: Some(average), .. }) = memory.next()
            {
                let aside = aside.first(p.value.len())?;
                gpu.copy(&p.value, &aside)?;
                gpu.copy(average, &p.value)?;
                gpu.copy(&aside, average)?;
                p.changed(gpu)?;
            }
            Ok(())
        })?;
        self.averaged = averaged;
        Ok(())
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes back to a count of steps, with the buffers as they were then.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The arrays of its memory, moving averages among them.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.memory.iter().flat_map(|m| m.buffers.iter().chain(&m.average))
    }
}
