//! Starts this rank's workers, one thread each, and sees them through.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::build::{Parts, build};
use super::cores;
use super::links::{Reports, WorkerLinks, edges};
use super::orders::Requests;
use super::record::{Launch, Traced};
use crate::backend::cpu;
use crate::backend::stage::Fit;
use crate::checkpoint::Checkpoint;
use crate::comm::exchange::{Gpus, connect_gpus};
use crate::comm::{Orders, World};
use crate::setup::Setup;
use crate::setup::neighbours::Neighbours;
use crate::setup::site::{self, Site};
use crate::sys::cpus::{at_once, own_processors};
use crate::torch::Import;
use crate::{Error, Result};

/// Where parameters come from.
pub enum Origin {
    /// A checkpoint, and how strictly it must fit.
    Checkpoint(Checkpoint, Fit),
    /// Another program's weights: what it has of the network.
    Import(Import),
}

impl Origin {
    /// The folder, or the file.
    pub fn path(&self) -> &Path {
        match self {
            Origin::Checkpoint(checkpoint, _) => checkpoint.path(),
            Origin::Import(import) => import.path(),
        }
    }
}

/// Which batches a run goes through, and from what parameters.
pub struct RunRange {
    /// The first batch.
    pub first: u64,
    /// The batch behind the last one.
    pub end: u64,
    /// Batches in the whole run, for the learning rate.
    pub total: u64,
    /// Where parameters (and in training the optimiser's state) come from.
    pub from: Option<Origin>,
    /// Training: whether the run folder gets metrics and checkpoints; without, nothing is written, and not validated.
    pub record: bool,
    /// Training: whether the validation after `first` batches is still to be made.
    pub validates_first: bool,
    /// Training: what is recorded moment by moment; none: nothing, whoever asks.
    pub trace: Option<Traced>,
}

impl RunRange {
    /// Batches of the checkpoint in the run folder that training goes on from.
    pub fn resumed(&self) -> Option<u64> {
        (self.record && self.first > 0).then_some(self.first)
    }
}

/// How a rank's workers came to their end.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// What was decided; empty if all batches were done.
    pub decision: Orders,
    /// Why a batch could not be read, on the rank of module 1.
    pub failure: Option<String>,
    /// The folders of what was recorded.
    pub recorded: Vec<PathBuf>,
}

