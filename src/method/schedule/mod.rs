//! Who does what at which tick: pure lists, computed before a tensor moves, then only followed.
//!
//! A clip has T frames. Module i works on frame t at its *step* t. `F2` is the forward pass of step 2, `B2` the vector–Jacobian
//! product (backward pass) for step 2. With three modules and T = 5 (`sideways plan --ticks` draws this for any configuration):
//!
//! ```text
//! sideways    tick  0    1    2    3    4    5    6
//! module 1          F0   F1   F2   F3   F4B4
//! module 2               F0   F1   F2B2 F3B3 F4B4
//! module 3                    F0B0 F1B1 F2B2 F3B3 F4B4
//!
//! stash       tick  0    1    2    3    4    5    6
//! module 1          F0   F1   F2   F3   F4B0
//! module 2               F0   F1   F2B0 F3B1 F4B2
//! module 3                    F0B0 F1B1 F2B2 F3B3 F4B4
//!
//! 1f1b        tick  0    1    2    3    4    5    6    7    8
//! module 1          F0   F1   F2   F3   F4B0 B1   B2   B3   B4
//! module 2               F0   F1   F2B0 F3B1 F4B2 B3   B4
//! module 3                    F0B0 F1B1 F2B2 F3B3 F4B4
//!
//! gpipe, bp   tick  0    1    2    3    4    5    6    7    8    9    10   11   12   13
//! module 1          F0   F1   F2   F3   F4                       B4   B3   B2   B1   B0
//! module 2               F0   F1   F2   F3   F4             B4   B3   B2   B1   B0
//! module 3                    F0   F1   F2   F3   F4   B4   B3   B2   B1   B0
//! ```
//!
//! Every message takes one tick. Under `sideways` and `skip-sideways` the cotangent that module 3 makes at its step 0 (tick 2)
//! is what module 2 uses at tick 3, its step 2, at that step's fresh activations: they come from different frames, and nobody
//! waits. With `stash` it meets the activations it belongs to, which module i keeps for δᵢ = 2(D − i) steps: a cotangent is added
//! to the sum of the step whose output was used. What belongs to a clip's last δᵢ steps would come too late and is not sent.
//! `1f1b` (one forward, one backward) waits for it: exact gradients, for a bubble of 2 (D − 1) ticks a clip. `gpipe` makes all
//! forward passes first, and keeps the activations of all T steps; `bp` is the same in one process. A rule is nothing but such
//! lists: the tick loop is the same for all.

mod clip;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use clip::Clip;

use super::graph::Graph;
use super::rule::{Rule, Stash};
use crate::{Error, Result};

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

/// What is kept of a step's forward pass for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: it has none.
    Nothing,
    /// All that it needs.
    Activations,
    /// What came in: the forward pass is done once more.
    Inputs,
}

/// What one module does at one tick, in the order of the fields. Inputs and outputs are numbered in the graph's order: main
/// first, then growing span.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// Which tick, counted from module 1's first of the clip.
    pub at: usize,
    /// F(t): a forward pass.
    pub forward: Option<Forward>,
    /// The cotangents that arrive.
    pub cotangents: Vec<Arrival>,
    /// B(τ): a vector–Jacobian product.
    pub backward: Option<Backward>,
}

impl Tick {
    /// The step it is about, for messages to people: that of the forward pass where there is one.
    pub fn step(&self) -> usize {
        let forward = self.forward.as_ref().map(|forward| forward.step);
        let backward = self.backward.as_ref().map(|backward| backward.step);
        forward.or(backward).or(self.cotangents.first().map(|arrival| arrival.step)).unwrap_or(0)
    }

    /// Whether there is a loss.
    pub fn has_loss(&self) -> bool {
        self.forward.as_ref().is_some_and(|forward| forward.loss)
    }
}

/// F(t) with its messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// t
    pub step: usize,
    /// For each input edge, the sender's step whose output arrives; `None` holds the one before.
    pub receive: Vec<Option<usize>>,
    /// For each output edge, whether this step's output is ever used there.
    pub send: Vec<bool>,
    /// Module D: whether there is a loss.
    pub loss: bool,
    /// What is kept for B(t).
    pub keep: Keep,
}

