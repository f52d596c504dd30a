//! `sideways bench link`: one link each way between two workers, and plain MPI in the same run.
//!
//! Both touch every cache line of a payload: written before it is sent, read when it has come. Both use two
//! buffers a direction in turn, have the receive posted before the message is sent and, both ways at once, wait for
//! their own message to leave too, so what differs is the link itself: its header, its checks, its lock and its
//! polling. The touching is part of the times.

use std::time::Instant;

use serde::Serialize;

use super::{LinkArgs, TIMEOUT, gpu_of, show_bytes, wrong_size};
use crate::cli::output::json;
use crate::comm::{Baseline, Endpoints, Kind, LinkSpec, Receiver, Sender, World, connect};
use crate::sys::host::hostname;
use crate::{Error, Result};

mod all_reduce;
mod gpu;

/// Bytes a batch moves each way, about; small messages are limited by [`MOST`].
const BATCH: usize = 64 << 20;
/// Messages a batch has at most, and at least.
const MOST: usize = 2000;
const LEAST: usize = 4;
/// Seconds that a batch over a slow link may last, unless its [`LEAST`] messages take longer.
const LONGEST: f64 = 1.0;

/// Seconds a message takes: one way at a time, and both ways at once.
#[derive(Clone, Copy, Serialize)]
struct Times {
    #[serde(rename = "one_way_seconds")]
    one: f64,
    #[serde(rename = "both_ways_seconds")]
    both: f64,
}

/// A payload's times, by the links and by plain MPI.
#[derive(Serialize)]
struct Row {
    payload_bytes: usize,
    link: Times,
    /// Absent within a process.
    mpi: Option<Times>,
}

/// Prints what was found about links, on rank 0, where that is asked for.
fn print_json(args: &LinkArgs, world: &World, rows: &[impl Serialize]) -> Result<()> {
    if world.rank() > 0 || !args.json {
        return Ok(());
    }
    let ranks = world.size();
    json(&serde_json::json!({ "ranks": ranks, "host": hostname(), "best_of_batches": args.repeat, "payloads": rows }))
}

impl Times {
    const NONE: Times = Times { one: f64::INFINITY, both: f64::INFINITY };

    fn best(self, other: Times) -> Times {
        Times { one: self.one.min(other.one), both: self.both.min(other.both) }
    }
}

pub(super) fn run(args: &LinkArgs, world: &World) -> Result<()> {
    if args.to < args.from {
        let (from, to) = (show_bytes(args.from), show_bytes(args.to));
        return Err(Error::input(format!("--to {to} is smaller than --from {from}")));
    }
    if args.all_reduce {
        return all_reduce::run(args, world);
    }
    if world.size() > 2 {
        return Err(wrong_size("link", world.size(), "use 2 ranks, or none for threads; more with --all-reduce"));
    }
    let ordinal = gpu_of(world, args.device)?;
    let prints = world.rank() == 0 && !args.json;
    if prints {
        let ends = if world.size() == 2 { "2 ranks" } else { "2 threads of one process" };
        outln!("A link between {ends} on {}, best of {} batches.", hostname(), args.repeat);
    }
    if let Some(ordinal) = ordinal {
        return gpu::run(args, world, ordinal, |bytes| Ok(measure(world, bytes, args.repeat.max(1))?.0));
    }
    if prints {
        outln!(
            "Counted: payload bytes; each line of a payload is written before and read after, by links and raw MPI alike."
        );
        outln!("\"one way\": half a round trip. \"both ways\": MiB/s each way while both sides send.\n");
        outln!(
            "{:>9} | {:>10} {:>9} {:>7} | {:>10} {:>9} {:>7} | {:>10} {:>9} {:>7}",
            "payload",
            "one way us",
            "raw us",
            "ratio",
            "MiB/s",
            "raw",
            "ratio",
            "both MiB/s",
            "raw",
            "ratio"
        );
    }
    let (mut bytes, mut rows) = (args.from, Vec::new());
    while bytes <= args.to {
        let (link, mpi) = measure(world, bytes, args.repeat.max(1))?;
        if prints {
            print_row(bytes, link, mpi);
        }
        rows.push(Row { payload_bytes: bytes, link, mpi });
        bytes = bytes.saturating_mul(4);
    }
    print_json(args, world, &rows)
}

fn print_row(bytes: usize, ours: Times, raw: Option<Times>) {
    let speed = |seconds: f64| bytes as f64 / seconds / 1_048_576.0;
    let raw = raw.unwrap_or(Times { one: f64::NAN, both: f64::NAN });
    let number = |x: f64, digits: usize| if x.is_nan() { "-".to_string() } else { format!("{x:.digits$}") };
    outln!(
        "{:>9} | {:>10.2} {:>9} {:>7} | {:>10.0} {:>9} {:>7} | {:>10.0} {:>9} {:>7}",
        show_bytes(bytes),
        ours.one * 1e6,
        number(raw.one * 1e6, 2),
        number(raw.one / ours.one, 3),
        speed(ours.one),
        number(speed(raw.one), 0),
        number(raw.one / ours.one, 3),
        speed(ours.both),
        number(speed(raw.both), 0),
        number(raw.both / ours.both, 3),
    );
}

