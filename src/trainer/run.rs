//! Starting workers and seeing them through: the pipeline's side of training and evaluation.

use std::sync::mpsc;
use std::time::Duration;

use candle_core::{DType, Device};

use crate::backend::cpu;
use crate::checkpoint::writer::Writer;
use crate::checkpoint::{self, Manifest};
use crate::comm::exchange::Exchange;
use crate::comm::{Receiver, Sender, World};
use crate::data::FrameStream;
use crate::nn::module::Module;
use crate::nn::optim::Optimizer;
use crate::nn::param::Init;
use crate::pipeline::compute::{Compute, Host};
#[cfg(feature = "cuda")]
use crate::pipeline::compute::{Route, Routes};
use crate::pipeline::ends::{Ends, ends_of, take};
use crate::pipeline::head::Head;
use crate::pipeline::metrics::Stopwatch;
use crate::pipeline::report::{DECIDED, Report};
use crate::pipeline::stop::{Decider, ENDS, Files, Requests, UNDO};
use crate::pipeline::turns::{self, Seat};
use crate::pipeline::worker::{InEdge, LossEnd, OutEdge, Source, Update, Waits, Worker};
use crate::setup::site::{self, Site};
use crate::setup::{Purpose, Setup};
use crate::sys::cpus::{at_once, own_processors};
use crate::sys::files::write_whole;
use crate::trainer::console::{Console, Observer, Recorder, Totals, gather};
use crate::trainer::preflight::Neighbours;
use crate::trainer::run_range::Span;
use crate::trainer::state::{Due, Fit, Saver, restore};
use crate::{Error, Result};

/// Trains with Sideways or Skip-Sideways over all workers; every rank calls it. Totals are rank 0's, but for the decision
/// that ended the run early. `requests` is what this process is asked for meanwhile.
///
/// # Errors
/// The first failure of any worker of this process; under MPI the whole job is ended with it.
pub fn train(setup: &Setup, world: &World, span: &Span, requests: &Requests, observer: Observer) -> Result<Totals> {
    world.agree(setup.fingerprint(span.first)?, "configuration, dataset and checkpoint")?;
    let recorder = if world.rank() == 0 { recorder(setup, span)? } else { None };
    run(setup, world, span, recorder, requests, observer)
}

/// One pass over the test clips with fixed parameters; every rank calls it. The observer sees logits on rank 0.
///
/// # Errors
/// As [`train`].
pub fn evaluate(setup: &Setup, world: &World, span: &Span, observer: Observer) -> Result<Totals> {
    world.agree(setup.fingerprint(span.first)?, "configuration, dataset and checkpoint")?;
    run(setup, world, span, None, &Requests::default(), observer)
}

/// Opens the run folder for recording, if the span is to be recorded.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn recorder(setup: &Setup, span: &Span) -> Result<Option<Recorder>> {
    if !span.record {
        return Ok(None);
    }
    let dir = &setup.config.run.dir;
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let text = setup.config.to_toml()?;
    let path = dir.join("config.toml");
    write_whole(&path, text.as_bytes())?;
    let mut manifest = Manifest::new(text, setup.class_names.clone(), setup.network.input, setup.cuts());
    manifest.data = setup.dataset.as_ref().map(|data| data.digest());
    checkpoint::clear_unfinished(&setup.checkpoints())?;
    Recorder::open(dir, setup.checkpoints(), manifest, &setup.config.run, span.first).map(Some)
}

