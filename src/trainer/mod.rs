//! A training run from its start to its end: [`Trainer`] is the library's front door.
//!
//! It plans the run ([`crate::setup`]), checks what the hosts offer ([`preflight`]), holds the run folder ([`run_folder`]),
//! resumes from the newest checkpoint ([`resume`]), listens to signals, runs the pipeline, and gathers on rank 0 what workers
//! report ([`console`]). The parameters are validated meanwhile where that is
//! asked for ([`Validated`]). [`evaluate`] is a pass over the test clips with fixed parameters.

mod attempt;
mod board;
pub mod console;
pub mod evaluate;
pub mod fidelity;
pub mod limits;
pub mod pictures;
pub mod preflight;
mod recorder;
pub mod resume;
pub mod run_folder;
mod signals;
mod validation;

use std::fs::File;
use std::time::Duration;

pub use console::{BatchSummary, Observer, Totals};
pub use evaluate::Evaluator;
pub use validation::{Tally, Validated, psnr};

use crate::Result;
use crate::comm::{Orders, World};
use crate::config::Config;
use crate::pipeline::orders::{self, Requests};
use crate::pipeline::{self, Parts, RunRange, Traced, frames_of, stage_of};
use crate::plan::cut::{cut, resume_cut};
use crate::setup::{Purpose, Setup};
use console::Console;
use recorder::recorder;

/// A training run on all ranks of a job: every rank makes one, and runs it.
pub struct Trainer<'w> {
    world: &'w World,
    setup: Setup,
    range: RunRange,
    requests: Requests,
    /// Keeps other runs out of the run folder.
    _held: Option<File>,
}

impl<'w> Trainer<'w> {
    /// Plans the run of `config`, checks that it can be, and finds out where it goes on: from the newest checkpoint in its run
    /// folder, which is held from now on. Ends after `stop_after` batches, if given. Collective.
    ///
    /// # Errors
    /// [`crate::Error::Input`], on all ranks, for whatever in configuration, data, ranks, hosts or run folder cannot work.
    pub fn new(world: &'w World, config: &Config, stop_after: Option<u64>) -> Result<Self> {
        let mut config = config.clone();
        let planned = resume_cut(&mut config).and_then(|_| Setup::new(&config, world.size(), Purpose::Train));
        let setup = cut(world.first_error(planned)?, world)?;
        preflight::require(world, &setup)?;
        let hold = || run_folder::hold(&setup.config.run.dir, patience());
        let held = world.first_error((world.rank() == 0).then(hold).transpose())?;
        let range = resume::range(&setup, world, stop_after)?;
        Ok(Trainer { world, setup, range, requests: Requests::default(), _held: held })
    }

    /// The first `batches` of a run that is planned, of which nothing is recorded and no run folder is used: for measuring.
    pub fn unrecorded(world: &'w World, setup: Setup, batches: u64) -> Self {
        Self::traced(world, setup, batches, None)
    }

    /// The same, of which some batches are recorded moment by moment.
    pub fn traced(world: &'w World, setup: Setup, batches: u64, trace: Option<Traced>) -> Self {
        let (end, total) = (batches, batches);
        let range = RunRange { first: 0, end, total, from: None, record: false, validates_first: false, trace };
        Trainer { world, setup, range, requests: Requests::default(), _held: None }
    }

    /// The run as planned.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Which batches it goes through.
    pub fn range(&self) -> &RunRange {
        &self.range
    }

    /// What this process is asked for while the run lasts: stop, or write a checkpoint.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
    }

    /// From now on, SIGTERM, SIGUSR1 or SIGINT asks the run to stop with a checkpoint; another one ends this process at once.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the operating system refuses.
    pub fn listen_to_signals(&self) -> Result<()> {
        signals::raise_on_signals(&self.requests, self.world.rank() == 0)
    }

    /// Whether all batches were done before, and validated where that is to be.
    pub fn is_done(&self) -> bool {
        self.range.first >= self.range.end && !self.range.validates_first
    }

    /// Trains. `observer` is called on rank 0 after every batch; totals are rank 0's, but for the decision that ended the run
    /// early. Collective.
    ///
    /// # Errors
    /// The first failure of any worker of this process; the caller ends the whole job with it ([`World::conclude`]).
    pub fn run(&self, observer: Observer) -> Result<Totals> {
        let Trainer { world, setup, range, requests, .. } = self;
        world.agree(setup.fingerprint(range.first)?, "configuration, dataset and checkpoint")?;
        attempt::note(world, setup, range)?;
        let recorder = if world.rank() == 0 { recorder(setup, range)? } else { None };
        let stage = |spec, w, site| stage_of(setup, range, spec, w, site);
        let frames = |r| frames_of(setup, range, r);
        let parts = Parts { stage: &stage, frames: &frames, gradients: None };
        let mut console = Console::new(setup, range.total, recorder, observer);
        let end =
            pipeline::run(setup, world, range, &parts, requests, |reports| console.follow(reports, range, requests))?;
        Ok(Totals { decision: end.decision, failure: end.failure, ..console.totals() })
    }

    /// How a run that came to `totals` ends for whoever started it: nothing where all was done or it was ended for good.
    /// Collective.
    ///
    /// # Errors
    /// [`crate::Error::Stopped`] where the same command goes on; [`crate::Error::Input`], on all ranks, where frames could not be read.
    pub fn conclude(&self, totals: &Totals) -> Result<()> {
        let decision = totals.decision;
        if decision.contains(Orders::UNDO) {
            let done = self.range.first + totals.batches;
            let failure = totals.failure.as_ref().map(|why| orders::undone(why, done));
            return self.world.first_error(failure.map_or(Ok(()), Err));
        }
        match decision {
            _ if decision.contains(Orders::FINISH) => Ok(()),
            _ if decision.contains(Orders::STOP) => Err(orders::stopped("a signal")),
            _ if self.range.end < self.range.total => Err(orders::stopped("--stop-after")),
            _ => Ok(()),
        }
    }
}

/// How long to wait for a run folder that another run holds: NFS gives the locks of a dead host back after 90 s.
fn patience() -> Duration {
    Duration::from_secs(if std::env::var_os("SLURM_JOB_ID").is_some() { 120 } else { 0 })
}
