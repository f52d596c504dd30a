//! Training by exact back-propagation in one process: the ceiling that pseudo-gradients are compared with.

use candle_core::Tensor;

use super::head::Head;
use super::reference;
use super::report::Report;
use super::stop::{Decider, ENDS, Files, Requests, UNDO};
use super::worker::{Update, left_out, pass};
use crate::backend::cpu;
use crate::checkpoint;
use crate::config::{OnCheckpointError, Task};
use crate::data::FrameStream;
use crate::nn::module::Module;
use crate::pipeline::metrics::{Phase, Stopwatch};
use crate::setup::Setup;
use crate::trainer::console::{Console, Observer, Totals};
use crate::trainer::run::{last_layer, modules, recorder, run_key, update};
use crate::trainer::run_range::Span;
use crate::trainer::state::{Due, Fit, restore, snapshot};
use crate::{Error, Result};

/// Every module with its optimiser, and the loss behind them.
struct Trainer<'a> {
    setup: &'a Setup,
    modules: Vec<Module>,
    updates: Vec<Update>,
    head: Head,
    stream: FrameStream,
    watch: Stopwatch,
    /// Every module as it was before this clip.
    before: Vec<Vec<(String, Tensor)>>,
}

/// Trains with exact gradients of the loss averaged over steps; same run folder, metrics and checkpoints as the
/// pipeline.
///
/// # Errors
/// As the pipeline's training.
pub fn train(setup: &Setup, span: &Span, requests: &Requests, observer: Observer) -> Result<Totals> {
    let config = &setup.config;
    let dataset = setup.dataset.clone().ok_or_else(|| Error::input("there is no dataset to read"))?;
    let mut trainer = Trainer {
        setup,
        modules: modules(setup)?,
        updates: (0..setup.grid.modules).map(|_| update(setup, span)).collect(),
        head: Head::new(config.model.task, config.model.loss, config.data.batch, setup.classes),
        stream: FrameStream::open(dataset, setup.stream(0, span.first, span.end))?,
        watch: Stopwatch::default(),
        before: Vec::new(),
    };
    if let Some((checkpoint, fit)) = &span.from {
        for (module, update) in trainer.modules.iter_mut().zip(&mut trainer.updates) {
            restore(module, Some(update).filter(|_| *fit == Fit::Exact), checkpoint, *fit, &last_layer(setup))?;
        }
    }
    let frames = (config.data.batch * config.data.frames) as u64;
    let mut console = Console::new(setup.grid, span.total, frames, recorder(setup, span)?, observer);
    let due = Due { every: config.run.checkpoint_every, end: span.end };
    let mut saved = match span.first == 0 && span.record {
        true => Some(trainer.save(0)?),
        false => span.resumed(),
    };
    console.started(&trainer.reports(Report { saved, ..Report::default() }))?;
    let mut decider = Decider::Chief { files: Files::new(&config.run.dir), others: Vec::new() };
    let (decision, failure) = cpu::with_threads(config.run.threads, || {
        for clip in span.first..span.end {
            let mut report = match trainer.clip(clip) {
                Ok(report) => report,
                Err(e @ (Error::Input(_) | Error::Io { .. })) if span.record => {
                    if saved != Some(clip) {
                        saved = Some(trainer.save_before(clip)?);
                    }
                    console.undone(&trainer.reports(Report { saved, ..Report::default() }))?;
                    return Ok((UNDO, Some(format!("clip {clip}: {e}"))));
                }
                Err(Error::Run(text)) => return Err(Error::Run(format!("clip {clip}: {text}"))),
                Err(Error::NonFinite(text)) => return Err(Error::NonFinite(format!("clip {clip}: {text}"))),
                Err(e) => return Err(e),
            };
            let decision = if span.record { decider.decide(requests, 0, clip, 0)? } else { 0 };
            if span.record && (due.at(clip + 1) || decision != 0) {
                match (trainer.save(clip + 1), config.run.on_checkpoint_error) {
                    (Ok(clips), _) => (saved, report.saved) = (Some(clips), Some(clips)),
                    (Err(e), OnCheckpointError::Continue) if clip + 1 < span.end && decision & ENDS == 0 => {
                        log::error!("checkpoint {} could not be written, the run goes on without it: {e}", clip + 1);
                    }
                    (Err(e), _) => return Err(e),
                }
            }
            report.time = trainer.watch.take();
            let ends = decision & ENDS != 0;
            console.batch(clip, trainer.reports(report), ends || clip + 1 == span.end)?;
            if ends {
                return Ok((decision, None));
            }
        }
        Ok::<_, Error>((0, None))
    })??;
    Ok(Totals { decision, failure, ..console.totals() })
}

