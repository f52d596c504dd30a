//! A stage in host memory, computed by the calling thread.

mod saved;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
pub(in crate::backend) use saved::unfinished_steps;
pub use saved::{EMA, Fit};

use super::{BatchEnd, Lent, NotFinite, Snapshot, Stage, StageSpec, Updated};
use crate::backend::cpu::activation;
use crate::backend::cpu::mix::{Mixing, mix};
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::method::Keep;
use crate::nn::head::{Head, Labels, Target};
use crate::nn::layers::{Pass, Tape};
use crate::nn::module::{Module, pool_for_edge, pool_for_edge_vjp};
use crate::nn::optim::{Average, Optimizer};
use crate::nn::param::Init;
use crate::nn::spec::Shape;
use crate::{Error, Result};

/// What is kept of a step's forward pass.
enum Kept {
    Activations(Tape),
    Inputs(Vec<Tensor>),
}

/// See the room's page.
pub struct CpuStage {
    spec: StageSpec,
    module: Module,
    optimizer: Option<Optimizer>,
    average: Option<Average>,
    head: Option<Head>,
    /// Whether the present batch is trained on.
    training: bool,
    /// Whether parameters and their averages have changed places: in validation.
    averaged: bool,
    /// The newest message of each input, held past the end of its sender's clip; or the frame.
    inputs: Vec<Option<Tensor>>,
    /// H(a), and what of it each output edge takes.
    y: Option<Tensor>,
    outputs: Vec<Option<Tensor>>,
    /// What is kept of forward passes, by step.
    kept: Vec<(usize, Kept)>,
    /// Sums of the cotangents that have come, by step.
    sums: Vec<(usize, Tensor)>,
    /// Of each input, as the last backward pass gave it.
    cotangents: Vec<Option<Tensor>>,
    /// Backward passes since the last update.
    steps: u64,
    /// The module as it was at the last mark. Values are replaced and not changed, so until an update replaces them this takes
    /// no memory.
    marked: Option<Snapshot>,
}

impl CpuStage {
    /// A stage with its initial parameters.
    ///
    /// # Errors
    /// As [`Module::new`].
    pub fn new(spec: StageSpec) -> Result<Self> {
        let init = Init { seed: spec.seed, dtype: DType::F32, device: Device::Cpu, last_layer: spec.last_layer };
        let mut module = Module::new(spec.index, &spec.layers, spec.main, &spec.skips, spec.fuse, &init)?;
        module.freeze(&|name| spec.frozen.contains(name))?;
        let average = spec.ema.map(|decay| Average::new(decay, &mut |f| module.visit(f))).transpose()?;
        let inputs = 1 + spec.skips.len();
        Ok(CpuStage {
            module,
            optimizer: spec.optimizer.map(Optimizer::new),
            average,
            head: spec.head.map(|head| Head::new(head, spec.batch)),
            training: false,
            averaged: false,
            inputs: vec![None; inputs],
            y: None,
            outputs: vec![None; spec.outputs.len()],
            kept: Vec::new(),
            sums: Vec::new(),
            cotangents: Vec::new(),
            steps: 0,
            marked: None,
            spec,
        })
    }

    /// What it was made from.
    pub fn spec(&self) -> &StageSpec {
        &self.spec
    }

    /// Its module.
    pub fn module(&mut self) -> &mut Module {
        &mut self.module
    }

    /// Its optimiser, in training.
    pub fn optimizer(&self) -> Option<&Optimizer> {
        self.optimizer.as_ref()
    }

    /// The moving average of its parameters, if it keeps one.
    pub fn average(&self) -> Option<&Average> {
        self.average.as_ref()
    }

    /// The backward passes since the last update that a checkpoint told of.
    pub fn unfinished(&self) -> u64 {
        self.steps
    }

    /// How many tensors wait for messages, passes and sums to come: inputs, outputs, steps kept, sums of cotangents.
    pub fn held(&self) -> usize {
        let registers = self.inputs.iter().chain(&self.outputs).chain(&self.cotangents).chain([&self.y]);
        registers.flatten().count() + self.kept.len() + self.sums.len()
    }

    fn tensor(&self, values: &[f32], [h, w, c]: Shape) -> Result<Tensor> {
        let shape = (self.spec.batch, h, w, c);
        if values.len() != shape.0 * h * w * c {
            return Err(Error::Run(format!("a message of {} words for a tensor of {shape:?}", values.len())));
        }
        Ok(Tensor::from_slice(values, shape, &Device::Cpu)?)
    }

    fn y(&self) -> Result<&Tensor> {
        self.y.as_ref().ok_or_else(|| Error::Run("there is no output yet".into()))
    }

