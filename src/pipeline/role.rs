//! What only some modules have: the first one frames, the last one the loss, and a link between them.

use candle_core::{DType, Device, Tensor};

use super::orders::Decider;
use super::worker::header;
use crate::backend::stage::with_values;
use crate::comm::{Header, Kind, Receiver, Sender};
use crate::data::{Frames, Mixture, Mixup};
use crate::nn::head::{Labels, Target};
use crate::nn::loss::Mixed;
use crate::nn::spec::Shape;
use crate::{Error, Result};

/// A worker's place in the pipeline.
pub enum Role {
    /// Module 1: reads frames, and sends labels or target frames to module D.
    First {
        /// Frames.
        source: Box<Source>,
        /// To module D.
        truth: (u32, Sender),
    },
    /// A module between them.
    Middle,
    /// Module D: has the loss.
    Last {
        /// What the loss needs.
        truth: Truth,
        /// From module 1.
        from: (u32, Receiver),
    },
    /// Modules 1 and D in one.
    Only {
        /// Frames.
        source: Box<Source>,
        /// The target frame of this step, as a message would carry it.
        target: Vec<f32>,
    },
}

/// What the loss compares the output with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// A label a clip; two where clips are mixtures.
    Labels {
        /// Whether they are.
        mixed: bool,
    },
    /// A target frame a step, `[H, W, C]`.
    Frames(Shape),
}

/// Module 1's frames.
pub struct Source {
    frames: Box<dyn Frames>,
    clips: usize,
    shape: Shape,
    /// How many frames after a step's own its target is; `None` in recognition.
    ahead: Option<usize>,
    /// At which steps module D has a loss.
    losses: Vec<bool>,
    /// This batch's labels.
    labels: Vec<i32>,
    /// How batches are mixed, and how this one is.
    mixup: Option<Mixup>,
    mixture: Option<Mixture>,
    /// Training: this module's part in deciding what to do after a batch.
    pub(super) decider: Option<Decider>,
    /// Why this batch's frames cannot be read. The rest of it is worked through without frames, so that all modules are told in
    /// time, and undone.
    pub(super) failure: Option<String>,
}

/// What module 1 reads for one step.
pub(super) struct Read {
    pub frame: Tensor,
    pub target: Option<Tensor>,
}

impl Source {
    /// Batches of `clips` frames of `shape` each.
    pub fn new(
        frames: Box<dyn Frames>,
        clips: usize,
        shape: Shape,
        (ahead, losses): (Option<usize>, Vec<bool>),
        mixup: Option<Mixup>,
        decider: Option<Decider>,
    ) -> Self {
        let (labels, mixture) = (Vec::new(), None);
        Source { frames, clips, shape, ahead, losses, labels, mixup, mixture, decider, failure: None }
    }

    /// Goes on to `batch`.
    pub(super) fn begin(&mut self, batch: u64) -> Result<()> {
        self.labels = self.frames.begin(batch)?;
        self.mixture = self.mixup.map(|mixup| mixup.draw(batch, &self.labels())).transpose()?;
        Ok(())
    }

    /// Goes on without frames, for `why`.
    pub(super) fn give_up(&mut self, why: String) {
        self.failure = Some(why);
        (self.labels, self.mixture) = (vec![-1; self.clips], None);
    }

    /// This batch's labels: −1 for clips that do not count, as far as is known.
    pub(super) fn labels(&self) -> Vec<i32> {
        let mut labels = self.labels.clone();
        for &place in self.frames.skipped() {
            if let Some(label) = labels.get_mut(place) {
                *label = -1;
            }
        }
        labels
    }

    /// The same for module D, with the partners' where clips are mixtures.
    fn truth(&self) -> Labels {
        let own = self.labels();
        let mixed = self.mixup.map(|_| match &self.mixture {
            Some(Mixture { weight, partners }) => {
                Mixed { partners: partners.iter().map(|&n| own[n]).collect(), weight: *weight }
            }
            None => Mixed { partners: own.clone(), weight: 1.0 },
        });
        Labels { own, mixed }
    }

    /// Places of the batch that damaged videos leave empty.
    pub(super) fn skipped(&self) -> usize {
        self.frames.skipped().len()
    }

    /// The frame of `step`, and the target frame if module D has a loss there that needs one.
    pub(super) fn read(&mut self, step: usize) -> Result<Read> {
        let due = self.losses.get(step).copied().unwrap_or(false);
        let ahead = self.ahead.filter(|_| due);
        if self.failure.is_some() {
            let [h, w, c] = self.shape;
            let blank = Tensor::zeros((self.clips, h, w, c), DType::F32, &Device::Cpu)?;
            return Ok(Read { target: ahead.map(|_| blank.clone()), frame: blank });
        }
        let frame = self.frames.frame(step)?;
        let frame = self.mixture.as_ref().map_or(Ok(frame.clone()), |mixture| mixture.mix(&frame))?;
        let target = ahead.map(|ahead| self.frames.frame(step + ahead)).transpose()?;
        Ok(Read { frame, target })
    }

