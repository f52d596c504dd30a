//! `sideways bench link --device cuda`: device arrays over a link in each of the ways a run has, and beside the one through host
//! memory its parts alone.

use std::sync::Arc;
use std::time::Instant;

use super::super::device_link::{In, Out};
use super::super::{LinkArgs, TIMEOUT, show_bytes};
use super::{BATCH, LEAST, Times};
use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::{Gpu, peak};
use crate::comm::exchange::{Edge, Settled, settle};
use crate::comm::{Endpoints, Kind, LinkSpec, World, connect_outside};
use crate::config::Exchange as Choice;
use crate::pipeline::compute::Route;
use crate::{Error, Result};

/// Messages a batch has at most: there are three ways, and every message is waited for.
const MOST: usize = 20;

/// A payload's times: staged, the copies at both ends of that alone, and the other ways where they work.
struct Found {
    staged: Times,
    to_host: f64,
    to_device: f64,
    peer: Option<Times>,
    by_mpi: Option<Times>,
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
    if world.rank() == 0 {
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
    let mut bytes = args.from;
    while bytes <= args.to {
        let found = measure(args, world, ordinal, bytes)?;
        let alone = message(bytes)?;
        if world.rank() == 0 {
            print_row(bytes, &found, alone.one);
        }
        bytes = bytes.saturating_mul(4);
    }
    Ok(())
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
    let way = |choice| over(args, world, ordinal, bytes, choice);
    let ((staged, copies), peer) = (way(Choice::Staged)?, where_it_works(way(Choice::Peer))?);
    // Within a process MPI carries nothing.
    let by_mpi = if world.size() == 2 { where_it_works(way(Choice::CudaAware))? } else { None };
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

/// Times of `choice`'s way, and seconds of copies to the host and from it alone.
fn over(args: &LinkArgs, world: &World, ordinal: usize, bytes: usize, choice: Choice) -> Result<(Times, [f64; 2])> {
    let words = bytes / 4;
    let link = |id: u32, from, to| {
        let name = format!("worker {from} -> {to}");
        LinkSpec { id, kind: Kind::Activation, from, to, words, depth: 2, name }
    };
    let links = [link(0, 0, 1), link(1, 1, 0)];
    let placement = [0, world.size() - 1];
    let edges = [Edge { there: 0, back: Some(1) }];
    let settled = settle(world, &placement, &links, &edges, choice, ordinal, TIMEOUT)?;
    let all = settled.links(&links, &placement);
    let mut endpoints = connect_outside(world, &placement, &all, TIMEOUT, &settled.outside())?;
    let rounds = (BATCH / bytes).clamp(LEAST, MOST);
    let repeat = args.repeat.max(1);
    let mine: Vec<usize> = if world.size() == 2 { vec![world.rank()] } else { vec![0, 1] };
    let sides = mine.iter().map(|&worker| Side::take(ordinal, &mut endpoints, &settled, &links, worker)).collect();
    let mut sides: Vec<Side> = world.first_error(sides)?;
    let copies = sides[0].copies()?;
    let breaker = endpoints.breaker();
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
    drop(endpoints);
    settled.close(world)?;
    Ok((times, copies))
}

/// One worker with its two ends.
struct Side {
    worker: usize,
    out: Out,
    inward: In,
    gpu: Arc<Gpu>,
    count: u64,
}

impl Side {
    fn take(
        ordinal: usize,
        endpoints: &mut Endpoints,
        settled: &Settled,
        links: &[LinkSpec; 2],
        worker: usize,
    ) -> Result<Side> {
        let gpu = Gpu::open(ordinal, false)?;
        let missing = || Error::Run(format!("worker {worker} has no ends"));
        let (out, inward) = (links[worker].clone(), links[1 - worker].clone());
        let (sender, receiver) = (endpoints.sender(out.id), endpoints.receiver(inward.id));
        let mut route = |link: &LinkSpec| {
            let values = settled.values(link.id).and_then(|id| endpoints.values(id));
            settled.ring(link.id).map(|ring| Route { ring, values })
        };
        let (there, here) = (route(&out), route(&inward));
        let out = Out::new(&gpu, out, sender.ok_or_else(missing)?, there)?;
        let inward = In::new(&gpu, inward, receiver.ok_or_else(missing)?, here)?;
        Ok(Side { worker, out, inward, gpu, count: 0 })
    }

    /// Seconds of the copies alone, to page-locked host memory and from it, by the GPU's clock.
    fn copies(&mut self) -> Result<[f64; 2]> {
        let mut host = vec![0.0f32; self.out.array.len()];
        self.gpu.pin(&host);
        let (stream, pointer) = (self.gpu.compute.cu_stream(), self.out.array.pointer());
        let to_host = peak::fastest(&self.gpu, || {
            // SAFETY: as long as the array; both live until `unpin` has waited.
            unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut host, pointer, stream) }
                .map_err(|e| failed("copying from the GPU", &e))
        });
        let to_device = peak::fastest(&self.gpu, || {
            // SAFETY: as above.
            unsafe { cudarc::driver::result::memcpy_htod_async(pointer, &host, stream) }
                .map_err(|e| failed("copying to the GPU", &e))
        });
        self.gpu.unpin(&host)?;
        Ok([to_host?, to_device?])
    }

    fn run(mut self, repeat: usize, rounds: usize) -> Result<Times> {
        self.gpu.bind()?;
        let times = (0..=repeat).try_fold(Times::NONE, |best, _| Ok(best.best(self.batch(rounds)?)));
        self.out.flush()?;
        times
    }

    fn send(&mut self) -> Result<()> {
        let header = self.out.link.header(self.count, 0, [self.out.link.words as u32, 1, 1, 1]);
        self.out.copy(&self.gpu, &header)?;
        self.out.finish()
    }

    fn receive(&mut self) -> Result<()> {
        let header = self.inward.link.header(self.count, 0, [self.inward.link.words as u32, 1, 1, 1]);
        self.inward.receive(&self.gpu, &header)?;
        self.inward.done(&self.gpu)?;
        self.inward.give_back()
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