/// Best times of the links, and of plain MPI where there is MPI.
fn measure(world: &World, bytes: usize, repeat: usize) -> Result<(Times, Option<Times>)> {
    let words = bytes / 4;
    let rank_of_worker = [0, world.size() - 1];
    let link = |id: u32, from, to| {
        let name = format!("worker {from} -> {to}");
        LinkSpec { id, kind: Kind::Activation, from, to, words, depth: 2, name }
    };
    let links = [link(0, 0, 1), link(1, 1, 0)];
    let mut endpoints = connect(world, &rank_of_worker, &links, TIMEOUT)?;
    let rounds = (BATCH / bytes).clamp(LEAST, MOST);
    if world.size() == 2 {
        let mut side = Side::take(&mut endpoints, &links, world.rank())?;
        let mut baseline = world.baseline(words)?;
        let (mut ours, mut raw) = (Times::NONE, Times::NONE);
        // Both sides make as many as rank 0 finds time for.
        let first = side.batch(words, LEAST)?;
        let found = (LONGEST / (2.0 * first.one + first.both)) as u64;
        let found =
            u64::from_le_bytes(world.gather(&found.to_le_bytes())?.swap_remove(0).try_into().unwrap_or_default());
        let rounds = rounds.min(found as usize).max(LEAST);
        for _ in 0..=repeat {
            ours = ours.best(side.batch(words, rounds)?);
            if let Some(baseline) = &mut baseline {
                raw = raw.best(plain(baseline, words, rounds)?);
            }
        }
        side.sender.flush()?;
        // Both sides are done with both before either drops its ends.
        world.agree(rounds as u64, "the number of messages")?;
        return Ok((ours, Some(raw)));
    }
    let mut sides = [Side::take(&mut endpoints, &links, 0)?, Side::take(&mut endpoints, &links, 1)?];
    std::thread::scope(|scope| {
        let threads = sides.each_mut().map(|side| {
            scope.spawn(move || (0..=repeat).try_fold(Times::NONE, |best, _| Ok(best.best(side.batch(words, rounds)?))))
        });
        let mut times = Times::NONE;
        for thread in threads {
            let found: Result<Times> = thread.join().map_err(|_| Error::Run("a worker panicked".into()))?;
            times = found?;
        }
        Ok((times, None))
    })
}

/// One worker with its two ends.
struct Side {
    worker: usize,
    out: LinkSpec,
    inward: LinkSpec,
    sender: Sender,
    receiver: Receiver,
    count: u64,
}

impl Side {
    fn take(endpoints: &mut Endpoints, links: &[LinkSpec; 2], worker: usize) -> Result<Side> {
        let (out, inward) = (links[worker].clone(), links[1 - worker].clone());
        let (sender, receiver) = (endpoints.sender(out.id)?, endpoints.receiver(inward.id)?);
        Ok(Side { worker, out, inward, sender, receiver, count: 0 })
    }

    fn send(&mut self, words: usize) -> Result<()> {
        let header = self.out.header(self.count, 0, [words as u32, 1, 1, 1]);
        write(&mut self.sender.host_slot()?[..words]);
        self.sender.start(&header)
    }

    fn receive(&mut self, words: usize) -> Result<()> {
        let header = self.inward.header(self.count, 0, [words as u32, 1, 1, 1]);
        read(self.receiver.wait(&header)?);
        self.receiver.release()
    }

    fn batch(&mut self, words: usize, rounds: usize) -> Result<Times> {
        let start = Instant::now();
        for _ in 0..rounds {
            if self.worker == 0 {
                self.send(words)?;
                self.receive(words)?;
            } else {
                self.receive(words)?;
                self.send(words)?;
            }
            self.count += 1;
        }
        let one = start.elapsed().as_secs_f64() / (2 * rounds) as f64;
        let start = Instant::now();
        for _ in 0..rounds {
            self.send(words)?;
            self.receive(words)?;
            self.sender.flush()?;
            self.count += 1;
        }
        Ok(Times { one, both: start.elapsed().as_secs_f64() / rounds as f64 })
    }
}

fn plain(baseline: &mut Baseline, words: usize, rounds: usize) -> Result<Times> {
    let start = Instant::now();
    baseline.exchange(words, rounds, false, write, read)?;
    let one = start.elapsed().as_secs_f64() / (2 * rounds) as f64;
    let start = Instant::now();
    baseline.exchange(words, rounds, true, write, read)?;
    Ok(Times { one, both: start.elapsed().as_secs_f64() / rounds as f64 })
}

/// Writes to every cache line.
fn write(payload: &mut [f32]) {
    payload.iter_mut().step_by(16).for_each(|value| *value += 1.0);
}

/// Reads from every cache line.
fn read(payload: &[f32]) {
    std::hint::black_box(payload.iter().step_by(16).sum::<f32>());
}
