//! Updates of all parameters of a module at once: one launch for gradients that come in another type, two for the norm of all,
//! one for the step.
//!
//! The step reads the norm in device memory, so the host waits for nothing. Learning rate and step count are arguments:
//! not for a graph.

use super::{Argument, Array, Element, Gpu, arguments, failed, launch, require, signed};
use crate::nn::optim::OptimizerSpec;
use crate::{Error, Result};

/// Elements of a block, as in optimizer.cu.
const PIECE: usize = 4096;

/// One parameter's arrays.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// The value, floats.
    pub value: &'a Array,
    /// The sum of gradients since the last step, floats; a step clears it.
    pub gradient: &'a Array,
    /// The buffers of the optimiser's rule in the order of their names (momentum; mean, square; square, momentum), floats,
    /// zeros at first.
    pub buffers: &'a [&'a Array],
    /// A copy of the value in bfloat16 that a step brings up to date.
    pub rounded: Option<&'a Array>,
    /// Whether weight decay applies to it.
    pub decays: bool,
    /// Its moving average, floats; all parameters have one, or none.
    pub average: Option<&'a Array>,
}

/// All parameters of a module, as one step updates them. Their arrays must outlive it: it keeps their addresses.
#[derive(Debug)]
pub struct Parameters {
    table: Array,
    pieces: Array,
    squares: Array,
    state: Array,
    blocks: usize,
    buffers: usize,
    averaged: bool,
}

impl Parameters {
    /// Tables in device memory for `parameters` under rule `spec`. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if an array's size does not fit its parameter, buffers are not those of the rule, or memory is short.
    pub fn new(gpu: &Gpu, spec: &OptimizerSpec, parameters: &[Parameter]) -> Result<Parameters> {
        let (mut table, mut pieces) = (Vec::new(), Vec::new());
        let buffers = spec.buffers().len();
        for (i, p) in parameters.iter().enumerate() {
            let n = p.value.len();
            if p.buffers.len() != buffers {
                let found = p.buffers.len();
                return Err(Error::Run(format!("parameter {i} has {found} buffers, and its optimiser {buffers}")));
            }
            for array in [p.value, p.gradient].into_iter().chain(p.buffers.iter().copied()) {
                require(&format!("an array of parameter {i}"), array, n, Element::F32)?;
            }
            if let Some(average) = p.average {
                require(&format!("the average of parameter {i}"), average, n, Element::F32)?;
            }
            if let Some(rounded) = p.rounded {
                require(&format!("the copy of parameter {i}"), rounded, n, Element::Bf16)?;
            }
            let buffer = |k: usize| p.buffers.get(k).map_or(0, |b| b.pointer());
            let rounded = p.rounded.map_or(0, Array::pointer);
            let (decays, average) = (u64::from(p.decays), p.average.map_or(0, Array::pointer));
            table.extend([
                p.value.pointer(),
                p.gradient.pointer(),
                buffer(0),
                buffer(1),
                rounded,
                n as u64,
                decays,
                average,
            ]);
            pieces.extend((0..n).step_by(PIECE).flat_map(|start| [i as u64, start as u64]));
        }
        let blocks = pieces.len() / 2;
        Ok(Parameters {
            table: words(gpu, &table)?,
            pieces: words(gpu, &pieces)?,
            squares: gpu.zeros(2 * blocks.max(1), Element::F32)?,
            state: gpu.zeros(4, Element::F32)?,
            blocks,
            buffers,
            averaged: !parameters.is_empty() && parameters.iter().all(|p| p.average.is_some()),
        })
    }

