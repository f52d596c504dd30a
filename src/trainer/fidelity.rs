//! How near each module's gradient comes to the exact one, at the same weights and clips (METHOD: "fidelity").
//!
//! Every rule runs through the pipeline's own loop, and so does exact back-propagation; updates are left out. Compared is what
//! the optimiser would get: the mean gradient of a batch, all parameters of a module together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc;

use serde::Serialize;

use super::console::Console;
use crate::backend::stage::Fit;
use crate::checkpoint::Checkpoint;
use crate::comm::World;
use crate::config::{Config, Exchange, NamedPeriod, Precision, Rule, Stash, UpdateEvery, Wire};
use crate::pipeline::orders::Requests;
use crate::pipeline::{self, Gradient, Origin, Parts, RunRange, frames_of, stage_of};
use crate::setup::{Purpose, Setup};
use crate::{Error, Result};

/// A rule whose gradients are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compared {
    /// Fresh pseudo-gradients on the main path alone, whatever skips the configuration has.
    Sideways,
    /// Fresh pseudo-gradients on the configuration's graph.
    SkipSideways,
    /// `train.stash` on the configuration's graph.
    Stash,
}

impl Compared {
    /// By the name that `--rules` takes.
    ///
    /// # Errors
    /// [`Error::Input`] with the names there are.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "sideways" => Ok(Compared::Sideways),
            "skip-sideways" => Ok(Compared::SkipSideways),
            "stash" => Ok(Compared::Stash),
            _ => Err(Error::input(format!(
                "--rules {name}: it is sideways, skip-sideways or stash, or several with commas"
            ))),
        }
    }

    /// The configuration by this rule, and the same by exact back-propagation.
    fn apply(self, config: &Config) -> [Config; 2] {
        let mut config = config.clone();
        if self == Compared::Sideways {
            config.model.skip = None;
        }
        let rule = if config.has_skips() { Rule::SkipSideways } else { Rule::Sideways };
        let stash = if self == Compared::Stash { Stash::Activations } else { Stash::None };
        [(rule, stash), (Rule::Bp, Stash::None)].map(|(rule, stash)| {
            let mut config = config.clone();
            (config.train.rule, config.train.stash) = (rule, stash);
            config
        })
    }
}

impl std::fmt::Display for Compared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Compared::Sideways => "sideways",
            Compared::SkipSideways => "skip-sideways",
            Compared::Stash => "stash",
        })
    }
}

/// Mean and standard deviation over batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation of a batch's value; 0 for one batch.
    pub deviation: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Spread { mean, deviation: if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 } }
    }
}

/// A module's gradient g by a rule beside the exact one e.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// By which rule.
    pub rule: Compared,
    /// Frames of the video from one frame of a clip to the next.
    pub stride: usize,
    /// i, from 1.
    pub module: usize,
    /// Batches compared.
    pub batches: usize,
    /// g·e / (|g| |e|)
    pub cosine: Spread,
    /// |g| / |e|
    pub norm_ratio: Spread,
    /// |g - e| / |e|
    pub relative_error: Spread,
}

/// What is compared.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Rules.
    pub rules: Vec<Compared>,
    /// Strides, as multiples of `data.stride`.
    pub strides: Vec<usize>,
    /// Batches.
    pub batches: u64,
}

/// What is called after each batch with how many are done, and of how many.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Compares the gradients of `config`'s network, at the weights of `from` or else its initial ones, on its training clips: a row a
/// stride, rule and module. In this process, on `run.device`, in 32-bit floats.
///
/// # Errors
/// [`Error::Input`] for whatever in configuration or data cannot work.
pub fn fidelity(
    config: &Config,
    from: Option<&Checkpoint>,
    comparison: &Comparison,
    progress: Progress,
) -> Result<Vec<Fidelity>> {
    let mut base = config.clone();
    (base.run.precision, base.run.exchange, base.run.wire) = (Precision::F32, Exchange::Auto, Wire::Auto);
    base.train.update_every = UpdateEvery::Named(NamedPeriod::Batch);
    (base.train.replicas, base.train.validate_every, base.train.until) = (1, 0, None);
    let mut graphs: Vec<Config> = Vec::new();
    for [_, by_bp] in comparison.rules.iter().map(|rule| rule.apply(&base)) {
        if !graphs.contains(&by_bp) {
            graphs.push(by_bp);
        }
    }
    let passes = comparison.strides.len() * (comparison.rules.len() + graphs.len());
    let (mut done, all) = (0, passes as u64 * comparison.batches);
    let mut count = || {
        done += 1;
        progress(done, all);
    };
    let mut rows = Vec::new();
    for &stride in &comparison.strides {
        base.data.stride = config.data.stride * stride;
        // The exact gradients of a graph serve all its rules.
        let mut exact: Vec<(Config, Gradients)> = Vec::new();
        for &rule in &comparison.rules {
            let [by_rule, by_bp] = rule.apply(&base);
            let place = match exact.iter().position(|(config, _)| *config == by_bp) {
                Some(place) => place,
                None => {
                    let gradients = gradients(&by_bp, from, comparison.batches, &mut count)?;
                    exact.push((by_bp, gradients));
                    exact.len() - 1
                }
            };
            let own = gradients(&by_rule, from, comparison.batches, &mut count)?;
            rows.extend(compare(rule, base.data.stride, &own, &exact[place].1)?);
        }
    }
    Ok(rows)
}

