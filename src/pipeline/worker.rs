//! A worker: one module of one replica, with its stage, its links, and what only its place in the pipeline asks of it.

use std::sync::Arc;
use std::time::Instant;

use super::cores::CoreUser;
use super::orders::Requests;
use super::pixels::{PixelError, Predictions};
use super::record::Tracer;
use super::role::Role;
use super::training::Training;
use crate::backend::stage::{NotFinite, Stage};
use crate::comm::{BatchId, Header, Kind, Orders, Receiver, Sender};
use crate::config::OnNonfinite;
use crate::method::Schedule;
use crate::metrics::{Phase, Stopwatch};
use crate::network::EdgeSpec;
use crate::nn::layers::Pass;
use crate::setup::validation::Validation;
use crate::{Error, Result};

/// Where in the run a worker is.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// The batch.
    pub batch: BatchId,
    /// The module's step in its clips.
    pub step: usize,
    /// The tick, from the start of training.
    pub tick: u64,
}

impl At {
    /// Where module `module` is, for messages to people.
    pub(super) fn place(&self, module: usize) -> String {
        format!("module {module}, {}, step {}, tick {}", self.batch, self.step, self.tick)
    }
}

/// An edge into the module.
pub struct InEdge {
    /// Shape and pooling.
    pub spec: EdgeSpec,
    /// Number of the link of activations.
    pub id: u32,
    /// Activations come here.
    pub activations: Receiver,
    /// Cotangents go there (absent where none is ever used).
    pub cotangents: Option<(u32, Sender)>,
    /// Time spent waiting for activations.
    pub waits: Waits,
    /// The next step's message was taken early, with these orders.
    pub taken: Option<Orders>,
}

/// An edge out of the module.
pub struct OutEdge {
    /// Shape and pooling.
    pub spec: EdgeSpec,
    /// Number of the link of activations.
    pub id: u32,
    /// Activations go there.
    pub activations: Sender,
    /// Cotangents come here (absent where none is ever used).
    pub cotangents: Option<(u32, Receiver)>,
    /// Time spent waiting for cotangents.
    pub waits: Waits,
}

impl InEdge {
    /// The header of the message that the sender sends at its step `step`.
    pub(super) fn due(&self, batch: BatchId, step: usize, clips: usize) -> Header {
        header(Kind::Activation, self.id, batch, step, clips, self.spec.shape)
    }
}

impl OutEdge {
    /// Whether the cotangent that is due next has come.
    pub(super) fn has_cotangent(&self) -> Result<bool> {
        self.cotangents.as_ref().map_or(Ok(true), |(_, receiver)| receiver.ready())
    }

    /// The error for a cotangent that is due where none ever comes.
    pub(super) fn no_cotangents(&self) -> Error {
        Error::Run(format!("{}: no cotangent comes back", self.spec.edge))
    }
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

/// What to do about values that are not finite.
pub struct NonFinite {
    policy: OnNonfinite,
    skipped: u32,
}

impl NonFinite {
    /// By `policy`; none so far.
    pub fn new(policy: OnNonfinite) -> Self {
        NonFinite { policy, skipped: 0 }
    }

    /// One that was left out: counted, or the end of the run.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where the policy is to stop.
    pub fn note(&mut self, what: NotFinite) -> Result<()> {
        match self.policy {
            OnNonfinite::Stop => Err(Error::NonFinite(what.0)),
            OnNonfinite::Skip => {
                self.skipped += 1;
                log::warn!("left out: {}", what.0);
                Ok(())
            }
        }
    }

