//! Which batches a worker records moment by moment, for `sideways trace`: those of `run.trace`, and the next ones wherever a file
//! `TRACE` asks for it, which travels as other requests do ([`super::orders`]).
//!
//! Recording is a matter of the stopwatch and of the thread's ends of links; nothing is asked in a tick. All workers go
//! through the same batches and hear of the same decisions, so they record the same ones.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::RunRange;
use super::worker::Worker;
use crate::Result;
use crate::backend::stage::{DevicePass, Work};
use crate::comm::all_reduce::messages;
use crate::comm::clocks::ClockOffset;
use crate::comm::{Orders, World, moments};
use crate::config::UpdateEvery;
use crate::method::Schedule;
use crate::metrics::recording::{Clocks, DeviceTime, write_json};
use crate::metrics::{Phase, Place, Recording};
use crate::setup::Setup;
use crate::sys::clock::nanoseconds;
use crate::sys::host::hostname;

/// Batches recorded where a file asks for it.
pub const ON_REQUEST: u64 = 3;

/// Slices, and messages, that a worker records at most: 150 MB.
const MOST: usize = 1 << 20;

/// And passes of a GPU, for each of which the driver makes two events before.
const MOST_PASSES: usize = 1 << 15;

/// What of a range is recorded.
#[derive(Clone, Debug)]
pub struct Traced {
    /// Each recording has a folder of its own in it.
    pub folder: PathBuf,
    /// These batches, whether anybody asks or not.
    pub batches: Option<Range<u64>>,
}

/// What this launch of the program has on all its ranks, and this rank's clock beside rank 0's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    /// When, by rank 0: nanoseconds since 1970.
    id: u64,
    clock: ClockOffset,
}

impl Launch {
    /// Of this launch. Collective.
    pub(super) fn new(world: &World) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let first = world.gather(&now.to_le_bytes())?.swap_remove(0);
        let id = first.as_slice().try_into().map_or(now, u64::from_le_bytes);
        let clock = world.clocks()?.get(world.rank()).copied().unwrap_or_default();
        Ok(Launch { id, clock })
    }

    /// The clocks once more, beside the recordings in `folders`: what they drifted meanwhile. Collective.
    pub(super) fn conclude(self, world: &World, folders: &[PathBuf]) -> Result<()> {
        let clocks = Clocks { launch: self.id, clocks: world.clocks()? };
        for folder in folders.iter().filter(|_| world.rank() == 0) {
            if let Err(e) = write_json(&folder.join(Clocks::FILE), &clocks) {
                log::warn!("clocks are as they were when the run began, in what was recorded: {e}");
            }
        }
        Ok(())
    }
}

/// A worker's part in recording.
pub struct Tracer {
    to: Traced,
    /// Of this worker, without anything recorded.
    empty: Recording,
    /// Room for a batch's slices and messages, without a validation and with one.
    room: Room,
    with_validation: Room,
    /// Batches from one validation to the next; 0: there is none.
    every: u64,
    /// The batch behind the run's last.
    end: u64,
    /// The batches that it is at.
    at_work: Option<Range<u64>>,
    /// Whether it was decided to record the next ones.
    ordered: bool,
    /// Folders of those written.
    recorded: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Room {
    slices: usize,
    messages: usize,
    /// A GPU's passes.
    passes: usize,
}

impl Room {
    /// For what module `i` does in one batch.
    fn of(setup: &Setup, schedule: &Schedule, i: usize) -> Self {
        let (inputs, outputs) = (setup.network.inputs(i).len(), setup.network.outputs(i).len());
        let ticks = schedule.window(i).len();
        // As many as enter a phase in a tick, where every cotangent is added on its own, and around the ticks.
        Room {
            slices: ticks * (20 + 3 * outputs) + 20,
            messages: ticks * (2 * inputs + 2 * outputs + 1) + 20,
            passes: ticks * 4 + 1,
        }
    }

    fn and(self, other: Room, times: usize) -> Self {
        let more = |a: usize, b: usize| a.saturating_add(b.saturating_mul(times));
        Room {
            slices: more(self.slices, other.slices),
            messages: more(self.messages, other.messages),
            passes: more(self.passes, other.passes),
        }
    }
}

impl Tracer {
    /// Worker `w`'s, which has recorded nothing.
    pub(super) fn new(setup: &Setup, w: usize, range: &RunRange, to: Traced, launch: Launch) -> Self {
        let (grid, (i, r)) = (setup.grid, setup.grid.module_and_replica(w));
        let empty = Recording {
            launch: launch.id,
            module: i,
            replica: r,
            grid: [grid.modules, grid.replicas],
            rank: grid.rank_of(w),
            host: hostname(),
            clock: launch.clock,
            slices: Vec::new(),
            device: Vec::new(),
            messages: Vec::new(),
            dropped: 0,
        };
        let averaged = Room { messages: messages(grid.replicas, setup.frozen.learned(i) as usize), ..Room::default() };
        let updates = match setup.config.train.update_every {
            UpdateEvery::Named(_) => 1,
            // And what is left at a batch's end.
            UpdateEvery::Steps(every) => setup.schedule.backwards(i).count() / every.max(1) as usize + 2,
        };
        let room = Room::of(setup, &setup.schedule, i).and(averaged, updates);
        let validation = setup.validation.as_ref().filter(|_| range.record);
        let with_validation = validation
            .map_or(room, |validation| room.and(Room::of(setup, &validation.schedule, i), validation.batches as usize));
        let every = validation.map_or(0, |validation| validation.every);
        let (at_work, ordered, recorded) = (None, false, Vec::new());
        Tracer { to, empty, room, with_validation, every, end: range.end, at_work, ordered, recorded }
    }

