//! A module's registers on a GPU: copies beside computation, nothing waited for but messages.
//!
//! ```text
//! incoming:  x ─▶                 g ─▶
//! compute:      forward ─────────────── backward ────────── (update)
//! outgoing:              ─▶ y                    ─▶ cotangents
//! ```
//!
//! An activation's message starts as soon as its copy has arrived, while the backward pass runs ([`Device::see_off`]). `copies`
//! gets values from and into messages, `parameters` is what happens between clips.

mod copies;
mod parameters;

use std::sync::Arc;

use candle_core::Tensor;

use copies::cast;
pub(crate) use copies::{Incoming, Outgoing};
pub use copies::{Route, Routes};

use crate::backend::cpu::Window;
use crate::backend::cuda::module::Module;
use crate::backend::cuda::optim::Optimizer;
use crate::backend::cuda::{Array, Element, Gpu, ops};
use crate::comm::{Header, Receiver, Sender, Values};
use crate::nn::layers::Pass;
use crate::nn::module;
use crate::pipeline::head::Head;
use crate::{Error, Result};

/// An edge out.
struct Out {
    /// y averaged, and a cotangent before it is spread; absent where nothing is averaged.
    pooled: Option<[Array; 2]>,
    activation: Outgoing,
    cotangent: Option<Incoming>,
}

/// What the loss works on.
pub struct Loss {
    /// i32, `[B]`.
    labels: Array,
    /// Sums over the clip's steps: logits `[B, K]` in recognition, else empty.
    logits: Array,
    /// Sum of losses weighted by clips, and the weights.
    sums: Array,
    target: Option<Incoming>,
    steps: usize,
}

/// A module's registers on a GPU.
pub struct Device {
    gpu: Arc<Gpu>,
    module: Module,
    inputs: Vec<Incoming>,
    outputs: Vec<Out>,
    /// Cotangents on their way to those who sent the inputs, one a wanted input.
    cotangents: Vec<Option<Outgoing>>,
    wanted: Vec<bool>,
    /// A cotangent in the shape and type of y, before it is added to the sum.
    spread: Option<Array>,
    /// The edge out whose cotangent came last, and whether g holds something.
    came: Option<usize>,
    summed: bool,
    loss: Option<Loss>,
    optimizer: Option<Optimizer>,
    /// How many messages and losses were not finite in this clip.
    flags: Array,
    scratch: Array,
    leaves_out: bool,
    /// Whether an update was launched whose outcome is not known yet.
    updated: bool,
    /// Everything that an update changes, with a copy of it; steps since the last update then, and updates.
    marked: Vec<(Array, Array)>,
    marked_steps: (u64, u64),
    /// B, and `[H, W, C]` of the output.
    batch: usize,
    output: [usize; 3],
}

/// What a device is made for.
pub struct Making<'a> {
    /// The edges out: whole factors of averaging, `[H, W, C]` as sent, whether cotangents come back.
    pub outputs: Vec<((usize, usize), [usize; 3], bool)>,
    /// For each input, whether its cotangent is ever sent.
    pub returned: Vec<bool>,
    /// `[H, W, C]` of each input as sent; module 1's frame.
    pub inputs: Vec<[usize; 3]>,
    /// `[H, W, C]` of the output.
    pub output: [usize; 3],
    /// B
    pub batch: usize,
    /// The type of activations.
    pub element: Element,
    /// The type of activations and cotangents in messages.
    pub wire: Element,
    /// Where messages are put.
    pub routes: Routes<'a>,
    /// Module D: whether target frames are needed.
    pub loss: Option<bool>,
    /// Whether what is not finite is left out.
    pub leaves_out: bool,
    /// In training, the optimiser with its state.
    pub optimizer: Option<&'a crate::nn::optim::Optimizer>,
}

