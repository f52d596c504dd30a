//! A module's registers on a GPU: copies beside computation, nothing waited for but messages.
//!
//! ```text
//! incoming:  x ─▶                 g ─▶
//! compute:      forward ─────────────── backward ────────── (update)
//! outgoing:              ─▶ y                    ─▶ cotangents
//! ```
//!
//! Messages are staged in the links' own buffers, locked into memory, or put into the receiver's GPU memory (see
//! [`crate::engine::exchange`]). An activation's message starts as soon as its copy has arrived, while the backward pass runs
//! ([`Device::see_off`]).

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;
use cudarc::driver::{CudaEvent, CudaStream};

use crate::cuda::gpu::failed;
use crate::cuda::module::Module;
use crate::cuda::optim::Optimizer;
use crate::cuda::shared::Ring;
use crate::cuda::{Array, Element, Gpu, ops};
use crate::engine::head::Head;
use crate::engine::worker::Update;
use crate::kernels::Window;
use crate::model::layers::Pass;
use crate::model::module;
use crate::transport::average::ReplicaAverage;
use crate::transport::{Header, Receiver, Sender, Values};
use crate::{Error, Result};

/// What comes in messages: its place on the GPU, and when it arrived and was used.
struct Incoming {
    /// What fills the places, where MPI does. Dropped before them.
    values: Option<Values>,
    /// One place, into which messages are copied; or those into which the sender puts them, in turn.
    places: Vec<Array>,
    /// Which one came last, and messages so far.
    at: usize,
    came: usize,
    put: bool,
    /// Whether the message that came last was not given back yet (those that were put only).
    held: bool,
    /// 32-bit words of a message.
    words: u32,
    arrived: CudaEvent,
    used: CudaEvent,
    ahead: Ahead,
}

/// How far the next message is that is fetched before it is asked for; with its flags.
#[derive(Clone, Copy, Default)]
enum Ahead {
    #[default]
    Nothing,
    Copying(u32),
    Copied(u32),
}

/// A copy from the GPU to where its receiver finds it, and a message that starts when it is there.
struct Outgoing {
    /// What sends the places' values, where MPI does. Dropped before them.
    values: Option<Values>,
    /// The values as they travel, where activations are of another type.
    wire: Option<Array>,
    /// The receiver's places, or those from which MPI sends, used in turn; none: values travel in the message.
    places: Vec<Array>,
    /// Messages so far.
    sent: usize,
    /// 32-bit words of a message.
    words: u32,
    made: CudaEvent,
    arrived: CudaEvent,
    unsent: Option<Header>,
}

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
    pub optimizer: Option<&'a crate::optim::Optimizer>,
}

/// The places in GPU memory into which a link's messages are put, and what moves them there where MPI does.
pub struct Route<'a> {
    /// The places.
    pub ring: &'a Ring,
    /// What moves values.
    pub values: Option<Values>,
}

