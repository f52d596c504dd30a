//! THE loop: what a module does at every tick, whatever the rule.
//!
//! Under Sideways every module works at every tick: it takes the newest activation from below and the newest cotangent from above,
//! though they come from different frames, and never waits for anything older (Sideways, Malinowski et al., CVPR
//! 2020, section 3; with skips, arXiv 2106.08318). Which steps these are, and at which activations a cotangent is taken,
//! says the schedule ([`crate::method::schedule`]); here it is only followed. Within a tick the order hides the transfers: y
//! travels while the backward pass computes, the cotangents while the next forward pass does.

use super::cores::CoreGuard;
use super::worker::{At, Worker, header};
use crate::Result;
use crate::backend::slots::Slot;
use crate::backend::stage::NotFinite;
use crate::comm::{Header, Kind, Orders};
use crate::data::Mixture;
use crate::method::schedule::{Arrival, Backward, Forward, Tick};
use crate::metrics::Phase;

impl Worker {
    /// One tick: a forward pass with what is there; then one vector–Jacobian product with the cotangents that have come for
    /// its step, at that step's activations and the present parameters; last, where that is due, the mean of gradients over replicas,
    /// which begins while a GPU still computes them, and an update. `next` is the tick that follows in the clip.
    pub(super) fn tick(&mut self, tick: &Tick, next: Option<&Tick>, at: At) -> Result<()> {
        let mut core = None;
        if let Some(forward) = &tick.forward {
            self.wait_for_activations(forward, at)?;
            core = self.forward(forward, tick, at)?;
            self.send_activations(forward, at)?;
        }
        if tick.has_loss() {
            self.loss(at)?;
        }
        self.take_cotangents(tick, at)?;
        let shares = self.shares_after(tick);
        if let Some(backward) = &tick.backward {
            self.backward(backward, shares, at)?;
        }
        drop(core);
        if let Some(backward) = &tick.backward {
            self.send_cotangents(backward, at)?;
            if shares {
                self.average_gradients(at.batch.number, at.step)?;
            }
            self.update_between_steps(at.batch.number)?;
        }
        self.settle(next, at)
    }

    /// The frame (module 1), or the main input and the skips: those that arrive now, else the one held.
    fn wait_for_activations(&mut self, forward: &Forward, at: At) -> Result<()> {
        if self.role.is_first() {
            self.read_frame(at)?;
            return self.decide(at);
        }
        self.watch.enter(Phase::WaitActivations);
        for (k, (edge, arrives)) in self.inputs.iter_mut().zip(&forward.receive).enumerate() {
            let Some(sent_at) = *arrives else { continue };
            let orders = match edge.taken.take() {
                Some(orders) => orders,
                None => {
                    let due = edge.due(at.batch, sent_at, self.clips);
                    let (orders, message) = edge.waits.time(|| edge.activations.wait_slot(&due))?;
                    let done = self.stage.receive(k, message)?;
                    edge.activations.release_when(done)?;
                    orders
                }
            };
            if edge.spec.edge.is_main() && at.step == self.decision_step {
                self.decision = orders;
            }
        }
        Ok(())
    }

    /// F(t). The core is kept if nothing has to be waited for: what the backward pass needs then is in the caches still.
    fn forward(&mut self, forward: &Forward, tick: &Tick, at: At) -> Result<Option<CoreGuard>> {
        let core = self.acquire_core(Phase::Forward);
        let pass = self.pass(at.batch, forward.step);
        self.stage.forward(forward.step, &pass, forward.keep, &forward.send)?;
        let predicts = self.training.is_none() || at.batch.begins_validation();
        if let Some(predictions) = self.predictions.as_mut().filter(|_| predicts) {
            predictions.add(forward.step, &self.stage.output()?)?;
        }
        let waits_for_nothing = self.waits_for_nothing(forward, tick)?;
        Ok(core.filter(|_| waits_for_nothing))
    }