    fn add_to_sum(&mut self, step: usize, cotangent: Tensor) -> Result<()> {
        match self.sums.iter_mut().find(|(of, _)| *of == step) {
            Some((_, sum)) => *sum = activation::add(sum, &cotangent)?,
            None => self.sums.push((step, cotangent)),
        }
        Ok(())
    }
}

/// Removes what is filed under `step`.
fn take<T>(filed: &mut Vec<(usize, T)>, step: usize) -> Option<T> {
    let place = filed.iter().position(|(of, _)| *of == step)?;
    Some(filed.swap_remove(place).1)
}

/// The values of a message in host memory.
fn host<'a>(message: Slot<'a>) -> Result<&'a [f32]> {
    match message {
        Slot::Host(values) => Ok(values),
        Slot::Device(_) => Err(Error::Run("a message in GPU memory came to a stage in host memory".into())),
    }
}

/// Copies a tensor's elements, in row-major order, into a message.
fn copy_into(tensor: &Tensor, message: SlotMut<'_>) -> Result<Done> {
    let SlotMut::Host(words) = message else {
        return Err(Error::Run("a stage in host memory cannot write into GPU memory".into()));
    };
    with_values(tensor, |values| {
        let room = words.get_mut(..values.len());
        room.ok_or_else(|| Error::Run(format!("a message is too small for {} words", values.len())))?
            .copy_from_slice(values);
        Ok(Done::Now)
    })
}

/// Calls `f` with the elements of a tensor in host memory, in row-major order.
///
/// # Errors
/// Those of `f`; [`Error::Run`] for a tensor elsewhere.
pub fn with_values<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => {
            let start = layout.start_offset();
            f(&storage.as_slice::<f32>()?[start..start + layout.shape().elem_count()])
        }
        _ => Err(Error::Run("a tensor is not in host memory".into())),
    }
}

impl Stage for CpuStage {
    fn begin(&mut self, labels: Option<&Labels>, training: bool) -> Result<()> {
        self.training = training;
        self.use_average(!training && self.optimizer.is_some())?;
        self.inputs.fill(None);
        self.kept.clear();
        self.sums.clear();
        if let (Some(head), Some(labels)) = (&mut self.head, labels) {
            head.begin(labels, training);
        }
        Ok(())
    }

    fn set_input(&mut self, k: usize, tensor: Tensor, mixing: Option<Mixing>) -> Result<()> {
        self.inputs[k] = Some(mixing.map_or(Ok(tensor.clone()), |mixing| mix(&tensor, &mixing))?);
        Ok(())
    }

    fn receive(&mut self, k: usize, message: Slot<'_>) -> Result<Done> {
        // The one before makes room for it.
        self.inputs[k] = None;
        let shape = k.checked_sub(1).map_or(self.spec.main, |skip| self.spec.skips[skip].shape);
        self.inputs[k] = Some(self.tensor(host(message)?, shape)?);
        Ok(Done::Now)
    }

    fn forward(&mut self, step: usize, pass: &Pass, keep: Keep, send: &[bool]) -> Result<()> {
        let missing = || Error::Run("an input is missing: nothing came that could be held".into());
        let inputs = self.inputs.iter().map(|held| held.clone().ok_or_else(missing)).collect::<Result<Vec<_>>>()?;
        if self.spec.frames {
            // A frame is never held.
            self.inputs.fill(None);
        }
        let mut tape = if keep == Keep::Activations { Tape::new() } else { Tape::blank() };
        let y = self.module.forward(&inputs, pass, &mut tape)?;
        for ((port, output), _) in self.spec.outputs.iter().zip(&mut self.outputs).zip(send).filter(|(_, send)| **send)
        {
            *output = Some(pool_for_edge(&y, port.size())?);
        }
        match keep {
            Keep::Nothing => {}
            Keep::Activations => self.kept.push((step, Kept::Activations(tape))),
            Keep::Inputs => self.kept.push((step, Kept::Inputs(inputs))),
        }
        self.y = Some(y);
        Ok(())
    }

    fn send(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let output = self.outputs[k].take();
        copy_into(&output.ok_or_else(|| Error::Run(format!("output {k} was not made to be sent")))?, message)
    }

    fn output(&mut self) -> Result<Tensor> {
        self.y().cloned()
    }

    fn loss(&mut self, step: usize, target: Option<Slot<'_>>) -> Result<(Done, Option<NotFinite>)> {
        let y = self.y()?.clone();
        let Some(head) = &mut self.head else { return Err(Error::Run("this module has no loss".into())) };
        let target = match target {
            Some(message) => {
                let (labels, frames) = Target::read(host(message)?, self.spec.batch)?;
                head.set_labels(labels);
                Some(frames)
            }
            None => None,
        };
        let (gradient, not_finite) = match head.loss(&y, target) {
            Err(Error::NonFinite(text)) if self.optimizer.is_some() => (y.zeros_like()?, Some(NotFinite(text))),
            gradient => (gradient?, None),
        };
        if self.training {
            self.add_to_sum(step, gradient)?;
        }
        Ok((Done::Now, not_finite))
    }

