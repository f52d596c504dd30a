//! A stage on a GPU: copies beside computation, nothing waited for but messages.
//!
//! ```text
//! incoming:  x ─▶                 g ─▶
//! compute:      forward ─────────────── backward ────────── (update)
//! outgoing:              ─▶ y                    ─▶ cotangents
//! ```
//!
//! Calls launch and return. `ports` gets values out of and into messages, `lending` gradients to the host and back, `sums` holds cotangents,
//! `loss` is the last module's, `parameters` is what happens between batches.

mod lending;
mod loss;
mod parameters;
mod ports;
mod sums;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};

use lending::Lending;
use loss::Loss;
use ports::cast;
pub(crate) use ports::{InPort, OutPort};
use sums::Sums;

use super::event::Clock;
use super::module::{Module, Placing, Plan};
use super::optim::Optimizer;
use super::passes::Passes;
use super::{Array, Element, Gpu, ops};
use crate::backend::cpu::mix::Mixing;
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::backend::stage::{
    self, BatchEnd, CpuStage, DevicePass, Lent, NotFinite, OutputPort, Snapshot, Stage, StageSpec, Updated, Work,
    with_values,
};
use crate::backend::{GpuPlacement, Precision};
use crate::method::Keep;
use crate::nn::head::{Head, Labels, Target, Task};
use crate::nn::layers::Pass;
use crate::{Error, Result};

/// An output edge.
struct Out {
    spec: OutputPort,
    /// y averaged, and a cotangent before it is spread; absent where nothing is averaged.
    pooled: Option<[Array; 2]>,
    port: OutPort,
    cotangent: Option<InPort>,
}

/// A stage on a GPU.
pub struct CudaStage {
    gpu: Arc<Gpu>,
    spec: StageSpec,
    module: Module,
    inputs: Vec<InPort>,
    /// i32, `[B]`: with which clip each is mixed, where frames are.
    partners: InPort,
    outputs: Vec<Out>,
    /// Cotangents on their way to those who sent the inputs, one a wanted input.
    cotangents: Vec<Option<OutPort>>,
    /// A cotangent in the shape and type of y, before it is added to the sum.
    spread: Option<Array>,
    sums: Sums,
    loss: Option<Loss>,
    optimizer: Option<Optimizer>,
    /// Where sums of gradients are lent out.
    lending: Option<Lending>,
    /// Whether the present batch is trained on.
    training: bool,
    /// Backward passes since the last update.
    steps: u64,
    /// How many messages and losses were not finite in this batch.
    flags: Array,
    scratch: Array,
    /// Whether an update was launched whose outcome is not known yet.
    updated: bool,
    /// Everything that an update changes, with a copy of it; steps since the last update then, and updates.
    marked: Vec<(Array, Array)>,
    marked_steps: Option<(u64, u64)>,
    /// When it was at work, while that is asked for.
    passes: Passes,
}

