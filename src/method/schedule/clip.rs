//! One clip by each rule: when every module does what, and with which messages.

use std::collections::{BTreeMap, BTreeSet};

use super::{Arrival, Backward, Boundary, Forward, Keep, LossAt, Schedule, Tick};
use crate::method::graph::{Edge, Graph};
use crate::{Error, Result};

/// A clip on a graph, before it is known what is done backward.
pub(super) struct Clip<'a> {
    graph: &'a Graph,
    frames: usize,
    boundary: Boundary,
    loss: LossAt,
    /// The lowest module that learns.
    lowest: usize,
}

impl<'a> Clip<'a> {
    pub(super) fn new(
        graph: &'a Graph,
        frames: usize,
        boundary: Boundary,
        loss: LossAt,
        lowest: usize,
    ) -> Result<Self> {
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
        Ok(Clip { graph, frames, boundary, loss, lowest })
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
    pub(super) fn shortest_with_stash(&self) -> usize {
        self.way_back(1) + 1
    }

    /// F(t) of module `i` at tick t + i − 1, of which nothing is kept.
    pub(super) fn forward_ticks(&self, i: usize) -> impl Iterator<Item = Tick> {
        (0..self.steps(i)).map(move |t| {
            let arrives = |e: &Edge| if t == 0 { self.used_step(e, 0) } else { t + e.lead() };
            let receive = self.graph.inputs(i).map(|e| Some(arrives(e)).filter(|&u| u < self.steps(e.from)));
            // A clip may be so short that the first step already uses the last output.
            let send = self
                .graph
                .outputs(i)
                .map(|e| t == self.used_step(e, 0) || (t > e.lead() && t - e.lead() < self.steps(e.to)));
            let (receive, send, loss) = (receive.collect(), send.collect(), self.has_loss(i, t));
            let forward = Forward { step: t, receive, send, loss, keep: Keep::Nothing };
            Tick { at: t + i - 1, forward: Some(forward), ..Tick::default() }
        })
    }

    /// A schedule of these windows. A step with a backward pass keeps what it needs: its activations, or, where the pass comes
    /// at a later tick, what `keep` says.
    pub(super) fn schedule(&self, period: usize, keep: Keep, mut windows: Vec<Vec<Tick>>) -> Schedule {
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
    pub(super) fn pseudo(&self) -> Schedule {
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

    /// `stash`: F(t), then B(t − δᵢ), by which time every cotangent of that step has come. What would come later than the window's
    /// last tick is not sent.
    pub(super) fn stashed(&self, keep: Keep) -> Schedule {
        let at = |i: usize, step: usize| {
            let own = step + self.way_back(i);
            (own < self.frames).then_some(own + i - 1)
        };
        self.schedule(self.frames, keep, self.own_activations(at))
    }

    /// `1f1b`: the same, and behind the window's last forward pass B(T − δᵢ) to B(T − 1) alone.
    pub(super) fn one_forward_one_backward(&self, keep: Keep) -> Schedule {
        let at = |i: usize, step: usize| Some(step + self.way_back(i) + i - 1);
        let period = self.frames + self.way_back(1);
        self.exact(self.schedule(period, keep, self.own_activations(at)))
    }

    /// `gpipe` and `bp`: all forward passes, then in the reverse order of ticks all backward ones.
    pub(super) fn all_forward_all_backward(&self, keep: Keep) -> Schedule {
        let d = self.graph.modules();
        let forward_ticks = (1..=d).map(|i| self.steps(i) + i - 1).max().unwrap_or(0);
        let at = |i: usize, step: usize| Some(2 * forward_ticks - 1 - (step + i - 1));
        self.exact(self.schedule(2 * forward_ticks, keep, self.own_activations(at)))
    }

    /// A schedule with a backward pass for every step that has a loss above it: gradients are means over the losses.
    fn exact(&self, schedule: Schedule) -> Schedule {
        let d = self.graph.modules();
        let losses = (0..self.steps(d)).filter(|&t| self.has_loss(d, t)).count();
        Schedule { mean_over: Some(losses), ..schedule }
    }

    /// Windows in which every cotangent meets the activations it belongs to. `at(i, τ)` is the tick of B(τ) of module i, behind
    /// those of all uses of its output y(τ); `None` where it would come too late, so that its cotangents are not sent. Every use
    /// sends one, those of held outputs too.
    fn own_activations(&self, at: impl Fn(usize, usize) -> Option<usize>) -> Vec<Vec<Tick>> {
        let d = self.graph.modules();
        let mut windows: Vec<BTreeMap<usize, Tick>> = vec![BTreeMap::new(); d];
        // From the top down: whether a step has a backward pass follows from the modules above it.
        for i in (1..=d).rev() {
            let mut window: BTreeMap<usize, Tick> = self.forward_ticks(i).map(|tick| (tick.at, tick)).collect();
            if i < self.lowest {
                windows[i - 1] = window;
                continue;
            }
            let mut due: BTreeSet<usize> = (0..self.steps(i)).filter(|&t| self.has_loss(i, t)).collect();
            // Of skips that arrive at the same tick, the longest first.
            let outputs: Vec<(usize, &Edge)> = self.graph.outputs(i).enumerate().collect();
            for &(output, e) in outputs.iter().rev() {
                for (&made, there) in &windows[e.to - 1] {
                    let Some(Backward { step, send }) = &there.backward else { continue };
                    if self.graph.inputs(e.to).zip(send).any(|(other, &sent)| other == e && sent) {
                        let used = self.used_step(e, *step);
                        let arrival = Arrival { output, sent_at: *step, step: used, first: false };
                        tick_at(&mut window, made + 1).cotangents.push(arrival);
                        due.insert(used);
                    }
                }
            }
            for step in due {
                let Some(tick) = at(i, step) else { continue };
                let used = |e: &Edge| e.from >= self.lowest && at(e.from, self.used_step(e, step)).is_some();
                let send = self.graph.inputs(i).map(used).collect();
                tick_at(&mut window, tick).backward = Some(Backward { step, send });
            }
            windows[i - 1] = window;
        }
        windows.into_iter().map(|window| window.into_values().collect()).collect()
    }
}

fn tick_at(window: &mut BTreeMap<usize, Tick>, at: usize) -> &mut Tick {
    window.entry(at).or_insert_with(|| Tick { at, ..Tick::default() })
}