fn run(
    setup: &Setup,
    world: &World,
    span: &Span,
    recorder: Option<Recorder>,
    requests: &Requests,
    observer: Observer,
) -> Result<Totals> {
    let grid = setup.grid;
    let site = site::choose(world, setup.config.run.device)?;
    let timeout = Duration::from_secs(setup.config.run.timeout);
    let exchange = Exchange::of_run(setup, world, site)?;
    let mut endpoints = exchange.connect(world, &grid.placement(), timeout)?;
    let breaker = endpoints.breaker();
    let batch = setup.config.data.batch;
    let mut reports: Vec<(u32, Receiver)> = Vec::new();
    if world.rank() == 0 {
        for &id in &setup.wiring.reports {
            reports.push((id, take(endpoints.receiver(id), id)?));
        }
    }
    let frames_a_batch = (grid.replicas * batch * setup.config.data.frames) as u64;
    let mut console = Console::new(grid, span.total, frames_a_batch, recorder, observer);
    let own: Vec<usize> = (0..grid.workers()).filter(|&w| grid.rank_of(w) == world.rank()).collect();
    let seats = turns::seats(own.len(), at_once(setup.config.run.threads), &processors_of_own(world, setup, site)?);
    let (done, finished) = mpsc::channel();
    let end = std::thread::scope(|scope| {
        let mut running = 0;
        for (w, seat) in own.into_iter().zip(seats) {
            let (i, r) = grid.module_and_replica(w);
            let (done, ends) = (done.clone(), ends_of(setup, w, &mut endpoints, &exchange)?);
            let requests = requests.clone();
            let threads = setup.config.run.threads;
            let exchange = &exchange;
            let body = move || {
                let work = || {
                    cpu::with_threads(threads, || work(setup, w, ends, span, seat, requests, (site, exchange)))
                        .and_then(|done| done)
                };
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
                    .unwrap_or_else(|_| Err(Error::Run(format!("module {i}, replica {r} panicked (a bug)"))));
                // The main thread waits for exactly one answer of every worker.
                let _ = done.send(result);
            };
            let name = format!("module-{i}.{r}");
            std::thread::Builder::new()
                .name(name)
                .spawn_scoped(scope, body)
                .map_err(|e| Error::Run(format!("starting a thread for module {i}: {e}")))?;
            running += 1;
        }
        if world.rank() == 0 {
            let (done, console) = (done.clone(), &mut console);
            scope.spawn(move || {
                let _ = done.send(watch(console, &mut reports, span, batch, requests));
            });
            running += 1;
        }
        let (mut errors, mut end) = (Vec::new(), End::default());
        for result in finished.iter().take(running) {
            match result {
                Ok(End { decision, failure }) => {
                    end.decision |= decision;
                    end.failure = end.failure.or(failure);
                }
                Err(e) => {
                    breaker.trip(e.to_string());
                    errors.push(e);
                }
            }
        }
        // A worker that fails makes its neighbours' links fail: the cause is what is not about links, else the first.
        let cause = errors.iter().position(|e| !matches!(e, Error::Transport(_))).unwrap_or(0);
        if errors.is_empty() { Ok(end) } else { Err(errors.swap_remove(cause)) }
    })?;
    exchange.close(world)?;
    Ok(Totals { decision: end.decision, failure: end.failure, ..console.totals() })
}

/// The processors that nobody but this rank's workers computes on, one of them each; none if there are others, or if these need
/// several or have a GPU. Collective.
fn processors_of_own(world: &World, setup: &Setup, site: Site) -> Result<Vec<usize>> {
    let apart = Neighbours::of(world)?.apart;
    Ok(if apart && site == Site::Cpu && setup.config.run.threads == 1 { own_processors() } else { Vec::new() })
}

/// How a thread of a run came to its end.
#[derive(Default)]
struct End {
    /// What was decided, 0 if all clips were done.
    decision: u32,
    /// Module 1: why a clip could not be read.
    failure: Option<String>,
}

/// The console's thread.
fn watch(
    console: &mut Console,
    reports: &mut [(u32, Receiver)],
    span: &Span,
    batch: usize,
    requests: &Requests,
) -> Result<End> {
    console.started(&gather(reports, span.first, batch)?.0)?;
    for clip in span.first..span.end {
        let (reports, flags) = gather(reports, clip, batch)?;
        let (asked, decided) = (flags & ((1 << DECIDED) - 1), flags >> DECIDED);
        requests.raise(asked);
        let ends = decided & ENDS != 0;
        if decided & UNDO != 0 {
            console.undone(&reports)?;
        } else {
            console.batch(clip, reports, ends || clip + 1 == span.end)?;
        }
        if ends {
            return Ok(End { decision: decided, failure: None });
        }
    }
    Ok(End::default())
}

