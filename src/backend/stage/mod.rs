//! A stage: one module with its optimiser and registers, on the device that computes it.
//!
//! The tick loop names what is to be done ([`Stage`]); which memory tensors lie in only a stage knows. [`CpuStage`] computes on
//! the calling thread; a GPU's ([`crate::backend::cuda`]) launches and returns.

mod cpu;
mod lent;
mod timed;

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use candle_core::Tensor;

#[cfg(feature = "cuda")]
pub(in crate::backend) use cpu::unfinished_steps;
pub use cpu::{CpuStage, EMA, Fit, with_values};
pub use lent::{Lends, Lent};
pub use timed::TimedStage;

use super::cpu::mix::Mixing;
use super::cuda;
use super::slots::{Done, Slot, SlotMut};
use crate::Result;
use crate::method::Keep;
use crate::nn::head::{HeadSpec, Labels, Score};
use crate::nn::layers::Pass;
use crate::nn::module::{Fuse, SkipInput};
use crate::nn::optim::OptimizerSpec;
use crate::nn::spec::{LayerSpec, Shape};

/// Everything a stage is made from. Shapes are `[H, W, C]` of one sample.
#[derive(Clone, Debug)]
pub struct StageSpec {
    /// The module's number, from 1.
    pub index: usize,
    /// Its layers with their places in the whole network.
    pub layers: Vec<(usize, LayerSpec)>,
    /// The main input; module 1's frame.
    pub main: Shape,
    /// The skip inputs as sent, in growing span.
    pub skips: Vec<SkipInput>,
    /// How inputs are joined.
    pub fuse: Fuse,
    /// The output.
    pub output: Shape,
    /// Whether inputs are frames, read from the host ([`Stage::set_input`]), and not messages.
    pub frames: bool,
    /// The output edges.
    pub outputs: Vec<OutputPort>,
    /// For each input edge, whether its cotangent is ever sent.
    pub returns: Vec<bool>,
    /// B, clips worked on in lock-step.
    pub batch: usize,
    /// Seed of initial values.
    pub seed: u64,
    /// The place in the whole network of the layer whose output is logits or pixels.
    pub last_layer: Option<usize>,
    /// Of how many steps in a row activations, or inputs, are held at most.
    pub kept: usize,
    /// Over how many steps in a row the sums of cotangents reach that are held at once.
    pub sums: usize,
    /// Whether inputs are kept for backward passes, which begin with the forward pass once more.
    pub recompute: bool,
    /// Training: the optimiser.
    pub optimizer: Option<OptimizerSpec>,
    /// Training: the part of itself that the moving average of the parameters keeps at an update, where there is one.
    pub ema: Option<f64>,
    /// Names of the parameters, in the whole network, that do not learn.
    pub frozen: BTreeSet<String>,
    /// Training: how sums of gradients are lent out, where they are.
    pub lends: Option<Lends>,
    /// Module D: the loss.
    pub head: Option<HeadSpec>,
    /// Whether values that are not finite are replaced by zeros (else they end the run).
    pub leave_out: bool,
}

/// An output edge.
#[derive(Clone, Copy, Debug)]
pub struct OutputPort {
    /// As sent: the output is averaged down to this height and width.
    pub shape: Shape,
    /// Whether cotangents ever come back.
    pub returns: bool,
}

impl OutputPort {
    /// Height and width as sent.
    pub fn size(&self) -> [usize; 2] {
        let [h, w, _] = self.shape;
        [h, w]
    }
}

/// A value that is not a finite number, and what it was; zeros stand in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotFinite(pub String);

/// What an update found.
#[derive(Clone, Debug, Default)]
pub struct Updated {
    /// Euclidean norm of the mean gradient, before clipping; a GPU's is known when the batch ends.
    pub grad_norm: Option<f64>,
    /// The update was not made.
    pub not_finite: Option<NotFinite>,
}

