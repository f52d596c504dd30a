//! A worker from the plan of a run.

use std::sync::mpsc;

use super::cores::CoreUser;
use super::links::WorkerLinks;
use super::orders::{By, Decider, Files, Requests};
use super::pixels::{PixelError, Predictions};
use super::record::{Launch, Tracer};
use super::role::{Role, Source, Truth};
use super::run::{Origin, RunRange};
use super::training::{Gradient, Saver, Training};
use super::worker::{InEdge, NonFinite, OutEdge, Waits, Worker};
use crate::backend::stage::{CpuStage, Fit, Stage, StageSpec};
use crate::backend::{GpuPlacement, Precision, cuda};
use crate::checkpoint::writer::Writer;
use crate::comm::Orders;
use crate::data::{FrameStream, Frames};
use crate::metrics::Stopwatch;
use crate::setup::footprint::gpu_memory;
use crate::setup::site::Site;
use crate::setup::{Purpose, Setup};
use crate::{Error, Result};

/// What workers are made of: a run's own, or stand-ins for measuring.
pub struct Parts<'a> {
    /// The stage of worker `w` on its site.
    pub stage: &'a (dyn Fn(StageSpec, usize, Site) -> Result<Box<dyn Stage>> + Sync),
    /// The frames of replica `r`.
    pub frames: &'a (dyn Fn(usize) -> Result<Box<dyn Frames>> + Sync),
    /// Where gradients go instead of into parameters, which then stay what they are: for measuring.
    pub gradients: Option<mpsc::Sender<Gradient>>,
}

/// The stage of worker `w` with the parameters that `range` begins with.
///
/// # Errors
/// [`Error::Input`] if the checkpoint is of another network, or the GPU too small.
pub fn stage_of(setup: &Setup, range: &RunRange, spec: StageSpec, w: usize, site: Site) -> Result<Box<dyn Stage>> {
    let mut stage = CpuStage::new(spec)?;
    if let Some(origin) = &range.from {
        let owns = stage.owns()?;
        let (tensors, fit) = match origin {
            Origin::Checkpoint(checkpoint, fit) => (checkpoint.load(owns)?, *fit),
            Origin::Import(import) => (import.load(owns)?, Fit::Partial),
        };
        stage.load(tensors, fit, &origin.path().display().to_string(), &last_layer(setup))?;
    }
    match site {
        Site::Cpu => Ok(Box::new(stage)),
        Site::Gpu { ordinal, ranks } => {
            let run = &setup.config.run;
            let element = if run.precision == Precision::Bf16 { 2 } else { 4 };
            cuda::stage(
                stage,
                &GpuPlacement {
                    ordinal,
                    precision: run.precision,
                    half_messages: run.halves_messages(),
                    graphs: run.graphs,
                    needed: gpu_memory(setup, w, element),
                    modules_on_it: setup.grid.workers().div_ceil(setup.grid.ranks) * ranks,
                },
            )
        }
    }
}

/// The frames of replica `r` from its dataset.
///
/// # Errors
/// As [`FrameStream::open`]; [`Error::Input`] without a dataset.
pub fn frames_of(setup: &Setup, range: &RunRange, r: usize) -> Result<Box<dyn Frames>> {
    let dataset = setup.dataset.clone().ok_or_else(|| Error::input("there is no dataset to read"))?;
    Ok(Box::new(FrameStream::open(dataset, setup.stream(r, range.first, range.end))?))
}

/// The frames that replica `r` is validated on, over and over; none where it is not.
fn validation_frames(setup: &Setup, range: &RunRange, r: usize) -> Result<Option<Box<dyn Frames>>> {
    let Some(validation) = setup.validation.as_ref().filter(|_| range.record) else { return Ok(None) };
    let stream = FrameStream::open(validation.dataset.clone(), setup.validation_stream(r))?;
    Ok(Some(Box::new(stream)))
}

/// The name under which the last layer's parameters begin: what a new head may replace.
fn last_layer(setup: &Setup) -> String {
    format!("layers.{}.", setup.network.last_layer())
}