impl Device {
    /// Registers for `module`.
    ///
    /// # Errors
    /// [`Error::Run`] if the GPU has no memory for them.
    pub fn new(gpu: &Arc<Gpu>, mut module: Module, making: Making) -> Result<Self> {
        let Making { batch, element, wire, .. } = making;
        let Routes { inputs: mut routes_in, outputs: mut routes_out } = making.routes;
        let from_host = routes_in.is_empty();
        let size = |[h, w, c]: [usize; 3]| batch * h * w * c;
        let training = making.optimizer.is_some();
        let mut outputs = Vec::new();
        for (k, &(factors, shape, returns)) in making.outputs.iter().enumerate() {
            let [there, back] = routes_out.get_mut(k).map(std::mem::take).unwrap_or_default();
            let pooled = match factors {
                (1, 1) => None,
                _ => Some([gpu.array(size(shape), element)?, gpu.array(size(shape), element)?]),
            };
            outputs.push(Out {
                pooled,
                activation: Outgoing::new(gpu, size(shape), [element, wire], there)?,
                cotangent: returns.then(|| Incoming::new(gpu, size(shape), wire, back)).transpose()?,
            });
        }
        let several = outputs.len() > 1 || outputs.iter().any(|out| out.pooled.is_some());
        let mut cotangents = Vec::new();
        let mut inputs = Vec::new();
        for (k, (&returned, &shape)) in making.returned.iter().zip(&making.inputs).enumerate() {
            let [there, back] = routes_in.get_mut(k).map(std::mem::take).unwrap_or_default();
            inputs.push(match from_host {
                // Never rounded.
                true => Incoming::of_frames(gpu, size(shape))?,
                false => Incoming::new(gpu, size(shape), wire, there)?,
            });
            cotangents.push(returned.then(|| Outgoing::new(gpu, size(shape), [element, wire], back)).transpose()?);
        }
        let output = size(making.output);
        let loss = match making.loss {
            None => None,
            Some(target) => Some(Loss {
                labels: gpu.zeros(batch, Element::F32)?,
                logits: gpu.zeros(if target { 0 } else { output }, Element::F32)?,
                sums: gpu.zeros(2, Element::F32)?,
                target: target.then(|| Incoming::of_frames(gpu, output)).transpose()?,
                steps: 0,
            }),
        };
        let largest = making.outputs.iter().map(|&(_, shape, _)| size(shape)).max().unwrap_or(0).max(output);
        let scratch = ops::guard_scratch(largest).max(ops::loss_scratch(output, batch));
        let optimizer = making.optimizer.map(|host| Optimizer::new(gpu, host, &mut module)).transpose()?;
        Ok(Device {
            inputs,
            outputs,
            wanted: vec![false; making.inputs.len()],
            cotangents,
            spread: (training && several).then(|| gpu.array(output, element)).transpose()?,
            came: None,
            summed: false,
            loss,
            optimizer,
            flags: gpu.zeros(1, Element::F32)?,
            scratch: gpu.array(scratch.max(1), Element::F32)?,
            leaves_out: making.leaves_out,
            updated: false,
            marked: Vec::new(),
            marked_steps: (0, 0),
            batch,
            output: making.output,
            module,
            gpu: gpu.clone(),
        })
    }

    pub(super) fn begin(&mut self) {
        self.summed = false;
    }

    pub(super) fn set_labels(&mut self, labels: &[i32]) -> Result<()> {
        let Some(loss) = &mut self.loss else { return Ok(()) };
        loss.steps = 0;
        [&loss.logits, &loss.sums].into_iter().try_for_each(|array| self.gpu.zero(array))?;
        let bits: Vec<f32> = labels.iter().map(|&label| f32::from_bits(label as u32)).collect();
        self.gpu.write(&loss.labels, &bits)
    }

    pub(super) fn set_input(&mut self, k: usize, tensor: &Tensor) -> Result<()> {
        let Device { gpu, inputs, module, .. } = self;
        with_host_values(tensor, |values| inputs[k].copy(gpu, values))?;
        cast(gpu, inputs[k].values(), module.input(k))?;
        inputs[k].done(gpu)
    }

    pub(super) fn receive_input(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        let (gpu, incoming) = (&self.gpu, &mut self.inputs[k]);
        let flags = incoming.receive(gpu, receiver, due)?;
        cast(gpu, incoming.values(), self.module.input(k))?;
        incoming.done(gpu)?;
        Ok(flags)
    }