    fn write_target(&self, target: &Tensor, message: &mut [f32]) -> Result<()> {
        with_values(target, |values| Target::write(message, &self.labels(), values))
    }
}

impl Role {
    /// Module 1's frames, for module 1.
    pub(super) fn source(&mut self) -> Option<&mut Source> {
        match self {
            Role::First { source, .. } | Role::Only { source, .. } => Some(source.as_mut()),
            Role::Middle | Role::Last { .. } => None,
        }
    }

    /// Whether this is module 1.
    pub(super) fn is_first(&self) -> bool {
        matches!(self, Role::First { .. } | Role::Only { .. })
    }

    /// Passes a target frame on to where the loss is.
    pub(super) fn pass_on_target(&mut self, frame: &Tensor, batch: u64, step: usize, tick: u64) -> Result<()> {
        match self {
            Role::First { source, truth: (id, sender) } => {
                let due = target_header(*id, batch, step, source.clips, source.shape);
                source.write_target(frame, &mut sender.host_slot()?[..due.words as usize])?;
                sender.start(&due.stamped(tick, Default::default()))
            }
            Role::Only { source, target } => {
                target.resize(Target::words(source.clips, source.shape), 0.0);
                source.write_target(frame, target)
            }
            Role::Middle | Role::Last { .. } => Ok(()),
        }
    }

    /// Module D: the labels of `batch`, once module 1 has them.
    pub(super) fn labels(&mut self, batch: u64, clips: usize) -> Result<Option<Labels>> {
        match self {
            Role::Only { source, .. } => Ok(Some(source.truth())),
            Role::Last { truth: Truth::Labels { mixed }, from: (id, receiver) } => {
                let message = receiver.wait(&labels_header(*id, batch, clips, *mixed))?;
                let labels = Labels::read(message, clips, *mixed)?;
                receiver.release()?;
                Ok(Some(labels))
            }
            // They come with every target.
            Role::Last { truth: Truth::Frames(_), .. } => Ok(Some(Labels { own: vec![-1; clips], mixed: None })),
            Role::First { .. } | Role::Middle => Ok(None),
        }
    }

    /// Module 1: sends the labels of `batch`, where they go alone.
    pub(super) fn send_labels(&mut self, batch: u64) -> Result<()> {
        match self {
            Role::First { source, truth: (id, sender) } if source.ahead.is_none() => {
                let labels = source.truth();
                sender.send(&labels_header(*id, batch, source.clips, labels.mixed.is_some()), &labels.message())
            }
            _ => Ok(()),
        }
    }

    /// Module D: whether the target that is due next has come, if one is due.
    pub(super) fn target_is_there(&self) -> Result<bool> {
        match self {
            Role::Last { truth: Truth::Frames(_), from: (_, receiver) } => receiver.ready(),
            _ => Ok(true),
        }
    }

    /// Module D: the target frame of `step` as a message, once it has come; `None` in recognition.
    pub(super) fn target(&mut self, batch: u64, step: usize, clips: usize) -> Result<Option<&[f32]>> {
        match self {
            Role::Last { truth: Truth::Frames(shape), from: (id, receiver) } => {
                receiver.wait(&target_header(*id, batch, step, clips, *shape)).map(Some)
            }
            Role::Only { source, target } if source.ahead.is_some() => Ok(Some(target)),
            _ => Ok(None),
        }
    }

    /// Module D: the target has been used.
    pub(super) fn release_target(&mut self) -> Result<()> {
        match self {
            Role::Last { truth: Truth::Frames(_), from: (_, receiver) } => receiver.release(),
            _ => Ok(()),
        }
    }

    /// Waits until everything sent has left.
    pub(super) fn flush(&mut self) -> Result<()> {
        if let Role::First { truth: (_, sender), .. } = self {
            sender.flush()?;
        }
        self.source().and_then(|source| source.decider.as_mut()).map_or(Ok(()), Decider::flush)
    }

    /// Module 1: what is needed at `step`.
    ///
    /// # Errors
    /// As reading; [`Error::Run`] elsewhere.
    pub(super) fn read(&mut self, step: usize) -> Result<Read> {
        let source = self.source().ok_or_else(|| Error::Run("frames are module 1's".into()))?;
        source.read(step)
    }

    /// Module 1, where frames cannot be read at `step`: its source, if the other modules can still be told to undo the batch. They
    /// cannot in evaluation, past the step at which decisions travel, and in other replicas than the one that decides.
    pub(super) fn source_if_undoable(&mut self, step: usize, decision_step: usize) -> Option<&mut Source> {
        let source = self.source()?;
        (source.decider.as_ref().is_some_and(Decider::is_chief) && step <= decision_step).then_some(source)
    }
}

fn labels_header(id: u32, batch: u64, clips: usize, mixed: bool) -> Header {
    header(Kind::Labels, id, batch, 0, clips, [1, 1, 1]).carrying(Labels::words(clips, mixed) as u32)
}

fn target_header(id: u32, batch: u64, step: usize, clips: usize, shape: Shape) -> Header {
    header(Kind::Target, id, batch, step, clips, shape).carrying(Target::words(clips, shape) as u32)
}
