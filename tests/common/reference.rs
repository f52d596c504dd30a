//! Exact back-propagation through the unrolled graph, written apart from the pipeline: the reference of gradient tests. What an edge
//! brings is brought to the main input's height and width here, by dense matrices, before a module sees it.
//!
//! Blocking: all steps forward, all steps back, every activation kept. Memory grows with the clip's length.

use candle_core::{Device, Tensor};

use sideways::backend::cpu::activation;
use sideways::method::schedule::Schedule;
use sideways::network::{EdgeSpec, Network};
use sideways::nn::layers::{Pass, Tape};
use sideways::nn::module::{Module, SkipInput};
use sideways::nn::param::Init;
use sideways::setup::Setup;
use sideways::{Error, Result};

/// A clip's forward passes, `[module − 1][step]`.
pub struct Unrolled {
    /// Outputs, `[B, H, W, C]`.
    pub outputs: Vec<Vec<Tensor>>,
    tapes: Vec<Vec<Tape>>,
}

impl Unrolled {
    /// The outputs of the last module, step by step.
    pub fn last(&self) -> &[Tensor] {
        self.outputs.last().map_or(&[], Vec::as_slice)
    }
}

/// The step of the sender that step `t` of an edge's receiver reads: the one that arrives then, or the last, held.
fn source_step(edge: &EdgeSpec, t: usize, sender_steps: usize) -> usize {
    (t + edge.edge.lead()).min(sender_steps - 1)
}

/// The modules of a run with their initial parameters, each of whose inputs has the main one's height and width.
pub fn modules(setup: &Setup, init: impl Fn(u64, Option<usize>) -> Init) -> Vec<Module> {
    let module = |i| {
        let spec = setup.stage_spec(i);
        let [h, w, _] = spec.main;
        let skips = spec.skips.iter().map(|skip| SkipInput { shape: [h, w, skip.shape[2]], ..*skip });
        let skips: Vec<SkipInput> = skips.collect();
        Module::new(i, &spec.layers, spec.main, &skips, spec.fuse, &init(spec.seed, spec.last_layer)).unwrap()
    };
    (1..=setup.grid.modules).map(module).collect()
}

/// What each of `to` rows takes of each of `from`: the mean of those it covers, if only in part, or the nearest above.
fn shares(from: usize, to: usize) -> Vec<Vec<f32>> {
    let row = |r: usize| -> Vec<f32> {
        let covers = |i: usize| match from >= to {
            true => (i + 1) * to > r * from && i * to < (r + 1) * from,
            false => i * to <= r * from && r * from < (i + 1) * to,
        };
        let covered = (0..from).filter(|&i| covers(i)).count() as f32;
        (0..from).map(|i| if covers(i) { 1.0 / covered } else { 0.0 }).collect()
    };
    (0..to).map(row).collect()
}

/// The matrix that brings pixels of one height and width to another's, `[to pixels, from pixels]`.
fn resizing([h, w]: [usize; 2], [oh, ow]: [usize; 2]) -> Result<Tensor> {
    let (rows, columns) = (shares(h, oh), shares(w, ow));
    let pixel = |p: usize, q: usize| rows[p / ow][q / w] * columns[p % ow][q % w];
    let values: Vec<f32> =
        (0..oh * ow).flat_map(|p| (0..h * w).map(move |q| (p, q))).map(|(p, q)| pixel(p, q)).collect();
    Ok(Tensor::from_vec(values, (oh * ow, h * w), &Device::Cpu)?)
}

/// `matrix` applied to the pixels of `x`, which then have the height and width `[h, w]`.
fn applied(matrix: &Tensor, x: &Tensor, [h, w]: [usize; 2]) -> Result<Tensor> {
    let (b, _, _, c) = x.dims4()?;
    let pixels = x.contiguous()?.reshape((b, (), c))?;
    Ok(matrix.broadcast_matmul(&pixels)?.reshape((b, h, w, c))?)
}

fn size(t: &Tensor) -> [usize; 2] {
    [t.dims()[1], t.dims()[2]]
}

fn size_of([h, w, _]: [usize; 3]) -> [usize; 2] {
    [h, w]
}

