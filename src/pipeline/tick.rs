//! THE loop: what a module does at every tick.
//!
//! Every module works at every tick: it takes the newest activation from below and the newest cotangent from above,
//! though they come from different frames, and never waits for anything older (Sideways, Malinowski et al., CVPR
//! 2020, section 3; with skips, arXiv 2106.08318). Within a tick the order hides the transfers: y travels while the
//! backward pass computes, the cotangents while the next forward pass does.

use candle_core::Tensor;

use super::compute::full;
use super::stop::UNDO;
use super::turns::Turn;
use super::worker::{At, LossEnd, Worker, header, left_out, not_finite, send};
use crate::comm::Kind;
use crate::config::UpdateEvery;
use crate::pipeline::metrics::Phase;
use crate::{Error, Result};

impl Worker {
    /// One tick: forward with what is there, then one vector–Jacobian product at these same fresh activations and
    /// present parameters, with the cotangent that has just arrived. Nothing is kept for later.
    pub(super) fn tick(&mut self, at: At) -> Result<()> {
        self.wait_for_activations(at)?;
        let turn = self.forward(at)?;
        self.send_activations(at)?;
        if self.cotangent(at)? {
            self.vjp(at)?;
            drop(turn);
            self.send_cotangents(at)?;
            self.count_backward_step(at)?;
        }
        self.end_tick(at)
    }

    /// The frame (module 1), or the main input and the skips: those that arrive now, else the one held.
    fn wait_for_activations(&mut self, at: At) -> Result<()> {
        if self.source.is_some() {
            self.read_frame(at)?;
            return self.decide(at);
        }
        self.watch.enter(Phase::WaitActivations);
        for (k, (edge, arrives)) in self.inputs.iter_mut().zip(&self.plan[at.step].receive).enumerate() {
            let Some(sent_at) = *arrives else { continue };
            let due = header(Kind::Activation, edge.id, at.clip, sent_at, self.batch, edge.spec.shape);
            let flags = edge.waits.time(|| self.compute.receive_input(k, &mut edge.activations, &due))?;
            if edge.spec.edge.is_main() && at.step == self.decision_step {
                self.decision = flags;
            }
        }
        Ok(())
    }

    /// Module 1, once a clip: what to do behind it (see [`super::stop`]).
    fn decide(&mut self, at: At) -> Result<()> {
        if let Some(decider) = self.decider.as_mut().filter(|_| at.step == self.decision_step) {
            self.watch.enter(Phase::Other);
            let own = if self.failure.is_some() { UNDO } else { 0 };
            self.decision = decider.decide(&self.requests, own, at.clip, at.step)?;
        }
        Ok(())
    }

    /// The turn goes on if nothing has to be waited for: what the backward pass needs then is in the caches still.
    fn forward(&mut self, at: At) -> Result<Option<Turn>> {
        self.watch.enter(Phase::Turn);
        let pass = self.pass(at);
        let turn = self.seat.take();
        self.watch.enter(Phase::Forward);
        self.compute.forward(&mut self.module, &pass)?;
        Ok(self.waits_for_nothing(at)?.then_some(turn))
    }

    /// Whether y can be sent and the step's cotangents have come. A GPU's passes are launched and then waited for.
    fn waits_for_nothing(&self, at: At) -> Result<bool> {
        let plan = &self.plan[at.step];
        let mut ready = self.compute.is_host();
        for (edge, (used, due)) in self.outputs.iter().zip(plan.send.iter().zip(&plan.cotangent)) {
            ready = ready && (!used || edge.activations.ready()?);
            if let (Some(_), Some((_, receiver))) = (due, &edge.cotangents) {
                ready = ready && receiver.ready()?;
            }
        }
        match &self.loss {
            Some(LossEnd { head, truth: Some((_, receiver)), .. }) if plan.loss && !head.needs_labels() => {
                Ok(ready && receiver.ready()?)
            }
            _ => Ok(ready),
        }
    }

    /// Sends y, averaged down to the receiver's height and width, along the edges on which it is ever used.
    fn send_activations(&mut self, at: At) -> Result<()> {
        let edges = self.outputs.iter_mut().zip(&self.plan[at.step].send).enumerate();
        for (k, (edge, _)) in edges.filter(|(_, (_, used))| **used) {
            if edge.spec.pool != (1, 1) {
                self.watch.enter(Phase::Turn);
                let _turn = self.seat.take();
                self.watch.enter(Phase::Forward);
                self.compute.pool(k, edge.spec.pool)?;
            }
            self.watch.enter(Phase::Send);
            let head = header(Kind::Activation, edge.id, at.clip, at.step, self.batch, edge.spec.shape);
            self.compute.send_output(k, &mut edge.activations, &head.stamped(at.tick, self.decision))?;
        }
        Ok(())
    }