/// Mean gradients by module and batch.
type Gradients = BTreeMap<(usize, u64), Vec<f32>>;

/// Runs batches without updates.
fn gradients(
    config: &Config,
    from: Option<&Checkpoint>,
    batches: u64,
    count: &mut (impl FnMut() + Send),
) -> Result<Gradients> {
    let setup = Setup::new(config, 1, Purpose::Train)?;
    let from = from.map(|checkpoint| Checkpoint::open(checkpoint.path())).transpose()?;
    let from = from.map(|checkpoint| Origin::Checkpoint(checkpoint, Fit::Weights));
    let range =
        RunRange { first: 0, end: batches, total: batches, from, record: false, validates_first: false, trace: None };
    let (sender, made) = mpsc::channel();
    let stage = |spec, w, site| stage_of(&setup, &range, spec, w, site);
    let frames = |r| frames_of(&setup, &range, r);
    let parts = Parts { stage: &stage, frames: &frames, gradients: Some(sender) };
    let (world, requests, mut observer) = (World::Alone, Requests::default(), |_: &super::BatchSummary| count());
    let mut console = Console::new(&setup, batches, None, &mut observer);
    pipeline::run(&setup, &world, &range, &parts, &requests, |reports| console.follow(reports, &range, &requests))?;
    drop(parts);
    Ok(made.into_iter().map(|Gradient { module, batch, values }| ((module, batch), values)).collect())
}

fn compare(rule: Compared, stride: usize, own: &Gradients, exact: &Gradients) -> Result<Vec<Fidelity>> {
    let mut measures: BTreeMap<usize, [Vec<f64>; 3]> = BTreeMap::new();
    for (&(module, batch), g) in own {
        let e = exact.get(&(module, batch)).filter(|e| e.len() == g.len());
        let e = e.ok_or_else(|| Error::Run(format!("module {module} has no exact gradient of batch {batch}")))?;
        let sum = |f: fn(f64, f64) -> f64| g.iter().zip(e).map(|(&g, &e)| f(f64::from(g), f64::from(e))).sum::<f64>();
        let (dot, gg, ee) = (sum(|g, e| g * e), sum(|g, _| g * g), sum(|_, e| e * e));
        if ee == 0.0 {
            // Layers without parameters, or a gradient that vanishes: there is nothing to be near to.
            continue;
        }
        let off = sum(|g, e| (g - e) * (g - e));
        let cosine = if gg > 0.0 { dot / (gg * ee).sqrt() } else { 0.0 };
        let found = measures.entry(module).or_default();
        for (values, value) in found.iter_mut().zip([cosine, (gg / ee).sqrt(), (off / ee).sqrt()]) {
            values.push(value);
        }
    }
    let row = |(module, [cosine, ratio, error]): (usize, [Vec<f64>; 3])| Fidelity {
        rule,
        stride,
        module,
        batches: cosine.len(),
        cosine: Spread::of(&cosine),
        norm_ratio: Spread::of(&ratio),
        relative_error: Spread::of(&error),
    };
    let of_all: BTreeSet<usize> = own.keys().chain(exact.keys()).map(|&(module, _)| module).collect();
    for module in of_all.into_iter().filter(|module| !measures.contains_key(module)) {
        log::warn!("{rule}, stride {stride}: module {module} has no gradient, or no exact one, to compare");
    }
    Ok(measures.into_iter().map(row).collect())
}