/// Routes by edge; `None` where messages are staged.
#[derive(Default)]
pub struct Routes<'a> {
    /// Activations that come, and the cotangents sent back for them.
    pub inputs: Vec<[Option<Route<'a>>; 2]>,
    /// Activations that are sent, and the cotangents that come back for them.
    pub outputs: Vec<[Option<Route<'a>>; 2]>,
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
            // Frames come from the host and are never rounded.
            let wire_in = if from_host { Element::F32 } else { wire };
            inputs.push(Incoming::new(gpu, size(shape), wire_in, there)?);
            cotangents.push(returned.then(|| Outgoing::new(gpu, size(shape), [element, wire], back)).transpose()?);
        }
        let output = size(making.output);
        let loss = match making.loss {
            None => None,
            Some(target) => Some(Loss {
                labels: gpu.zeros(batch, Element::F32)?,
                logits: gpu.zeros(if target { 0 } else { output }, Element::F32)?,
                sums: gpu.zeros(2, Element::F32)?,
                target: target.then(|| Incoming::new(gpu, output, Element::F32, None)).transpose()?,
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
        with_host_values(tensor, |values| {
            inputs[k].copy(gpu, values)?;
            inputs[k].wait()
        })?;
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

    /// Starts the messages of outputs whose copies have arrived in host memory; whether all are off. With `wait`, waits for
    /// the copies.
    ///
    /// # Errors
    /// As [`Sender::start`].
    pub fn see_off<'a>(&mut self, senders: impl Iterator<Item = &'a mut Sender>, wait: bool) -> Result<bool> {
        let mut all = true;
        for (out, sender) in self.outputs.iter_mut().zip(senders) {
            all &= out.activation.start(sender, wait)?;
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
        let Some(target) = self.loss.as_ref().and_then(|loss| loss.target.as_ref()) else { return Ok(()) };
        with_host_values(tensor, |values| {
            target.copy(&self.gpu, values)?;
            target.wait()
        })
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
    pub fn see_cotangents_off<'a>(
        &mut self,
        senders: impl Iterator<Item = Option<&'a mut Sender>>,
        wait: bool,
    ) -> Result<bool> {
        let mut all = true;
        for (outgoing, sender) in self.cotangents.iter_mut().zip(senders) {
            if let (Some(outgoing), Some(sender)) = (outgoing, sender) {
                all &= outgoing.start(sender, wait)?;
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

    /// Launches an update by the mean of the gradients, at `scale` times the learning rate.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails; [`Error::Transport`] if a replica is gone.
    pub fn update(&mut self, update: &mut Update, clip: u64, step: usize) -> Result<()> {
        if let Some(average) = &mut update.average {
            self.average_gradients(average, clip, step)?;
        }
        let Some(optimizer) = &mut self.optimizer else { return Ok(()) };
        let factor = update.schedule.factor(clip, update.total_clips);
        optimizer.step(&self.gpu, factor, update.steps as f64, update.clip_norm)?;
        update.lr = factor * update.rate;
        update.steps = 0;
        self.updated = true;
        Ok(())
    }

    /// Replaces the gradients by their mean over replicas, by way of host memory.
    fn average_gradients(&mut self, average: &mut ReplicaAverage, clip: u64, step: usize) -> Result<()> {
        let (gpu, mut all) = (&self.gpu, Vec::new());
        self.module.visit(&mut |p| {
            if let Some(grad) = &p.grad {
                all.extend(gpu.download(grad)?);
            }
            Ok(())
        })?;
        average.average(&mut all, clip, step as u32)?;
        let mut rest = all.as_slice();
        self.module.visit(&mut |p| {
            let Some(grad) = &p.grad else { return Ok(()) };
            let (own, others) = rest.split_at(grad.len());
            rest = others;
            gpu.write(grad, own)
        })
    }

    /// Waits for the clip's last launch: what the GPU has counted. The loss goes to `head`, the gradient's norm to `update`.
    /// Errors about values that are not finite are told apart by what they are about, all of them.
    ///
    /// # Errors
    /// [`Error::Run`] if anything launched before failed.
    pub fn tally(&mut self, head: Option<&mut Head>, update: Option<&mut Update>) -> Result<Vec<Error>> {
        let mut errors = Vec::new();
        let flagged = self.gpu.download(&self.flags)?[0];
        if flagged > 0.0 {
            self.gpu.zero(&self.flags)?;
            errors.push(Error::NonFinite(format!(
                "{flagged} of the cotangents and losses' gradients of this clip are not finite"
            )));
        }
        if let (Some(head), Some(loss)) = (head, &self.loss)
            && loss.steps > 0
        {
            let sums = self.gpu.download(&loss.sums)?;
            let logits = self.gpu.download(&loss.logits)?;
            let labels: Vec<i32> = self.gpu.download(&loss.labels)?.iter().map(|x| x.to_bits() as i32).collect();
            match head.count(sums[0], sums[1], &logits, &labels, loss.steps) {
                Err(e @ Error::NonFinite(_)) => errors.push(e),
                result => result?,
            }
        }
        if let (Some(optimizer), Some(update), true) = (&mut self.optimizer, update, self.updated) {
            let (norm, finite) = optimizer.outcome(&self.gpu)?;
            update.grad_norm = norm;
            if !finite {
                optimizer.undo_count();
                self.forget_gradients()?;
                errors.push(Error::NonFinite(format!(
                    "a gradient is not finite (norm {norm}): try a smaller learning rate, warm-up, or clipping"
                )));
            }
        }
        self.updated = false;
        Ok(errors)
    }

    fn forget_gradients(&mut self) -> Result<()> {
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.grad.as_ref().map_or(Ok(()), |grad| gpu.zero(grad)))
    }

    /// Copies parameters and the optimiser's memory to the host's `module` and `update`, gradients too where an update is
    /// not due yet. Waits.
    ///
    /// # Errors
    /// [`Error::Run`] if a copy fails.
    pub fn download(&mut self, module: &mut module::Module, update: Option<&mut Update>) -> Result<()> {
        let gpu = &self.gpu;
        let unfinished = update.as_ref().is_some_and(|update| update.steps > 0);
        let (mut values, mut gradients) = (HashMap::new(), HashMap::new());
        self.module.visit(&mut |p| {
            values.insert(p.name.clone(), p.read(gpu, &p.value)?);
            if let (Some(grad), true) = (&p.grad, unfinished) {
                gradients.insert(p.name.clone(), p.read(gpu, grad)?);
            }
            Ok(())
        })?;
        module.visit(&mut |p| {
            if let Some(value) = values.remove(&p.name) {
                p.value = value;
            }
            p.grad = gradients.remove(&p.name);
            Ok(())
        })?;
        if let (Some(optimizer), Some(update)) = (&self.optimizer, update) {
            let mut state = optimizer.state(gpu, &mut self.module)?;
            update.optimizer.load_state(&mut |f| module.visit(f), &mut |name| state.remove(name))?;
        }
        Ok(())
    }

    /// Remembers the module as it is, in device memory, to go back to it: nothing is waited for.
    ///
    /// # Errors
    /// [`Error::Run`] if there is no memory for it.
    pub fn mark(&mut self, steps: u64) -> Result<()> {
        let mut own = Vec::new();
        self.module.visit(&mut |p| {
            own.extend([Some(p.value.clone()), p.grad.clone()].into_iter().flatten());
            Ok(())
        })?;
        own.extend(self.optimizer.iter().flat_map(|o| o.arrays().cloned()));
        if self.marked.is_empty() {
            for array in &own {
                self.marked.push((array.clone(), self.gpu.array(array.len(), Element::F32)?));
            }
        }
        self.marked.iter().try_for_each(|(array, copy)| self.gpu.copy(array, copy))?;
        self.marked_steps = (steps, self.optimizer.as_ref().map_or(0, Optimizer::steps));
        Ok(())
    }

    /// Goes back to the module as it was at the last [`Device::mark`], whose `steps` it gives back.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn rewind(&mut self) -> Result<u64> {
        self.marked.iter().try_for_each(|(array, copy)| self.gpu.copy(copy, array))?;
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.changed(gpu))?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_steps(self.marked_steps.1);
        }
        Ok(self.marked_steps.0)
    }
}

impl Incoming {
    fn new(gpu: &Gpu, elements: usize, wire: Element, route: Option<Route>) -> Result<Self> {
        let (ring, values) = route.map_or((None, None), |route| (Some(route.ring), route.values));
        let places = match ring {
            Some(ring) => ring.arrays(elements, wire)?,
            None => vec![gpu.array(elements, wire)?],
        };
        if let Some(ring) = ring {
            gpu.count_allocated(ring.places * ring.stride);
        }
        let words = if ring.is_some() { 0 } else { places[0].bytes().div_ceil(4) as u32 };
        let (arrived, used) = (gpu.event()?, gpu.event()?);
        let put = ring.is_some();
        let incoming =
            Incoming { values, places, at: 0, came: 0, put, held: false, words, arrived, used, ahead: Ahead::Nothing };
        incoming.done(gpu)?;
        Ok(incoming)
    }

    /// The values of the message that came last.
    fn values(&self) -> &Array {
        &self.places[self.at]
    }

    /// Copies a payload behind the last use of the place; what comes next in the compute stream waits for it.
    fn copy(&self, gpu: &Gpu, payload: &[f32]) -> Result<()> {
        let place = self.values();
        if payload.len() != place.bytes().div_ceil(4) {
            return Err(Error::Run(format!("{} words came for {} bytes", payload.len(), place.bytes())));
        }
        gpu.pin(payload);
        wait(&gpu.incoming, &self.used)?;
        // SAFETY: the place is as large as the bytes, and they as the payload, which stays where it is until `wait` has
        // returned.
        unsafe {
            let bytes = std::slice::from_raw_parts(payload.as_ptr().cast::<u8>(), place.bytes());
            cudarc::driver::result::memcpy_htod_async(place.pointer(), bytes, gpu.incoming.cu_stream())
                .map_err(|e| failed("copying a message to the GPU", &e))?;
        }
        record(&self.arrived, &gpu.incoming)?;
        wait(&gpu.compute, &self.arrived)
    }

    /// Waits until the values are on the GPU.
    fn wait(&self) -> Result<()> {
        self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))
    }

    fn receive(&mut self, gpu: &Gpu, receiver: &mut Receiver, due: &Header) -> Result<u32> {
        if self.put {
            // The one before went back when its tick ended.
            let (flags, _) = receiver.wait_flagged(&due.carrying(0))?;
            if let Some(values) = &mut self.values {
                values.wait()?;
            }
            (self.at, self.came, self.held) = (self.came % self.places.len(), self.came + 1, true);
            return Ok(flags);
        }
        let ahead = std::mem::take(&mut self.ahead);
        if let Ahead::Copied(flags) = ahead {
            return Ok(flags);
        }
        let (flags, values) = receiver.wait_flagged(&due.carrying(self.words))?;
        if matches!(ahead, Ahead::Nothing) {
            self.copy(gpu, values)?;
        }
        self.wait()?;
        receiver.release()?;
        Ok(flags)
    }

    fn prefetch(&mut self, gpu: &Gpu, receiver: &mut Receiver, due: &Header) -> Result<()> {
        if self.put {
            return Ok(());
        }
        self.ahead = match self.ahead {
            Ahead::Nothing if receiver.ready()? => {
                let (flags, values) = receiver.wait_flagged(&due.carrying(self.words))?;
                self.copy(gpu, values)?;
                Ahead::Copying(flags)
            }
            Ahead::Copying(flags) if self.arrived.try_is_complete().map_err(|e| failed("asking for a copy", &e))? => {
                receiver.release()?;
                Ahead::Copied(flags)
            }
            ahead => ahead,
        };
        Ok(())
    }

    /// Gives the message back if its values were used; whether none is held.
    fn give_back(&mut self, receiver: &mut Receiver) -> Result<bool> {
        if self.held && self.used.try_is_complete().map_err(|e| failed("asking for a use", &e))? {
            self.values.as_mut().map_or(Ok(()), Values::start)?;
            receiver.release()?;
            self.held = false;
        }
        Ok(!self.held)
    }

    /// What was launched so far is the last to use the values.
    fn done(&self, gpu: &Gpu) -> Result<()> {
        record(&self.used, &gpu.compute)
    }
}

