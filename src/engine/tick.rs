//! THE loop: what a module does at every tick.
//!
//! Every module works at every tick: it takes the newest activation from below and the newest cotangent from above,
//! though they come from different frames, and never waits for anything older (Sideways, Malinowski et al., CVPR
//! 2020, section 3; with skips, arXiv 2106.08318). Within a tick the order hides the transfers: y travels while the
//! backward pass computes, the cotangents while the next forward pass does.

use candle_core::{Device, Tensor};

use super::stop::UNDO;
use super::worker::{At, Worker, header, left_out, not_finite, receive, send};
use crate::config::UpdateEvery;
use crate::kernels::activation;
use crate::metrics::Phase;
use crate::model::module::{pool_for_edge, pool_for_edge_vjp};
use crate::transport::Kind;
use crate::{Error, Result};

impl Worker {
    /// One tick: forward with what is there, then one vector–Jacobian product at these same fresh activations and
    /// present parameters, with the cotangent that has just arrived. Nothing is kept for later.
    pub(super) fn tick(&mut self, at: At) -> Result<()> {
        let inputs = self.wait_for_activations(at)?;
        let y = self.forward(&inputs, at)?;
        self.send_activations(&y, at)?;
        if let Some(g) = self.cotangent(&y, at)? {
            let cotangents = self.vjp(&g, at)?;
            self.send_cotangents(&cotangents, at)?;
            self.count_backward_step(at)?;
        }
        self.tape.clear();
        Ok(())
    }