/// What a stage says when a batch ends.
#[derive(Clone, Debug, Default)]
pub struct BatchEnd {
    /// Module D: what was counted.
    pub score: Option<Score>,
    /// Module D in recognition: the clips' mean logits `[B, K]`.
    pub logits: Vec<f32>,
    /// Module D: the labels `[B]`, −1 for what does not count.
    pub labels: Vec<i32>,
    /// As in [`Updated`].
    pub grad_norm: Option<f64>,
    /// What a GPU found only now.
    pub not_finite: Vec<NotFinite>,
}

/// A module's tensors by name, as a checkpoint holds them: parameters and running statistics as they are called, the optimiser's
/// state as `optimizer.…`, moving averages as `ema.…`, an unfinished sum of gradients as `gradient.…` and `progress.steps.…`.
pub type Snapshot = Vec<(String, Tensor)>;

/// One module at work. Inputs and outputs are numbered from 0, main first, then growing span.
pub trait Stage {
    /// Begins a batch, to be trained on or not: nothing that was held is held any more. Module D gets the labels.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be copied.
    fn begin(&mut self, labels: Option<&Labels>, training: bool) -> Result<()>;

    /// Takes input `k`, `[B, H, W, C]`, from the host: module 1's frame; mixed, where a mixing is given.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if it cannot be copied, or is of another batch.
    fn set_input(&mut self, k: usize, tensor: Tensor, mixing: Option<Mixing>) -> Result<()>;

