//! One clip of one module: what comes before its first tick and after its last.

use super::report::{DECIDED, Report};
use super::stop::{Decider, UNDO};
use super::worker::{At, Worker, header};
use crate::comm::{Header, Kind};
use crate::config::UpdateEvery;
use crate::pipeline::metrics::Phase;
use crate::{Error, Result};

impl Worker {
    /// One clip. `first_tick` is the tick of module 1's first step in it.
    ///
    /// # Errors
    /// Whatever fails, with module, clip, step and tick in front.
    pub fn clip(&mut self, clip: u64, first_tick: u64) -> Result<()> {
        self.begin(clip)?;
        for step in 0..self.plan.len() {
            let at = At { clip, step, tick: first_tick + (step + self.index - 1) as u64 };
            self.tick(at).map_err(|e| self.locate(at, e))?;
        }
        self.end(clip)
    }

    /// Clears every register and takes the clip's labels.
    fn begin(&mut self, clip: u64) -> Result<()> {
        self.compute.begin();
        (self.decision, self.skipped) = (0, 0);
        if self.saver.is_some() {
            self.compute.mark(&mut self.module, self.update.as_ref(), self.index)?;
        }
        if self.source.is_some() {
            self.watch.enter(Phase::Data);
            let labels = self.labels(clip)?;
            let Some(source) = &mut self.source else { return Ok(()) };
            match (&mut source.truth, &mut self.loss) {
                (None, Some(end)) => self.compute.set_labels(&mut end.head, &labels)?,
                (Some((id, sender)), _) if source.ahead.is_none() => {
                    let head = header(Kind::Labels, *id, clip, 0, self.batch, [1, 1, 1]);
                    let labels: Vec<f32> = labels.iter().map(|&l| l as f32).collect();
                    sender.send(&head, &labels)?;
                }
                _ => {}
            }
        } else if let Some(end) = &mut self.loss {
            self.watch.enter(Phase::WaitActivations);
            match &mut end.truth {
                Some((id, receiver)) if end.head.needs_labels() => {
                    let labels = receiver.wait(&header(Kind::Labels, *id, clip, 0, self.batch, [1, 1, 1]))?;
                    let labels: Vec<i32> = labels.iter().map(|&l| l as i32).collect();
                    receiver.release()?;
                    self.compute.set_labels(&mut end.head, &labels)?;
                }
                _ => {
                    let present = end.present(clip, self.batch);
                    self.compute.set_labels(&mut end.head, &present)?;
                }
            }
        }
        Ok(())
    }

    /// Module 1: the clip's labels; none, where they cannot be read and the clip is given up.
    fn labels(&mut self, clip: u64) -> Result<Vec<i32>> {
        let Some(source) = &mut self.source else { return Err(Error::Run("no frames here".into())) };
        match source.stream.begin(clip) {
            Ok(clip) => Ok(clip.labels),
            Err(e) => {
                let place = |text| format!("module 1, clip {clip}: {text}");
                let error = if let Error::Input(text) = e { Error::Input(place(text)) } else { e };
                self.give_up(error, 0)?;
                Ok(vec![-1; self.batch])
            }
        }
    }

    /// Module 1, where frames cannot be read at `step`: gives the clip up if the other modules can still be told.
    ///
    /// # Errors
    /// `error`, if they cannot: in evaluation, past the step at which decisions travel, and in other replicas than the
    /// one that decides.
    pub(crate) fn give_up(&mut self, error: Error, step: usize) -> Result<()> {
        let decides = self.decider.as_ref().is_some_and(Decider::is_chief);
        if !decides || step > self.decision_step {
            return Err(error);
        }
        self.failure = Some(error.to_string());
        Ok(())
    }

    /// The end of the module's own window: no barrier, every module updates when it is through.
    fn end(&mut self, clip: u64) -> Result<()> {
        if self.decision & UNDO != 0 {
            let saved = self.save_before(clip)?;
            return self.send_report(clip, &Report { saved, ..Report::default() });
        }
        self.compute.unmark();
        let backward_steps = self.plan.iter().filter(|s| s.backward).count() as f32;
        if let Some(update) = &self.update
            && matches!(update.every, UpdateEvery::Named(_))
            && update.steps > 0
        {
            self.apply_update(clip, self.plan.len())?;
        }
        self.tally()?;
        self.watch.enter(Phase::Other);
        let saved = self.save(clip)?;
        let (link, waited) = self.longest_wait();
        let skipped = self.skipped as f32;
        let mut report = Report { backward_steps, saved, skipped, link, waited, ..Report::default() };
        if let Some(end) = &mut self.loss {
            report.score = end.head.end();
            if self.report_logits {
                let (logits, labels) = end.head.logits_and_labels();
                report.logits = logits.to_vec();
                report.labels = labels.iter().map(|&l| l as f32).collect();
            }
        }
        if let Some(source) = &self.source {
            report.videos_skipped = source.stream.skipped().len() as f32;
        }
        if let Some(update) = &self.update {
            (report.grad_norm, report.lr) = (update.grad_norm as f32, update.lr as f32);
        }
        report.time = self.watch.take();
        self.send_report(clip, &report)
    }

    /// Sends a report of batch `clip` to the console.
    pub(crate) fn send_report(&mut self, clip: u64, report: &Report) -> Result<()> {
        let (id, sender) = &mut self.console;
        let words = report.write(sender.slot()?);
        let flags = self.requests.pending() | self.decision << DECIDED;
        sender.start(&Header::new(Kind::Report, *id, clip, 0, [words as u32, 1, 1, 1]).stamped(0, flags))
    }

    /// The link that this worker waited on longest since the last report, and the seconds.
    fn longest_wait(&mut self) -> (u32, f32) {
        let inputs = self.inputs.iter_mut().map(|edge| (edge.id, edge.waits.take()));
        let outputs = self.outputs.iter_mut().filter_map(|edge| Some((edge.cotangents.as_ref()?.0, edge.waits.take())));
        let longest = inputs.chain(outputs).max_by(|a, b| a.1.total_cmp(&b.1));
        longest.map_or((0, 0.0), |(link, seconds)| (link, seconds as f32))
    }

    /// Waits until everything sent has left.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.compute.flush()?;
        for edge in &mut self.outputs {
            edge.activations.flush()?;
        }
        for (_, sender) in self.inputs.iter_mut().filter_map(|edge| edge.cotangents.as_mut()) {
            sender.flush()?;
        }
        if let Some((_, sender)) = self.source.as_mut().and_then(|s| s.truth.as_mut()) {
            sender.flush()?;
        }
        if let Some(decider) = &mut self.decider {
            decider.flush()?;
        }
        self.console.1.flush()
    }

    pub(crate) fn locate(&self, at: At, e: Error) -> Error {
        let place = format!("module {}, clip {}, step {}, tick {}", self.index, at.clip, at.step, at.tick);
        match e {
            Error::Input(text) => Error::Input(format!("{place}: {text}")),
            Error::Transport(text) => Error::Transport(format!("{place}: {text}")),
            Error::NonFinite(text) => Error::NonFinite(format!("{place}: {text}")),
            e @ Error::Io { .. } => e,
            e => Error::Run(format!("{place}: {e}")),
        }
    }
}
