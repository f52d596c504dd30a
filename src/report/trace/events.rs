//! The events of a trace: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>.

use serde::Serialize;

use super::clocks::{Clock, clocks};
use super::messages::{Carried, carried};
use super::{Recorded, Summary};
use crate::metrics::recording::Slice;
use crate::metrics::{Phase, Recording};
use crate::{Error, Result};

/// One event. Times are in microseconds.
#[derive(Debug, Default, Serialize)]
struct Event<'a> {
    /// `X`: a slice; `s`, `f`: an arrow's two ends; `M`: a name.
    ph: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    cat: &'static str,
    name: &'a str,
    pid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    tid: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    /// An arrow's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<usize>,
    #[serde(skip_serializing_if = "Args::is_empty")]
    args: Args<'a>,
}

/// What an event says about itself.
#[derive(Debug, Default, Serialize)]
struct Args<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sort_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<u64>,
    /// In a validation after `batch` batches: its own batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    validation: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tick: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

impl Args<'_> {
    fn is_empty(&self) -> bool {
        let Args { name, labels, sort_index, batch, validation: _, step: _, tick: _, bytes: _ } = self;
        name.is_none() && labels.is_none() && sort_index.is_none() && batch.is_none()
    }
}

/// What stands beside the events.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    display_time_unit: &'static str,
    other_data: About,
    trace_events: Vec<Event<'a>>,
}

/// What a trace is of.
#[derive(Serialize)]
struct About {
    program: String,
    modules: usize,
    replicas: usize,
    ranks: usize,
    /// When the run was launched, in seconds since 1970.
    launched: f64,
    clocks: Vec<ClockLine>,
    problems: Vec<String>,
}

/// A rank's clock beside rank 0's.
#[derive(Serialize)]
struct ClockLine {
    rank: usize,
    host: String,
    /// What was added to its time, at the first slice's beginning and at the last one's end.
    offset_us: f64,
    offset_at_end_us: f64,
    /// How wrong that can be ([`Clock::uncertainty`]).
    uncertainty_us: f64,
}

fn microseconds(nanoseconds: i128) -> f64 {
    nanoseconds as f64 / 1e3
}

/// Readers round times to nanoseconds, each in its own way. So that no slice reaches into the next one, and none out of the batch's
/// around it, slices end so many nanoseconds early.
const EARLY: [i128; 2] = [3, 1];

/// A worker's thread.
struct Track<'a> {
    part: &'a Recording,
    clock: Clock,
    tid: usize,
}

impl Track<'_> {
    fn ts(&self, at: u64, zero: i128) -> f64 {
        microseconds(self.clock.first(at) - zero)
    }

    /// What was done from `begin` to `end`; `around` others or not.
    fn slice<'a>(
        &self,
        name: &'a str,
        (begin, end): (u64, u64),
        zero: i128,
        around: bool,
        args: Args<'a>,
    ) -> Event<'a> {
        let (begin, end) = (self.clock.first(begin) - zero, self.clock.first(end) - zero);
        let dur = microseconds((end - begin - EARLY[usize::from(around)]).max(0));
        let cat = if around { "batch" } else { "work" };
        let (pid, tid) = (self.part.rank, Some(self.tid));
        Event { ph: "X", cat, name, pid, tid, ts: Some(microseconds(begin)), dur: Some(dur), args, ..Event::default() }
    }
}

/// Nanoseconds in which a core that is free is had.
const FREE: u64 = 10_000;

/// A core that was free was not waited for.
fn counts(slice: &Slice) -> bool {
    slice.phase != Phase::WaitCore || slice.end.saturating_sub(slice.begin) >= FREE
}

/// The batches of a worker's slices, which follow each other: each one's name and slices.
fn batches(slices: &[Slice]) -> impl Iterator<Item = (String, &[Slice])> {
    slices.chunk_by(|a, b| (a.batch, a.validation) == (b.batch, b.validation)).map(|slices| {
        let Slice { batch, validation, .. } = slices[0];
        let name = match validation.checked_sub(1) {
            None => format!("batch {batch}"),
            Some(place) => format!("validation after {batch}, batch {place}"),
        };
        (name, slices)
    })
}

