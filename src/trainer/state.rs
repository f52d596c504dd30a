//! What outlives a clip: updates of the parameters, and their way into and out of checkpoints.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::writer::Writer;
use crate::nn::module::Module;
use crate::pipeline::metrics::Phase;
use crate::pipeline::stop::ENDS;
use crate::pipeline::worker::{Update, Worker, left_out};
use crate::{Error, Result};

/// Name of the count of steps since the last update, per module (only where updates do not fall on clips' ends).
const STEPS: &str = "progress.steps";

/// When a worker writes its module, and what writes it.
pub struct Saver {
    /// Writes into the run's `checkpoints` folder.
    pub writer: Writer,
    /// When.
    pub due: Due,
}

/// When checkpoints are written without being asked for.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// Batches of clips between checkpoints.
    pub every: u64,
    /// The batch of clips behind the last one of this run: a checkpoint is written there too.
    pub end: u64,
}

impl Due {
    /// Is a checkpoint due when `clips` batches are done?
    pub fn at(&self, clips: u64) -> bool {
        clips.is_multiple_of(self.every) || clips == self.end
    }
}

impl Worker {
    /// Applies the optimiser to G, the mean of the pseudo-gradients since the last update (averaged over replicas).
    pub(crate) fn apply_update(&mut self, clip: u64, step: usize) -> Result<()> {
        self.watch.enter(Phase::Optimizer);
        let Some(update) = &mut self.update else { return Ok(()) };
        match self.compute.update(&mut self.module, update, clip, step) {
            Err(e @ Error::NonFinite(_)) => {
                left_out(self.on_nonfinite, &mut self.skipped, e, || update.forget(&mut self.module))
            }
            result => result,
        }
    }

    /// Hands the module over to be written if a checkpoint is due after `clip`, or was decided on; at the end of the run
    /// waits until it is written. Returns the newest checkpoint that this worker's part of is on disk.
    pub(crate) fn save(&mut self, clip: u64) -> Result<Option<u64>> {
        let Some(saver) = &self.saver else { return Ok(None) };
        let (done, last) = (clip + 1, clip + 1 == saver.due.end || self.decision & ENDS != 0);
        let due = saver.due.at(done) || self.decision != 0;
        let tensors = if due { Some(self.snapshot()?) } else { None };
        let Some(saver) = &mut self.saver else { return Ok(None) };
        if let Some(tensors) = tensors {
            saver.writer.begin(done, tensors)?;
        }
        if !last {
            return saver.writer.written();
        }
        let written = saver.writer.wait()?;
        if written != Some(done) {
            return Err(Error::Run(format!(
                "the run's last checkpoint, of {done} batches of clips, could not be written (see above)"
            )));
        }
        Ok(written)
    }

    /// Undoes `clip`: writes the module as it was before it, if no checkpoint of that was written yet.
    pub(crate) fn save_before(&mut self, clip: u64) -> Result<Option<u64>> {
        let before = self.compute.rewind(&mut self.module, self.update.as_mut(), self.index)?;
        let (Some(saver), Some(before)) = (&mut self.saver, before) else { return Ok(None) };
        if saver.writer.wait()? != Some(clip) {
            saver.writer.begin(clip, before)?;
        }
        match saver.writer.wait()? {
            Some(written) if written == clip => Ok(Some(written)),
            _ => Err(Error::Run(format!("the checkpoint of {clip} batches of clips could not be written (see above)"))),
        }
    }

    /// Writes the module as it is before the first clip.
    pub(crate) fn save_start(&mut self) -> Result<Option<u64>> {
        if self.saver.is_none() {
            return Ok(None);
        }
        let tensors = self.snapshot()?;
        let Some(saver) = &mut self.saver else { return Ok(None) };
        saver.writer.begin(0, tensors)?;
        saver.writer.wait()
    }

    /// The module as it is.
    fn snapshot(&mut self) -> Result<Vec<(String, Tensor)>> {
        self.compute.snapshot(&mut self.module, self.update.as_mut(), self.index)
    }

    /// At a clip's end, what a GPU has counted in it: losses, and what was not finite.
    pub(crate) fn tally(&mut self) -> Result<()> {
        self.watch.enter(Phase::Backward);
        let head = self.loss.as_mut().map(|end| &mut end.head);
        for error in self.compute.tally(head, self.update.as_mut())? {
            left_out(self.on_nonfinite, &mut self.skipped, error, || Ok(()))?;
        }
        Ok(())
    }
}

impl Update {
    /// One update of `module` at the learning rate of `clip`.
    ///
    /// # Errors
    /// [`Error::Run`] if the gradient is not finite; [`Error::Transport`] if a replica is gone.
    pub fn apply(&mut self, module: &mut Module, clip: u64, step: usize) -> Result<()> {
        if let Some(average) = &mut self.average {
            average_gradients(module, average, clip, step)?;
        }
        let factor = self.schedule.factor(clip, self.total_clips);
        let stats = self.optimizer.step(&mut |f| module.visit(f), factor, self.steps as f64, self.clip_norm)?;
        (self.grad_norm, self.lr) = (stats.grad_norm, factor * self.rate);
        self.steps = 0;
        Ok(())
    }
}

impl Update {
    /// Forgets the gradients since the last update.
    ///
    /// # Errors
    /// None of its own.
    pub fn forget(&mut self, module: &mut Module) -> Result<()> {
        self.steps = 0;
        module.visit(&mut |p| {
            p.grad = None;
            Ok(())
        })
    }
}