    /// gᵢ(t): at module D the true gradient of this step's loss; elsewhere the sum of the cotangents that module i's
    /// receivers computed one tick ago. Whether there is one.
    fn cotangent(&mut self, at: At) -> Result<bool> {
        if self.plan[at.step].loss {
            return self.loss_gradient(at);
        }
        self.see_activations_off(at)?;
        let plan = &self.plan[at.step];
        for (k, (edge, computed_at)) in self.outputs.iter_mut().zip(&plan.cotangent).enumerate() {
            let (Some(computed_at), Some((id, receiver))) = (*computed_at, edge.cotangents.as_mut()) else { continue };
            self.watch.enter(Phase::WaitCotangents);
            let due = header(Kind::Cotangent, *id, at.clip, computed_at, self.batch, edge.spec.shape);
            let asked = edge.waits.time(|| self.compute.receive_cotangent(k, receiver, &due))?;
            self.requests.raise(asked);
            if !self.compute.cotangent_is_finite()? {
                let text =
                    format!("the cotangent that module {} computed at its step {computed_at}", edge.spec.edge.to);
                let compute = &mut self.compute;
                left_out(self.on_nonfinite, &mut self.skipped, not_finite(&text), || compute.clear_cotangent())?;
            }
            let computes = self.compute.has_sum() || edge.spec.pool != (1, 1);
            let _turn = computes.then(|| {
                self.watch.enter(Phase::Turn);
                self.seat.take()
            });
            self.watch.enter(Phase::Backward);
            self.compute.add_cotangent(edge.spec.pool)?;
        }
        Ok(self.compute.has_sum())
    }

    fn vjp(&mut self, at: At) -> Result<()> {
        self.watch.enter(Phase::Turn);
        let pass = self.pass(at);
        let _turn = self.seat.take();
        self.watch.enter(Phase::Backward);
        // Frames need no gradient.
        let wanted = if self.source.is_some() { &[false][..] } else { &self.plan[at.step].wanted };
        self.compute.vjp(&mut self.module, &pass, wanted)
    }

    fn send_cotangents(&mut self, at: At) -> Result<()> {
        self.watch.enter(Phase::Send);
        let asked = self.requests.pending();
        for (k, edge) in self.inputs.iter_mut().enumerate() {
            if let Some((id, sender)) = edge.cotangents.as_mut() {
                let head = header(Kind::Cotangent, *id, at.clip, at.step, self.batch, edge.spec.shape);
                self.compute.send_cotangent(k, sender, &head.stamped(at.tick, asked))?;
            }
        }
        Ok(())
    }

    /// Counts Δᵢ(t) into the mean and, when steps are what counts, updates.
    fn count_backward_step(&mut self, at: At) -> Result<()> {
        let Some(update) = &mut self.update else { return Ok(()) };
        update.steps += 1;
        match update.every {
            UpdateEvery::Steps(every) if update.steps == every => self.apply_update(at.clip, at.step),
            _ => Ok(()),
        }
    }

    /// Module 1: this step's frame; and this step's target, if module D will have a loss, on its way.
    fn read_frame(&mut self, at: At) -> Result<()> {
        self.watch.enter(Phase::Data);
        let read = if self.failure.is_some() { None } else { Some(self.frame_and_target(at)) };
        let (x, target) = match read {
            Some(Ok(read)) => read,
            Some(Err(e)) => {
                self.give_up(self.locate(at, e), at.step)?;
                self.without_frames(at)?
            }
            None => self.without_frames(at)?,
        };
        let Some(source) = &mut self.source else { return Err(Error::Run("no frames here".into())) };
        if let Some(target) = target {
            match &mut source.truth {
                Some((id, sender)) => {
                    let head = header(Kind::Target, *id, at.clip, at.step, self.batch, source.shape);
                    send(sender, &head.stamped(at.tick, 0), &target)?;
                }
                None => self.compute.set_target(target)?,
            }
        }
        self.compute.set_input(0, x)
    }

    fn frame_and_target(&mut self, at: At) -> Result<(Tensor, Option<Tensor>)> {
        let Some(source) = &mut self.source else { return Err(Error::Run("no frames here".into())) };
        let x = source.stream.frame(at.step)?;
        let target = source.target_of(at.step).map(|t| source.stream.target(t)).transpose()?;
        Ok((x, target))
    }

    /// What stands for frames that cannot be read: zeros, and a target that counts for nothing.
    fn without_frames(&self, at: At) -> Result<(Tensor, Option<Tensor>)> {
        let Some(source) = &self.source else { return Err(Error::Run("no frames here".into())) };
        let all = |value: f32| full(value, self.batch, source.shape);
        Ok((all(0.0)?, source.target_of(at.step).map(|_| all(f32::NAN)).transpose()?))
    }

    /// Module D: the loss of this step's output against the label or the target frame, and whether there is a gradient.
    fn loss_gradient(&mut self, at: At) -> Result<bool> {
        let training = self.update.is_some();
        let Some(end) = &mut self.loss else { return Err(Error::Run("no loss here".into())) };
        if let Some((id, receiver)) = end.truth.as_mut().filter(|_| !end.head.needs_labels()) {
            self.watch.enter(Phase::WaitActivations);
            let due = header(Kind::Target, *id, at.clip, at.step, self.batch, end.shape);
            self.compute.receive_target(receiver, &due)?;
        }
        self.watch.enter(Phase::Backward);
        match self.compute.loss(&mut end.head, training) {
            Err(e @ Error::NonFinite(_)) if training => {
                let compute = &mut self.compute;
                left_out(self.on_nonfinite, &mut self.skipped, e, || compute.leave_loss_out())?;
            }
            result => result?,
        }
        Ok(training)
    }
}