    /// Whether y can be sent and what the backward pass needs has come. A GPU's passes are launched and then waited for.
    fn waits_for_nothing(&self, forward: &Forward, tick: &Tick) -> Result<bool> {
        let mut ready = self.stage.is_synchronous() && (!forward.loss || self.role.target_is_there()?);
        for (edge, _) in self.outputs.iter().zip(&forward.send).filter(|(_, used)| **used) {
            ready = ready && edge.activations.ready()?;
        }
        Ok(ready && self.has_cotangents(tick)?)
    }

    fn has_cotangents(&self, tick: &Tick) -> Result<bool> {
        let mut all = true;
        for arrival in &tick.cotangents {
            all = all && self.outputs[arrival.output].has_cotangent()?;
        }
        Ok(all)
    }

    /// Sends y along the edges on which it is ever used.
    fn send_activations(&mut self, forward: &Forward, at: At) -> Result<()> {
        self.watch.enter(Phase::Send);
        for (k, (edge, _)) in self.outputs.iter_mut().zip(&forward.send).enumerate().filter(|(_, (_, used))| **used) {
            let done = self.stage.send(k, edge.activations.slot()?)?;
            let header = header(Kind::Activation, edge.id, at.batch, forward.step, self.clips, edge.spec.shape);
            edge.activations.start_when(&header.stamped(at.tick, self.decision), done)?;
        }
        Ok(())
    }

    /// gᵢ(τ) = Σ over the uses of y(τ) of the cotangents that this module's receivers computed one tick ago: each is added to
    /// its step's sum, and its message given back, before a core is waited for, but where there is something to compute.
    fn take_cotangents(&mut self, tick: &Tick, at: At) -> Result<()> {
        if tick.cotangents.is_empty() {
            return Ok(());
        }
        self.watch.enter(Phase::WaitCotangents);
        self.progress_until(|worker| worker.has_cotangents(tick))?;
        for arrival in &tick.cotangents {
            self.watch.enter(Phase::WaitCotangents);
            let edge = &mut self.outputs[arrival.output];
            let Some((id, receiver)) = &mut edge.cotangents else { return Err(edge.no_cotangents()) };
            let due = header(Kind::Cotangent, *id, at.batch, arrival.sent_at, self.clips, edge.spec.shape);
            let (asked, _) = edge.waits.time(|| receiver.wait_slot(&due))?;
            self.requests.raise(asked);
            let computes = !arrival.first || edge.spec.pooled;
            let _core = if computes { self.acquire_core(Phase::Backward) } else { None };
            self.add_cotangent(arrival, &due)?;
        }
        Ok(())
    }

    fn add_cotangent(&mut self, arrival: &Arrival, due: &Header) -> Result<()> {
        let edge = &mut self.outputs[arrival.output];
        let Some((_, receiver)) = &mut edge.cotangents else { return Err(edge.no_cotangents()) };
        let (_, message) = receiver.wait_slot(due)?;
        let (done, not_finite) = self.stage.add_cotangent(arrival.output, arrival.step, message)?;
        receiver.release_when(done)?;
        if not_finite.is_some() {
            let (module, step) = (edge.spec.edge.to, arrival.sent_at);
            let text = format!("the cotangent that module {module} computed at its step {step} is not finite");
            self.non_finite.note(NotFinite(text))?;
        }
        Ok(())
    }

    /// Module D: the true gradient of this step's loss is the first part of its cotangent.
    fn loss(&mut self, at: At) -> Result<()> {
        self.watch.enter(Phase::WaitActivations);
        self.role.target(at.batch, at.step, self.clips)?;
        let (_core, trains) = (self.acquire_core(Phase::Backward), self.trains_on(at.batch));
        let target = self.role.target(at.batch, at.step, self.clips)?;
        let (_, not_finite) = self.stage.loss(at.step, target.map(Slot::Host))?;
        if let (Some(pixels), Some(target), false) = (&mut self.pixels, target, trains) {
            pixels.add_target(&self.stage.output()?, target)?;
        }
        self.role.release_target()?;
        not_finite.map_or(Ok(()), |what| self.non_finite.note(what))
    }