/// Replaces the module's gradients by their mean over its replicas.
fn average_gradients(
    module: &mut Module,
    average: &mut crate::comm::all_reduce::ReplicaAverage,
    clip: u64,
    step: usize,
) -> Result<()> {
    let mut all: Vec<f32> = Vec::new();
    module.visit(&mut |p| {
        if p.trainable {
            match &p.grad {
                Some(grad) => all.extend(grad.flatten_all()?.to_vec1::<f32>()?),
                None => all.resize(all.len() + p.value.elem_count(), 0.0),
            }
        }
        Ok(())
    })?;
    average.average(&mut all, clip, step as u32)?;
    let mut at = 0;
    module.visit(&mut |p| {
        if p.trainable {
            let words = p.value.elem_count();
            p.grad = Some(Tensor::from_slice(&all[at..at + words], p.value.shape(), &Device::Cpu)?);
            at += words;
        }
        Ok(())
    })
}

/// Everything of a module that must outlive the process, by global names: parameters and running statistics as they
/// are called, the optimiser's state as `optimizer.…`, an unfinished mean as `gradient.…` and `progress.…`.
pub fn snapshot(module: &mut Module, update: Option<&Update>, index: usize) -> Result<Vec<(String, Tensor)>> {
    let unfinished = update.is_some_and(|u| u.steps > 0);
    let mut tensors = Vec::new();
    module.visit(&mut |p| {
        tensors.push((p.name.clone(), p.value.clone()));
        if unfinished && let Some(grad) = &p.grad {
            // Values are replaced, gradients added to in place: what is written later needs its own.
            tensors.push((format!("gradient.{}", p.name), grad.copy()?));
        }
        Ok(())
    })?;
    if let Some(update) = update {
        let state = update.optimizer.state()?;
        tensors.extend(state.into_iter().map(|(name, tensor)| (format!("optimizer.{name}"), tensor)));
        if unfinished {
            let steps = Tensor::new(&[update.steps as u32], &Device::Cpu)?;
            tensors.push((format!("{STEPS}.{}", first_parameter(module, index)?), steps));
        }
    }
    Ok(tensors)
}

/// The name of a module's first parameter: what a per-module value is filed under, since modules have no global names.
fn first_parameter(module: &mut Module, index: usize) -> Result<String> {
    let mut first = None;
    module.visit(&mut |p| {
        first.get_or_insert_with(|| p.name.clone());
        Ok(())
    })?;
    Ok(first.unwrap_or_else(|| format!("module.{index}")))
}

/// How strictly a checkpoint must fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Every parameter with its shape: resuming, evaluating.
    Exact,
    /// Initial weights: the last layer may have another size and starts anew.
    NewHead,
}

/// Loads parameters (and, with `update`, the optimiser's state) of `module` from a checkpoint made at any partition.
///
/// # Errors
/// [`Error::Input`] naming the parameter that is missing or has another shape.
pub fn restore(
    module: &mut Module,
    update: Option<&mut Update>,
    checkpoint: &Checkpoint,
    fit: Fit,
    last_layer: &str,
) -> Result<()> {
    let mut names = Vec::new();
    module.visit(&mut |p| {
        names.push(p.name.clone());
        Ok(())
    })?;
    let bare = |name: &str| {
        let name = name.strip_prefix("optimizer.").or(name.strip_prefix("gradient.")).unwrap_or(name);
        name.strip_prefix(STEPS).map(|n| n.trim_start_matches('.')).unwrap_or(name).to_string()
    };
    let mut tensors: HashMap<String, Tensor> = checkpoint.load(|name| {
        let bare = bare(name);
        names.iter().any(|n| bare.strip_prefix(n.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    })?;
    let from = checkpoint.path().display().to_string();
    module.visit(&mut |p| {
        match tensors.remove(&p.name) {
            Some(value) if value.shape() == p.value.shape() => p.value = value.to_dtype(p.value.dtype())?,
            other if fit == Fit::NewHead && p.name.starts_with(last_layer) => {
                let found = other.map_or("absent".into(), |t| format!("{:?}", t.dims()));
                log::warn!("{from}: {} is {found}, {:?} here: the head starts anew", p.name, p.value.dims());
            }
            other => {
                let found = other.map_or("it is not there".into(), |t| format!("its shape is {:?}", t.dims()));
                return Err(Error::input(format!(
                    "{from}: parameter {} of shape {:?} is needed, but {found}: the checkpoint is of another network",
                    p.name,
                    p.value.dims()
                )));
            }
        }
        p.grad = tensors.remove(&format!("gradient.{}", p.name));
        Ok(())
    })?;
    if let Some(update) = update {
        update
            .optimizer
            .load_state(&mut |f| module.visit(f), &mut |name| tensors.remove(&format!("optimizer.{name}")))?;
        match tensors.iter().find(|(name, _)| name.starts_with(STEPS)) {
            Some((_, steps)) => update.steps = u64::from(steps.to_dtype(DType::U32)?.to_vec1::<u32>()?[0]),
            // Cut elsewhere than it was: whose count it is cannot be told, so the unfinished mean starts anew.
            None => module.visit(&mut |p| {
                p.grad = None;
                Ok(())
            })?,
        }
    }
    Ok(())
}
