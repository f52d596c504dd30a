//! Every moment of some batches of a worker: what it did when, and which messages left and came. Kept in memory that was asked for
//! before, and written to a file behind the last batch. The same stopwatch that a worker's time account comes from makes it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Phase;
use crate::comm::clocks::ClockOffset;
use crate::comm::moments::{Moment, Moments};
use crate::comm::{BatchId, Kind};
use crate::sys::clock::nanoseconds;
use crate::sys::files::{read, write_whole};
use crate::{Error, Result};

/// The folder of a run's recordings, in its run folder.
pub const FOLDER: &str = "trace";

/// Where in the run a worker is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The batch.
    pub batch: BatchId,
    /// The tick, from the run's first.
    pub tick: u64,
    /// The step of its forward pass, if it has one.
    pub forward: Option<usize>,
    /// And that of its backward pass.
    pub backward: Option<usize>,
}

/// A stretch of a worker's time in which it did one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// What.
    pub phase: Phase,
    /// From when to when, in nanoseconds of the rank's clock.
    pub begin: u64,
    /// See `begin`.
    pub end: u64,
    /// [`BatchId::number`]
    pub batch: u64,
    /// [`BatchId::validation`]
    #[serde(default, skip_serializing_if = "is_zero")]
    pub validation: u32,
    /// The tick, from the run's first.
    pub tick: u64,
    /// The step: of the forward pass up to that, then of the backward pass, where there are both.
    pub step: u32,
}

/// A message at one of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// What it carries.
    pub kind: Kind,
    /// The link's number.
    pub link: u32,
    /// It left; else it was there.
    pub sent: bool,
    /// When, in nanoseconds of the rank's clock.
    pub at: u64,
    /// [`BatchId::number`]
    pub batch: u64,
    /// [`BatchId::validation`]
    #[serde(default, skip_serializing_if = "is_zero")]
    pub validation: u32,
    /// The sender's step.
    pub step: u32,
    /// Of the payload.
    pub bytes: u64,
}

fn is_zero(validation: &u32) -> bool {
    *validation == 0
}

impl From<&Moment> for Message {
    fn from(moment: &Moment) -> Self {
        let Moment { at, sent, header } = *moment;
        let BatchId { number, validation } = header.batch;
        Message {
            kind: header.kind,
            link: header.link,
            sent,
            at: nanoseconds(at),
            batch: number,
            validation,
            step: header.step,
            // Without words where the values went elsewhere.
            bytes: 4 * match header.words {
                0 => header.shape.iter().map(|&dim| u64::from(dim)).product(),
                words => u64::from(words),
            },
        }
    }
}

/// What a GPU did, in nanoseconds of the rank's clock.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTime {
    /// What.
    pub phase: Phase,
    /// When the worker asked for it.
    pub launched: u64,
    /// From when.
    pub begin: u64,
    /// To when.
    pub end: u64,
}

/// The stretches recorded so far, up to as many as there is room for.
#[derive(Debug, Default)]
pub struct Slices {
    place: Place,
    /// Whether this tick has come to its backward pass.
    behind: bool,
    slices: Vec<Slice>,
    dropped: u64,
}

impl Slices {
    /// Room for `room`.
    pub(super) fn new(room: usize, place: Place) -> Self {
        Slices { place, behind: false, slices: Vec::with_capacity(room), dropped: 0 }
    }

    pub(super) fn at(&mut self, place: Place) {
        (self.place, self.behind) = (place, false);
    }

    /// Adds what was done from `begin` to `end`, which follows what was added before.
    pub(super) fn add(&mut self, phase: Phase, begin: Instant, end: Instant) {
        match phase {
            Phase::Forward | Phase::WaitActivations | Phase::Data => self.behind = false,
            Phase::Backward | Phase::WaitCotangents => self.behind = true,
            _ => {}
        }
        let Place { batch, tick, forward, backward } = self.place;
        let step = if self.behind { backward.or(forward) } else { forward.or(backward) };
        let slice = Slice {
            phase,
            begin: nanoseconds(begin),
            end: nanoseconds(end),
            batch: batch.number,
            validation: batch.validation,
            tick,
            step: step.unwrap_or_default() as u32,
        };
        if let Some(last) = self.slices.last_mut()
            && (Slice { begin: last.begin, end: slice.begin, ..slice }) == *last
        {
            last.end = slice.end;
        } else if self.slices.len() < self.slices.capacity() {
            self.slices.push(slice);
        } else {
            self.dropped += 1;
        }
    }
}

/// A recording of one worker: a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recording {
    /// Which launch of the program made it: the same on all ranks.
    pub launch: u64,
    /// i, from 1.
    pub module: usize,
    /// r, from 0.
    pub replica: usize,
    /// Modules and replicas of the run.
    pub grid: [usize; 2],
    /// The rank.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// The rank's clock when the run was launched.
    pub clock: ClockOffset,
    /// When and what.
    pub slices: Vec<Slice>,
    /// The same of its GPU, if it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<Slice>,
    /// And the messages.
    pub messages: Vec<Message>,
    /// Slices and messages that there was no room for.
    pub dropped: u64,
}