/// A worker's thread: all clips of the span, or up to the one after which it was decided to end.
fn work(
    setup: &Setup,
    w: usize,
    ends: Ends,
    span: &Span,
    seat: Seat,
    requests: Requests,
    place: (Site, &Exchange),
) -> Result<End> {
    let mut worker = build(setup, w, ends, span, seat, requests, place)?;
    worker.start(span.first)?;
    let mut end = End::default();
    for clip in span.first..span.end {
        worker.clip(clip, setup.schedule.tick(clip, 1, 0))?;
        if worker.decision & ENDS != 0 {
            end = End { decision: worker.decision, failure: worker.failure.take() };
            break;
        }
    }
    worker.flush()?;
    Ok(end)
}

/// All modules of the network with their initial parameters (module numbers from 1), for use in one process.
///
/// # Errors
/// As [`Module::new`].
pub fn modules(setup: &Setup) -> Result<Vec<Module>> {
    (1..=setup.grid.modules).map(|i| module(setup, i)).collect()
}

fn module(setup: &Setup, i: usize) -> Result<Module> {
    let spec = &setup.network.modules[i - 1];
    let init = Init { seed: setup.config.train.seed, dtype: DType::F32, device: Device::Cpu };
    Module::new(i, &setup.network.layers_of(i), spec.main, &spec.skips, setup.network.fuse, &init)
}

/// The settings of an update, without averaging.
pub fn update(setup: &Setup, span: &Span) -> Update {
    let train = &setup.config.train;
    Update {
        rate: train.optimizer.lr(),
        optimizer: Optimizer::new(train.optimizer),
        schedule: train.lr_schedule,
        total_clips: span.total,
        every: train.update_every,
        clip_norm: train.clip_norm,
        average: None,
        steps: 0,
        grad_norm: 0.0,
        lr: 0.0,
    }
}

/// The name under which the last layer's parameters begin: what a new head may replace.
pub fn last_layer(setup: &Setup) -> String {
    let last = setup.network.layers.iter().rposition(|l| l.is_heavy()).unwrap_or(0);
    format!("layers.{last}.")
}

fn build(
    setup: &Setup,
    w: usize,
    mut ends: Ends,
    span: &Span,
    seat: Seat,
    requests: Requests,
    place: (Site, &Exchange),
) -> Result<Worker> {
    let (i, r) = setup.grid.module_and_replica(w);
    let config = &setup.config;
    let training = setup.purpose == Purpose::Train;
    let mut module = module(setup, i)?;
    let mut update = training.then(|| Update { average: ends.average.take(), ..update(setup, span) });
    if let Some((checkpoint, fit)) = &span.from {
        let state = update.as_mut().filter(|_| *fit == Fit::Exact);
        restore(&mut module, state, checkpoint, *fit, &last_layer(setup))?;
    }
    let compute = compute(setup, w, &mut module, update.as_ref(), &mut ends, place)?;
    let inputs = setup.network.inputs(i).into_iter().zip(ends.inputs);
    let outputs = setup.network.outputs(i).into_iter().zip(ends.outputs);
    let d = setup.grid.modules;
    let source = (i == 1).then(|| source(setup, r, span, ends.truth_out)).transpose()?;
    let loss = (i == d).then(|| LossEnd {
        head: Head::new(config.model.task, config.model.loss, config.data.batch, setup.classes),
        truth: ends.truth_in,
        shape: setup.network.modules[i - 1].output,
        clips: setup.dataset.as_ref().filter(|_| !training).map(|data| data.videos.len()),
    });
    let saver = match training && r == 0 && span.record {
        true => Some(Saver {
            writer: Writer::new(setup.checkpoints(), i, config.run.on_checkpoint_error, span.resumed())?,
            due: Due { every: config.run.checkpoint_every, end: span.end },
        }),
        false => None,
    };
    let decider = (training && i == 1 && span.record).then(|| match ends.told {
        Some(told) => Decider::Told(told),
        None => Decider::Chief { files: Files::new(&config.run.dir), others: ends.tells },
    });
    Ok(Worker {
        index: i,
        batch: config.data.batch,
        key: run_key(config.train.seed, r),
        plan: setup.schedule.steps(i).to_vec(),
        module,
        compute,
        inputs: inputs
            .map(|(spec, (id, activations, cotangents))| InEdge {
                spec: spec.clone(),
                id,
                activations,
                cotangents,
                waits: Waits::default(),
            })
            .collect(),
        outputs: outputs
            .map(|(spec, (id, activations, cotangents))| OutEdge {
                spec: spec.clone(),
                id,
                activations,
                cotangents,
                waits: Waits::default(),
            })
            .collect(),
        source,
        loss,
        update,
        saver,
        failure: None,
        requests,
        decider,
        decision_step: setup.schedule.steps(d).len().saturating_sub(1),
        decision: 0,
        on_nonfinite: config.run.on_nonfinite,
        skipped: 0,
        console: ends.console,
        report_logits: !training && i == d && setup.ahead.is_none(),
        watch: Stopwatch::default(),
        seat,
    })
}

