//! One module of one replica with everything it works on: parameters, schedule, links, frames, loss, optimiser.

use std::time::Instant;

use candle_core::{Device, Tensor};

use super::compute::Compute;
use super::head::Head;
use super::stop::{Decider, Requests};
use super::turns::Seat;
use crate::comm::all_reduce::ReplicaAverage;
use crate::comm::{Header, Kind, Receiver, Sender};
use crate::config::{OnNonfinite, UpdateEvery};
use crate::data::loader::FrameStream;
use crate::method::schedule::StepPlan;
use crate::network::EdgeSpec;
use crate::nn::layers::Pass;
use crate::nn::module::Module;
use crate::nn::optim::{LrSchedule, Optimizer};
use crate::pipeline::metrics::Stopwatch;
use crate::trainer::state::Saver;
use crate::{Error, Result};

/// Where in the run a worker is.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Batch of clips, from the start of training.
    pub clip: u64,
    /// The module's step in the clip.
    pub step: usize,
    /// The tick, from the start of training.
    pub tick: u64,
}

/// An edge into the module.
pub struct InEdge {
    /// Shape and pooling.
    pub spec: EdgeSpec,
    /// Link number of its activations.
    pub id: u32,
    /// Activations come here.
    pub activations: Receiver,
    /// Cotangents go there (absent where none is ever used).
    pub cotangents: Option<(u32, Sender)>,
    /// Time spent waiting for activations.
    pub waits: Waits,
}

/// An edge out of the module.
pub struct OutEdge {
    /// Shape and pooling.
    pub spec: EdgeSpec,
    /// Link number of its activations.
    pub id: u32,
    /// Activations go there.
    pub activations: Sender,
    /// Cotangents come here (absent where none is ever used).
    pub cotangents: Option<(u32, Receiver)>,
    /// Time spent waiting for cotangents.
    pub waits: Waits,
}

/// Time spent waiting on one link since the last report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waits(f64);

impl Waits {
    /// Counts the time that `f` takes.
    pub fn time<T>(&mut self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = f();
        self.0 += start.elapsed().as_secs_f64();
        result
    }

    /// The seconds counted, which starts anew.
    pub fn take(&mut self) -> f64 {
        std::mem::take(&mut self.0)
    }
}

/// Module 1's frames, and what it passes on to module D.
pub struct Source {
    /// The clips.
    pub stream: FrameStream,
    /// Labels or targets go there; absent if this worker is module D too.
    pub truth: Option<(u32, Sender)>,
    /// How many frames after a step's own its target is; `None` in recognition.
    pub ahead: Option<usize>,
    /// At which steps module D has a loss.
    pub loss_steps: Vec<bool>,
    /// `[H, W, C]` of a frame.
    pub shape: [usize; 3],
}

impl Source {
    /// The frame that is the target of `step`, if module D has a loss there that needs one.
    pub fn target_of(&self, step: usize) -> Option<usize> {
        let due = self.loss_steps.get(step).copied().unwrap_or(false);
        self.ahead.filter(|_| due).map(|ahead| step + ahead)
    }
}

/// Module D's loss, and where its labels or targets come from.
pub struct LossEnd {
    /// The loss.
    pub head: Head,
    /// Labels or targets come here; absent if this worker is module 1 too.
    pub truth: Option<(u32, Receiver)>,
    /// `[H, W, C]` of the output, and of a target frame.
    pub shape: [usize; 3],
    /// Evaluation: how many clips there are in all; the last batch is padded behind them.
    pub clips: Option<usize>,
}

impl LossEnd {
    /// Batch `clip` in place of labels, where none are sent: 0 for a clip, −1 for padding.
    pub fn present(&self, clip: u64, batch: usize) -> Vec<i32> {
        let first = clip as usize * batch;
        (first..first + batch).map(|n| if self.clips.is_some_and(|clips| n >= clips) { -1 } else { 0 }).collect()
    }
}

/// How parameters change.
pub struct Update {
    /// The learning rate before the schedule.
    pub rate: f64,
    /// The optimiser with its state.
    pub optimizer: Optimizer,
    /// Learning rate over the run.
    pub schedule: LrSchedule,
    /// Batches of clips in the whole run, for the schedule.
    pub total_clips: u64,
    /// When.
    pub every: UpdateEvery,
    /// Largest Euclidean norm of a module's gradient.
    pub clip_norm: Option<f64>,
    /// Averaging with the module's replicas.
    pub average: Option<ReplicaAverage>,
    /// Steps with backward work since the last update (n of the mean).
    pub steps: u64,
    /// Norm of the last update's gradient, for the report.
    pub grad_norm: f64,
    /// Learning rate of the last update, for the report.
    pub lr: f64,
}