    /// B(τ), behind which gradients are averaged over the replicas if it `shares` them.
    fn backward(&mut self, backward: &Backward, shares: bool, at: At) -> Result<()> {
        let _core = self.acquire_core(Phase::Backward);
        let pass = self.pass(at.batch, backward.step);
        match shares {
            true => self.stage.backward_lending(backward.step, &pass, &backward.send),
            false => self.stage.backward(backward.step, &pass, &backward.send),
        }
    }

    /// c_{i→j}(τ), along the edges whose senders use it.
    fn send_cotangents(&mut self, backward: &Backward, at: At) -> Result<()> {
        self.watch.enter(Phase::Send);
        let asked = self.requests.pending();
        for (k, (edge, _)) in self.inputs.iter_mut().zip(&backward.send).enumerate().filter(|(_, (_, used))| **used) {
            let Some((id, sender)) = edge.cotangents.as_mut() else { continue };
            let done = self.stage.send_cotangent(k, sender.slot()?)?;
            let header = header(Kind::Cotangent, *id, at.batch, backward.step, self.clips, edge.spec.shape);
            sender.start_when(&header.stamped(at.tick, asked), done)?;
        }
        Ok(())
    }

    /// Ends a tick: everything made in it is on its way, and all that came is used and given back. Nothing is held over from
    /// tick to tick: with that, and `delay` + 1 buffers a link, modules cannot wait for one another in a circle. While a GPU
    /// is at it, the next tick's activations are copied to it.
    fn settle(&mut self, next: Option<&Tick>, at: At) -> Result<()> {
        self.stage.end_tick();
        if self.progress()? {
            return Ok(());
        }
        self.watch.enter(Phase::Backward);
        loop {
            if let Some(forward) = next.and_then(|next| next.forward.as_ref()) {
                self.take_early(forward, at)?;
            }
            if self.progress()? {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }

    /// Takes those of the next tick's activations that are there, in host memory, already.
    fn take_early(&mut self, forward: &Forward, at: At) -> Result<()> {
        for (k, (edge, arrives)) in self.inputs.iter_mut().zip(&forward.receive).enumerate() {
            let Some(sent_at) = arrives.filter(|_| edge.taken.is_none()) else { continue };
            if edge.activations.is_in_host_memory() && edge.activations.progress()? && edge.activations.ready()? {
                let due = edge.due(at.batch, sent_at, self.clips);
                let (orders, message) = edge.activations.wait_slot(&due)?;
                let done = self.stage.receive(k, message)?;
                edge.activations.release_when(done)?;
                edge.taken = Some(orders);
            }
        }
        Ok(())
    }

    /// Module 1: this step's frame; and this step's target, if module D will have a loss, on its way.
    fn read_frame(&mut self, at: At) -> Result<()> {
        self.watch.enter(Phase::Data);
        let mut read = self.role.read(at.step);
        if let Err(e) = read {
            let undoable = self.role.source_if_undoable(at.step, self.decision_step);
            let Some(source) = undoable else { return Err(e) };
            source.give_up(e.within(&at.place(self.index)).to_string());
            read = source.read(at.step);
        }
        let read = read?;
        if let Some(target) = read.target {
            self.role.pass_on_target(&target, at.batch, at.step, at.tick)?;
        }
        let mixture = self.role.source().and_then(|source| source.mixture());
        self.stage.set_input(0, read.frame, mixture.map(Mixture::mixing))
    }

    /// Module 1, once a batch: what to do behind it (see [`super::orders`]).
    fn decide(&mut self, at: At) -> Result<()> {
        let Some(source) = self.role.source().filter(|_| at.step == self.decision_step) else { return Ok(()) };
        self.watch.enter(Phase::Other);
        let own = if source.failure.is_some() { Orders::UNDO } else { Orders::empty() };
        if let Some(decider) = &mut source.decider {
            self.decision = decider.decide(&self.requests, own, at.batch, at.step)?;
        }
        Ok(())
    }
}