/// All ranks' clocks when the run ended: a file beside them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Clocks {
    /// As [`Recording::launch`].
    pub launch: u64,
    /// By rank.
    pub clocks: Vec<ClockOffset>,
}

impl Clocks {
    /// The file's name.
    pub const FILE: &str = "clocks.json";
}

impl Recording {
    /// With what was recorded.
    pub fn holding(mut self, slices: Slices, messages: &Moments, device: &[DeviceTime]) -> Self {
        self.dropped = slices.dropped + messages.dropped;
        self.slices = slices.slices;
        // A GPU's work is about what the worker was at when it asked for it.
        let placed = |time: &DeviceTime| {
            let DeviceTime { phase, launched, begin, end } = *time;
            let at = self.slices.partition_point(|slice| slice.end <= launched);
            self.slices.get(at).map(|asked| Slice { phase, begin, end, ..*asked })
        };
        self.device = device.iter().filter_map(placed).collect();
        self.messages = messages.noted.iter().map(Message::from).collect();
        self
    }

    /// The file of module `module` of replica `replica` in the folder of a recording.
    pub fn file(folder: &Path, module: usize, replica: usize) -> PathBuf {
        folder.join(format!("module-{module}.{replica}.json"))
    }

    /// Writes it into `folder`, which is made.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        write_json(&Self::file(folder, self.module, self.replica), self)
    }
}

/// Writes a part of a recording.
///
/// # Errors
/// [`Error::Io`] if the disk refuses.
pub fn write_json(path: &Path, part: &impl Serialize) -> Result<()> {
    write_whole(path, &serde_json::to_vec(part).map_err(|e| Error::io(path, e.into()))?)
}

/// Reads a part of a recording.
///
/// # Errors
/// [`Error::Input`] if it cannot be read, or is none.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = read(path).map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::input(format!("{}: not a part of a recording: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::super::Stopwatch;
    use super::*;

    fn place(tick: u64, forward: Option<usize>, backward: Option<usize>) -> Place {
        Place { batch: 7.into(), tick, forward, backward }
    }

    #[test]
    fn what_is_recorded_adds_up_to_the_account() {
        let mut watch = Stopwatch::default();
        watch.enter(Phase::Data);
        watch.take();
        watch.record(64);
        watch.at(place(20, Some(5), Some(1)));
        for phase in [Phase::WaitActivations, Phase::Forward, Phase::Send, Phase::WaitCotangents, Phase::WaitCotangents]
        {
            watch.enter(phase);
            std::thread::sleep(std::time::Duration::from_micros(300));
        }
        watch.enter(Phase::Backward);
        std::thread::sleep(std::time::Duration::from_micros(300));
        watch.enter(Phase::Send);
        watch.at(place(21, None, Some(2)));
        watch.enter(Phase::Backward);
        let slices = watch.recorded();
        let (account, slices) = (watch.take(), slices.slices);
        let kinds: Vec<_> = slices.iter().map(|s| (s.phase, s.tick, s.step)).collect();
        let expected = [
            (Phase::WaitActivations, 20, 5),
            (Phase::Forward, 20, 5),
            (Phase::Send, 20, 5),
            (Phase::WaitCotangents, 20, 1),
            (Phase::Backward, 20, 1),
            (Phase::Send, 20, 1),
            (Phase::Send, 21, 2),
            (Phase::Backward, 21, 2),
        ];
        assert_eq!(kinds[kinds.len() - 8..], expected);
        assert!(slices.iter().all(|s| s.batch == 7 || s.tick == 0));
        assert!(slices.windows(2).all(|pair| pair[0].end == pair[1].begin));
        let of = |phase| {
            let slices = slices.iter().filter(|s| s.phase == phase);
            slices.map(|s| (s.end - s.begin) as f64 * 1e-9).sum::<f64>()
        };
        assert!((of(Phase::WaitCotangents) - f64::from(account.wait_cotangents)).abs() < 1e-5, "{account:?}");
        assert!((of(Phase::Forward) - f64::from(account.forward)).abs() < 1e-5, "{account:?}");
        // Once more: nothing is recorded any more.
        watch.enter(Phase::Forward);
        assert!(watch.recorded().slices.is_empty());
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let mut slices = Slices::new(2, place(1, Some(1), None));
        let now = Instant::now();
        let room = slices.slices.capacity();
        let phases = [Phase::Forward, Phase::Send].into_iter().cycle();
        for (n, phase) in phases.take(room + 3).enumerate() {
            let at = |n: usize| now + std::time::Duration::from_nanos(n as u64);
            slices.add(phase, at(n), at(n + 1));
        }
        assert_eq!((slices.slices.len(), slices.dropped), (room, 3));
    }
}