    pub(super) fn forward(&mut self, _: &mut module::Module, pass: &Pass) -> Result<()> {
        self.module.forward(pass)
    }

    pub(super) fn pool(&mut self, k: usize, factors: (usize, usize)) -> Result<()> {
        match &self.outputs[k].pooled {
            Some([pooled, _]) => {
                ops::average_pool(&self.gpu, self.y_shape(), &edge_window(factors), self.module.output(), pooled)
            }
            None => Ok(()),
        }
    }

    pub(super) fn send_output(&mut self, k: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        let out = &mut self.outputs[k];
        let y = out.pooled.as_ref().map_or_else(|| self.module.output(), |[pooled, _]| pooled);
        out.activation.copy(&self.gpu, y, sender, header)
    }

    /// Starts the messages of outputs whose copies have arrived; whether all are off.
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn see_off<'a>(&mut self, senders: impl Iterator<Item = &'a mut Sender>) -> Result<bool> {
        let mut all = true;
        for (out, sender) in self.outputs.iter_mut().zip(senders) {
            all &= out.activation.start(sender)?;
        }
        Ok(all)
    }

    pub(super) fn receive_cotangent(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        let Some(incoming) = &mut self.outputs[k].cotangent else {
            return Err(Error::Run("no cotangent was due".into()));
        };
        let flags = incoming.receive(&self.gpu, receiver, due)?;
        self.came = Some(k);
        Ok(flags)
    }

    fn y_shape(&self) -> [usize; 4] {
        let [h, w, c] = self.output;
        [self.batch, h, w, c]
    }

    fn came(&self) -> Result<(usize, &Incoming)> {
        let k = self.came.ok_or_else(|| Error::Run("no cotangent came".into()))?;
        let incoming = self.outputs[k].cotangent.as_ref();
        incoming.map(|incoming| (k, incoming)).ok_or_else(|| Error::Run("no cotangent was due".into()))
    }

    pub(super) fn guard_cotangent(&mut self) -> Result<()> {
        let (_, incoming) = self.came()?;
        ops::guard(&self.gpu, incoming.values(), &self.flags, &self.scratch, self.leaves_out)
    }

    pub(super) fn add_cotangent(&mut self, factors: (usize, usize)) -> Result<()> {
        let (k, incoming) = self.came()?;
        let (gpu, gy) = (&self.gpu, self.module.output_cotangent()?);
        let target = match &self.spread {
            Some(spread) if self.summed => spread,
            _ => gy,
        };
        match &self.outputs[k].pooled {
            Some([_, pooled]) => {
                cast(gpu, incoming.values(), pooled)?;
                ops::average_pool_vjp(gpu, self.y_shape(), &edge_window(factors), pooled, target)?;
            }
            None => cast(gpu, incoming.values(), target)?,
        }
        incoming.done(gpu)?;
        if self.summed {
            ops::add_to(gpu, target, gy)?;
        }
        self.summed = true;
        Ok(())
    }

    pub(super) fn has_sum(&self) -> bool {
        self.summed
    }

    pub(super) fn set_target(&mut self, tensor: &Tensor) -> Result<()> {
        let Some(target) = self.loss.as_mut().and_then(|loss| loss.target.as_mut()) else { return Ok(()) };
        with_host_values(tensor, |values| target.copy(&self.gpu, values))
    }

    pub(super) fn receive_target(&mut self, receiver: &mut Receiver, due: &Header) -> Result<()> {
        let Some(target) = self.loss.as_mut().and_then(|loss| loss.target.as_mut()) else { return Ok(()) };
        target.receive(&self.gpu, receiver, due).map(|_| ())
    }

    pub(super) fn loss(&mut self, head: &mut Head, training: bool) -> Result<()> {
        let gpu = &self.gpu;
        let Some(loss) = &mut self.loss else { return Err(Error::Run("no loss here".into())) };
        let gradient = if training { Some(self.module.output_cotangent()?) } else { None };
        let (y, labels, sums, scratch) = (self.module.output(), &loss.labels, &loss.sums, &self.scratch);
        match (head.frame_loss(), &loss.target) {
            (Some(kind), Some(target)) => {
                ops::pixel(gpu, kind, y, target.values(), labels, gradient, sums, scratch)?;
                target.done(gpu)?;
            }
            (Some(_), None) => return Err(Error::Run("a step with a loss came without its target".into())),
            (None, _) => ops::cross_entropy(gpu, y, labels, gradient, Some(&loss.logits), sums, scratch)?,
        }
        loss.steps += 1;
        if let (Some(gradient), true) = (gradient, self.leaves_out) {
            ops::guard(gpu, gradient, &self.flags, scratch, true)?;
        }
        self.summed = training;
        Ok(())
    }

    pub(super) fn vjp(&mut self, _: &mut module::Module, _: &Pass, wanted: &[bool]) -> Result<()> {
        self.wanted.copy_from_slice(wanted);
        self.module.backward(wanted)
    }

    pub(super) fn send_cotangent(&mut self, k: usize, sender: &mut Sender, header: &Header) -> Result<()> {
        match self.cotangents.get_mut(k).and_then(Option::as_mut) {
            Some(outgoing) if self.wanted[k] => {
                outgoing.copy(&self.gpu, self.module.input_cotangent(k)?, sender, header)
            }
            _ => Ok(()),
        }
    }

    /// Starts the messages of cotangents, as [`Device::see_off`] those of outputs.
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn see_cotangents_off<'a>(&mut self, senders: impl Iterator<Item = Option<&'a mut Sender>>) -> Result<bool> {
        let mut all = true;
        for (outgoing, sender) in self.cotangents.iter_mut().zip(senders) {
            if let (Some(outgoing), Some(sender)) = (outgoing, sender) {
                all &= outgoing.start(sender)?;
            }
        }
        Ok(all)
    }

    pub(super) fn end_tick(&mut self) {
        (self.summed, self.came) = (false, None);
    }

    /// Waits until all values that MPI sends have left.
    ///
    /// # Errors
    /// As [`Values::flush`].
    pub fn flush(&mut self) -> Result<()> {
        let activations = self.outputs.iter_mut().map(|out| &mut out.activation);
        let all = activations.chain(self.cotangents.iter_mut().flatten());
        all.filter_map(|outgoing| outgoing.values.as_mut()).try_for_each(Values::flush)
    }

    /// Gives the buffers of messages back whose values were put into this GPU's memory and have been used since; whether none
    /// is left. `receivers`: those of inputs, then those of the outputs' cotangents.
    ///
    /// # Errors
    /// [`Error::Run`] if CUDA fails; [`Error::Transport`] as in [`Receiver::release`].
    pub fn give_back<'a>(
        &mut self,
        inputs: impl Iterator<Item = &'a mut Receiver>,
        cotangents: impl Iterator<Item = Option<&'a mut Receiver>>,
    ) -> Result<bool> {
        let mut all = true;
        for (incoming, receiver) in self.inputs.iter_mut().zip(inputs) {
            all &= incoming.give_back(receiver)?;
        }
        for (out, receiver) in self.outputs.iter_mut().zip(cotangents) {
            if let (Some(incoming), Some(receiver)) = (&mut out.cotangent, receiver) {
                all &= incoming.give_back(receiver)?;
            }
        }
        Ok(all)
    }

    /// Starts the copy of input `k`, if its message is there; the message's buffer is given back when the copy has arrived.
    ///
    /// # Errors
    /// [`Error::Transport`] if the message is not the one that is `due` next.
    pub fn prefetch(&mut self, k: usize, receiver: &mut Receiver, due: &Header) -> Result<()> {
        self.inputs[k].prefetch(&self.gpu, receiver, due)
    }
}

fn edge_window((fh, fw): (usize, usize)) -> Window {
    Window { kernel: [fh, fw], stride: [fh, fw], padding: [0, 0] }
}

/// Calls `f` with the elements of a tensor in host memory.
fn with_host_values(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<()>) -> Result<()> {
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