/// A cotangent that arrives from a receiver of this module's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The output edge it comes back along.
    pub output: usize,
    /// The step of the module there that computed it.
    pub sent_at: usize,
    /// The own step to whose sum it is added.
    pub step: usize,
    /// Whether the sum begins with it.
    pub first: bool,
}

/// B(τ) with its messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backward {
    /// τ
    pub step: usize,
    /// For each input edge, whether its sender uses the cotangent.
    pub send: Vec<bool>,
}

/// One clip for every module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    frames: usize,
    boundary: Boundary,
    /// Ticks from one clip's first to the next one's.
    period: usize,
    mean_over: Option<usize>,
    windows: Vec<Vec<Tick>>,
}

impl Schedule {
    /// The schedule of training by `rule` on clips of `frames` frames over `graph`.
    ///
    /// # Errors
    /// [`Error::Input`] if the clip is too short to train module 1, or has no step with a loss; if `stash` does not go with
    /// `boundary`.
    pub fn training(
        graph: &Graph,
        frames: usize,
        rule: Rule,
        stash: Stash,
        boundary: Boundary,
        loss: LossAt,
    ) -> Result<Self> {
        Self::training_from(graph, frames, rule, stash, boundary, loss, 1)
    }

    /// The same where nothing below module `lowest` learns: the modules there do no backward work, and nobody sends them cotangents.
    ///
    /// # Errors
    /// As [`Schedule::training`], of module `lowest`.
    pub fn training_from(
        graph: &Graph,
        frames: usize,
        rule: Rule,
        stash: Stash,
        boundary: Boundary,
        loss: LossAt,
        lowest: usize,
    ) -> Result<Self> {
        let clip = Clip::new(graph, frames, boundary, loss, lowest)?;
        let d = graph.modules();
        let keep = if stash == Stash::Inputs { Keep::Inputs } else { Keep::Activations };
        match rule {
            Rule::OneForwardOneBackward => return Ok(clip.one_forward_one_backward(keep)),
            Rule::Gpipe | Rule::Bp => return Ok(clip.all_forward_all_backward(keep)),
            Rule::Sideways | Rule::SkipSideways => {}
        }
        if stash != Stash::None && boundary == Boundary::Cut {
            return Err(Error::input(format!(
                "train.stash = \"{stash}\" needs train.boundary = \"flow\": with \"cut\" a clip ends before its cotangents come back"
            )));
        }
        let schedule = match stash {
            Stash::None => clip.pseudo(),
            Stash::Inputs | Stash::Activations => clip.stashed(keep),
        };
        if lowest > 1 {
            let reached = schedule.backwards(lowest).next().is_some();
            return match reached {
                true => Ok(schedule),
                false => Err(Error::input(format!(
                    "clips of {frames} frames are too short: no cotangent reaches module {lowest}, the lowest that learns; raise \
                     data.frames or use fewer modules"
                ))),
            };
        }
        let shortest = if stash == Stash::None { graph.shortest_clip() } else { clip.shortest_with_stash() };
        if frames < shortest {
            return Err(Error::input(format!(
                "clips of {frames} frames are too short: with {d} modules (shortest path {}){} module 1 is trained from \
                 {shortest} frames on; raise data.frames or use fewer modules",
                graph.fewest_modules(),
                if stash == Stash::None { "" } else { " and train.stash" },
            )));
        }
        Ok(schedule)
    }