/// One module of one replica at work; see [`super::tick`] for what it does.
pub struct Worker {
    /// i, from 1.
    pub index: usize,
    /// Clips in a batch.
    pub batch: usize,
    /// Mixed into the keys of dropout masks: seed and replica.
    pub key: u64,
    /// What to do at each step.
    pub plan: Vec<StepPlan>,
    /// Layers and parameters; those of a GPU's module as they are between clips where somebody asks for them.
    pub module: Module,
    /// Inputs, output and cotangents, and what computes on them.
    pub compute: Compute,
    /// Edges in, main first, then growing span.
    pub inputs: Vec<InEdge>,
    /// Edges out, main first, then growing span.
    pub outputs: Vec<OutEdge>,
    /// Module 1 only.
    pub source: Option<Source>,
    /// Module D only.
    pub loss: Option<LossEnd>,
    /// Training only.
    pub update: Option<Update>,
    /// Training, replica 0 only.
    pub saver: Option<Saver>,
    /// Training, module 1 of replica 0 only: why this clip's frames cannot be read. The rest of it is worked through
    /// without frames, so that all modules are told in time, and undone.
    pub failure: Option<String>,
    /// What this process was asked for.
    pub requests: Requests,
    /// Training, module 1 only: its part in deciding what to do after a clip.
    pub decider: Option<Decider>,
    /// The step at which the decision travels: the last that every module has.
    pub decision_step: usize,
    /// What was decided for the end of this clip (bits of [`super::stop`]).
    pub decision: u32,
    /// Whether something that is not a finite number stops the run or is left out.
    pub on_nonfinite: OnNonfinite,
    /// Losses, cotangents and updates left out in this clip because they were not finite.
    pub skipped: u64,
    /// To rank 0.
    pub console: (u32, Sender),
    /// Reports carry logits (evaluation).
    pub report_logits: bool,
    /// Time account.
    pub watch: Stopwatch,
    /// When it may compute.
    pub seat: Seat,
}

impl Worker {
    /// What a pass of the module needs to know at `at`.
    pub fn pass(&self, at: At) -> Pass {
        pass(self.update.is_some(), self.key, at.clip, at.step)
    }
}

/// The error for something that holds values which are not finite numbers.
pub fn not_finite(what: &str) -> Error {
    Error::NonFinite(format!("{what} is not finite"))
}

/// What to do about a value that is not finite: `error` where that stops the run, else `instead`, counted in `skipped`.
///
/// # Errors
/// `error`, or that of `instead`.
pub fn left_out<T>(
    policy: OnNonfinite,
    skipped: &mut u64,
    error: Error,
    instead: impl FnOnce() -> Result<T>,
) -> Result<T> {
    match policy {
        OnNonfinite::Stop => Err(error),
        OnNonfinite::Skip => {
            *skipped += 1;
            log::warn!("left out: {error}");
            instead()
        }
    }
}

/// A pass whose key depends on the run's key, clip and step alone.
pub fn pass(training: bool, key: u64, clip: u64, step: usize) -> Pass {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    bytes[8..16].copy_from_slice(&clip.to_le_bytes());
    bytes[16..].copy_from_slice(&(step as u64).to_le_bytes());
    Pass { training, key: xxhash_rust::xxh3::xxh3_64(&bytes) }
}

/// The header of a message of `shape` (`[B, H, W, C]`) sent at step `step`.
pub fn header(kind: Kind, id: u32, clip: u64, step: usize, batch: usize, shape: [usize; 3]) -> Header {
    let [h, w, c] = shape.map(|x| x as u32);
    Header::new(kind, id, clip, step as u32, [batch as u32, h, w, c])
}

/// Sends a tensor's elements in row-major order.
pub fn send(sender: &mut Sender, header: &Header, tensor: &Tensor) -> Result<()> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => {
            let all = storage.as_slice::<f32>()?;
            let start = layout.start_offset();
            sender.send(header, &all[start..start + layout.shape().elem_count()])
        }
        _ => Err(Error::Run("a tensor to be sent is not in host memory".into())),
    }
}

/// Waits for a message and makes its payload a tensor `[B, H, W, C]`, with the header's flags; the buffer is given back at
/// once.
pub fn receive(receiver: &mut Receiver, header: &Header) -> Result<(Tensor, u32)> {
    let shape: Vec<usize> = header.shape.iter().map(|&x| x as usize).collect();
    let (flags, payload) = receiver.wait_flagged(header)?;
    let tensor = Tensor::from_slice(payload, shape, &Device::Cpu)?;
    receiver.release()?;
    Ok((tensor, flags))
}