/// The registers of worker `w` where it computes.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only a GPU needs more than the edges in"))]
fn compute(
    setup: &Setup,
    w: usize,
    module: &mut Module,
    update: Option<&Update>,
    ends: &mut Ends,
    (site, exchange): (Site, &Exchange),
) -> Result<Compute> {
    let (i, _) = setup.grid.module_and_replica(w);
    match site {
        Site::Cpu => Ok(Compute::Host(Host::new(setup.network.inputs(i).len()))),
        #[cfg(feature = "cuda")]
        Site::Gpu { ordinal, ranks } => {
            let mut values = std::mem::take(&mut ends.values);
            let mut route = |id: u32| exchange.ring(id).map(|ring| Route { ring, values: values.remove(&id) });
            let mut routes = |there: u32, back: Option<u32>| [route(there), back.and_then(&mut route)];
            let back = |end: &Option<(u32, Sender)>| end.as_ref().map(|(id, _)| *id);
            let inputs = ends.inputs.iter().map(|(id, _, end)| routes(*id, back(end))).collect();
            let outputs =
                ends.outputs.iter().map(|(id, _, end)| routes(*id, end.as_ref().map(|(id, _)| *id))).collect();
            let edges = crate::setup::site::Edges {
                returned: ends.inputs.iter().map(|(.., back)| back.is_some()).collect(),
                returns: ends.outputs.iter().map(|(.., back)| back.is_some()).collect(),
                routes: Routes { inputs, outputs },
            };
            crate::setup::site::registers(setup, w, module, update, crate::setup::site::Place { ordinal, ranks }, edges)
        }
    }
}

/// What makes one run's and replica's dropout masks differ from another's.
pub fn run_key(seed: u64, replica: usize) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(&(replica as u64).to_le_bytes(), seed)
}

fn source(setup: &Setup, r: usize, span: &Span, truth: Option<(u32, Sender)>) -> Result<Source> {
    let dataset = setup.dataset.clone().ok_or_else(|| Error::input("there is no dataset to read"))?;
    let d = setup.grid.modules;
    let shape = setup.network.input;
    Ok(Source {
        stream: FrameStream::open(dataset, setup.stream(r, span.first, span.end))?,
        truth,
        ahead: setup.ahead,
        loss_steps: setup.schedule.steps(d).iter().map(|s| s.loss).collect(),
        shape,
    })
}

impl Worker {
    /// Says that it is ready; before the first clip of all also writes its module into checkpoint 0.
    fn start(&mut self, first: u64) -> Result<()> {
        let saved = if first == 0 { self.save_start()? } else { None };
        let report = Report { saved, time: self.watch.take(), ..Report::default() };
        self.send_report(first, &report)
    }
}
