//! What the last module has of its own.

use super::InPort;
use crate::Result;
use crate::backend::cuda::{Array, Element, Gpu};
use crate::nn::head::{Head, Task};

/// What the loss works on.
pub(super) struct Loss {
    pub(super) head: Head,
    /// i32, `[B]`.
    pub(super) labels: Array,
    /// The same of the clips' partners, where clips are mixtures.
    pub(super) partners: Option<Array>,
    /// Sums over the clip's steps: logits `[B, K]` in recognition, else empty.
    pub(super) logits: Array,
    /// Sum of losses weighted by clips, and the weights.
    pub(super) sums: Array,
    pub(super) target: Option<InPort>,
    pub(super) steps: usize,
}

impl Loss {
    pub(super) fn new(gpu: &Gpu, head: Head, batch: usize, output: usize) -> Result<Self> {
        let frames = head.spec().task == Task::FutureFrames;
        let mixed = head.spec().mixed;
        Ok(Loss {
            head,
            partners: mixed.then(|| gpu.zeros(batch, Element::F32)).transpose()?,
            labels: gpu.zeros(batch, Element::F32)?,
            logits: gpu.zeros(if frames { 0 } else { output }, Element::F32)?,
            sums: gpu.zeros(2, Element::F32)?,
            target: frames.then(|| InPort::new(gpu, output, Element::F32)).transpose()?,
            steps: 0,
        })
    }

    pub(super) fn set_labels(&mut self, gpu: &Gpu, labels: &[i32]) -> Result<()> {
        self.head.set_labels(labels);
        gpu.write(&self.labels, bytemuck::cast_slice(labels))
    }
}