    /// How many were left out since this was last asked.
    pub fn take(&mut self) -> u32 {
        std::mem::take(&mut self.skipped)
    }
}

/// One module of one replica at work; see `tick.rs` for what it does.
pub struct Worker {
    /// What computes. Dropped before the links: a GPU may be copying from and to their buffers.
    pub stage: Box<dyn Stage>,
    /// i, from 1.
    pub index: usize,
    /// B, clips worked on in lock-step.
    pub clips: usize,
    /// Mixed into the keys of dropout masks: seed and replica.
    pub key: u64,
    /// Who does what at which tick.
    pub schedule: Arc<Schedule>,
    /// Edges in, main first, then growing span.
    pub inputs: Vec<InEdge>,
    /// Edges out, main first, then growing span.
    pub outputs: Vec<OutEdge>,
    /// What only its place in the pipeline asks of it.
    pub role: Role,
    /// Training only.
    pub training: Option<Training>,
    /// Training: what is validated on, and when.
    pub validation: Option<Arc<Validation>>,
    /// Evaluation of future frames, module D: how far predicted pixels are from true ones.
    pub pixels: Option<PixelError>,
    /// Module D, where outputs are to be reported: those of the steps so far.
    pub predictions: Option<Predictions>,
    /// What this process was asked for.
    pub requests: Requests,
    /// The step at which the decision about a batch's end travels: the last that every module has.
    pub decision_step: usize,
    /// What was decided for the end of this batch.
    pub decision: Orders,
    /// Values that are not finite.
    pub non_finite: NonFinite,
    /// To rank 0.
    pub console: (u32, Sender),
    /// Where its time goes.
    pub watch: Stopwatch,
    /// Training: what records its time moment by moment, where that is asked for.
    pub tracer: Option<Tracer>,
    /// The cores it computes on.
    pub cores: CoreUser,
}

impl Worker {
    /// What a pass for `step` needs to know: its key depends on the run's key, batch and step alone.
    pub(super) fn pass(&self, batch: BatchId, step: usize) -> Pass {
        let words = [self.key, batch.number, step as u64];
        Pass {
            training: self.trains_on(batch),
            key: xxhash_rust::xxh3::xxh3_64(bytemuck::bytes_of(&words)),
            again: false,
        }
    }

    /// Whether a batch is there to be trained on.
    pub(super) fn trains_on(&self, batch: BatchId) -> bool {
        self.training.is_some() && batch.is_training()
    }

    /// Lets every message whose values are still being copied go on; whether none is left.
    pub(super) fn progress(&mut self) -> Result<bool> {
        progress(&mut self.inputs, &mut self.outputs)
    }

    /// The same until none is left, or what this worker waits for next is there.
    pub(super) fn progress_until(&mut self, ready: impl Fn(&Worker) -> Result<bool>) -> Result<()> {
        while !self.progress()? && !ready(self)? {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits until everything sent has left.
    pub(super) fn flush(&mut self) -> Result<()> {
        for edge in &mut self.outputs {
            edge.activations.flush()?;
        }
        for (_, sender) in self.inputs.iter_mut().filter_map(|edge| edge.cotangents.as_mut()) {
            sender.flush()?;
        }
        self.role.flush()?;
        self.console.1.flush()
    }

    /// The link that this worker waited on longest since the last report, and the seconds.
    pub(super) fn longest_wait(&mut self) -> (u32, f32) {
        let inputs = self.inputs.iter_mut().map(|edge| (edge.id, edge.waits.take()));
        let outputs = self.outputs.iter_mut().filter_map(|edge| Some((edge.cotangents.as_ref()?.0, edge.waits.take())));
        let longest = inputs.chain(outputs).max_by(|a, b| a.1.total_cmp(&b.1));
        longest.map_or((0, 0.0), |(link, seconds)| (link, seconds as f32))
    }

    /// Enters a phase and waits for a core.
    pub(super) fn acquire_core(&mut self, then: Phase) -> Option<super::cores::CoreGuard> {
        self.watch.enter(Phase::WaitCore);
        let core = self.stage.needs_core().then(|| self.cores.acquire());
        self.watch.enter(then);
        core
    }
}

/// As [`Worker::progress`], of these edges' messages.
pub(super) fn progress(inputs: &mut [InEdge], outputs: &mut [OutEdge]) -> Result<bool> {
    let mut settled = true;
    for edge in inputs {
        settled &= edge.activations.progress()?;
        if let Some((_, sender)) = &mut edge.cotangents {
            settled &= sender.progress()?;
        }
    }
    for edge in outputs {
        settled &= edge.activations.progress()?;
        if let Some((_, receiver)) = &mut edge.cotangents {
            settled &= receiver.progress()?;
        }
    }
    Ok(settled)
}

/// The header of a message of `clips` times `shape` (`[H, W, C]`) sent at step `step`.
pub(super) fn header(kind: Kind, id: u32, batch: BatchId, step: usize, clips: usize, shape: [usize; 3]) -> Header {
    let [h, w, c] = shape.map(|x| x as u32);
    Header::new(kind, id, batch, step as u32, [clips as u32, h, w, c])
}
