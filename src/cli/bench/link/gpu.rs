//! `sideways bench link --device cuda`: device arrays over a link through host memory, beside the parts of that way alone.

use std::sync::Arc;
use std::time::Instant;

use super::super::staged::{In, Out};
use super::super::{LinkArgs, TIMEOUT, show_bytes};
use super::{BATCH, LEAST, Times};
use crate::cuda::gpu::failed;
use crate::cuda::{Gpu, peak};
use crate::transport::{Endpoints, Kind, LinkSpec, World, connect};
use crate::{Error, Result};

/// Messages a batch has at most: each copy costs some microseconds besides.
const MOST: usize = 200;

/// Seconds of a payload's way, and of its parts.
#[derive(Clone, Copy)]
struct Found {
    staged: Times,
    to_host: f64,
    to_device: f64,
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
        println!(
            "Arrays on a GPU: copied to host memory, sent, copied to the GPU. \"parts\": the three one after the other.\n"
        );
        println!(
            "{:>9} | {:>10} | {:>9} {:>10} {:>10} {:>9} {:>7} | {:>10} {:>10}",
            "payload", "one way us", "to host", "message", "to device", "parts", "ratio", "MiB/s", "both MiB/s"
        );
    }
    let mut bytes = args.from;
    while bytes <= args.to {
        let found = measure(args, world, ordinal, bytes)?;
        let alone = message(bytes)?;
        if world.rank() == 0 {
            let speed = |seconds: f64| bytes as f64 / seconds / 1_048_576.0;
            let parts = found.to_host + alone.one + found.to_device;
            println!(
                "{:>9} | {:>10.2} | {:>9.2} {:>10.2} {:>10.2} {:>9.2} {:>7.3} | {:>10.0} {:>10.0}",
                show_bytes(bytes),
                1e6 * found.staged.one,
                1e6 * found.to_host,
                1e6 * alone.one,
                1e6 * found.to_device,
                1e6 * parts,
                found.staged.one / parts,
                speed(found.staged.one),
                speed(found.staged.both)
            );
        }
        bytes = bytes.saturating_mul(4);
    }
    Ok(())
}

fn measure(args: &LinkArgs, world: &World, ordinal: usize, bytes: usize) -> Result<Found> {
    let words = bytes / 4;
    let link = |id: u32, from, to| {
        let name = format!("worker {from} -> {to}");
        LinkSpec { id, kind: Kind::Activation, from, to, words, depth: 2, name }
    };
    let links = [link(0, 0, 1), link(1, 1, 0)];
    let mut endpoints = connect(world, &[0, world.size() - 1], &links, TIMEOUT)?;
    let rounds = (BATCH / bytes).clamp(LEAST, MOST);
    let repeat = args.repeat.max(1);
    let mine: Vec<usize> = if world.size() == 2 { vec![world.rank()] } else { vec![0, 1] };
    let sides = mine.iter().map(|&worker| Side::take(ordinal, &mut endpoints, &links, worker)).collect();
    let mut sides: Vec<Side> = world.first_error(sides)?;
    let (to_host, to_device) = sides[0].copies()?;
    let breaker = endpoints.breaker();
    let staged: Result<Times> = std::thread::scope(|scope| {
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
    let staged = staged?;
    // Both sides are done before either drops its ends.
    world.agree(rounds as u64, "the number of messages")?;
    Ok(Found { staged, to_host, to_device })
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
    fn take(ordinal: usize, endpoints: &mut Endpoints, links: &[LinkSpec; 2], worker: usize) -> Result<Side> {
        let gpu = Gpu::open(ordinal, false)?;
        let missing = || Error::Run(format!("worker {worker} has no ends"));
        let (out, inward) = (links[worker].clone(), links[1 - worker].clone());
        let (sender, receiver) = (endpoints.sender(out.id), endpoints.receiver(inward.id));
        let out = Out::new(&gpu, out, sender.ok_or_else(missing)?)?;
        let inward = In::new(&gpu, inward, receiver.ok_or_else(missing)?)?;
        Ok(Side { worker, out, inward, gpu, count: 0 })
    }

    /// Seconds of the copies alone, to page-locked host memory and from it, by the GPU's clock.
    fn copies(&mut self) -> Result<(f64, f64)> {
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
        Ok((to_host?, to_device?))
    }

    fn run(mut self, repeat: usize, rounds: usize) -> Result<Times> {
        self.gpu.bind()?;
        let times = (0..=repeat).try_fold(Times::NONE, |best, _| Ok(best.best(self.batch(rounds)?)));
        self.out.sender.flush()?;
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
        self.inward.done(&self.gpu)
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
