//! What a tick on a GPU waits for, and what is done meanwhile: messages start as their copies arrive in host memory.
//!
//! On the CPU there is nothing to wait for: messages are started where they are made.

#[cfg(feature = "cuda")]
use super::compute::{Compute, Device};
use super::worker::{At, Worker};
#[cfg(feature = "cuda")]
use super::worker::{InEdge, OutEdge, header};
use crate::Result;
#[cfg(feature = "cuda")]
use crate::{comm::Kind, pipeline::metrics::Phase};

#[cfg(feature = "cuda")]
impl Worker {
    /// Starts y on its way as soon as it is there, until all edges have theirs or all cotangents that are due have come: the
    /// backward pass need not wait for y.
    pub(super) fn see_activations_off(&mut self, at: At) -> Result<()> {
        let Compute::Device(device) = &mut self.compute else { return Ok(()) };
        self.watch.enter(Phase::WaitCotangents);
        while !device.see_off(self.outputs.iter_mut().map(|edge| &mut edge.activations))? {
            let mut all = true;
            for (edge, due) in self.outputs.iter().zip(&self.plan[at.step].cotangent) {
                if let (Some(_), Some((_, receiver))) = (due, &edge.cotangents) {
                    all &= receiver.ready()?;
                }
            }
            if all {
                break;
            }
            give_back(device, &mut self.inputs, &mut self.outputs)?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Ends a tick: everything made in it is on its way, and all that came is used and given back. While the GPU is at it, the
    /// next tick's activations are copied to it.
    pub(super) fn end_tick(&mut self, at: At) -> Result<()> {
        if let Compute::Device(device) = &mut self.compute {
            self.watch.enter(Phase::Backward);
            let next = self.plan.get(at.step + 1);
            loop {
                let off = device.see_off(self.outputs.iter_mut().map(|edge| &mut edge.activations))?;
                let senders = self.inputs.iter_mut().map(|edge| edge.cotangents.as_mut().map(|(_, sender)| sender));
                let off = device.see_cotangents_off(senders)? && off;
                let arrives = next.map_or(&[][..], |plan| &plan.receive);
                for (k, (edge, sent_at)) in self.inputs.iter_mut().zip(arrives).enumerate() {
                    if let Some(sent_at) = *sent_at {
                        let shape = edge.spec.shape;
                        let due = header(Kind::Activation, edge.id, at.clip, sent_at, self.batch, shape);
                        device.prefetch(k, &mut edge.activations, &due)?;
                    }
                }
                // Nothing is held over from tick to tick: with that, and `delay` + 1 buffers a link, modules cannot wait for
                // one another in a circle.
                if give_back(device, &mut self.inputs, &mut self.outputs)? && off {
                    break;
                }
                std::thread::yield_now();
            }
        }
        self.compute.end_tick();
        Ok(())
    }
}

#[cfg(feature = "cuda")]
fn give_back(device: &mut Device, inputs: &mut [InEdge], outputs: &mut [OutEdge]) -> Result<bool> {
    let cotangents = outputs.iter_mut().map(|edge| edge.cotangents.as_mut().map(|(_, receiver)| receiver));
    device.give_back(inputs.iter_mut().map(|edge| &mut edge.activations), cotangents)
}

#[cfg(not(feature = "cuda"))]
impl Worker {
    pub(super) fn see_activations_off(&mut self, _: At) -> Result<()> {
        Ok(())
    }

    pub(super) fn end_tick(&mut self, _: At) -> Result<()> {
        self.compute.end_tick();
        Ok(())
    }
}
