//! Where a worker's time goes, what held it back, what it reports of every batch, and, where that is asked for, a record of every moment.

pub mod attempt;
pub mod limit;
pub mod recording;
pub mod report;

use std::time::Instant;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

pub use recording::{Place, Recording};
pub use report::Report;

use recording::Slices;

/// What a worker is doing. The phases sum to wall time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The forward pass, sender's pooling included.
    Forward,
    /// Waiting for activations (and for labels or target frames).
    WaitActivations,
    /// Loss and vector–Jacobian product.
    Backward,
    /// Waiting for cotangents.
    WaitCotangents,
    /// The optimiser.
    Optimizer,
    /// Waiting for and scaling frames (module 1).
    Data,
    /// Handing messages over: copying, and waiting for a free buffer where the receiver is behind.
    Send,
    /// Waiting for a core, where the process has more workers than cores.
    WaitCore,
    /// Reports, what is between phases.
    Other,
    /// Everything between the begin and the end of a validation.
    Validation,
    /// Averaging gradients over replicas, waiting for theirs included.
    AllReduce,
    /// Handing the module over to be written, and waiting for that where a run ends.
    Checkpoint,
}

impl Phase {
    /// In words, as a trace has it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::WaitActivations => "wait for activations",
            Phase::Backward => "backward",
            Phase::WaitCotangents => "wait for cotangents",
            Phase::Optimizer => "update",
            Phase::Data => "data",
            Phase::Send => "send",
            Phase::WaitCore => "wait for a core",
            Phase::Other => "other",
            Phase::Validation => "validation",
            Phase::AllReduce => "all-reduce",
            Phase::Checkpoint => "checkpoint",
        }
    }
}

/// How many phases there are.
pub const PHASES: usize = 12;

/// Seconds spent in each phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, Pod, Zeroable)]
#[serde(default)]
#[repr(C)]
pub struct TimeAccount {
    /// [`Phase::Forward`]
    pub forward: f32,
    /// [`Phase::WaitActivations`]
    pub wait_activations: f32,
    /// [`Phase::Backward`]
    pub backward: f32,
    /// [`Phase::WaitCotangents`]
    pub wait_cotangents: f32,
    /// [`Phase::Optimizer`]
    pub optimizer: f32,
    /// [`Phase::Data`]
    pub data: f32,
    /// [`Phase::Send`]
    pub send: f32,
    /// [`Phase::WaitCore`] (formerly `turn`)
    #[serde(alias = "turn")]
    pub wait_core: f32,
    /// [`Phase::Other`]
    pub other: f32,
    /// [`Phase::Validation`]
    pub validation: f32,
    /// [`Phase::AllReduce`]
    pub all_reduce: f32,
    /// [`Phase::Checkpoint`] (formerly part of `other`)
    pub checkpoint: f32,
}

impl TimeAccount {
    /// All entries, in declaration order.
    pub fn to_array(self) -> [f32; PHASES] {
        bytemuck::cast(self)
    }

    /// The inverse of [`TimeAccount::to_array`].
    pub fn from_array(seconds: [f32; PHASES]) -> Self {
        bytemuck::cast(seconds)
    }

    /// Adds another account.
    pub fn add(&mut self, other: &TimeAccount) {
        let mut sum = self.to_array();
        sum.iter_mut().zip(other.to_array()).for_each(|(s, t)| *s += t);
        *self = Self::from_array(sum);
    }

    /// All seconds.
    pub fn total(self) -> f32 {
        self.to_array().iter().sum()
    }

    /// The seconds of useful work: forward, backward, optimiser.
    pub fn busy(self) -> f32 {
        self.forward + self.backward + self.optimizer
    }
}

/// Attributes every moment to one [`Phase`].
#[derive(Debug)]
pub struct Stopwatch {
    phase: Phase,
    /// Whatever the phase, it is a validation's.
    validates: bool,
    since: Instant,
    spent: [f64; PHASES],
    /// Where in the run the worker is.
    place: Place,
    /// Every stretch of time, while that is recorded.
    slices: Option<Slices>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        let (place, slices) = (Place::default(), None);
        Stopwatch { phase: Phase::Other, validates: false, since: Instant::now(), spent: [0.0; PHASES], place, slices }
    }
}

impl Stopwatch {
    /// Ends the present phase and begins another.
    pub fn enter(&mut self, phase: Phase) {
        let now = Instant::now();
        let present = if self.validates { Phase::Validation } else { self.phase };
        self.spent[present as usize] += (now - self.since).as_secs_f64();
        if let Some(slices) = &mut self.slices {
            slices.add(self.phase, self.since, now);
        }
        self.since = now;
        self.phase = phase;
    }

    /// Goes on to another batch or tick: what follows is about that.
    pub fn at(&mut self, place: Place) {
        if self.slices.is_some() {
            self.enter(self.phase);
        }
        self.place = place;
        if let Some(slices) = &mut self.slices {
            slices.at(place);
        }
    }

    /// Records every stretch of time from now on, up to `room` of them.
    pub fn record(&mut self, room: usize) {
        self.enter(self.phase);
        self.slices = Some(Slices::new(room, self.place));
    }

    /// Ends that; what was recorded.
    pub fn recorded(&mut self) -> Slices {
        self.enter(self.phase);
        self.slices.take().unwrap_or_default()
    }

    /// Begins a validation, or ends it: what is entered meanwhile counts as [`Phase::Validation`].
    pub fn validate(&mut self, begins: bool) {
        self.enter(Phase::Other);
        self.validates = begins;
    }

    /// The account since the last call, which starts anew.
    pub fn take(&mut self) -> TimeAccount {
        self.enter(self.phase);
        TimeAccount::from_array(std::mem::take(&mut self.spent).map(|s| s as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn phases_sum_to_wall_time() {
        let start = Instant::now();
        let mut watch = Stopwatch::default();
        for phase in [Phase::Forward, Phase::WaitActivations, Phase::Data] {
            watch.enter(phase);
            std::thread::sleep(Duration::from_millis(3));
        }
        let account = watch.take();
        let wall = start.elapsed().as_secs_f32();
        assert!((account.total() - wall).abs() < 1e-3, "{account:?} against {wall}");
        assert!(account.forward >= 0.003 && account.data >= 0.003 && account.backward == 0.0);
        assert_eq!(TimeAccount::from_array(account.to_array()), account);
    }

    #[test]
    fn a_validation_is_a_phase_of_its_own() {
        let mut watch = Stopwatch::default();
        watch.validate(true);
        watch.enter(Phase::Forward);
        std::thread::sleep(Duration::from_millis(3));
        watch.enter(Phase::WaitActivations);
        std::thread::sleep(Duration::from_millis(3));
        watch.validate(false);
        watch.enter(Phase::Forward);
        std::thread::sleep(Duration::from_millis(3));
        let account = watch.take();
        assert!(account.validation >= 0.006 && account.forward >= 0.003, "{account:?}");
        assert!(account.wait_activations == 0.0 && account.busy() == account.forward, "{account:?}");
    }
}
