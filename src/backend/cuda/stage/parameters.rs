//! A GPU's parameters between batches: what was counted, and their way to the host and back.

use std::collections::HashMap;

use super::CudaStage;
use crate::backend::cuda::module::Module;
use crate::backend::cuda::optim::Optimizer;
use crate::backend::cuda::{Element, Gpu};
use crate::backend::stage::{BatchEnd, EMA, NotFinite, Snapshot, unfinished_steps};
use crate::nn::module;
use crate::{Error, Result};

/// Gradients of an update that was not due yet when the checkpoint was written.
pub(super) fn restore_gradients(gpu: &Gpu, host: &mut module::Module, module: &mut Module) -> Result<()> {
    let mut gradients = HashMap::new();
    host.visit(&mut |p| {
        gradients.extend(p.grad.take().map(|grad| (p.name.clone(), grad)));
        Ok(())
    })?;
    module.visit(&mut |p| match (gradients.remove(&p.name), &p.grad) {
        (Some(tensor), Some(grad)) => p.write(gpu, &tensor, grad),
        _ => Ok(()),
    })
}

impl CudaStage {
    pub(super) fn download_gradients(&mut self) -> Result<Vec<f32>> {
        let (gpu, mut all) = (&self.gpu, Vec::new());
        self.module.visit(&mut |p| {
            if let Some(grad) = &p.grad {
                all.extend(gpu.download(grad)?);
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// Waits for the clip's last launch. All values that are not finite are named, each by what it is.
    pub(super) fn tally(&mut self) -> Result<BatchEnd> {
        let mut end = BatchEnd::default();
        let flagged = self.gpu.download(&self.flags)?[0];
        if flagged > 0.0 {
            self.gpu.zero(&self.flags)?;
            let text = format!("{flagged} of the cotangents and losses' gradients of this batch are not finite");
            end.not_finite.push(NotFinite(text));
        }
        if let Some(loss) = &mut self.loss {
            if loss.steps > 0 {
                let (sums, logits) = (self.gpu.download(&loss.sums)?, self.gpu.download(&loss.logits)?);
                match loss.head.count(sums[0], sums[1], &logits, loss.steps) {
                    Err(Error::NonFinite(text)) => end.not_finite.push(NotFinite(text)),
                    result => result?,
                }
            }
            end.score = Some(loss.head.end());
            end.logits = loss.head.logits().to_vec();
            end.labels = loss.head.labels().to_vec();
        }
        if let (Some(optimizer), true) = (&mut self.optimizer, self.updated) {
            let (norm, finite) = optimizer.outcome(&self.gpu)?;
            end.grad_norm = Some(norm);
            if !finite {
                optimizer.undo_count();
                self.forget_gradients()?;
                let text = "try a smaller learning rate, warm-up, or clipping";
                end.not_finite.push(NotFinite(format!("a gradient is not finite (norm {norm}): {text}")));
            }
        }
        self.updated = false;
        Ok(end)
    }

    fn forget_gradients(&mut self) -> Result<()> {
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.grad.as_ref().map_or(Ok(()), |grad| gpu.zero(grad)))
    }

    /// Computes with the moving average of the parameters, if there is one, or with themselves.
    pub(super) fn use_average(&mut self, averaged: bool) -> Result<()> {
        match &mut self.optimizer {
            Some(optimizer) => optimizer.use_average(&self.gpu, &mut self.module, averaged),
            None => Ok(()),
        }
    }

    /// Waits, and copies everything that a checkpoint holds.
    pub(super) fn download(&mut self) -> Result<Snapshot> {
        self.use_average(false)?;
        let (gpu, unfinished) = (self.gpu.clone(), self.steps > 0);
        let (mut tensors, mut first) = (Snapshot::new(), None);
        self.module.visit(&mut |p| {
            first.get_or_insert_with(|| p.name.clone());
            tensors.push((p.name.clone(), p.read(&gpu, &p.value)?));
            if let (Some(grad), true) = (&p.grad, unfinished) {
                tensors.push((format!("gradient.{}", p.name), p.read(&gpu, grad)?));
            }
            Ok(())
        })?;
        if let Some(optimizer) = &self.optimizer {
            let averages = optimizer.averages(&gpu, &mut self.module)?;
            tensors.extend(averages.into_iter().map(|(name, tensor)| (format!("{EMA}{name}"), tensor)));
            let state = optimizer.state(&gpu, &mut self.module)?;
            tensors.extend(state.into_iter().map(|(name, tensor)| (format!("optimizer.{name}"), tensor)));
            if unfinished {
                tensors.push(unfinished_steps(first.as_deref(), self.spec.index, self.steps)?);
            }
        }
        Ok(tensors)
    }

    /// In device memory: nothing is waited for.
    pub(super) fn remember(&mut self) -> Result<()> {
        self.use_average(false)?;
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
        self.marked_steps = Some((self.steps, self.optimizer.as_ref().map_or(0, Optimizer::steps)));
        Ok(())
    }

    /// Goes back to the module as it was when last remembered.
    pub(super) fn go_back(&mut self) -> Result<Option<Snapshot>> {
        let Some((steps, updates)) = self.marked_steps.take() else { return Ok(None) };
        self.marked.iter().try_for_each(|(array, copy)| self.gpu.copy(copy, array))?;
        let gpu = &self.gpu;
        self.module.visit(&mut |p| p.changed(gpu))?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_steps(updates);
        }
        self.steps = steps;
        self.download().map(Some)
    }
}
