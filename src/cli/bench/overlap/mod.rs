//! `sideways bench overlap`: the order of a tick with sleeps for compute, to see what transfers cost.
//!
//! Within a tick a worker waits for the activation of the tick before, computes, sends its own, waits for the
//! cotangent of the tick before, computes, sends its own. A transfer that hides behind compute costs nothing: the
//! tick is then as long as its two computations.

use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};

use super::{OverlapArgs, TIMEOUT, gpu_of, show_bytes, wrong_size};
use crate::cli::output::table;
use crate::comm::{Endpoints, Kind, LinkSpec, Receiver, Sender, World, connect};
use crate::sys::cpus::processor_seconds;
use crate::sys::host::hostname;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod gpu;

/// Seconds of one worker, over the ticks that count.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Spent {
    wall: f64,
    compute: f64,
    activation: f64,
    cotangent: f64,
    send: f64,
}

pub(super) fn run(args: &OverlapArgs, world: &World) -> Result<()> {
    let workers = args.workers.unwrap_or(if world.size() > 1 { world.size() } else { 8 });
    if workers < world.size() {
        let size = world.size();
        return Err(wrong_size("overlap", size, &format!("{workers} workers leave some without work")));
    }
    if !(args.compute_ms >= 0.0 && args.compute_ms.is_finite()) || args.ticks == 0 {
        return Err(Error::input("--compute-ms must be 0 or more and --ticks at least 1"));
    }
    let ordinal = gpu_of(world, args.device)?;
    if ordinal.is_some() && args.busy {
        return Err(Error::input("--busy is for the processor: with --device cuda modules wait on the GPU"));
    }
    let rank_of_worker: Vec<usize> = (0..workers).map(|worker| worker * world.size() / workers).collect();
    let links: Vec<LinkSpec> = (1..workers)
        .flat_map(|to| {
            let words = args.bytes / 4;
            let link = |id, kind, from, to, name| LinkSpec { id, kind, from, to, words, depth: 2, name };
            let (down, up) = (format!("module {to} -> {}", to + 1), format!("module {} -> {to}", to + 1));
            let id = 2 * to as u32;
            [link(id, Kind::Activation, to - 1, to, down), link(id + 1, Kind::Cotangent, to, to - 1, up)]
        })
        .collect();
    let mut endpoints = connect(world, &rank_of_worker, &links, TIMEOUT)?;
    let breaker = endpoints.breaker();
    let mine: Vec<usize> = (0..workers).filter(|worker| rank_of_worker[*worker] == world.rank()).collect();
    #[cfg(feature = "cuda")]
    if let Some(ordinal) = ordinal {
        let alone = mine.len() == 1;
        let begun =
            mine.iter().map(|&worker| gpu::Worker::take(ordinal, &mut endpoints, &links, worker, alone)).collect();
        let begun: Vec<gpu::Worker> = world.first_error(begun)?;
        let found: Result<Vec<gpu::Found>> = std::thread::scope(|scope| {
            let run = |worker: gpu::Worker| {
                let breaker = breaker.clone();
                scope.spawn(move || worker.run(args, workers).inspect_err(|error| breaker.trip(error.to_string())))
            };
            let threads: Vec<_> = begun.into_iter().map(run).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|found| found.map_err(|_| Error::Run("a worker panicked".into()))?).collect()
        });
        let all = gather::<gpu::Found>(world, &found?)?;
        if world.rank() == 0 {
            gpu::print(args, world, &all);
        }
        return Ok(());
    }
    let spent: Result<Vec<Spent>> = std::thread::scope(|scope| {
        let threads: Vec<_> = mine
            .iter()
            .map(|&worker| {
                let chain = Worker::take(&mut endpoints, &links, worker);
                let breaker = breaker.clone();
                scope.spawn(move || chain.run(args, workers).inspect_err(|error| breaker.trip(error.to_string())))
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|spent| spent.map_err(|_| Error::Run("a worker panicked".into()))?).collect()
    });
    let (spent, cpu) = (spent?, processor_seconds());
    let all = gather::<Spent>(world, &spent)?;
    if world.rank() == 0 {
        print(args, world, &all, cpu);
    }
    Ok(())
}

/// What the workers of all ranks found, in their order. Collective.
fn gather<T: Pod>(world: &World, mine: &[T]) -> Result<Vec<T>> {
    Ok(world.gather(bytemuck::cast_slice(mine))?.iter().flat_map(|all| bytemuck::pod_collect_to_vec(all)).collect())
}