/// Worker `w`.
pub(super) fn build(
    setup: &Setup,
    w: usize,
    mut links: WorkerLinks,
    range: &RunRange,
    parts: &Parts,
    site: Site,
    (requests, cores, launch): (Requests, CoreUser, Option<Launch>),
) -> Result<Worker> {
    let (i, r) = setup.grid.module_and_replica(w);
    let (config, network, d) = (&setup.config, &setup.network, setup.grid.modules);
    let mut spec = setup.stage_spec(i);
    if let (Some(lends), Some(all_reduce)) = (&mut spec.lends, &links.all_reduce) {
        lends.on_gpu = all_reduce.is_between_gpus().then(|| all_reduce.at_once());
    }
    let stage = (parts.stage)(spec, w, site)?;
    let training = setup.purpose == Purpose::Train;
    let decider = (training && i == 1 && range.record).then(|| {
        let from = links
            .decisions_in
            .take()
            .map_or_else(|| By::Files(Files::new(&config.run.dir)), |link| By::Link(Box::new(link)));
        Decider::new(from, std::mem::take(&mut links.decisions_out))
    });
    let all_reduce = links.all_reduce.take();
    let training = match training {
        true => Some(Training {
            base_lr: config.train.optimizer.lr(),
            lr_factor: config.lr_factor(i, d),
            lr_schedule: config.train.lr_schedule,
            total_batches: range.total,
            every: config.train.update_every,
            clip_norm: config.train.clip_norm.limit(),
            all_reduce,
            last_backward: setup
                .schedule
                .window(i)
                .iter()
                .rev()
                .find(|tick| tick.backward.is_some())
                .map(|tick| tick.at),
            gradients: parts.gradients.clone(),
            saver: (r == 0 && range.record).then(|| saver(setup, i, range)).transpose()?,
            grad_norm: 0.0,
            lr: 0.0,
        }),
        false => None,
    };
    let pixels = || {
        let data = &config.data;
        setup.ahead.map(|_| PixelError::new(data.batch, data.mean, data.std))
    };
    let source = |decider| {
        let (targets, mixup) = ((setup.ahead, setup.schedule.losses()), setup.mixup(r));
        let source = Source::new((parts.frames)(r)?, config.data.batch, network.input, targets, mixup, decider);
        let source = source.comparing(pixels(), config.model.horizon, setup.purpose != Purpose::Train);
        Ok::<_, Error>(source.validating(validation_frames(setup, range, r)?))
    };
    let missing = || Error::Run(format!("module {i} has no link for labels or targets"));
    let truth = match setup.ahead {
        Some(_) => Truth::Frames(network.input),
        None => Truth::Labels { mixed: setup.mixup(r).is_some() },
    };
    let role = match (i == 1, i == d) {
        (true, true) => Role::Only { source: Box::new(source(decider)?), target: Vec::new() },
        (true, false) => {
            Role::First { source: Box::new(source(decider)?), truth: links.truth_out.ok_or_else(missing)? }
        }
        (false, true) => Role::Last { truth, from: links.truth_in.ok_or_else(missing)? },
        (false, false) => Role::Middle,
    };
    let inputs = network.inputs(i).into_iter().zip(links.inputs).map(|(spec, (id, activations, cotangents))| InEdge {
        spec: spec.clone(),
        id,
        activations,
        cotangents,
        waits: Waits::default(),
        taken: None,
    });
    let outputs = network.outputs(i).into_iter().zip(links.outputs);
    let outputs = outputs.map(|(spec, (id, activations, cotangents))| OutEdge {
        spec: spec.clone(),
        id,
        activations,
        cotangents,
        waits: Waits::default(),
    });
    Ok(Worker {
        stage,
        index: i,
        clips: config.data.batch,
        key: run_key(config.train.seed, r),
        schedule: setup.schedule.clone(),
        inputs: inputs.collect(),
        outputs: outputs.collect(),
        role,
        training,
        validation: setup.validation.clone().filter(|_| range.record),
        pixels: if i == d { pixels() } else { None },
        predictions: setup.predicted.clone().filter(|_| i == d && r == 0).map(|p| Predictions::new(p.clips, p.steps)),
        requests,
        decision_step: setup.schedule.steps(d).saturating_sub(1),
        decision: Orders::empty(),
        non_finite: NonFinite::new(config.run.on_nonfinite),
        console: links.console,
        watch: Stopwatch::default(),
        tracer: range.trace.clone().zip(launch).map(|(to, launch)| Tracer::new(setup, w, range, to, launch)),
        cores,
    })
}

fn saver(setup: &Setup, i: usize, range: &RunRange) -> Result<Saver> {
    let run = &setup.config.run;
    let writer = Writer::new(setup.checkpoints(), i, run.on_checkpoint_error, range.resumed())?;
    Ok(Saver { writer, every: run.checkpoint_every, end: range.end })
}

/// What makes one run's and replica's dropout masks differ from another's.
fn run_key(seed: u64, replica: usize) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(&(replica as u64).to_le_bytes(), seed)
}
