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
//! bp          tick  0    1    2    3    4    5    6    7    8    9    10   11   12   13
//! module 1          F0   F1   F2   F3   F4                       B4   B3   B2   B1   B0
//! module 2               F0   F1   F2   F3   F4             B4   B3   B2   B1   B0
//! module 3                    F0   F1   F2   F3   F4   B4   B3   B2   B1   B0
//! ```
//!
//! Every message takes one tick. Under `sideways` and `skip-sideways` the cotangent that module 3 makes at its step 0 (tick 2)
//! is what module 2 uses at tick 3, its step 2, at that step's fresh activations: they come from different frames, and nobody
//! waits. With `stash` it meets the activations it belongs to, which module i keeps for δᵢ = 2(D − i) steps: a cotangent is added
//! to the sum of the step whose output was used. What belongs to a clip's last δᵢ steps would come too late and is not sent. `bp`
//! does the same for every step. A rule is nothing but such lists: the tick loop is the same for all.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::graph::{Edge, Graph};
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
    /// [`Error::Input`] if the clip is too short to train module 1, or has no step with a loss; if `stash` does not go with `rule`
    /// or `boundary`.
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
        let clip = Clip { lowest, ..Clip::new(graph, frames, boundary, loss)? };
        let d = graph.modules();
        if rule.is_exact() {
            return match stash {
                Stash::None => Ok(clip.exact()),
                _ => Err(Error::input(format!(
                    "train.stash = \"{stash}\": rule \"{rule}\" keeps all activations anyway"
                ))),
            };
        }
        if stash != Stash::None && boundary == Boundary::Cut {
            return Err(Error::input(format!(
                "train.stash = \"{stash}\" needs train.boundary = \"flow\": with \"cut\" a clip ends before its cotangents come back"
            )));
        }
        let schedule = match stash {
            Stash::None => clip.pseudo(),
            Stash::Inputs => clip.stashed(Keep::Inputs),
            Stash::Activations => clip.stashed(Keep::Activations),
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
        let clip = Clip::new(graph, frames, boundary, loss)?;
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

/// A clip on a graph, before it is known what is done backward.
struct Clip<'a> {
    graph: &'a Graph,
    frames: usize,
    boundary: Boundary,
    loss: LossAt,
    /// The lowest module that learns.
    lowest: usize,
}

impl<'a> Clip<'a> {
    fn new(graph: &'a Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Result<Self> {
        let d = graph.modules();
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
        Ok(Clip { graph, frames, boundary, loss, lowest: 1 })
    }

    /// Steps of module `i`.
    fn steps(&self, i: usize) -> usize {
        match self.boundary {
            Boundary::Flow => self.frames,
            Boundary::Cut => self.frames + 1 - i,
        }
    }

    fn has_loss(&self, i: usize, t: usize) -> bool {
        i == self.graph.modules()
            && match self.loss {
                LossAt::EveryStep => true,
                LossAt::Ahead(ahead) => t + ahead < self.frames,
            }
    }

    /// δᵢ, from a step of module `i` to the arrival of its main cotangent.
    fn way_back(&self, i: usize) -> usize {
        2 * (self.graph.modules() - i)
    }

    /// The step of the sender whose output step `t` of an edge's receiver uses: the one that arrives then, or the last, held.
    fn used_step(&self, e: &Edge, t: usize) -> usize {
        (t + e.lead()).min(self.steps(e.from) - 1)
    }

    /// The fewest frames with which module 1 has a backward pass under `stash`: its step 0, whose cotangent sets out from the
    /// first loss.
    fn shortest_with_stash(&self) -> usize {
        self.way_back(1) + 1
    }

    /// F(t) of module `i` at tick t + i − 1, of which nothing is kept.
    fn forward_ticks(&self, i: usize) -> impl Iterator<Item = Tick> {
        (0..self.steps(i)).map(move |t| {
            let receive = self.graph.inputs(i).map(|e| Some(t + e.lead()).filter(|&u| u < self.steps(e.from)));
            let send = self.graph.outputs(i).map(|e| t >= e.lead() && t - e.lead() < self.steps(e.to));
            let (receive, send, loss) = (receive.collect(), send.collect(), self.has_loss(i, t));
            let forward = Forward { step: t, receive, send, loss, keep: Keep::Nothing };
            Tick { at: t + i - 1, forward: Some(forward), ..Tick::default() }
        })
    }

    /// A schedule of these windows. A step with a backward pass keeps what it needs: its activations, or, where the pass comes
    /// at a later tick, what `keep` says.
    fn schedule(&self, period: usize, keep: Keep, mut windows: Vec<Vec<Tick>>) -> Schedule {
        for window in &mut windows {
            let backward: BTreeMap<usize, usize> =
                window.iter().filter_map(|tick| Some((tick.backward.as_ref()?.step, tick.at))).collect();
            let mut sums = BTreeSet::new();
            for tick in window {
                if let Some(forward) = &mut tick.forward {
                    forward.keep = match backward.get(&forward.step) {
                        None => Keep::Nothing,
                        Some(&at) if at == tick.at => Keep::Activations,
                        Some(_) => keep,
                    };
                    if forward.loss {
                        sums.insert(forward.step);
                    }
                }
                for arrival in &mut tick.cotangents {
                    arrival.first = sums.insert(arrival.step);
                }
            }
        }
        let (frames, boundary) = (self.frames, self.boundary);
        Schedule { frames, boundary, period, mean_over: None, windows }
    }

