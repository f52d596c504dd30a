//! What only some modules have: the first one frames, the last one the loss, and a link between them.

use candle_core::{DType, Device, Tensor};

use super::orders::Decider;
use super::pixels::PixelError;
use super::worker::header;
use crate::backend::stage::with_values;
use crate::comm::{BatchId, Header, Kind, Receiver, Sender};
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
    /// Those of validation, over and over, and how many batches of them there were so far.
    validation: Option<(Box<dyn Frames>, u64)>,
    /// Whether this batch is validation's.
    validates: bool,
    /// Whether every batch is one of evaluation.
    evaluates: bool,
    /// Evaluation of future frames: how far the newest frame seen is from the target, and by how many frames before it.
    copy: Option<(PixelError, usize)>,
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
        let (validation, copy, labels, mixture) = (None, None, Vec::new(), None);
        Source {
            frames,
            validation,
            validates: false,
            evaluates: false,
            copy,
            clips,
            shape,
            ahead,
            losses,
            labels,
            mixup,
            mixture,
            decider,
            failure: None,
        }
    }

    /// With frames to validate on, if there are any.
    pub(super) fn validating(self, frames: Option<Box<dyn Frames>>) -> Self {
        Source { validation: frames.map(|frames| (frames, 0)), ..self }
    }

    /// Comparing targets with the frame `horizon` before them, if that is asked for, wherever is evaluated.
    pub(super) fn comparing(self, pixels: Option<PixelError>, horizon: usize, evaluates: bool) -> Self {
        Source { copy: pixels.map(|pixels| (pixels, horizon)), evaluates, ..self }
    }

    /// Goes on to `batch`.
    pub(super) fn begin(&mut self, batch: BatchId) -> Result<()> {
        self.validates = !batch.is_training();
        self.labels = match &mut self.validation {
            Some((frames, next)) if self.validates => {
                *next += 1;
                frames.begin(*next - 1)?
            }
            _ => self.frames.begin(batch.number)?,
        };
        let mixup = self.mixup.filter(|_| !self.validates);
        self.mixture = mixup.map(|mixup| mixup.draw(batch.number, &self.labels())).transpose()?;
        Ok(())
    }

    fn present(&self) -> &dyn Frames {
        match &self.validation {
            Some((frames, _)) if self.validates => frames.as_ref(),
            _ => self.frames.as_ref(),
        }
    }

    /// The mean squared error of copying, summed over clips and steps with a loss since it was last asked for.
    pub(super) fn take_copy_error(&mut self) -> f32 {
        self.copy.as_mut().map_or(0.0, |(pixels, _)| pixels.take())
    }

    /// Goes on without frames, for `why`.
    pub(super) fn give_up(&mut self, why: String) {
        self.failure = Some(why);
        (self.labels, self.mixture) = (vec![-1; self.clips], None);
    }

    /// This batch's labels: −1 for clips that do not count, as far as is known.
    pub(super) fn labels(&self) -> Vec<i32> {
        let mut labels = self.labels.clone();
        for &place in self.present().skipped() {
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

    /// How this batch's clips are mixed, if they are.
    pub(super) fn mixture(&self) -> Option<&Mixture> {
        self.mixture.as_ref()
    }

    /// Places of the batch that damaged videos leave empty.
    pub(super) fn skipped(&self) -> usize {
        self.present().skipped().len()
    }

    /// The frame of `step`, not mixed yet, and the target frame if module D has a loss there that needs one.
    pub(super) fn read(&mut self, step: usize) -> Result<Read> {
        let due = self.losses.get(step).copied().unwrap_or(false);
        let ahead = self.ahead.filter(|_| due);
        if self.failure.is_some() {
            let [h, w, c] = self.shape;
            let blank = Tensor::zeros((self.clips, h, w, c), DType::F32, &Device::Cpu)?;
            return Ok(Read { target: ahead.map(|_| blank.clone()), frame: blank });
        }
        let frames = match &mut self.validation {
            Some((frames, _)) if self.validates => frames.as_mut(),
            _ => self.frames.as_mut(),
        };
        let frame = frames.frame(step)?;
        let target = ahead.map(|ahead| frames.frame(step + ahead)).transpose()?;
        if let (Some((pixels, horizon)), Some(ahead), Some(target)) = (&mut self.copy, ahead, &target)
            && (self.validates || self.evaluates)
        {
            let seen = frames.frame(step + ahead - *horizon)?;
            with_values(target, |target| pixels.add(&seen, target, &self.labels))?;
        }
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
    pub(super) fn pass_on_target(&mut self, frame: &Tensor, batch: BatchId, step: usize, tick: u64) -> Result<()> {
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
    pub(super) fn labels(&mut self, batch: BatchId, clips: usize) -> Result<Option<Labels>> {
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
    pub(super) fn send_labels(&mut self, batch: BatchId) -> Result<()> {
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
    pub(super) fn target(&mut self, batch: BatchId, step: usize, clips: usize) -> Result<Option<&[f32]>> {
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

fn labels_header(id: u32, batch: BatchId, clips: usize, mixed: bool) -> Header {
    header(Kind::Labels, id, batch, 0, clips, [1, 1, 1]).carrying(Labels::words(clips, mixed) as u32)
}

fn target_header(id: u32, batch: BatchId, step: usize, clips: usize, shape: Shape) -> Header {
    header(Kind::Target, id, batch, step, clips, shape).carrying(Target::words(clips, shape) as u32)
}