    /// Takes input `k` out of a message.
    ///
    /// # Errors
    /// [`crate::Error::Run`] on a message of another size.
    fn receive(&mut self, k: usize, message: Slot<'_>) -> Result<Done>;

    /// F(step): y = H(inputs), averaged for the output edges it will be `send` along. Of what it needs for B(step), `keep` is
    /// filed under the step.
    ///
    /// # Errors
    /// As [`crate::nn::module::Module::forward`]; [`crate::Error::Run`] where an input never came.
    fn forward(&mut self, step: usize, pass: &Pass, keep: Keep, send: &[bool]) -> Result<()>;

    /// Writes y, as output edge `k` takes it, into a message.
    ///
    /// # Errors
    /// [`crate::Error::Run`] on a message of another size.
    fn send(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done>;

    /// y, `[B, H, W, C]`, for the host. Waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is none.
    fn output(&mut self) -> Result<Tensor>;

    /// Module D: the loss of y, and where the batch is trained on its gradient as the first part of `step`'s cotangent. Future frames come with
    /// a message of [`crate::nn::head::Target`].
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`] if the stage was not made for training, [`crate::Error::Run`] without a target where one is needed.
    fn loss(&mut self, step: usize, target: Option<Slot<'_>>) -> Result<(Done, Option<NotFinite>)>;

    /// Adds the cotangent of output edge `k` out of a message to `step`'s, spread over the pixels that were averaged.
    ///
    /// # Errors
    /// [`crate::Error::Run`] on a message of another size.
    fn add_cotangent(&mut self, k: usize, step: usize, message: Slot<'_>) -> Result<(Done, Option<NotFinite>)>;

    /// B(step): one vector–Jacobian product with the step's cotangent at the activations kept of it (or made once more of its
    /// inputs), which are then forgotten. Gradients are added up; inputs' cotangents are computed where `wanted`.
    ///
    /// # Errors
    /// As [`crate::nn::module::Module::vjp`].
    fn backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()>;

    /// The same, the last one before [`Stage::lend`]: a GPU copies the last layers' sums of gradients to the host while it still computes
    /// the first ones'.
    ///
    /// # Errors
    /// As [`Stage::backward`].
    fn backward_lending(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        self.backward(step, pass, wanted)
    }

    /// Writes the cotangent of input `k` into a message.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the last backward pass did not compute it.
    fn send_cotangent(&mut self, k: usize, message: SlotMut<'_>) -> Result<Done>;

    /// Ends a tick: what no other tick needs is let go, while it is in the caches for the next module that computes there.
    fn end_tick(&mut self) {}

    /// Backward passes since the last update.
    fn steps(&self) -> u64;

    /// The sums of gradients, one parameter after another; zeros where there was none.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be copied.
    fn gradients(&mut self) -> Result<Vec<f32>>;

    /// Lends them out, on the host or on their way there, to be replaced by others. Nothing else is done with them until they are
    /// taken back.
    ///
    /// # Errors
    /// As [`Stage::gradients`]; [`crate::Error::Run`] where they are lent out, or [`StageSpec::lends`] says that they never are.
    fn lend(&mut self) -> Result<Lent>;

    /// `words` of what is lent out are what they are to be: a GPU copies them back.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be copied.
    fn put(&mut self, lent: &mut Lent, words: &Range<usize>) -> Result<()>;

    /// Takes back what was lent out, all of which was [`Stage::put`].
    ///
    /// # Errors
    /// As [`Stage::put`].
    fn take_back(&mut self, lent: Lent) -> Result<()>;

    /// Updates the parameters by the sum of gradients over `divisor`, with the learning rate times `lr_factor` and the norm of all
    /// gradients together clipped to `clip_norm`; the sums begin anew. What is not finite is not applied.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the stage was not made for training.
    fn update(&mut self, lr_factor: f64, divisor: f64, clip_norm: Option<f64>) -> Result<Updated>;

    /// Ends a batch: what was counted, and what a GPU found.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if anything launched before failed.
    fn end(&mut self) -> Result<BatchEnd>;

    /// The module as it is. Waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if it cannot be copied.
    fn snapshot(&mut self) -> Result<Snapshot>;

    /// Remembers the module as it is, to go back to it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory for it.
    fn mark(&mut self) -> Result<()>;

    /// Forgets what was remembered.
    fn unmark(&mut self);

    /// The module as it was when last remembered, if that was not forgotten. What becomes of the module itself is left open.
    ///
    /// # Errors
    /// As [`Stage::snapshot`].
    fn rewind(&mut self) -> Result<Option<Snapshot>>;

    /// Whether passes are done when their calls return, on the calling thread.
    fn is_synchronous(&self) -> bool {
        true
    }

    /// Whether passes keep the core they are called on at work.
    fn needs_core(&self) -> bool {
        true
    }

    /// Bytes of a GPU's memory that its arrays take.
    fn allocated(&self) -> Option<usize> {
        None
    }

    /// Now, by the clock of what computes: behind all that was launched.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the GPU has no clock left.
    fn clock(&mut self) -> Result<Clock> {
        Ok(Clock::Host(Instant::now()))
    }

    /// From now on notes when its passes are at work, up to `room` of them, where they are not done when their calls return.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the GPU has no more clocks, or what was launched before failed.
    fn note_passes(&mut self, _room: usize) -> Result<()> {
        Ok(())
    }

    /// Ends that: what was noted, in order. Waits until the GPU is through with it.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if it failed.
    fn noted_passes(&mut self) -> Result<Vec<DevicePass>> {
        Ok(Vec::new())
    }
}

/// What a GPU works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A forward pass.
    Forward,
    /// A loss.
    Loss,
    /// A vector–Jacobian product.
    Backward,
    /// The optimiser.
    Update,
}

/// When a GPU worked on something, by the host's clock.
#[derive(Clone, Copy, Debug)]
pub struct DevicePass {
    /// On what.
    pub work: Work,
    /// When it was asked to.
    pub launched: Instant,
    /// From when.
    pub begin: Instant,
    /// To when.
    pub end: Instant,
}

/// A moment of a stage's work.
pub enum Clock {
    /// By the host's clock.
    Host(Instant),
    /// By a GPU's.
    Device(cuda::Clock),
}

impl Clock {
    /// Seconds from `self` to a later moment. Waits until the GPU is there.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched before failed.
    pub fn until(&self, later: &Clock) -> Result<f64> {
        match (self, later) {
            (Clock::Host(a), Clock::Host(b)) => Ok((*b - *a).as_secs_f64()),
            (Clock::Device(a), Clock::Device(b)) => a.until(b),
            _ => Err(crate::Error::Run("moments by two different clocks".into())),
        }
    }
}