    /// The schedule of evaluation: forward passes and losses alone.
    ///
    /// # Errors
    /// [`Error::Input`] if the clip has no step with a loss.
    pub fn evaluation(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Result<Self> {
        let clip = Clip::new(graph, frames, boundary, loss, 1)?;
        let windows = (1..=graph.modules()).map(|i| clip.forward_ticks(i).collect()).collect();
        Ok(clip.schedule(frames, Keep::Nothing, windows))
    }

    /// T, the frames of a clip.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// How modules cross from one clip to the next.
    pub fn boundary(&self) -> Boundary {
        self.boundary
    }

    /// What module `i` (from 1) does for one clip: its ticks, in order.
    pub fn window(&self, i: usize) -> &[Tick] {
        &self.windows[i - 1]
    }

    /// The forward passes of module `i`, one a step.
    pub fn forwards(&self, i: usize) -> impl Iterator<Item = &Forward> {
        self.window(i).iter().filter_map(|tick| tick.forward.as_ref())
    }

    /// The backward passes of module `i`.
    pub fn backwards(&self, i: usize) -> impl Iterator<Item = &Backward> {
        self.window(i).iter().filter_map(|tick| tick.backward.as_ref())
    }

    /// How many steps module `i` has in a clip.
    pub fn steps(&self, i: usize) -> usize {
        self.forwards(i).count()
    }

    /// By step of module D, whether there is a loss.
    pub fn losses(&self) -> Vec<bool> {
        self.forwards(self.windows.len()).map(|forward| forward.loss).collect()
    }

    /// Of how many steps in a row module `i` holds activations (or inputs) at most, that at hand among them.
    pub fn kept(&self, i: usize) -> usize {
        let (mut most, mut waiting) = (1, BTreeSet::new());
        for tick in self.window(i) {
            if let Some(forward) = &tick.forward {
                let oldest = waiting.first().copied().unwrap_or(forward.step);
                most = most.max(forward.step + 1 - oldest);
                if forward.keep != Keep::Nothing {
                    waiting.insert(forward.step);
                }
            }
            if let Some(backward) = &tick.backward {
                waiting.remove(&backward.step);
            }
        }
        most
    }

    /// Of how many steps module `i` keeps activations (or inputs) at once, at most: fewer than [`Schedule::kept`] where clips are so
    /// short that most steps have no backward pass.
    pub fn kept_at_once(&self, i: usize) -> usize {
        let (mut most, mut now) = (0usize, 0usize);
        for tick in self.window(i) {
            now += usize::from(tick.forward.as_ref().is_some_and(|forward| forward.keep != Keep::Nothing));
            most = most.max(now);
            now -= usize::from(tick.backward.is_some());
        }
        most
    }

    /// Whether module `i` does forward passes once more, in its backward passes.
    pub fn recomputes(&self, i: usize) -> bool {
        self.forwards(i).any(|forward| forward.keep == Keep::Inputs)
    }

    /// Over how many steps in a row the sums of cotangents reach that module `i` holds at once.
    pub fn sums(&self, i: usize) -> usize {
        let (mut most, mut begun) = (1, BTreeSet::new());
        for tick in self.window(i) {
            let loss = tick.forward.iter().filter(|forward| forward.loss).map(|forward| forward.step);
            begun.extend(tick.cotangents.iter().map(|arrival| arrival.step).chain(loss));
            if let (Some(first), Some(last)) = (begun.first(), begun.last()) {
                most = most.max(last + 1 - first);
            }
            if let Some(backward) = &tick.backward {
                begun.remove(&backward.step);
            }
        }
        most
    }

    /// By how many steps a clip's sum of gradients is divided, the same for every module; `None`: by the number of its own
    /// backward passes.
    pub fn mean_over(&self) -> Option<usize> {
        self.mean_over
    }

    /// The share of balanced work's time in which modules wait while the pipeline fills and drains, one module a rank:
    /// (D − 1) / (T + D − 1) by the exact rules; 0 where nobody waits between clips.
    pub fn bubble(&self) -> f64 {
        let idle = (self.windows.len() - 1) as f64;
        self.mean_over.map_or(0.0, |_| idle / (self.frames as f64 + idle))
    }

    /// Whether any cotangent ever goes back along input `k` of module `i`.
    pub fn returns(&self, i: usize, k: usize) -> bool {
        self.backwards(i).any(|backward| backward.send[k])
    }

    /// The tick, counted from the run's first, at which batch number `batch` begins at module 1.
    pub fn first_tick(&self, batch: u64) -> u64 {
        batch * self.period as u64
    }

    /// Ticks from one clip's first to the next one's.
    pub fn period(&self) -> usize {
        self.period
    }
}