    /// Pseudo-gradients: F(t), then B(t) with the cotangents that have just arrived, each computed one tick before.
    fn pseudo(&self) -> Schedule {
        let d = self.graph.modules();
        let mut windows: Vec<Vec<Tick>> = vec![Vec::new(); d];
        // From the top down: whether a module has backward work follows from the modules above it.
        for i in (1..=d).rev() {
            let mut window: Vec<Tick> = self.forward_ticks(i).collect();
            for (t, tick) in window.iter_mut().enumerate().filter(|_| i >= self.lowest) {
                for (output, e) in self.graph.outputs(i).enumerate() {
                    let sent_at = t.checked_sub(e.span() + 1);
                    if let Some(sent_at) = sent_at.filter(|&v| windows[e.to - 1][v].backward.is_some()) {
                        tick.cotangents.push(Arrival { output, sent_at, step: t, first: false });
                    }
                }
                if self.has_loss(i, t) || !tick.cotangents.is_empty() {
                    let used = |e: &Edge| e.from >= self.lowest && t + e.span() + 1 < self.steps(e.from);
                    tick.backward = Some(Backward { step: t, send: self.graph.inputs(i).map(used).collect() });
                }
            }
            windows[i - 1] = window;
        }
        self.schedule(self.frames, Keep::Activations, windows)
    }

    /// F(t), then B(t − δᵢ) at the activations of its own step, by which time every cotangent of that step has come. What would
    /// come later than the window's last tick is not sent.
    fn stashed(&self, keep: Keep) -> Schedule {
        let d = self.graph.modules();
        let mut windows: Vec<Vec<Tick>> = vec![Vec::new(); d];
        for i in (1..=d).rev() {
            let mut window: Vec<Tick> = self.forward_ticks(i).collect();
            if i < self.lowest {
                windows[i - 1] = window;
                continue;
            }
            let mut due: BTreeSet<usize> = (0..self.steps(i)).filter(|&t| self.has_loss(i, t)).collect();
            // Of skips that arrive at the same tick, the longest first.
            let outputs: Vec<(usize, &Edge)> = self.graph.outputs(i).enumerate().collect();
            for &(output, e) in outputs.iter().rev() {
                for (t, there) in windows[e.to - 1].iter().enumerate() {
                    let Some(Backward { step, send }) = &there.backward else { continue };
                    if self.graph.inputs(e.to).zip(send).any(|(other, &sent)| other == e && sent) {
                        let used = self.used_step(e, *step);
                        // Made at the receiver's step t, a tick before this module's step t + span + 1.
                        let arrival = Arrival { output, sent_at: *step, step: used, first: false };
                        window[t + e.span() + 1].cotangents.push(arrival);
                        due.insert(used);
                    }
                }
            }
            for step in due {
                if let Some(tick) = window.get_mut(step + self.way_back(i)) {
                    let in_time = |e: &Edge| {
                        e.from >= self.lowest && self.used_step(e, step) + self.way_back(e.from) < self.frames
                    };
                    tick.backward = Some(Backward { step, send: self.graph.inputs(i).map(in_time).collect() });
                }
            }
            windows[i - 1] = window;
        }
        self.schedule(self.frames, keep, windows)
    }

    /// Exact back-propagation: all forward passes, then in the reverse order of ticks all backward ones, each at the
    /// activations of its own step. Every use of an output sends its cotangent, those of held outputs too.
    fn exact(&self) -> Schedule {
        let d = self.graph.modules();
        let forward_ticks = (1..=d).map(|i| self.steps(i) + i - 1).max().unwrap_or(0);
        let backward_tick = |i: usize, step: usize| 2 * forward_ticks - 1 - (step + i - 1);
        let mut windows: Vec<BTreeMap<usize, Tick>> = vec![BTreeMap::new(); d];
        for i in (1..=d).rev() {
            let mut window: BTreeMap<usize, Tick> = self.forward_ticks(i).map(|tick| (tick.at, tick)).collect();
            if i < self.lowest {
                windows[i - 1] = window;
                continue;
            }
            // Of skips that arrive at the same tick, the longest first.
            let outputs: Vec<(usize, &Edge)> = self.graph.outputs(i).enumerate().collect();
            for &(output, e) in outputs.iter().rev() {
                for (&at, tick) in &windows[e.to - 1] {
                    let Some(Backward { step, .. }) = tick.backward else { continue };
                    let arrival = Arrival { output, sent_at: step, step: self.used_step(e, step), first: false };
                    let tick = window.entry(at + 1).or_insert_with(|| Tick { at: at + 1, ..Tick::default() });
                    tick.cotangents.push(arrival);
                }
            }
            let due: Vec<usize> = window.values().flat_map(|tick| &tick.cotangents).map(|c| c.step).collect();
            for step in (0..self.steps(i)).filter(|&t| self.has_loss(i, t) || due.contains(&t)) {
                let at = backward_tick(i, step);
                let tick = window.entry(at).or_insert_with(|| Tick { at, ..Tick::default() });
                let send = self.graph.inputs(i).map(|e| e.from >= self.lowest).collect();
                tick.backward = Some(Backward { step, send });
            }
            windows[i - 1] = window;
        }
        let windows = windows.into_iter().map(|window| window.into_values().collect()).collect();
        let losses = (0..self.steps(d)).filter(|&t| self.has_loss(d, t)).count();
        Schedule { mean_over: Some(losses), ..self.schedule(2 * forward_ticks, Keep::Activations, windows) }
    }
}
