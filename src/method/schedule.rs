//! Who does what at which tick: pure, computed before a tensor moves, then only followed.
//!
//! A clip has T frames. Module i works on the clip's frame t at its *step* t, which is tick t + i − 1 counted from
//! the clip's first. With three modules and T = 5 (`F` forward, `B` also backward; `sideways plan --ticks` draws
//! this for any configuration):
//!
//! ```text
//! tick        0   1   2   3   4   5   6
//! module 1    F0  F1  F2  F3  B4
//! module 2        F0  F1  B2  B3  B4
//! module 3            B0  B1  B2  B3  B4
//! ```
//!
//! The cotangent module 3 makes at its step 0 (tick 2) is what module 2 uses at tick 3, its step 2, at that step's
//! fresh activations: they come from different frames, and nobody waits.

use crate::method::graph::{Edge, Graph};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a module crosses from one clip to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Boundary {
    /// Windows are staggered: every module takes all T steps and starts the next clip at once.
    #[default]
    Flow,
    /// The clip lasts T ticks in all: module i takes its first T − i + 1 steps, then everything is cleared.
    Cut,
}

/// At which steps of module D there is a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossAt {
    /// Every step: recognition.
    EveryStep,
    /// Those whose target frame, this many frames after the main path's, lies in the clip: future frames.
    Ahead(usize),
}

/// What one module does at one step. Inputs and outputs are in the graph's order (main first, then growing span).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// For each input edge, the sender's step whose message arrives now; `None` holds the one before.
    pub receive: Vec<Option<usize>>,
    /// For each output edge: is this step's output ever used there?
    pub send: Vec<bool>,
    /// Is there a loss at this step (module D only)?
    pub loss: bool,
    /// For each output edge, the receiver's step whose cotangent arrives now.
    pub cotangent: Vec<Option<usize>>,
    /// Is there backward work at this step?
    pub backward: bool,
    /// For each input edge: will its sender use the cotangent of this step?
    pub wanted: Vec<bool>,
}

/// The whole clip for every module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    frames: usize,
    boundary: Boundary,
    plans: Vec<Vec<StepPlan>>,
}

impl Schedule {
    /// The schedule of one clip of `frames` frames over `graph`, with backward work if `training`.
    ///
    /// # Errors
    /// [`Error::Input`] if the clip is too short to train module 1, or has no step with a loss.
    pub fn new(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt, training: bool) -> Result<Self> {
        let d = graph.modules();
        if training && frames < graph.shortest_clip() {
            return Err(Error::input(format!(
                "clips of {frames} frames are too short: with {d} modules (shortest path {}) module 1 is trained from \
                 {} frames on; raise data.frames or use fewer modules",
                graph.fewest_modules(),
                graph.shortest_clip()
            )));
        }
        if boundary == Boundary::Cut && frames < d {
            return Err(Error::input(format!(
                "clips of {frames} frames never reach module {d} with boundary = \"cut\"; raise data.frames to at \
                 least {d}"
            )));
        }
        if let LossAt::Ahead(ahead) = loss
            && ahead >= frames
        {
            return Err(Error::input(format!(
                "clips of {frames} frames have no target: the first lies {ahead} frames after the clip's first; \
                 raise data.frames or lower model.horizon"
            )));
        }
        let steps = |i: usize| match boundary {
            Boundary::Flow => frames,
            Boundary::Cut => frames + 1 - i,
        };
        let mut plans: Vec<Vec<StepPlan>> = vec![Vec::new(); d];
        // From the top down: whether a module has backward work follows from the modules above it.
        for i in (1..=d).rev() {
            let inputs: Vec<&Edge> = graph.inputs(i).collect();
            let outputs: Vec<&Edge> = graph.outputs(i).collect();
            for t in 0..steps(i) {
                let cotangent: Vec<Option<usize>> = outputs
                    .iter()
                    .map(|e| t.checked_sub(e.span() + 1).filter(|&tm| plans[e.to - 1][tm].backward))
                    .collect();
                let has_loss = i == d
                    && match loss {
                        LossAt::EveryStep => true,
                        LossAt::Ahead(ahead) => t + ahead < frames,
                    };
                let backward = training && has_loss || cotangent.iter().any(Option::is_some);
                plans[i - 1].push(StepPlan {
                    receive: inputs.iter().map(|e| Some(t + e.lead()).filter(|&tj| tj < steps(e.from))).collect(),
                    send: outputs.iter().map(|e| t >= e.lead() && t - e.lead() < steps(e.to)).collect(),
                    loss: has_loss,
                    cotangent,
                    backward,
                    wanted: inputs.iter().map(|e| backward && t + e.span() + 1 < steps(e.from)).collect(),
                });
            }
        }
        Ok(Schedule { frames, boundary, plans })
    }

    /// T, the frames of a clip.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// The steps of module `i` (1-based) in one clip.
    pub fn steps(&self, i: usize) -> &[StepPlan] {
        &self.plans[i - 1]
    }

    /// The tick, counted from the run's first, of step `t` of module `i` in clip number `clip`.
    pub fn tick(&self, clip: u64, i: usize, t: usize) -> u64 {
        clip * self.frames as u64 + (t + i - 1) as u64
    }
}