    /// The batches whose record begins with `batch`, if any.
    fn due(&mut self, batch: u64) -> Option<Range<u64>> {
        let asked = self.to.batches.clone().filter(|batches| batches.contains(&batch));
        let ordered = std::mem::take(&mut self.ordered).then_some(batch..batch + ON_REQUEST);
        let end = asked.or(ordered)?.end;
        Some(batch..end.min(self.end))
    }

    /// Room for these batches, or as much as there is at most.
    fn room(&self, batches: &Range<u64>) -> Room {
        let number = (batches.end - batches.start) as usize;
        let validations =
            batches.end.checked_div(self.every).map_or(0, |n| n + 2 - batches.start / self.every) as usize;
        let all = Room::default().and(self.room, number).and(self.with_validation, validations.min(number));
        Room { slices: all.slices.min(MOST), messages: all.messages.min(MOST), passes: all.passes.min(MOST_PASSES) }
    }

    fn folder(&self, batches: &Range<u64>) -> PathBuf {
        self.to.folder.join(format!("batches-{:08}-{:08}", batches.start, batches.end))
    }
}

impl Worker {
    /// Begins to record where batch `batch`, which begins at tick `tick`, is the first that is to be.
    ///
    /// # Errors
    /// As [`Stage::note_passes`](crate::backend::stage::Stage::note_passes).
    pub(super) fn record_from(&mut self, batch: u64, tick: u64) -> Result<()> {
        let Some(tracer) = self.tracer.as_mut().filter(|tracer| tracer.at_work.is_none()) else {
            return Ok(());
        };
        let Some(batches) = tracer.due(batch) else { return Ok(()) };
        let room = tracer.room(&batches);
        tracer.at_work = Some(batches);
        self.stage.note_passes(room.passes)?;
        moments::begin(room.messages);
        self.watch.at(Place { batch: batch.into(), tick, ..Place::default() });
        self.watch.record(room.slices);
        Ok(())
    }

    /// Remembers that the next batches are to be recorded, if that was decided on in this one.
    pub(super) fn record_as_ordered(&mut self) {
        if let Some(tracer) = &mut self.tracer {
            tracer.ordered |= self.decision.contains(Orders::TRACE);
        }
    }

    /// Writes what was recorded if `done` batches end it, or all `ends`. A run does not end because that cannot be written.
    ///
    /// # Errors
    /// As [`Stage::noted_passes`](crate::backend::stage::Stage::noted_passes).
    pub(super) fn record_until(&mut self, done: u64, ends: bool) -> Result<()> {
        let Some(tracer) = &mut self.tracer else { return Ok(()) };
        let Some(batches) = tracer.at_work.take_if(|batches| ends || batches.end <= done) else { return Ok(()) };
        let folder = tracer.folder(&(batches.start..done));
        let (slices, messages) = (self.watch.recorded(), moments::end());
        let passes: Vec<DeviceTime> = self.stage.noted_passes()?.iter().map(device_time).collect();
        let recording = tracer.empty.clone().holding(slices, &messages, &passes);
        match recording.write(&folder) {
            Ok(()) if self.index == 1 && self.training.as_ref().is_some_and(|training| training.saver.is_some()) => {
                log::info!("batches {}..{done} are recorded in {}", batches.start, folder.display());
            }
            Ok(()) => {}
            Err(e) => log::error!("the run goes on, and what module {} recorded is lost: {e}", self.index),
        }
        tracer.recorded.push(folder);
        Ok(())
    }

    /// The folders of what was recorded.
    pub(super) fn recorded(&mut self) -> Vec<PathBuf> {
        self.tracer.as_mut().map(|tracer| std::mem::take(&mut tracer.recorded)).unwrap_or_default()
    }
}

fn device_time(pass: &DevicePass) -> DeviceTime {
    let DevicePass { work, launched, begin, end } = *pass;
    let phase = match work {
        Work::Forward => Phase::Forward,
        Work::Loss | Work::Backward => Phase::Backward,
        Work::Update => Phase::Optimizer,
    };
    DeviceTime { phase, launched: nanoseconds(launched), begin: nanoseconds(begin), end: nanoseconds(end) }
}