    fn add_cotangent(&mut self, k: usize, step: usize, message: Slot<'_>) -> Result<(Done, Option<NotFinite>)> {
        let port = self.spec.outputs[k];
        let mut cotangent = self.tensor(host(message)?, port.shape)?;
        let mut not_finite = None;
        if !activation::all_finite(&cotangent)? {
            not_finite = Some(NotFinite("a cotangent is not finite".into()));
            cotangent = cotangent.zeros_like()?;
        }
        let [h, w, _] = self.spec.output;
        self.add_to_sum(step, pool_for_edge_vjp(&cotangent, [h, w])?)?;
        Ok((Done::Now, not_finite))
    }

    fn backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        let missing = |what: &str| Error::Run(format!("there is no {what} of step {step}"));
        let g = take(&mut self.sums, step).ok_or_else(|| missing("cotangent"))?;
        let mut tape = match take(&mut self.kept, step).ok_or_else(|| missing("activation"))? {
            Kept::Activations(tape) => tape,
            Kept::Inputs(inputs) => {
                let mut tape = Tape::new();
                self.module.forward(&inputs, &Pass { again: true, ..*pass }, &mut tape)?;
                tape
            }
        };
        // Frames need no gradient.
        let wanted = if self.spec.frames { &[false][..] } else { wanted };
        self.cotangents = self.module.vjp(&g, pass, &mut tape, wanted)?;
        self.steps += 1;
        Ok(())
    }

    fn send_cotangent(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let cotangent = self.cotangents.get_mut(k).and_then(Option::take);
        copy_into(
            &cotangent.ok_or_else(|| Error::Run(format!("the cotangent of input {k} was not computed")))?,
            message,
        )
    }

    fn end_tick(&mut self) {
        (self.y, self.cotangents) = (None, Vec::new());
        self.outputs.fill(None);
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn gradients(&mut self) -> Result<Vec<f32>> {
        let mut all: Vec<f32> = Vec::new();
        self.module.visit(&mut |p| match &p.grad {
            _ if !p.trainable => Ok(()),
            Some(grad) => with_values(grad, |values| {
                all.extend_from_slice(values);
                Ok(())
            }),
            None => {
                all.resize(all.len() + p.value.elem_count(), 0.0);
                Ok(())
            }
        })?;
        Ok(all)
    }

    fn lend(&mut self) -> Result<Lent> {
        self.gradients().map(Lent::new)
    }

    fn put(&mut self, _: &mut Lent, _: &Range<usize>) -> Result<()> {
        Ok(())
    }

    fn take_back(&mut self, lent: Lent) -> Result<()> {
        let values = lent.into_values();
        let mut rest = &values[..];
        self.module.visit(&mut |p| {
            if p.trainable {
                let split = rest.split_at_checked(p.value.elem_count());
                let (own, others) = split.ok_or_else(|| Error::Run("too few gradients".into()))?;
                p.grad = Some(Tensor::from_slice(own, p.value.shape(), &Device::Cpu)?);
                rest = others;
            }
            Ok(())
        })
    }

    fn update(&mut self, lr_factor: f64, divisor: f64, clip_norm: Option<f64>) -> Result<Updated> {
        // Nothing of the batch is needed any more.
        (self.y, self.cotangents) = (None, Vec::new());
        let CpuStage { module, optimizer, average, .. } = self;
        let Some(optimizer) = optimizer else { return Err(Error::Run("this stage is not for training".into())) };
        match optimizer.step(&mut |f| module.visit(f), lr_factor, divisor, clip_norm) {
            Err(Error::NonFinite(text)) => {
                self.forget_gradients()?;
                Ok(Updated { not_finite: Some(NotFinite(text)), grad_norm: None })
            }
            stats => {
                let grad_norm = Some(stats?.grad_norm);
                if let Some(average) = average {
                    average.update(&mut |f| module.visit(f))?;
                }
                self.steps = 0;
                Ok(Updated { grad_norm, not_finite: None })
            }
        }
    }

    fn end(&mut self) -> Result<BatchEnd> {
        // What is held belongs to the clips.
        self.inputs.fill(None);
        Ok(match &mut self.head {
            Some(head) => BatchEnd {
                score: Some(head.end()),
                logits: head.logits().to_vec(),
                labels: head.labels().to_vec(),
                ..BatchEnd::default()
            },
            None => BatchEnd::default(),
        })
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        self.saved()
    }

    fn mark(&mut self) -> Result<()> {
        self.marked = Some(self.snapshot()?);
        Ok(())
    }

    fn unmark(&mut self) {
        self.marked = None;
    }

    fn rewind(&mut self) -> Result<Option<Snapshot>> {
        Ok(self.marked.take())
    }
}