/// All steps of all modules forward, in the order of ticks. `frame(t)` gives frame t, `[B, H, W, C]`.
///
/// # Errors
/// As `frame` and the modules' forward passes.
pub fn forward(
    modules: &mut [Module],
    network: &Network,
    schedule: &Schedule,
    pass: &dyn Fn(usize) -> Pass,
    frame: &mut dyn FnMut(usize) -> Result<Tensor>,
) -> Result<Unrolled> {
    let d = modules.len();
    let mut run = Unrolled { outputs: vec![Vec::new(); d], tapes: (0..d).map(|_| Vec::new()).collect() };
    for tick in 0..schedule.frames() + d - 1 {
        for i in 1..=d.min(tick + 1) {
            let t = tick + 1 - i;
            if t >= schedule.steps(i) {
                continue;
            }
            let inputs = if i == 1 {
                vec![frame(t)?]
            } else {
                network
                    .inputs(i)
                    .into_iter()
                    .map(|e| {
                        let sent = &run.outputs[e.edge.from - 1];
                        let sent = &sent[source_step(e, t, schedule.steps(e.edge.from))];
                        let main = size_of(network.modules[i - 1].main);
                        applied(&resizing(size(sent), main)?, sent, main)
                    })
                    .collect::<Result<Vec<_>>>()?
            };
            let mut tape = Tape::default();
            run.outputs[i - 1].push(modules[i - 1].forward(&inputs, &pass(t), &mut tape)?);
            run.tapes[i - 1].push(tape);
        }
    }
    Ok(run)
}

/// All steps back, in the reverse order of ticks. `loss_gradients[t]` is the gradient of step t's loss with respect to
/// the last module's output. Adds to the gradient of every parameter of module i the sum over those of its steps t that
/// `counted(i, t)` says; with all of them, divide by the number of losses for the gradient of their mean.
///
/// # Errors
/// As the modules' vector–Jacobian products.
pub fn backward(
    modules: &mut [Module],
    network: &Network,
    schedule: &Schedule,
    pass: &dyn Fn(usize) -> Pass,
    mut run: Unrolled,
    loss_gradients: Vec<Option<Tensor>>,
    counted: &dyn Fn(usize, usize) -> bool,
) -> Result<()> {
    let d = modules.len();
    let mut g: Vec<Vec<Option<Tensor>>> = run.outputs.iter().map(|o| vec![None; o.len()]).collect();
    g[d - 1] = loss_gradients;
    for tick in (0..schedule.frames() + d - 1).rev() {
        for i in (1..=d.min(tick + 1)).rev() {
            let t = tick + 1 - i;
            let Some(gy) = g[i - 1].get_mut(t).and_then(Option::take) else { continue };
            let wanted = vec![i > 1; network.inputs(i).len().max(1)];
            let sums = gradients(&mut modules[i - 1])?;
            let cotangents = modules[i - 1].vjp(&gy, &pass(t), &mut run.tapes[i - 1][t], &wanted)?;
            if !counted(i, t) {
                let mut sums = sums.into_iter();
                modules[i - 1].visit(&mut |p| {
                    p.grad = sums.next().flatten();
                    Ok(())
                })?;
            }
            for (edge, c) in network.inputs(i).into_iter().zip(cotangents) {
                let c = c.ok_or_else(|| Error::Run(format!("{}: no input gradient", edge.edge)))?;
                let from = edge.edge.from;
                let sent = size_of(network.modules[from - 1].output);
                let c = applied(&resizing(sent, size(&c))?.t()?.contiguous()?, &c, sent)?;
                let at = &mut g[from - 1][source_step(edge, t, schedule.steps(from))];
                *at = Some(match at.take() {
                    Some(sum) => activation::add(&sum, &c)?,
                    None => c,
                });
            }
        }
    }
    Ok(())
}

/// Copies of a module's sums of gradients, parameter by parameter.
fn gradients(module: &mut Module) -> Result<Vec<Option<Tensor>>> {
    let mut all = Vec::new();
    module.visit(&mut |p| {
        all.push(p.grad.as_ref().map(Tensor::copy).transpose()?);
        Ok(())
    })?;
    Ok(all)
}