impl Trainer<'_> {
    /// One clip: all steps forward, the losses, all steps back, one update a module.
    fn clip(&mut self, clip: u64) -> Result<Report> {
        let Setup { network, schedule, config, .. } = self.setup;
        let key = run_key(config.train.seed, 0);
        let passes = |t: usize| pass(true, key, clip, t);
        let before = self.modules.iter_mut().zip(&self.updates).enumerate();
        self.before = before.map(|(n, (m, u))| snapshot(m, Some(u), n + 1)).collect::<Result<_>>()?;
        self.watch.enter(Phase::Data);
        self.head.begin(&self.stream.begin(clip)?.labels);
        let mut targets: Vec<Option<Tensor>> = Vec::new();
        let losses = schedule.steps(self.modules.len());
        let (stream, ahead) = (&mut self.stream, self.setup.ahead);
        let watch = &mut self.watch;
        let mut frame = |t: usize| -> Result<Tensor> {
            watch.enter(Phase::Data);
            let x = stream.frame(t)?;
            targets.push(match ahead.filter(|_| losses.get(t).is_some_and(|s| s.loss)) {
                Some(ahead) => Some(stream.target(t + ahead)?),
                None => None,
            });
            watch.enter(Phase::Forward);
            Ok(x)
        };
        let run = reference::forward(&mut self.modules, network, schedule, &passes, &mut frame)?;
        self.watch.enter(Phase::Backward);
        let (mut gradients, mut skipped, policy) = (Vec::new(), 0, config.run.on_nonfinite);
        for (t, y) in run.last().iter().enumerate() {
            let has_loss = losses.get(t).is_some_and(|s| s.loss);
            let target = targets.get(t).and_then(Option::as_ref);
            debug_assert!(config.model.task == Task::Recognition || target.is_some() == has_loss);
            gradients.push(match has_loss.then(|| self.head.loss(y, target, true)).transpose() {
                Ok(gradient) => gradient.flatten(),
                Err(e @ Error::NonFinite(_)) => left_out(policy, &mut skipped, e, || Ok(None))?,
                Err(e) => return Err(e),
            });
        }
        let count = gradients.iter().flatten().count() as u64;
        reference::backward(&mut self.modules, network, schedule, &passes, run, gradients)?;
        self.watch.enter(Phase::Optimizer);
        self.before.clear();
        for (module, update) in self.modules.iter_mut().zip(&mut self.updates) {
            update.steps = count;
            if let Err(e) = update.apply(module, clip, losses.len()) {
                if !matches!(e, Error::NonFinite(_)) {
                    return Err(e);
                }
                left_out(policy, &mut skipped, e, || update.forget(module))?;
            }
        }
        self.watch.enter(Phase::Other);
        let last = &self.updates[self.updates.len() - 1];
        Ok(Report {
            score: self.head.end(),
            backward_steps: count as f32,
            grad_norm: last.grad_norm as f32,
            lr: last.lr as f32,
            skipped: skipped as f32,
            videos_skipped: self.stream.skipped().len() as f32,
            ..Report::default()
        })
    }

    fn save(&mut self, clips: u64) -> Result<u64> {
        let dir = self.setup.checkpoints();
        for (n, (module, update)) in self.modules.iter_mut().zip(&self.updates).enumerate() {
            checkpoint::write_module(&dir, clips, n + 1, snapshot(module, Some(update), n + 1)?)?;
        }
        Ok(clips)
    }

    /// Writes every module as it was before `clip`.
    fn save_before(&mut self, clip: u64) -> Result<u64> {
        let dir = self.setup.checkpoints();
        for (n, tensors) in std::mem::take(&mut self.before).into_iter().enumerate() {
            checkpoint::write_module(&dir, clip, n + 1, tensors)?;
        }
        Ok(clip)
    }

    /// The process's report stands at the last module; the others' are empty.
    fn reports(&self, report: Report) -> Vec<Report> {
        let mut reports = vec![Report { saved: report.saved, ..Report::default() }; self.modules.len() - 1];
        reports.push(report);
        reports
    }
}
