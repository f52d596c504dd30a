//! `sideways bench link --device cuda`: device arrays over a link in each of the ways a run has, and beside the one through host
//! memory its parts alone.

use std::time::Instant;

use serde::Serialize;

use super::super::{LinkArgs, TIMEOUT, show_bytes};
use super::{BATCH, LEAST, Times, print_json};
use crate::backend::cuda::Probe;
use crate::comm::exchange::{Edge, Exchange, Gpus, connect_gpus};
use crate::comm::{Endpoints, Kind, LinkSpec, Receiver, Sender, World};
use crate::{Error, Result};

/// Messages a batch has at most: there are three ways, and every message is waited for.
const MOST: usize = 20;

/// A payload's times: staged, the copies at both ends of that alone, and the other ways where they work.
#[derive(Serialize)]
struct Found {
    staged: Times,
    #[serde(rename = "to_host_seconds")]
    to_host: f64,
    #[serde(rename = "to_device_seconds")]
    to_device: f64,
    peer: Option<Times>,
    by_mpi: Option<Times>,
}

/// The same as JSON, with a link's times from host to host.
#[derive(Serialize)]
struct Row {
    payload_bytes: usize,
    message: Times,
    #[serde(flatten)]
    found: Found,
}

/// Measures all sizes and prints on rank 0; `message` gives a link's times alone.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(
    args: &LinkArgs,
    world: &World,
    ordinal: usize,
    message: impl Fn(usize) -> Result<Times>,
) -> Result<()> {
    let prints = world.rank() == 0 && !args.json;
    if prints {
        outln!(
            "Arrays on a GPU, one way in us. \"staged\": copied to host memory, sent, copied to the GPU; \"parts\": the three \
             one after the other. \"peer\": into the receiver's GPU memory. \"by MPI\": by an MPI library that takes GPU \
             memory. -: does not work here.\n"
        );
        outln!(
            "{:>9} | {:>9} {:>10} {:>10} {:>9} | {:>10} {:>7} {:>8} {:>10} | {:>10} {:>8} {:>10} | {:>10} {:>8}",
            "payload",
            "to host",
            "message",
            "to device",
            "parts",
            "staged",
            "ratio",
            "MiB/s",
            "both MiB/s",
            "peer",
            "MiB/s",
            "both MiB/s",
            "by MPI",
            "MiB/s"
        );
    }
    let (mut bytes, mut rows) = (args.from, Vec::new());
    while bytes <= args.to {
        let found = measure(args, world, ordinal, bytes)?;
        let message = message(bytes)?;
        if prints {
            print_row(bytes, &found, message.one);
        }
        rows.push(Row { payload_bytes: bytes, message, found });
        bytes = bytes.saturating_mul(4);
    }
    print_json(args, world, &rows)
}

fn print_row(bytes: usize, found: &Found, message: f64) {
    let speed = |seconds: f64| format!("{:.0}", bytes as f64 / seconds / 1_048_576.0);
    let us = |seconds: f64| format!("{:.2}", 1e6 * seconds);
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let parts = found.to_host + message + found.to_device;
    let (staged, peer, by_mpi) = (found.staged, found.peer, found.by_mpi);
    outln!(
        "{:>9} | {:>9} {:>10} {:>10} {:>9} | {:>10} {:>7.3} {:>8} {:>10} | {:>10} {:>8} {:>10} | {:>10} {:>8}",
        show_bytes(bytes),
        us(found.to_host),
        us(message),
        us(found.to_device),
        us(parts),
        us(staged.one),
        staged.one / parts,
        speed(staged.one),
        speed(staged.both),
        or_none(peer.map(|times| us(times.one))),
        or_none(peer.map(|times| speed(times.one))),
        or_none(peer.map(|times| speed(times.both))),
        or_none(by_mpi.map(|times| us(times.one))),
        or_none(by_mpi.map(|times| speed(times.one)))
    );
}

fn measure(args: &LinkArgs, world: &World, ordinal: usize, bytes: usize) -> Result<Found> {
    let way = |exchange| over(args, world, ordinal, bytes, exchange);
    let ((staged, copies), peer) = (way(Exchange::Staged)?, where_it_works(way(Exchange::Peer))?);
    // Within a process MPI carries nothing.
    let by_mpi = if world.size() == 2 { where_it_works(way(Exchange::CudaAware))? } else { None };
    let [to_host, to_device] = copies;
    Ok(Found { staged, to_host, to_device, peer: peer.map(|found| found.0), by_mpi: by_mpi.map(|found| found.0) })
}