/// Goes through `range` on all ranks; every rank calls it. `console` is called on rank 0, in a thread of its own, with all
/// workers' reports. `requests` is what this process is asked for meanwhile.
///
/// # Errors
/// The first failure of any worker of this process; under MPI the caller ends the whole job with it.
pub fn run(
    setup: &Setup,
    world: &World,
    range: &RunRange,
    parts: &Parts,
    requests: &Requests,
    console: impl FnOnce(&mut Reports) -> Result<()> + Send,
) -> Result<End> {
    let (grid, config) = (setup.grid, &setup.config.run);
    let launch = range.trace.as_ref().map(|_| Launch::new(world)).transpose()?;
    let site = site::choose(world, config.device)?;
    // Who compares gradients runs it again and again, and says it once; a GPU's stages say it themselves.
    if site == Site::Cpu && world.rank() == 0 && parts.gradients.is_none() {
        log::info!("modules compute on the CPU: {}, {} thread(s) each", cpu::back_end(), config.threads);
    }
    let (edges, links) = if site == Site::Cpu { Default::default() } else { edges(setup) };
    let gpus = match site {
        Site::Cpu => None,
        Site::Gpu { ordinal, .. } => {
            let (exchange, numbers) = (config.exchange, setup.wiring.numbers());
            Some(Gpus { ordinal, exchange, edges: &edges, links: &links, numbers })
        }
    };
    let (timeout, links) = (Duration::from_secs(config.timeout), setup.wiring.of_rank(world.rank()));
    let (mut ends, shared) = connect_gpus(world, &grid.placement(), &links, timeout, gpus)?;
    let breaker = ends.breaker();
    let mut reports = if world.rank() == 0 { Some(Reports::take(setup, &mut ends)?) } else { None };
    let own: Vec<usize> = grid.workers_of(world.rank()).collect();
    let users = cores::share(own.len(), at_once(config.threads), &processors_of_own(world, setup, site)?);
    let (done, finished) = mpsc::channel();
    let links = own.iter().map(|&w| WorkerLinks::take(setup, w, &mut ends)).collect::<Result<Vec<_>>>()?;
    let end = std::thread::scope(|scope| {
        let mut running = 0;
        for ((w, cores), links) in own.into_iter().zip(users).zip(links) {
            let (i, r) = grid.module_and_replica(w);
            let (done, requests) = (done.clone(), requests.clone());
            let work = move || {
                work(setup, range, move || build(setup, w, links, range, parts, site, (requests, cores, launch)))
            };
            let body = move || {
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
                    .unwrap_or_else(|_| Err(Error::Run(format!("module {i}, replica {r} panicked (a bug)"))));
                // The main thread waits for exactly one answer of every worker.
                let _ = done.send(result);
            };
            std::thread::Builder::new()
                .name(format!("module-{i}.{r}"))
                .spawn_scoped(scope, body)
                .map_err(|e| Error::Run(format!("starting a thread for module {i}: {e}")))
                .inspect_err(|e| breaker.trip(e.to_string()))?;
            running += 1;
        }
        if let Some(reports) = &mut reports {
            let done = done.clone();
            scope.spawn(move || {
                let _ = done.send(console(reports).map(|()| End::default()));
            });
            running += 1;
        }
        let (mut errors, mut end) = (Vec::new(), End::default());
        for result in finished.iter().take(running) {
            match result {
                Ok(End { decision, failure, recorded }) => {
                    end.decision |= decision;
                    end.failure = end.failure.or(failure);
                    // The same of all workers, and none of the console.
                    end.recorded = if recorded.is_empty() { end.recorded } else { recorded };
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
    if let Some(launch) = launch.filter(|_| !end.recorded.is_empty()) {
        launch.conclude(world, &end.recorded)?;
    }
    shared.close(world)?;
    Ok(end)
}

/// The processors that nobody but this rank's workers computes on, one of them each; none if there are others, or if these need
/// several or have a GPU. Collective.
fn processors_of_own(world: &World, setup: &Setup, site: Site) -> Result<Vec<usize>> {
    let apart = Neighbours::of(world)?.apart;
    Ok(if apart && site == Site::Cpu && setup.config.run.threads == 1 { own_processors() } else { Vec::new() })
}

/// A worker's thread: all batches of the range, or up to the one after which it was decided to end.
fn work(setup: &Setup, range: &RunRange, build: impl FnOnce() -> Result<super::worker::Worker> + Send) -> Result<End> {
    cpu::with_threads(setup.config.run.threads, move || {
        let mut worker = build()?;
        worker.start(range.first)?;
        let validation = worker.validation.clone();
        if range.validates_first {
            worker.validate(range.first)?;
        }
        let mut done = range.first;
        while done < range.end && !worker.decision.intersects(Orders::ENDS) {
            worker.run_batch(done)?;
            done += 1;
            let due = validation.as_ref().is_some_and(|validation| validation.is_due(done, range.total));
            if due && !worker.decision.intersects(Orders::ENDS) {
                worker.validate(done)?;
            }
            worker.record_until(done, done == range.end || worker.decision.intersects(Orders::ENDS))?;
        }
        let mut end = End { recorded: worker.recorded(), ..End::default() };
        if worker.decision.intersects(Orders::ENDS) {
            end.decision = worker.decision;
            end.failure = worker.role.source().and_then(|source| source.failure.take());
        }
        worker.flush()?;
        Ok(end)
    })?
}