    /// The frame (module 1), or the main input and the skips: those that arrive now, else the one held.
    fn wait_for_activations(&mut self, at: At) -> Result<Vec<Tensor>> {
        if self.source.is_some() {
            let frame = self.read_frame(at)?;
            self.decide(at)?;
            return Ok(vec![frame]);
        }
        self.watch.enter(Phase::WaitActivations);
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for (edge, arrives) in self.inputs.iter_mut().zip(&self.plan[at.step].receive) {
            if let Some(sent_at) = *arrives {
                let due = header(Kind::Activation, edge.id, at.clip, sent_at, self.batch, edge.spec.shape);
                let (activation, flags) = edge.waits.time(|| receive(&mut edge.activations, &due))?;
                edge.held = Some(activation);
                if edge.spec.edge.is_main() && at.step == self.decision_step {
                    self.decision = flags;
                }
            }
            let held = edge.held.clone();
            inputs.push(held.ok_or_else(|| Error::Run(format!("{}: nothing to hold", edge.spec.edge)))?);
        }
        Ok(inputs)
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

    fn forward(&mut self, inputs: &[Tensor], at: At) -> Result<Tensor> {
        self.watch.enter(Phase::Turn);
        let pass = self.pass(at);
        let _turn = self.turns.take();
        self.watch.enter(Phase::Forward);
        self.module.forward(inputs, &pass, &mut self.tape)
    }

    /// Sends y, averaged down to the receiver's height and width, along the edges on which it is ever used.
    fn send_activations(&mut self, y: &Tensor, at: At) -> Result<()> {
        for (edge, _) in self.outputs.iter_mut().zip(&self.plan[at.step].send).filter(|(_, used)| **used) {
            let (fh, fw) = edge.spec.pool;
            let pooled = match (fh, fw) {
                (1, 1) => y.clone(),
                _ => {
                    self.watch.enter(Phase::Turn);
                    let _turn = self.turns.take();
                    self.watch.enter(Phase::Forward);
                    pool_for_edge(y, fh, fw)?
                }
            };
            self.watch.enter(Phase::Send);
            let head = header(Kind::Activation, edge.id, at.clip, at.step, self.batch, edge.spec.shape);
            send(&mut edge.activations, &head.stamped(at.tick, self.decision), &pooled)?;
        }
        Ok(())
    }

    /// gᵢ(t): at module D the true gradient of this step's loss; elsewhere the sum of the cotangents that module i's
    /// receivers computed one tick ago. `None` if there is none.
    fn cotangent(&mut self, y: &Tensor, at: At) -> Result<Option<Tensor>> {
        let plan = &self.plan[at.step];
        if plan.loss {
            return self.loss_gradient(y, at);
        }
        let mut sum: Option<Tensor> = None;
        for (edge, computed_at) in self.outputs.iter_mut().zip(&plan.cotangent) {
            let (Some(computed_at), Some((id, receiver))) = (*computed_at, edge.cotangents.as_mut()) else { continue };
            self.watch.enter(Phase::WaitCotangents);
            let due = header(Kind::Cotangent, *id, at.clip, computed_at, self.batch, edge.spec.shape);
            let (c, asked) = edge.waits.time(|| receive(receiver, &due))?;
            self.requests.raise(asked);
            let c = if activation::all_finite(&c)? {
                c
            } else {
                let text =
                    format!("the cotangent that module {} computed at its step {computed_at}", edge.spec.edge.to);
                left_out(self.on_nonfinite, &mut self.skipped, not_finite(&text), || Ok(c.zeros_like()?))?
            };
            let (fh, fw) = edge.spec.pool;
            if sum.is_none() && (fh, fw) == (1, 1) {
                sum = Some(c);
                continue;
            }
            self.watch.enter(Phase::Turn);
            let _turn = self.turns.take();
            self.watch.enter(Phase::Backward);
            let c = pool_for_edge_vjp(&c, fh, fw)?;
            sum = Some(match sum {
                Some(sum) => activation::add(&sum, &c)?,
                None => c,
            });
        }
        Ok(sum)
    }

    fn vjp(&mut self, g: &Tensor, at: At) -> Result<Vec<Option<Tensor>>> {
        self.watch.enter(Phase::Turn);
        let pass = self.pass(at);
        let _turn = self.turns.take();
        self.watch.enter(Phase::Backward);
        // Frames need no gradient.
        let wanted = if self.source.is_some() { &[false][..] } else { &self.plan[at.step].wanted };
        self.module.vjp(g, &pass, &mut self.tape, wanted)
    }

    fn send_cotangents(&mut self, cotangents: &[Option<Tensor>], at: At) -> Result<()> {
        self.watch.enter(Phase::Send);
        let asked = self.requests.pending();
        for (edge, c) in self.inputs.iter_mut().zip(cotangents) {
            if let (Some(c), Some((id, sender))) = (c, edge.cotangents.as_mut()) {
                let head = header(Kind::Cotangent, *id, at.clip, at.step, self.batch, edge.spec.shape);
                send(sender, &head.stamped(at.tick, asked), c)?;
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
    fn read_frame(&mut self, at: At) -> Result<Tensor> {
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
            match (&mut source.truth, &mut self.loss) {
                (Some((id, sender)), _) => {
                    let head = header(Kind::Target, *id, at.clip, at.step, self.batch, source.shape);
                    send(sender, &head.stamped(at.tick, 0), &target)?;
                }
                (None, Some(end)) => end.target = Some(target),
                (None, None) => {}
            }
        }
        Ok(x)
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
        let [h, w, c] = source.shape;
        let all = |value: f32| Tensor::full(value, (self.batch, h, w, c), &Device::Cpu);
        Ok((all(0.0)?, source.target_of(at.step).map(|_| all(f32::NAN)).transpose()?))
    }

    /// Module D: the loss of this step's output against the label or the target frame, and its gradient.
    fn loss_gradient(&mut self, y: &Tensor, at: At) -> Result<Option<Tensor>> {
        let training = self.update.is_some();
        let Some(end) = &mut self.loss else { return Err(Error::Run("no loss here".into())) };
        let target = match &mut end.truth {
            Some((id, receiver)) if !end.head.needs_labels() => {
                self.watch.enter(Phase::WaitActivations);
                let (_, h, w, c) = y.dims4()?;
                Some(receive(receiver, &header(Kind::Target, *id, at.clip, at.step, self.batch, [h, w, c]))?.0)
            }
            _ => end.target.take(),
        };
        self.watch.enter(Phase::Backward);
        match end.head.loss(y, target.as_ref(), training) {
            Err(e @ Error::NonFinite(_)) if training => {
                left_out(self.on_nonfinite, &mut self.skipped, e, || Ok(Some(y.zeros_like()?)))
            }
            result => result,
        }
    }
}