impl Outgoing {
    /// For values of the first type that travel as the second.
    fn new(gpu: &Gpu, elements: usize, [element, wire]: [Element; 2], route: Option<Route>) -> Result<Self> {
        let (ring, values) = route.map_or((None, None), |route| (Some(route.ring), route.values));
        let places = ring.map_or(Ok(Vec::new()), |ring| ring.arrays(elements, wire))?;
        let words = if ring.is_some() { 0 } else { (elements * wire.size()).div_ceil(4) as u32 };
        let wire = (element != wire).then(|| gpu.array(elements, wire)).transpose()?;
        Ok(Outgoing { values, wire, places, sent: 0, words, made: gpu.event()?, arrived: gpu.event()?, unsent: None })
    }

    /// Copies `values`, as the compute stream has made them or will, to where the receiver finds them. They may be written
    /// again when the message is off.
    fn copy(&mut self, gpu: &Gpu, values: &Array, sender: &mut Sender, header: &Header) -> Result<()> {
        let values = match &self.wire {
            Some(wire) => cast(gpu, values, wire).map(|()| wire)?,
            None => values,
        };
        // Once there is a buffer, the place that is next is free too: see `LinkSpec::in_flight`.
        let slot = sender.slot()?;
        if let Some(values) = &mut self.values {
            values.wait()?;
        }
        record(&self.made, &gpu.compute)?;
        wait(&gpu.outgoing, &self.made)?;
        if self.places.is_empty() {
            let slot = slot.get_mut(..self.words as usize).filter(|slot| size_of_val(*slot) >= values.bytes());
            let slot = slot.ok_or_else(|| Error::Run("a message is too small for its array".into()))?;
            gpu.pin(slot);
            // SAFETY: as long as the values; the link's buffer is not used before `start` has seen the copy's end, and
            // outlives it because a worker's registers are dropped before its links, and wait for the streams.
            unsafe {
                let bytes = std::slice::from_raw_parts_mut(slot.as_mut_ptr().cast::<u8>(), values.bytes());
                cudarc::driver::result::memcpy_dtoh_async(bytes, values.pointer(), gpu.outgoing.cu_stream())
            }
        } else {
            let place = &self.places[self.sent % self.places.len()];
            if place.bytes() != values.bytes() {
                return Err(Error::Run("a place for a message has another size than its array".into()));
            }
            self.sent += 1;
            // SAFETY: both have these bytes; nobody reads the place before the message tells, nor writes it before that was
            // given back.
            unsafe {
                let (to, from, bytes) = (place.pointer(), values.pointer(), values.bytes());
                cudarc::driver::result::memcpy_dtod_async(to, from, bytes, gpu.outgoing.cu_stream())
            }
        }
        .map_err(|e| failed("copying a message from the GPU", &e))?;
        record(&self.arrived, &gpu.outgoing)?;
        self.unsent = Some(header.carrying(self.words));
        Ok(())
    }

    /// Starts the message if its copy has arrived, or waits for that; whether it is off.
    fn start(&mut self, sender: &mut Sender, wait: bool) -> Result<bool> {
        let Some(header) = self.unsent else { return Ok(true) };
        if wait {
            self.arrived.synchronize().map_err(|e| failed("waiting for a copy", &e))?;
        } else if !self.arrived.try_is_complete().map_err(|e| failed("asking for a copy", &e))? {
            return Ok(false);
        }
        self.unsent = None;
        self.values.as_mut().map_or(Ok(()), Values::start)?;
        sender.start(&header).map(|()| true)
    }
}

/// Copies values into an array of the other type, or of the same.
fn cast(gpu: &Gpu, from: &Array, to: &Array) -> Result<()> {
    match (from.element(), to.element()) {
        (Element::F32, _) => ops::from_f32(gpu, from, to),
        (_, Element::F32) => ops::to_f32(gpu, from, to),
        _ => gpu.copy(from, to),
    }
}

fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).map_err(|e| failed("recording an event", &e))
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).map_err(|e| failed("ordering streams", &e))
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
