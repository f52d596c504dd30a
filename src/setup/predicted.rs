//! Which outputs of the last module are reported to the console.

use std::ops::Range;

/// Of a batch, the outputs that are reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Predicted {
    /// Of so many of its clips, the first ones.
    pub clips: usize,
    /// At these steps.
    pub steps: Range<usize>,
}

impl Predicted {
    /// Steps of a clip that are shown, at most.
    const SHOWN: usize = 16;

    /// What is shown of a validation while training goes on: its first clip's last steps that have a target, which is `ahead` frames
    /// after a step's own frame of `frames`.
    pub(super) fn shown(frames: usize, ahead: usize) -> Self {
        let end = frames.saturating_sub(ahead);
        Predicted { clips: 1, steps: end.saturating_sub(Self::SHOWN)..end }
    }

    /// How many values these are, of outputs `[H, W, C]`.
    pub(super) fn values(&self, output: [usize; 3]) -> usize {
        self.clips * self.steps.len() * output.iter().product::<usize>()
    }
}
