//! A GPU's parameters between clips: updates, what was counted, and their way to the host and back.

use std::collections::HashMap;

use candle_core::Tensor;

use super::Device;
use crate::backend::cuda::Element;
use crate::backend::cuda::optim::Optimizer;
use crate::comm::all_reduce::ReplicaAverage;
use crate::nn::module;
use crate::pipeline::head::Head;
use crate::pipeline::worker::Update;
use crate::trainer::state;
use crate::{Error, Result};

impl Device {
    pub(in crate::pipeline::compute) fn update(
        &mut self,
        _: &mut module::Module,
        update: &mut Update,
        clip: u64,
        step: usize,
    ) -> Result<()> {
        if let Some(average) = &mut update.average {
            self.average_gradients(average, clip, step)?;
        }
        let Some(optimizer) = &mut self.optimizer else { return Ok(()) };
        let factor = update.schedule.factor(clip, update.total_clips);
        optimizer.step(&self.gpu, factor, update.steps as f64, update.clip_norm)?;
        update.lr = factor * update.rate;
        update.steps = 0;
        self.updated = true;
        Ok(())
    }

    /// Replaces the gradients by their mean over replicas, by way of host memory.
    fn average_gradients(&mut self, average: &mut ReplicaAverage, clip: u64, step: usize) -> Result<()> {
        let (gpu, mut all) = (&self.gpu, Vec::new());
        self.module.visit(&mut |p| {
            if let Some(grad) = &p.grad {
                all.extend(gpu.download(grad)?);
            }
            Ok(())
        })?;
        average.average(&mut all, clip, step as u32)?;
        let mut rest = all.as_slice();
        self.module.visit(&mut |p| {
            let Some(grad) = &p.grad else { return Ok(()) };
            let (own, others) = rest.split_at(grad.len());
            rest = others;
            gpu.write(grad, own)
        })
    }

    /// Waits for the clip's last launch. Errors about values that are not finite are told apart by what they are about, all of
    /// them.
    pub(in crate::pipeline::compute) fn tally(
        &mut self,
        head: Option<&mut Head>,
        update: Option<&mut Update>,
    ) -> Result<Vec<Error>> {
        let mut errors = Vec::new();
        let flagged = self.gpu.download(&self.flags)?[0];
        if flagged > 0.0 {
            self.gpu.zero(&self.flags)?;
            errors.push(Error::NonFinite(format!(
                "{flagged} of the cotangents and losses' gradients of this clip are not finite"
            )));
        }
        if let (Some(head), Some(loss)) = (head, &self.loss)
            && loss.steps > 0
        {
            let sums = self.gpu.download(&loss.sums)?;
            let logits = self.gpu.download(&loss.logits)?;
            let labels: Vec<i32> = self.gpu.download(&loss.labels)?.iter().map(|x| x.to_bits() as i32).collect();
            match head.count(sums[0], sums[1], &logits, &labels, loss.steps) {
                Err(e @ Error::NonFinite(_)) => errors.push(e),
                result => result?,
            }
        }
        if let (Some(optimizer), Some(update), true) = (&mut self.optimizer, update, self.updated) {
            let (norm, finite) = optimizer.outcome(&self.gpu)?;
            update.grad_norm = norm;
            if !finite {
                optimizer.undo_count();
                self.forget_gradients()?;
                errors.push(Error::NonFinite(format!(
                    "a gradient is not finite (norm {norm}): try a smaller learning rate, warm-up, or clipping"
                )));
            }
        }
        self.updated = false;
        Ok(errors)
    }

    fn forget_gradients(&mut self) -> Result<()> {
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.grad.as_ref().map_or(Ok(()), |grad| gpu.zero(grad)))
    }

    /// Copies parameters and the optimiser's memory to the host's `module` and `update`, gradients too where an update is
    /// not due yet. Waits.
    fn download(&mut self, module: &mut module::Module, update: Option<&mut Update>) -> Result<()> {
        let gpu = &self.gpu;
        let unfinished = update.as_ref().is_some_and(|update| update.steps > 0);
        let (mut values, mut gradients) = (HashMap::new(), HashMap::new());
        self.module.visit(&mut |p| {
            values.insert(p.name.clone(), p.read(gpu, &p.value)?);
            if let (Some(grad), true) = (&p.grad, unfinished) {
                gradients.insert(p.name.clone(), p.read(gpu, grad)?);
            }
            Ok(())
        })?;
        module.visit(&mut |p| {
            if let Some(value) = values.remove(&p.name) {
                p.value = value;
            }
            p.grad = gradients.remove(&p.name);
            Ok(())
        })?;
        if let (Some(optimizer), Some(update)) = (&self.optimizer, update) {
            let mut state = optimizer.state(gpu, &mut self.module)?;
            update.optimizer.load_state(&mut |f| module.visit(f), &mut |name| state.remove(name))?;
        }
        Ok(())
    }

    pub(in crate::pipeline::compute) fn snapshot(
        &mut self,
        module: &mut module::Module,
        mut update: Option<&mut Update>,
        index: usize,
    ) -> Result<Vec<(String, Tensor)>> {
        self.download(module, update.as_deref_mut())?;
        state::snapshot(module, update.as_deref(), index)
    }

    /// In device memory: nothing is waited for.
    pub(in crate::pipeline::compute) fn mark(
        &mut self,
        _: &mut module::Module,
        update: Option<&Update>,
        _: usize,
    ) -> Result<()> {
        let mut own = Vec::new();
        self.module.visit(&mut |p| {
            own.extend([Some(p.value.clone()), p.grad.clone()].into_iter().flatten());
            Ok(())
        })?;
        own.extend(self.optimizer.iter().flat_map(|o| o.arrays().cloned()));
        if self.marked.is_empty() {
            for array in &own {
                self.marked.push((array.clone(), self.gpu.array(array.len(), Element::F32)?));
            }
        }
        self.marked.iter().try_for_each(|(array, copy)| self.gpu.copy(array, copy))?;
        let steps = update.map_or(0, |update| update.steps);
        self.marked_steps = (steps, self.optimizer.as_ref().map_or(0, Optimizer::steps));
        Ok(())
    }

    /// Goes back to the module as it was at the last [`Device::mark`].
    pub(in crate::pipeline::compute) fn rewind(
        &mut self,
        module: &mut module::Module,
        mut update: Option<&mut Update>,
        index: usize,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        self.marked.iter().try_for_each(|(array, copy)| self.gpu.copy(copy, array))?;
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.changed(gpu))?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_steps(self.marked_steps.1);
        }
        if let Some(update) = &mut update {
            update.steps = self.marked_steps.0;
        }
        self.snapshot(module, update, index).map(Some)
    }
}