    /// Takes the Euclidean norm of all gradients over `divisor` (the number of steps summed in them) and, with `clip_norm`,
    /// by how much they must shrink to have at most that norm, for the step that follows.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn norm(&self, gpu: &Gpu, divisor: f64, clip_norm: Option<f64>) -> Result<()> {
        let arguments = arguments![&self.table, &self.pieces, &self.squares];
        launch(gpu, "gradient_squares", Element::F32, [self.blocks, 1, 1], arguments)?;
        // 0: no clipping. A norm to clip to is above 0.
        let clip = clip_norm.unwrap_or(0.0);
        let arguments = arguments![&self.squares, signed(self.blocks)?, divisor, clip, &self.state];
        launch(gpu, "gradient_norm", Element::F32, [1, 1, 1], arguments)
    }

    /// What [`Parameters::norm`] found, four floats in device memory: the norm; the factor for the gradients; 1 where the
    /// norm is finite, else 0; nothing.
    pub fn state(&self) -> &Array {
        &self.state
    }

    /// Updates every value, its buffers and rounded copy by the rule `spec`, and clears the gradients, after
    /// [`Parameters::norm`]; where that found the norm not finite, changes nothing at all. `scale` multiplies the learning
    /// rate; `steps` counts this step too, from 1.
    ///
    /// # Errors
    /// [`Error::Run`] if the rule has other buffers than that of [`Parameters::new`] or a launch fails.
    pub fn step(&self, gpu: &Gpu, spec: &OptimizerSpec, scale: f64, steps: u64) -> Result<()> {
        if spec.buffers().len() != self.buffers {
            return Err(Error::Run(format!("{spec:?} has other buffers than the optimiser's tables were made for")));
        }
        let lr = spec.lr() * scale;
        let mut arguments: Vec<Argument> = arguments![&self.table, &self.pieces, &self.state].to_vec();
        let name = match *spec {
            OptimizerSpec::Sgd { momentum, weight_decay, nesterov, .. } => {
                arguments.extend_from_slice(arguments![lr as f32, momentum as f32, weight_decay as f32, nesterov]);
                "sgd"
            }
            OptimizerSpec::Adamw { betas, eps, weight_decay, .. } => {
                let count = steps as f64;
                let size = lr / (1.0 - betas[0].powf(count));
                let root = (1.0 - betas[1].powf(count)).sqrt();
                let shrink = 1.0 - lr * weight_decay;
                let rates = betas.map(|b| [b, 1.0 - b]);
                let values = [size, root, shrink, eps].into_iter().chain(rates.into_iter().flatten());
                arguments.extend(values.map(|v| Argument::from(v as f32)));
                "adamw"
            }
            OptimizerSpec::Rmsprop { alpha, eps, momentum, weight_decay, .. } => {
                let values = [lr, alpha, 1.0 - alpha, eps, momentum, weight_decay];
                arguments.extend(values.map(|v| Argument::from(v as f32)));
                "rmsprop"
            }
        };
        // Compiled for bfloat16: the type of rounded copies.
        launch(gpu, name, Element::Bf16, [self.blocks, 1, 1], &arguments)
    }
}

impl Parameters {
    /// After [`Parameters::step`]: `average = decay average + (1 - decay) value` for every parameter, if that step was made.
    ///
    /// # Errors
    /// [`Error::Run`] if a parameter has no average, or the launch fails.
    pub fn average(&self, gpu: &Gpu, decay: f64) -> Result<()> {
        if !self.averaged {
            return Err(Error::Run("a moving average of parameters that have none".into()));
        }
        let (keep, part) = (decay as f32, (1.0 - decay) as f32);
        let arguments = arguments![&self.table, &self.pieces, &self.state, keep, part];
        launch(gpu, "moving_average", Element::F32, [self.blocks, 1, 1], arguments)
    }
}

/// Gradients in the type of activations, on their way into sums of 32-bit floats, all at once. Their arrays must outlive it: it
/// keeps their addresses.
#[derive(Debug)]
pub struct Accumulation {
    table: Array,
    pieces: Array,
    blocks: usize,
    element: Element,
}

impl Accumulation {
    /// Tables in device memory for pairs of what comes, all of one type, and the sum it is added to. Not for use in a tick.
    ///
    /// # Errors
    /// [`Error::Run`] if sizes or types do not fit, or memory is short.
    pub fn new(gpu: &Gpu, pairs: &[(Array, Array)]) -> Result<Accumulation> {
        let (mut table, mut pieces) = (Vec::new(), Vec::new());
        let element = pairs.first().map_or(Element::F32, |(x, _)| x.element());
        for (i, (x, sum)) in pairs.iter().enumerate() {
            require("a gradient", x, sum.len(), element)?;
            require("a sum of gradients", sum, sum.len(), Element::F32)?;
            table.extend([x.pointer(), sum.pointer(), x.len() as u64]);
            pieces.extend((0..x.len()).step_by(PIECE).flat_map(|start| [i as u64, start as u64]));
        }
        let blocks = pieces.len() / 2;
        Ok(Accumulation { table: words(gpu, &table)?, pieces: words(gpu, &pieces)?, blocks, element })
    }

    /// `sum += x` for every pair.
    ///
    /// # Errors
    /// [`Error::Run`] if the launch fails.
    pub fn launch(&self, gpu: &Gpu) -> Result<()> {
        launch(gpu, "accumulate", self.element, [self.blocks, 1, 1], arguments![&self.table, &self.pieces])
    }
}

/// 64-bit words in device memory.
fn words(gpu: &Gpu, words: &[u64]) -> Result<Array> {
    let array = gpu.zeros(2 * words.len().max(1), Element::F32)?;
    // SAFETY: the array is as long as the words, which outlive the wait below.
    unsafe { cudarc::driver::result::memcpy_htod_async(array.pointer(), words, gpu.compute.cu_stream()) }
        .map_err(|e| failed("copying to the GPU", &e))?;
    gpu.synchronize()?;
    Ok(array)
}
