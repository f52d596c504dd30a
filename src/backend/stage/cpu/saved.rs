//! What a checkpoint holds of a stage, and how it comes back.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::CpuStage;
use crate::backend::stage::Snapshot;
use crate::{Error, Result};

/// Name of the count of backward passes since the last update, a module (only where updates do not fall on batches' ends).
const STEPS: &str = "progress.steps";

/// How the names of moving averages begin.
pub const EMA: &str = "ema.";

/// How strictly a checkpoint must fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Every parameter with its shape: resuming, evaluating.
    Exact,
    /// The same, and where the checkpoint has a moving average of a parameter, that in its place: evaluating.
    Averaged,
    /// The parameters alone, with their shapes: looking at a network as it was trained.
    Weights,
    /// Initial weights: the last layer may have another size and starts anew.
    NewHead,
    /// Initial weights: the parameters that are there, with their shapes; the others keep their initial values.
    Partial,
}

impl CpuStage {
    /// Whether a checkpoint's tensor `name` belongs to this module.
    ///
    /// # Errors
    /// None of its own.
    pub fn owns(&mut self) -> Result<impl Fn(&str) -> bool + use<>> {
        let names = self.names()?;
        Ok(move |name: &str| {
            let kinds = ["optimizer.", "gradient.", EMA];
            let name = kinds.iter().find_map(|kind| name.strip_prefix(kind)).unwrap_or(name);
            let name = name.strip_prefix(STEPS).map_or(name, |rest| rest.trim_start_matches('.'));
            let belongs =
                |n: &String| name.strip_prefix(n.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('.'));
            names.iter().any(belongs)
        })
    }

    fn names(&mut self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        self.module.visit(&mut |p| {
            names.push(p.name.clone());
            Ok(())
        })?;
        Ok(names)
    }

    /// Takes parameters, and with [`Fit::Exact`] the optimiser's state and an unfinished sum of gradients, from a checkpoint made
    /// at any partition. `from` names it in errors; `last_layer` is how the names of the last layer's parameters begin, which a
    /// new head may replace.
    ///
    /// # Errors
    /// [`Error::Input`] naming the parameter that is missing or has another shape.
    pub fn load(&mut self, mut tensors: HashMap<String, Tensor>, fit: Fit, from: &str, last_layer: &str) -> Result<()> {
        self.module.visit(&mut |p| {
            let average = if fit == Fit::Averaged { tensors.remove(&format!("{EMA}{}", p.name)) } else { None };
            match average.or(tensors.remove(&p.name)) {
                Some(value) if value.shape() == p.value.shape() => p.value = value.to_dtype(p.value.dtype())?,
                None if fit == Fit::Partial => {}
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
            // An unfinished sum of gradients is the same run's alone.
            p.grad = tensors.remove(&format!("gradient.{}", p.name)).filter(|_| fit == Fit::Exact && p.trainable);
            Ok(())
        })?;
        if let Some(average) = &mut self.average {
            let module = &mut self.module;
            let mut of = |name: &str| tensors.remove(&format!("{EMA}{name}")).filter(|_| fit == Fit::Exact);
            average.load(&mut |f| module.visit(f), &mut of)?;
        }
        let Some(optimizer) = self.optimizer.as_mut().filter(|_| fit == Fit::Exact) else { return Ok(()) };
        let module = &mut self.module;
        let mut state = |name: &str| tensors.remove(&format!("optimizer.{name}"));
        optimizer.load_state(&mut |f| module.visit(f), &mut state)?;
        match tensors.iter().find(|(name, _)| name.starts_with(STEPS)) {
            Some((name, steps)) => {
                let steps = steps.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
                let steps = steps.first().ok_or_else(|| Error::input(format!("{from}: {name} is empty")))?;
                self.steps = u64::from(*steps);
            }
            // Cut elsewhere than it was: whose count it is cannot be told, so the unfinished sum starts anew.
            None => self.forget_gradients()?,
        }
        Ok(())
    }

    /// Computes with the moving average of the parameters, if there is one, or with themselves.
    pub(super) fn use_average(&mut self, averaged: bool) -> Result<()> {
        let CpuStage { module, average: Some(average), .. } = self else { return Ok(()) };
        if self.averaged != averaged {
            average.swap(&mut |f| module.visit(f))?;
            self.averaged = averaged;
        }
        Ok(())
    }

    pub(super) fn forget_gradients(&mut self) -> Result<()> {
        self.steps = 0;
        self.module.visit(&mut |p| {
            p.grad = None;
            Ok(())
        })
    }

    /// Everything that a checkpoint holds.
    pub(super) fn saved(&mut self) -> Result<Snapshot> {
        self.use_average(false)?;
        let unfinished = self.steps > 0;
        let mut tensors = Vec::new();
        let mut first = None;
        self.module.visit(&mut |p| {
            first.get_or_insert_with(|| p.name.clone());
            tensors.push((p.name.clone(), p.value.clone()));
            if unfinished && let Some(grad) = &p.grad {
                // Values are replaced, gradients added to in place: what is written later needs its own.
                tensors.push((format!("gradient.{}", p.name), grad.copy()?));
            }
            Ok(())
        })?;
        if let Some(average) = &self.average {
            tensors.extend(average.values().iter().map(|(name, value)| (format!("{EMA}{name}"), value.clone())));
        }
        if let Some(optimizer) = &self.optimizer {
            let state = optimizer.state()?;
            tensors.extend(state.into_iter().map(|(name, tensor)| (format!("optimizer.{name}"), tensor)));
            if unfinished {
                tensors.push(unfinished_steps(first.as_deref(), self.spec.index, self.steps)?);
            }
        }
        Ok(tensors)
    }
}

/// The count of backward passes since the last update as a checkpoint has it: filed under the module's first parameter, since
/// modules have no global names.
pub(in crate::backend) fn unfinished_steps(first: Option<&str>, index: usize, steps: u64) -> Result<(String, Tensor)> {
    let first = first.map_or_else(|| format!("module.{index}"), String::from);
    Ok((format!("{STEPS}.{first}"), Tensor::new(&[steps as u32], &Device::Cpu)?))
}