impl CudaStage {
    /// Moves a stage of the host to a GPU.
    ///
    /// # Errors
    /// [`Error::Input`] if the GPU is too small for it, before anything is allocated; [`Error::Run`] if CUDA fails.
    pub fn new(mut host: CpuStage, placement: &GpuPlacement) -> Result<Self> {
        let spec = host.spec().clone();
        let gpu = Gpu::open(placement.ordinal, placement.precision == Precision::Tf32)?;
        check_memory(&gpu, &spec, placement)?;
        let element = if placement.precision == Precision::Bf16 { Element::Bf16 } else { Element::F32 };
        let wire = if placement.half_messages { Element::Bf16 } else { Element::F32 };
        let (batch, training) = (spec.batch, spec.optimizer.is_some());
        let recompute = spec.recompute && spec.kept > 1;
        let placing = Placing {
            batch,
            element,
            training,
            kept: spec.kept,
            recompute,
            lends: spec.lends.map(|lends| lends.piece),
            graphs: placement.graphs,
        };
        let StageSpec { index, main, fuse, lends, .. } = spec;
        let plan = Plan { index, layers: &spec.layers, main, skips: &spec.skips, fuse };
        let mut module = Module::new(&gpu, &plan, host.module(), placing)?;
        parameters::restore_gradients(&gpu, host.module(), &mut module)?;
        let size = |[h, w, c]: [usize; 3]| batch * h * w * c;
        let mut outputs = Vec::new();
        for &port in &spec.outputs {
            let array = || gpu.array(size(port.shape), element);
            outputs.push(Out {
                spec: port,
                pooled: if port.size() == spec.output[..2] { None } else { Some([array()?, array()?]) },
                port: OutPort::new(&gpu, size(port.shape), [element, wire])?,
                cotangent: port.returns.then(|| InPort::new(&gpu, size(port.shape), wire)).transpose()?,
            });
        }
        let several = spec.sums > 1 || outputs.len() > 1 || outputs.iter().any(|out| out.pooled.is_some());
        let shapes = std::iter::once(spec.main).chain(spec.skips.iter().map(|skip| skip.shape));
        let (mut inputs, mut cotangents) = (Vec::new(), Vec::new());
        for (k, shape) in shapes.enumerate() {
            // Frames are never rounded.
            inputs.push(InPort::new(&gpu, size(shape), if spec.frames { Element::F32 } else { wire })?);
            let returns = spec.returns.get(k).is_some_and(|&returns| returns);
            cotangents.push(returns.then(|| OutPort::new(&gpu, size(shape), [element, wire])).transpose()?);
        }
        let output = size(spec.output);
        let loss = spec.head.map(|head| Loss::new(&gpu, Head::new(head, batch), batch, output)).transpose()?;
        let largest = spec.outputs.iter().map(|port| size(port.shape)).max().unwrap_or(0).max(output);
        let scratch = ops::guard_scratch(largest).max(ops::loss_scratch(output, batch));
        let optimizer =
            host.optimizer().map(|own| Optimizer::new(&gpu, own, host.average(), &mut module)).transpose()?;
        let lending = lends.map(|lends| Lending::new(&gpu, &mut module, lends)).transpose()?;
        let stage = CudaStage {
            inputs,
            partners: InPort::new(&gpu, batch, Element::F32)?,
            outputs,
            cotangents,
            spread: (training && several).then(|| gpu.array(output, element)).transpose()?,
            sums: Sums::new(&gpu, if training { spec.sums } else { 1 }, output, element)?,
            loss,
            optimizer,
            lending,
            training: false,
            steps: host.unfinished(),
            flags: gpu.zeros(1, Element::F32)?,
            scratch: gpu.array(scratch.max(1), Element::F32)?,
            updated: false,
            marked: Vec::new(),
            marked_steps: None,
            passes: Passes::default(),
            module,
            spec,
            gpu,
        };
        say_once(format!(
            "module {} computes on GPU {} ({}) in {:?}: {} of its memory, {} predicted",
            stage.spec.index,
            placement.ordinal,
            stage.gpu.name(),
            placement.precision,
            mib(stage.gpu.allocated() as u64),
            mib(placement.needed)
        ));
        Ok(stage)
    }

    /// B(step), behind which gradients are lent out where it `lends`.
    fn launch_backward(&mut self, step: usize, pass: &Pass, wanted: &[bool], lends: bool) -> Result<()> {
        if !self.sums.end(&self.gpu, step, self.module.output_cotangent()?)? {
            return Err(Error::Run(format!("there is no cotangent of step {step}")));
        }
        if self.module.recomputes() {
            // The newest output, which may be on its way, is written over.
            self.outputs.iter().try_for_each(|out| out.port.wait(&self.gpu))?;
        }
        let wanted = if self.spec.frames { &[false][..] } else { wanted };
        self.passes.begin(&self.gpu, Work::Backward)?;
        match (&mut self.lending, lends) {
            (Some(lending), true) => {
                let gpu = &self.gpu;
                self.module.backward_in_parts(step, pass, wanted, &mut |from| lending.begin(gpu, from))?;
            }
            _ => self.module.backward(step, pass, wanted)?,
        }
        self.steps += 1;
        self.passes.end(&self.gpu)
    }

    fn y_shape(&self) -> [usize; 4] {
        let [h, w, c] = self.spec.output;
        [self.spec.batch, h, w, c]
    }
}

fn check_memory(gpu: &Gpu, spec: &StageSpec, placement: &GpuPlacement) -> Result<()> {
    let &GpuPlacement { needed, modules_on_it, .. } = placement;
    let (free, all) = gpu.memory()?;
    if needed * modules_on_it as u64 <= all as u64 && needed <= free as u64 {
        return Ok(());
    }
    Err(Error::input(format!(
        "module {} needs {} of GPU memory, and {modules_on_it} module(s) share {} of {} ({} are free): use more GPUs, a \
         smaller data.batch, more modules, or run.precision = \"bf16\"",
        spec.index,
        mib(needed),
        mib(all as u64),
        gpu.name(),
        mib(free as u64)
    )))
}