fn print(args: &OverlapArgs, world: &World, all: &[Spent], cpu: f64) {
    let ms = |seconds: f64| seconds / args.ticks as f64 * 1e3;
    outln!(
        "{} workers on {} ranks of {}: {} down and {} up a tick, {} ticks, compute {} ms twice ({})",
        all.len(),
        world.size(),
        hostname(),
        show_bytes(args.bytes),
        show_bytes(args.bytes),
        args.ticks,
        args.compute_ms,
        if args.busy { "busy" } else { "asleep" }
    );
    let row = |(worker, spent): (usize, &Spent)| {
        let Spent { wall, compute, activation, cotangent, send } = *spent;
        let ms = [wall, compute, activation, cotangent, send].map(|seconds| format!("\t{:.3}", ms(seconds))).concat();
        format!("worker {worker}{ms}")
    };
    let header = "ms a tick\ttick\tcompute\twait activation\twait cotangent\tsend";
    table(1, header, all.iter().enumerate().map(row));
    let tick = all.iter().map(|spent| ms(spent.wall)).fold(0.0, f64::max);
    let compute = all.iter().map(|spent| ms(spent.compute)).fold(0.0, f64::max);
    outln!(
        "slowest worker's tick {tick:.3} ms: {:.4} of the {} ms asked for, {:.4} of compute alone; \
         processor time of rank 0: {cpu:.2} s",
        tick / (2.0 * args.compute_ms),
        2.0 * args.compute_ms,
        tick / compute
    );
}

/// One module's stand-in.
struct Worker {
    out: Vec<(LinkSpec, Sender)>,
    inward: Vec<(LinkSpec, Receiver)>,
}

impl Worker {
    fn take(endpoints: &mut Endpoints, links: &[LinkSpec], worker: usize) -> Worker {
        let out = links.iter().filter(|link| link.from == worker);
        let inward = links.iter().filter(|link| link.to == worker);
        Worker {
            out: out.filter_map(|link| Some((link.clone(), endpoints.sender(link.id)?))).collect(),
            inward: inward.filter_map(|link| Some((link.clone(), endpoints.receiver(link.id)?))).collect(),
        }
    }

    fn run(mut self, args: &OverlapArgs, workers: usize) -> Result<Spent> {
        let payload = vec![1.0f32; args.bytes / 4];
        let warm = 2 * workers as u64;
        let (mut spent, mut start) = (Spent::default(), Instant::now());
        for tick in 0..warm + args.ticks {
            if tick == warm {
                (spent, start) = (Spent::default(), Instant::now());
            }
            let last = tick + 1 == warm + args.ticks;
            for kind in [Kind::Activation, Kind::Cotangent] {
                let waited = self.receive(kind, tick)?;
                match kind {
                    Kind::Activation => spent.activation += waited,
                    _ => spent.cotangent += waited,
                }
                spent.compute += timed(|| compute(args))?;
                if !last {
                    spent.send += timed(|| self.send(kind, tick, &payload))?;
                }
            }
        }
        spent.wall = start.elapsed().as_secs_f64();
        self.out.iter_mut().try_for_each(|(_, sender)| sender.flush())?;
        Ok(spent)
    }

    /// Waits for the message of the tick before; returns how long.
    fn receive(&mut self, kind: Kind, tick: u64) -> Result<f64> {
        let Some((link, receiver)) = self.inward.iter_mut().find(|(link, _)| link.kind == kind) else { return Ok(0.0) };
        if tick == 0 {
            return Ok(0.0);
        }
        timed(|| {
            let header = link.header(0, (tick - 1) as u32, [link.words as u32, 1, 1, 1]);
            std::hint::black_box(receiver.wait(&header)?.iter().step_by(16).sum::<f32>());
            receiver.release()
        })
    }

    fn send(&mut self, kind: Kind, tick: u64, payload: &[f32]) -> Result<()> {
        let Some((link, sender)) = self.out.iter_mut().find(|(link, _)| link.kind == kind) else { return Ok(()) };
        sender.send(&link.header(0, tick as u32, [payload.len() as u32, 1, 1, 1]).stamped(tick, 0), payload)
    }
}

fn timed(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

fn compute(args: &OverlapArgs) -> Result<()> {
    let duration = Duration::from_secs_f64(args.compute_ms / 1e3);
    if !args.busy {
        std::thread::sleep(duration);
        return Ok(());
    }
    let start = Instant::now();
    while start.elapsed() < duration {
        std::hint::spin_loop();
    }
    Ok(())
}
