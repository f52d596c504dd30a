//! Optimisers and learning-rate schedules: PyTorch's update rules, names and defaults.
//!
//! One optimiser belongs to one module and is stepped at the end of that module's own window: there is no global one.

mod average;
mod rate;
mod spec;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};

pub use average::Average;
pub use rate::LrSchedule;
pub use spec::OptimizerSpec;

use crate::backend::cpu::{Host, Real, by_dtype, update_together, vectorized};
use crate::nn::param::Param;
use crate::{Error, Result};

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Euclidean norm of the module's averaged gradient, before clipping.
    pub grad_norm: f64,
}

/// Something whose parameters can be visited, such as `|f| module.visit(f)`.
pub type Visit<'a> = &'a mut dyn FnMut(&mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()>;

/// What an optimiser remembers of one parameter.
struct Memory {
    steps: u64,
    buffers: Vec<Tensor>,
    /// Whether somebody else may hold the buffers: then an update replaces them, else it changes them in place.
    lent: AtomicBool,
}

impl Memory {
    fn new(steps: u64, buffers: Vec<Tensor>) -> Self {
        Memory { steps, buffers, lent: AtomicBool::new(true) }
    }
}

/// An update rule with its memory, for the parameters of one module.
pub struct Optimizer {
    spec: OptimizerSpec,
    memory: BTreeMap<String, Memory>,
}

impl Optimizer {
    /// An optimiser that remembers nothing yet.
    pub fn new(spec: OptimizerSpec) -> Self {
        Optimizer { spec, memory: BTreeMap::new() }
    }

    /// Its rule.
    pub fn spec(&self) -> OptimizerSpec {
        self.spec
    }

    /// Updates every trainable parameter that has a gradient, by that gradient over `divisor` (the number of steps summed
    /// in it), and clears it: the new value takes the gradient's memory, which nobody else may hold. `scale` multiplies the learning rate. With `clip_norm`, the gradients of all parameters
    /// together are scaled down to that norm where theirs is larger, as PyTorch's `clip_grad_norm_` does.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where the gradient is not finite: nothing is updated then. [`Error::Run`] where sizes differ.
    pub fn step(&mut self, visit: Visit, scale: f64, divisor: f64, clip_norm: Option<f64>) -> Result<StepStats> {
        let (mut squares, mut culprit) = (0.0, None);
        visit(&mut |p| {
            if let (Some(grad), true) = (&p.grad, p.trainable) {
                squares += by_dtype!(grad, T => sum_of_squares::<T>(grad))?;
                if !f64::is_finite(squares) {
                    culprit.get_or_insert_with(|| p.name.clone());
                }
            }
            Ok(())
        })?;
        let grad_norm = squares.sqrt() / divisor;
        if let Some(name) = culprit {
            return Err(Error::NonFinite(format!(
                "the gradient of {name} is not finite (norm {grad_norm}): try a smaller learning rate, warm-up, or clipping"
            )));
        }
        let clip = clip_norm.map_or(1.0, |most| (most / (grad_norm + 1e-6)).min(1.0));
        visit(&mut |p| {
            let grad = p.grad.take();
            match grad {
                Some(grad) if p.trainable => self.update(p, &grad.contiguous()?, scale, clip / divisor),
                _ => Ok(()),
            }
        })?;
        Ok(StepStats { grad_norm })
    }

    fn update(&mut self, p: &mut Param, grad: &Tensor, scale: f64, factor: f64) -> Result<()> {
        let memory = self.memory.entry(p.name.clone()).or_insert_with(|| Memory::new(0, Vec::new()));
        memory.steps += 1;
        let first = memory.buffers.is_empty();
        if first {
            let zeros = |_| Ok(p.value.zeros_like()?);
            memory.buffers = self.spec.buffers().into_iter().map(zeros).collect::<Result<_>>()?;
        } else if memory.lent.load(Ordering::Relaxed) {
            memory.buffers = memory.buffers.iter().map(|b| Ok(b.copy()?)).collect::<Result<_>>()?;
        }
        memory.lent.store(false, Ordering::Relaxed);
        let decays = self.spec.decays(p.value.rank());
        let step = Step { steps: memory.steps, first, scale, factor, decays };
        by_dtype!(p.value, T => apply::<T>(&self.spec, &step, p, grad, &memory.buffers))?;
        p.value = grad.clone();
        Ok(())
    }

    /// Everything remembered: `{parameter}.step` (one f64) and the rule's buffers, such as `{parameter}.momentum`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor cannot be made.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::new();
        for (name, memory) in &self.memory {
            state.push((format!("{name}.step"), Tensor::from_vec(vec![memory.steps as f64], 1, &Device::Cpu)?));
            memory.lent.store(true, Ordering::Relaxed);
            let buffers = self.spec.buffers().into_iter().zip(&memory.buffers);
            state.extend(buffers.map(|(buffer, t)| (format!("{name}.{buffer}"), t.clone())));
        }
        Ok(state)
    }

    /// Remembers again what [`Optimizer::state`] gave: `get` finds a tensor by name. A parameter `get` has no step count
    /// for starts anew.
    ///
    /// # Errors
    /// [`Error::Input`] where a buffer is missing or has another shape than its parameter.
    pub fn load_state(&mut self, visit: Visit, get: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<()> {
        self.memory.clear();
        visit(&mut |p| {
            let Some(steps) = get(&format!("{}.step", p.name)).filter(|_| p.trainable) else { return Ok(()) };
            let steps = steps.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            let steps = steps.first().copied().unwrap_or(0.0) as u64;
            let mut buffers = Vec::new();
            for buffer in self.spec.buffers() {
                let name = format!("{}.{buffer}", p.name);
                let found = get(&name).filter(|t| t.dims() == p.value.dims()).ok_or_else(|| {
                    Error::input(format!(
                        "the optimiser's {name} of shape {:?} is not in the checkpoint: it was written with another \
                         optimizer; use that one, or start from its weights alone with train.init",
                        p.value.dims()
                    ))
                })?;
                buffers.push(found.to_dtype(p.value.dtype())?.to_device(p.value.device())?.contiguous()?);
            }
            self.memory.insert(p.name.clone(), Memory::new(steps, buffers));
            Ok(())
        })
    }
}

fn sum_of_squares<T: Real>(t: &Tensor) -> Result<f64> {
    let t = t.contiguous()?;
    let t = Host::of(&t)?;
    let t = t.slice::<T>()?;
    // Sums side by side: one alone would wait for each addition.
    let mut sums = [0.0; 32];
    vectorized(
        #[inline(always)]
        || {
            for values in t.chunks(sums.len()) {
                for (sum, v) in sums.iter_mut().zip(values) {
                    let v = v.to_f64();
                    *sum += v * v;
                }
            }
        },
    );
    Ok(sums.iter().sum())
}

/// One update of one parameter: which one it is, by what its gradient and the learning rate are multiplied, and whether weight decay
/// applies.
struct Step {
    steps: u64,
    first: bool,
    scale: f64,
    factor: f64,
    decays: bool,
}

/// Writes the new value of one parameter over its gradient, and changes its buffers.
fn apply<T: Real>(spec: &OptimizerSpec, step: &Step, p: &Param, grad: &Tensor, buffers: &[Tensor]) -> Result<()> {
    let value = Host::of(&p.value)?;
    let value = value.slice::<T>()?;
    let tensors: Vec<&Tensor> = std::iter::once(grad).chain(buffers).collect();
    let mut fits = true;
    update_together::<T>(&tensors, &mut |slices| {
        let Some((grad, buffers)) = slices.split_first_mut() else { return };
        fits = grad.len() == value.len();
        if fits {
            vectorized(
                #[inline(always)]
                || update(spec, step, value, grad, buffers),
            );
        }
    })?;
    if fits {
        Ok(())
    } else {
        Err(Error::Run(format!("the gradient of {} has {:?}, its value {:?}", p.name, grad.dims(), p.value.dims())))
    }
}

/// `grad` becomes the new value.
#[inline(always)]
fn update<T: Real>(spec: &OptimizerSpec, step: &Step, value: &[T], grad: &mut [T], buffers: &mut [&mut [T]]) {
    let (factor, lr) = (T::of(step.factor), T::of(spec.lr() * step.scale));
    let each = grad.iter_mut().zip(value);
    let applied = |decay: f64| if step.decays { decay } else { 0.0 };
    match *spec {
        OptimizerSpec::Sgd { momentum, weight_decay, nesterov, .. } => {
            let (momentum, decay) = (T::of(momentum), T::of(applied(weight_decay)));
            match buffers {
                [buffer] => {
                    for ((g, &p), b) in each.zip(&mut **buffer) {
                        let gradient = *g * factor + decay * p;
                        *b = if step.first { gradient } else { momentum * *b + gradient };
                        *g = p - lr * if nesterov { gradient + momentum * *b } else { *b };
                    }
                }
                _ => each.for_each(|(g, &p)| *g = p - lr * (*g * factor + decay * p)),
            }
        }
        OptimizerSpec::Adamw { betas, eps, weight_decay, .. } => {
            let steps = step.steps as f64;
            let (shrink, eps) = (T::of(1.0 - spec.lr() * step.scale * applied(weight_decay)), T::of(eps));
            let size = T::of(spec.lr() * step.scale / (1.0 - betas[0].powf(steps)));
            let root = T::of((1.0 - betas[1].powf(steps)).sqrt());
            let [(b1, c1), (b2, c2)] = betas.map(|b| (T::of(b), T::of(1.0 - b)));
            if let [means, squares] = buffers {
                for (((g, &p), m), v) in each.zip(&mut **means).zip(&mut **squares) {
                    let gradient = *g * factor;
                    *m = b1 * *m + c1 * gradient;
                    *v = b2 * *v + c2 * gradient * gradient;
                    *g = p * shrink - size * *m / ((*v).root() / root + eps);
                }
            }
        }
        OptimizerSpec::Rmsprop { alpha, eps, momentum, weight_decay, .. } => {
            let (momentum, decay, eps) = (T::of(momentum), T::of(applied(weight_decay)), T::of(eps));
            let (keep, take) = (T::of(alpha), T::of(1.0 - alpha));
            let scaled = |g: T, p: T, s: &mut T| {
                let gradient = g * factor + decay * p;
                *s = keep * *s + take * gradient * gradient;
                gradient / ((*s).root() + eps)
            };
            match buffers {
                [squares] => each.zip(&mut **squares).for_each(|((g, &p), s)| *g = p - lr * scaled(*g, p, s)),
                [squares, buffer] => {
                    for (((g, &p), s), b) in each.zip(&mut **squares).zip(&mut **buffer) {
                        *b = momentum * *b + scaled(*g, p, s);
                        *g = p - lr * *b;
                    }
                }
                _ => {}
            }
        }
    }
}