/// Logs a line, and in detail alone where this process has logged it before: a command may make its modules more than once.
fn say_once(line: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let level = match SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone()) {
        true => log::Level::Info,
        false => log::Level::Debug,
    };
    log::log!(level, "{line}");
}

fn no_lending() -> Error {
    Error::Run("this stage was made to lend no gradients out".into())
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl Stage for CudaStage {
    fn begin(&mut self, labels: Option<&Labels>, training: bool) -> Result<()> {
        self.training = training;
        self.sums.clear();
        self.use_average(!training)?;
        if let (Some(loss), Some(labels)) = (&mut self.loss, labels) {
            loss.head.begin(labels, training);
            loss.steps = 0;
            [&loss.logits, &loss.sums].into_iter().try_for_each(|array| self.gpu.zero(array))?;
            loss.set_labels(&self.gpu, &labels.own)?;
            if let (Some(partners), Some(mixed)) = (&loss.partners, &labels.mixed) {
                self.gpu.write(partners, bytemuck::cast_slice(&mixed.partners))?;
            }
        }
        Ok(())
    }

    fn set_input(&mut self, k: usize, tensor: Tensor, mixing: Option<Mixing>) -> Result<()> {
        let CudaStage { gpu, inputs, partners, module, .. } = self;
        let to = module.input(k);
        with_values(&tensor, |values| {
            let Some(mixing) = mixing else {
                return inputs[k].read_passing(gpu, values, |values| cast(gpu, values, to));
            };
            mixing.fits(tensor.dims())?;
            let words: Vec<f32> = mixing.partners.iter().map(|&n| f32::from_bits(n as u32)).collect();
            partners.read_passing(gpu, &words, |partners| {
                inputs[k].read_passing(gpu, values, |values| ops::mix(gpu, values, partners, mixing.weight, to))
            })
        })
    }

    fn receive(&mut self, k: usize, message: Slot<'_>) -> Result<Done> {
        let CudaStage { gpu, inputs, module, .. } = self;
        inputs[k].read(gpu, message, |values| cast(gpu, values, module.input(k)))
    }

    fn forward(&mut self, step: usize, pass: &Pass, _: Keep, send: &[bool]) -> Result<()> {
        self.passes.begin(&self.gpu, Work::Forward)?;
        self.module.forward(step, pass)?;
        for (out, _) in self.outputs.iter().zip(send).filter(|(_, send)| **send) {
            if let Some([pooled, _]) = &out.pooled {
                ops::adaptive_average(&self.gpu, self.y_shape(), out.spec.size(), self.module.output(), pooled)?;
            }
        }
        self.passes.end(&self.gpu)
    }

    fn send(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let Out { pooled, port, .. } = &mut self.outputs[k];
        let y = pooled.as_ref().map_or_else(|| self.module.output(), |[pooled, _]| pooled);
        port.write(&self.gpu, y, message)
    }

    fn output(&mut self) -> Result<Tensor> {
        let y = self.module.output();
        let wide = self.gpu.array(y.len(), Element::F32)?;
        cast(&self.gpu, y, &wide)?;
        Ok(Tensor::from_vec(self.gpu.download(&wide)?, &self.y_shape()[..], &Device::Cpu)?)
    }

    fn loss(&mut self, step: usize, target: Option<Slot<'_>>) -> Result<(Done, Option<NotFinite>)> {
        let CudaStage { gpu, loss, module, scratch, flags, spec, sums, training, passes, .. } = self;
        let training = *training;
        let Some(loss) = loss else { return Err(Error::Run("this module has no loss".into())) };
        passes.begin(gpu, Work::Loss)?;
        // It comes before cotangents: its sum begins with it.
        let gradient = if training { Some(sums.begin(step, module.output_cotangent()?).0) } else { None };
        let gradient = gradient.as_ref();
        let y = module.output();
        match (loss.head.spec().task, target) {
            (Task::Recognition, _) => {
                let mixed = loss.partners.as_ref().zip(loss.head.mixed().map(|mixed| mixed.weight));
                let labels = ops::Labels { own: &loss.labels, mixed, smoothing: loss.head.smoothing() };
                ops::cross_entropy(gpu, y, &labels, gradient, Some(&loss.logits), &loss.sums, scratch)?;
            }
            (Task::FutureFrames, Some(Slot::Host(message))) => {
                let (labels, frames) = Target::read(message, spec.batch)?;
                if labels != loss.head.labels() {
                    loss.set_labels(gpu, labels)?;
                }
                let Loss { labels, sums, target, head, .. } = loss;
                let Some(target) = target else { return Err(Error::Run("there is no place for a target".into())) };
                let kind = head.spec().pixel_loss;
                let launch = |values: &Array| ops::pixel(gpu, kind, y, values, labels, gradient, sums, scratch);
                target.read_passing(gpu, frames, launch)?;
            }
            (Task::FutureFrames, _) => return Err(Error::Run("a step with a loss came without its target".into())),
        }
        loss.steps += 1;
        if let (Some(gradient), true) = (gradient, spec.leave_out) {
            ops::guard(gpu, gradient, flags, scratch, true)?;
        }
        passes.end(gpu)?;
        Ok((Done::Now, None))
    }

    fn add_cotangent(&mut self, k: usize, step: usize, message: Slot<'_>) -> Result<(Done, Option<NotFinite>)> {
        let y_shape = self.y_shape();
        let CudaStage { gpu, outputs, module, spread, flags, scratch, spec, sums, .. } = self;
        let Out { spec: port, pooled, cotangent, .. } = &mut outputs[k];
        let Some(cotangent) = cotangent else { return Err(Error::Run("no cotangent was due".into())) };
        let (sum, begun) = sums.begin(step, module.output_cotangent()?);
        let target = spread.as_ref().filter(|_| begun).unwrap_or(&sum);
        let done = cotangent.read(gpu, message, |values| {
            ops::guard(gpu, values, flags, scratch, spec.leave_out)?;
            match pooled {
                Some([_, pooled]) => {
                    cast(gpu, values, pooled)?;
                    ops::adaptive_average_vjp(gpu, y_shape, port.size(), pooled, target)?;
                }
                None => cast(gpu, values, target)?,
            }
            if begun { ops::add_to(gpu, target, &sum) } else { Ok(()) }
        })?;
        Ok((done, None))
    }

    fn backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        self.launch_backward(step, pass, wanted, false)
    }

    fn backward_lending(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        self.launch_backward(step, pass, wanted, true)
    }

    fn send_cotangent(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done> {
        let Some(port) = &mut self.cotangents[k] else {
            return Err(Error::Run(format!("the cotangent of input {k} was not computed")));
        };
        port.write(&self.gpu, self.module.input_cotangent(k)?, message)
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn gradients(&mut self) -> Result<Vec<f32>> {
        self.download_gradients()
    }

    fn lend(&mut self) -> Result<Lent> {
        self.lending.as_mut().ok_or_else(no_lending)?.lend(&self.gpu)
    }

    fn put(&mut self, lent: &mut Lent, words: &Range<usize>) -> Result<()> {
        self.lending.as_mut().ok_or_else(no_lending)?.put(lent, words)
    }

    fn take_back(&mut self, lent: Lent) -> Result<()> {
        self.lending.as_mut().ok_or_else(no_lending)?.take_back(&self.gpu, lent)
    }

    fn update(&mut self, lr_factor: f64, divisor: f64, clip_norm: Option<f64>) -> Result<Updated> {
        let Some(optimizer) = &mut self.optimizer else {
            return Err(Error::Run("this stage is not for training".into()));
        };
        self.passes.begin(&self.gpu, Work::Update)?;
        optimizer.step(&self.gpu, lr_factor, divisor, clip_norm)?;
        self.passes.end(&self.gpu)?;
        (self.steps, self.updated) = (0, true);
        Ok(Updated::default())
    }

    fn end(&mut self) -> Result<BatchEnd> {
        self.tally()
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        self.download()
    }

    fn mark(&mut self) -> Result<()> {
        self.remember()
    }

    fn unmark(&mut self) {
        // The memory is kept for the next mark.
        self.marked_steps = None;
    }

    fn rewind(&mut self) -> Result<Option<Snapshot>> {
        self.go_back()
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn allocated(&self) -> Option<usize> {
        Some(self.gpu.allocated())
    }

    fn clock(&mut self) -> Result<stage::Clock> {
        Clock::now(&self.gpu).map(stage::Clock::Device)
    }

    fn note_passes(&mut self, room: usize) -> Result<()> {
        self.passes.note(&self.gpu, room)
    }

    fn noted_passes(&mut self) -> Result<Vec<DevicePass>> {
        self.passes.take()
    }
}
