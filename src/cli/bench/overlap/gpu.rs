//! `sideways bench overlap --device cuda`: modules that wait on the GPU, which is then nobody's bottleneck, and whose arrays
//! travel as a run's do.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaEvent;

use super::super::device_link::{In, Out};
use super::super::{OverlapArgs, show_bytes};
use crate::backend::cuda::gpu::failed;
use crate::backend::cuda::wait::Wait;
use crate::backend::cuda::{Gpu, peak};
use crate::cli::output::table;
use crate::comm::{Endpoints, Kind, LinkSpec, World};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// What one worker found: seconds of a tick by the GPU's clock, and of a wait by itself.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Found {
    tick: f64,
    alone: f64,
}

/// One module's stand-in.
pub(super) struct Worker {
    out: Vec<Out>,
    inward: Vec<In>,
    gpu: Arc<Gpu>,
    wait: Wait,
}

impl Worker {
    /// Worker `worker`, `alone` in its process or not.
    pub(super) fn take(
        ordinal: usize,
        endpoints: &mut Endpoints,
        links: &[LinkSpec],
        worker: usize,
        alone: bool,
    ) -> Result<Self> {
        let gpu = Gpu::open(ordinal, false)?;
        let missing = || Error::Run(format!("worker {worker} has no ends"));
        let out = links.iter().filter(|link| link.from == worker);
        let out = out.map(|link| Out::new(&gpu, link.clone(), endpoints.sender(link.id).ok_or_else(missing)?, None));
        let out = out.collect::<Result<_>>()?;
        let inward = links.iter().filter(|link| link.to == worker);
        let inward =
            inward.map(|link| In::new(&gpu, link.clone(), endpoints.receiver(link.id).ok_or_else(missing)?, None));
        let inward = inward.collect::<Result<_>>()?;
        let wait = if alone { Wait::Host } else { Wait::kernel(&gpu)? };
        Ok(Worker { out, inward, gpu, wait })
    }

    pub(super) fn run(mut self, args: &OverlapArgs, workers: usize) -> Result<Found> {
        self.gpu.bind()?;
        let seconds = args.compute_ms / 1e3;
        let alone = peak::fastest(&self.gpu, || self.wait.launch(&self.gpu, seconds))?;
        let warm = 2 * workers as u64;
        let end = warm + args.ticks;
        let (from, to) = (self.gpu.clock()?, self.gpu.clock()?);
        for tick in 0..end {
            if tick == warm {
                self.record(&from)?;
            }
            for kind in [Kind::Activation, Kind::Cotangent] {
                self.receive(kind, tick)?;
                self.wait.launch(&self.gpu, seconds)?;
                self.inward.iter().filter(|end| end.link.kind == kind).try_for_each(|end| end.done(&self.gpu))?;
                if tick + 1 < end {
                    self.send(kind, tick)?;
                }
            }
        }
        self.record(&to)?;
        self.out.iter_mut().try_for_each(|out| {
            out.finish()?;
            out.flush()
        })?;
        let ms = from.elapsed_ms(&to).map_err(|e| failed("reading a clock", &e))?;
        // Streams are done with the links' buffers before those go.
        self.gpu.outgoing.synchronize().map_err(|e| failed("waiting for copies", &e))?;
        Ok(Found { tick: f64::from(ms) * 1e-3 / args.ticks as f64, alone })
    }

    fn record(&self, clock: &CudaEvent) -> Result<()> {
        clock.record(&self.gpu.compute).map_err(|e| failed("recording an event", &e))
    }

    /// The message of the tick before; while it is waited for, copies that arrive are sent.
    fn receive(&mut self, kind: Kind, tick: u64) -> Result<()> {
        let Some(k) = self.inward.iter().position(|end| end.link.kind == kind).filter(|_| tick > 0) else {
            return Ok(());
        };
        while !self.inward[k].receiver.ready()? && self.out.iter().any(Out::is_pending) {
            self.out.iter_mut().try_for_each(Out::start)?;
            std::thread::yield_now();
        }
        let end = &mut self.inward[k];
        let header = end.link.header(0, (tick - 1) as u32, [end.link.words as u32, 1, 1, 1]);
        end.receive(&self.gpu, &header)
    }

    fn send(&mut self, kind: Kind, tick: u64) -> Result<()> {
        let Some(out) = self.out.iter_mut().find(|out| out.link.kind == kind) else { return Ok(()) };
        out.finish()?;
        let header = out.link.header(0, tick as u32, [out.link.words as u32, 1, 1, 1]).stamped(tick, 0);
        out.copy(&self.gpu, &header)
    }
}

pub(super) fn print(args: &OverlapArgs, world: &World, all: &[Found]) {
    outln!(
        "{} workers on {} ranks of {}, arrays on a GPU, staged in host memory: {} down and {} up a tick, {} ticks, waits of {} \
         ms twice",
        all.len(),
        world.size(),
        hostname(),
        show_bytes(args.bytes),
        show_bytes(args.bytes),
        args.ticks,
        args.compute_ms
    );
    let exposed = |found: &Found| (found.tick - 2.0 * found.alone).max(0.0);
    let row = |(worker, found): (usize, &Found)| {
        let (alone, exposed) = (2e3 * found.alone, exposed(found));
        let share = 100.0 * exposed / found.tick;
        format!("worker {worker}\t{:.3}\t{alone:.3}\t{:.3}\t{share:.2}%", 1e3 * found.tick, 1e3 * exposed)
    };
    let header = "ms a tick\ttick\twaits alone\texposed\tof a tick";
    table(1, header, all.iter().enumerate().map(row));
    let worst = all.iter().map(|found| exposed(found) / found.tick).fold(0.0, f64::max);
    outln!("exposed communication: {:.2} % of the tick at most", 100.0 * worst);
}