impl Recorded {
    /// The trace, as the file's text, and what is in it.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be written as JSON.
    pub fn json(&self) -> Result<(Vec<u8>, Summary)> {
        let modules = self.parts.first().map_or(1, |part| part.grid[0]);
        let messages = carried(&self.parts);
        let clocks = clocks(&self.parts, self.clocks.as_ref(), &messages);
        let tid = |part: &Recording| part.replica * modules + part.module;
        let tracks: Vec<Track> =
            self.parts.iter().zip(clocks).map(|(part, clock)| Track { part, clock, tid: tid(part) }).collect();
        let moments = |track: &Track| {
            let slices = track.part.slices.iter().chain(&track.part.device).flat_map(|slice| [slice.begin, slice.end]);
            slices.chain(track.part.messages.iter().map(|message| message.at)).map(|at| track.clock.first(at)).collect()
        };
        let moments: Vec<i128> = tracks.iter().flat_map(|track| -> Vec<i128> { moments(track) }).collect();
        let zero = moments.iter().copied().min().unwrap_or_default();
        let length = moments.iter().copied().max().unwrap_or_default() - zero;
        // GPUs' threads come behind the workers'.
        let workers = modules * self.replicas();
        let texts: Vec<[String; 4]> = tracks.iter().map(|track| names(track, self.replicas())).collect();
        let batch_names: Vec<Vec<String>> =
            tracks.iter().map(|track| batches(&track.part.slices).map(|(name, _)| name).collect()).collect();
        let mut events = Vec::new();
        let mut summary = Summary {
            length: length.try_into().unwrap_or(u64::MAX),
            arrows: messages.len(),
            uncertainty: tracks.iter().map(|track| track.clock.uncertainty).max().unwrap_or_default(),
            ..Summary::default()
        };
        for ((track, texts), batch_names) in tracks.iter().zip(&texts).zip(&batch_names) {
            events.extend(named(track, texts, workers));
            for (name, (_, slices)) in batch_names.iter().zip(batches(&track.part.slices)) {
                let whole = (slices[0].begin, slices[slices.len() - 1].end);
                let Slice { batch, validation, .. } = slices[0];
                let of_batch = || Args { batch: Some(batch), validation: validation.checked_sub(1), ..Args::default() };
                events.push(track.slice(name, whole, zero, true, of_batch()));
                for Slice { phase, begin, end, tick, step, .. } in slices.iter().filter(|slice| counts(slice)) {
                    let args = Args { step: Some(*step), tick: Some(*tick), ..of_batch() };
                    events.push(track.slice(phase.name(), (*begin, *end), zero, false, args));
                    summary.slices += 1;
                }
            }
            let gpu = Track { part: track.part, clock: track.clock, tid: workers + track.tid };
            for Slice { phase, begin, end, batch, validation, tick, step } in &track.part.device {
                let (batch, validation) = (Some(*batch), validation.checked_sub(1));
                let args = Args { batch, validation, step: Some(*step), tick: Some(*tick), ..Args::default() };
                let slice = gpu.slice(phase.name(), (*begin, *end), zero, false, args);
                events.push(Event { cat: "gpu", ..slice });
                summary.slices += 1;
            }
        }
        arrows(&messages, &tracks, zero, &mut events);
        let about = self.about(&tracks);
        let trace = Trace { display_time_unit: "ms", other_data: about, trace_events: events };
        let text = serde_json::to_vec(&trace).map_err(|e| Error::Run(format!("writing a trace: {e}")))?;
        Ok((text, summary))
    }

    fn replicas(&self) -> usize {
        self.parts.first().map_or(1, |part| part.grid[1])
    }

    fn about(&self, tracks: &[Track]) -> About {
        let mut clocks: Vec<ClockLine> = Vec::new();
        for Track { part, clock, .. } in tracks {
            if clocks.iter().all(|line| line.rank != part.rank) {
                let ends = [part.slices.first().map(|slice| slice.begin), part.slices.last().map(|slice| slice.end)];
                let [first, last] = ends.map(|at| clock.offset(at.unwrap_or(part.clock.at)));
                clocks.push(ClockLine {
                    rank: part.rank,
                    host: part.host.clone(),
                    offset_us: microseconds(first),
                    offset_at_end_us: microseconds(last),
                    uncertainty_us: microseconds(clock.uncertainty.into()),
                });
            }
        }
        clocks.sort_by_key(|line| line.rank);
        let [modules, replicas] = self.parts.first().map_or([0, 0], |part| part.grid);
        About {
            program: format!("sideways {}", env!("CARGO_PKG_VERSION")),
            modules,
            replicas,
            ranks: clocks.len(),
            launched: self.parts.first().map_or(0.0, |part| part.launch as f64 / 1e9),
            clocks,
            problems: self.problems.clone(),
        }
    }
}

/// What a rank, its clock and a module are called.
fn names(track: &Track, replicas: usize) -> [String; 4] {
    let part = track.part;
    let module = match replicas {
        1 => format!("module {}", part.module),
        _ => format!("module {}, replica {}", part.module, part.replica),
    };
    let clock = format!("clock within {} µs of rank 0's", microseconds(track.clock.uncertainty.into()));
    let gpu = format!("{module}, GPU");
    [format!("rank {} {}", part.rank, part.host), clock, module, gpu]
}

/// The names' events.
fn named<'a>(track: &Track, [rank, clock, module, gpu]: &'a [String; 4], workers: usize) -> Vec<Event<'a>> {
    let (pid, tid) = (track.part.rank, Some(track.tid));
    let event = |name, tid, args| Event { ph: "M", name, pid, tid, args, ..Event::default() };
    let mut events = vec![
        event("process_name", None, Args { name: Some(rank), ..Args::default() }),
        event("process_labels", None, Args { labels: Some(clock), ..Args::default() }),
        event("process_sort_index", None, Args { sort_index: Some(pid), ..Args::default() }),
        event("thread_name", tid, Args { name: Some(module), ..Args::default() }),
        event("thread_sort_index", tid, Args { sort_index: tid, ..Args::default() }),
    ];
    if !track.part.device.is_empty() {
        let name = Args { name: Some(gpu), ..Args::default() };
        events.push(event("thread_name", Some(workers + track.tid), name));
    }
    events
}

/// An arrow for each message.
fn arrows(messages: &[Carried], tracks: &[Track], zero: i128, events: &mut Vec<Event>) {
    for (number, Carried { from, to, sent, received }) in messages.iter().enumerate() {
        let (from, to) = (&tracks[*from], &tracks[*to]);
        let left = from.ts(sent.at, zero);
        let end = |ph, track: &Track, ts| Event {
            ph,
            cat: "message",
            name: received.kind.name(),
            pid: track.part.rank,
            tid: Some(track.tid),
            ts: Some(ts),
            id: Some(number),
            args: Args {
                batch: Some(sent.batch),
                validation: sent.validation.checked_sub(1),
                step: Some(sent.step),
                bytes: Some(sent.bytes),
                ..Args::default()
            },
            ..Event::default()
        };
        // It ends at the slice that comes next: what the message was waited for. An arrow does not go back in time, even where clocks
        // could not be moved so.
        events.push(end("s", from, left));
        events.push(end("f", to, to.ts(received.at, zero).max(left)));
    }
}