/// What is refused, on all ranks alike, does not work here.
fn where_it_works<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(Error::Input(text)) => {
            log::debug!("{text}");
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// Times of `exchange`'s way, and seconds of copies to the host and from it alone.
fn over(args: &LinkArgs, world: &World, ordinal: usize, bytes: usize, exchange: Exchange) -> Result<(Times, [f64; 2])> {
    let words = bytes / 4;
    let link = |id: u32, from, to| {
        let name = format!("worker {from} -> {to}");
        LinkSpec { id, kind: Kind::Activation, from, to, words, depth: 2, name }
    };
    let links = [link(0, 0, 1), link(1, 1, 0)];
    let placement = [0, world.size() - 1];
    let edges = [Edge { there: 0, back: Some(1) }];
    let gpus = Gpus { ordinal, exchange, edges: &edges, links: &links, numbers: links.len() as u32 };
    let (mut ends, shared) = connect_gpus(world, &placement, &links, TIMEOUT, Some(gpus))?;
    let rounds = (BATCH / bytes).clamp(LEAST, MOST);
    let repeat = args.repeat.max(1);
    let mine: Vec<usize> = if world.size() == 2 { vec![world.rank()] } else { vec![0, 1] };
    let sides = mine.iter().map(|&worker| Side::take(ordinal, &mut ends, &links, worker)).collect();
    let mut sides: Vec<Side> = world.first_error(sides)?;
    let copies = sides[0].probe.host_copies()?;
    let breaker = ends.breaker();
    let times: Result<Times> = std::thread::scope(|scope| {
        let run = |side: Side| {
            let breaker = breaker.clone();
            scope.spawn(move || side.run(repeat, rounds).inspect_err(|error| breaker.trip(error.to_string())))
        };
        let threads: Vec<_> = sides.into_iter().map(run).collect();
        let mut times = Times::NONE;
        for thread in threads {
            let found: Result<Times> = thread.join().map_err(|_| Error::Run("a worker panicked".into()))?;
            times = found?;
        }
        Ok(times)
    });
    let times = times?;
    // Both sides are done before either drops its ends.
    world.agree(rounds as u64, "the number of messages")?;
    drop(ends);
    shared.close(world)?;
    Ok((times, copies))
}

/// One worker with its two ends.
struct Side {
    worker: usize,
    // Before the links' ends, whose buffers a copy may be writing.
    probe: Probe,
    out: LinkSpec,
    inward: LinkSpec,
    sender: Sender,
    receiver: Receiver,
    count: u64,
}

impl Side {
    fn take(ordinal: usize, ends: &mut Endpoints, links: &[LinkSpec; 2], worker: usize) -> Result<Side> {
        let (out, inward) = (links[worker].clone(), links[1 - worker].clone());
        let (sender, receiver) = (ends.sender(out.id)?, ends.receiver(inward.id)?);
        Ok(Side { worker, probe: Probe::new(ordinal, out.words)?, out, inward, sender, receiver, count: 0 })
    }

    fn run(mut self, repeat: usize, rounds: usize) -> Result<Times> {
        self.probe.bind()?;
        let times = (0..=repeat).try_fold(Times::NONE, |best, _| Ok(best.best(self.batch(rounds)?)));
        self.sender.flush()?;
        times
    }

    fn send(&mut self) -> Result<()> {
        let header = self.out.header(self.count, 0, [self.out.words as u32, 1, 1, 1]);
        let done = self.probe.write(self.sender.slot()?)?;
        self.sender.start_when(&header, done)?;
        while !self.sender.progress()? {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let header = self.inward.header(self.count, 0, [self.inward.words as u32, 1, 1, 1]);
        let done = self.probe.read(self.receiver.wait_slot(&header)?.1)?;
        self.receiver.release_when(done)?;
        while !self.receiver.progress()? {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn batch(&mut self, rounds: usize) -> Result<Times> {
        let start = Instant::now();
        for _ in 0..rounds {
            if self.worker == 0 {
                self.send()?;
                self.receive()?;
            } else {
                self.receive()?;
                self.send()?;
            }
            self.count += 1;
        }
        let one = start.elapsed().as_secs_f64() / (2 * rounds) as f64;
        let start = Instant::now();
        for _ in 0..rounds {
            self.send()?;
            self.receive()?;
            self.count += 1;
        }
        Ok(Times { one, both: start.elapsed().as_secs_f64() / rounds as f64 })
    }
}
