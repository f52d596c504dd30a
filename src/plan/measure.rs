//! Times of parts of a network on the processor, at work as they would be in a pipeline.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::gpu;
use super::profile::{Conditions, Times, median};
use crate::backend::cpu;
use crate::nn::layers::{Pass, Tape};
use crate::nn::module::{Module, SkipInput};
use crate::nn::optim::Optimizer;
use crate::nn::param::Init;
use crate::nn::spec::Shape;
use crate::{Error, Result};

/// Seconds that rounds are repeated for at least, and at most.
const SECONDS: (f64, f64) = (0.6, 8.0);
/// Rounds at least where they are short, and at most.
const ROUNDS: (usize, usize) = (5, 200);

/// Times all parts in turn, as a pipeline of them in one process would work: each finds the caches as its neighbours left
/// them. With more than one of `copies`, the others run beside and are not timed. The second value is the bytes a second at
/// which one thread copies.
///
/// # Errors
/// [`Error::Input`] where a part's shapes do not fit.
pub fn measure(conditions: &Conditions, copies: usize) -> Result<(Vec<Times>, f64)> {
    if let Some(on) = &conditions.gpu {
        return gpu::measure(conditions, on);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 1..copies {
            scope.spawn(|| {
                let mut pipeline = Pipeline::new(conditions)?;
                while !stop.load(Ordering::Relaxed) {
                    pipeline.tick(true)?;
                }
                Ok::<_, Error>(())
            });
        }
        let times = Pipeline::new(conditions).and_then(|mut pipeline| pipeline.measure());
        stop.store(true, Ordering::Relaxed);
        times
    })
}

/// Parts that take turns. With messages each has a thread of its own, as a module has: memory that one has freed is not the
/// next one's, and by its next turn others have used the caches.
struct Pipeline {
    stations: Vec<Station>,
    /// Bytes copied so far, and the seconds it took.
    copied: (f64, f64),
}

impl Pipeline {
    fn new(conditions: &Conditions) -> Result<Self> {
        let stations = match conditions.messages {
            true => conditions.parts.iter().map(|part| conditions.with(vec![part.clone()])).collect(),
            false => vec![conditions.clone()],
        };
        let stations = stations.into_iter().map(Station::new).collect::<Result<_>>()?;
        Ok(Pipeline { stations, copied: (0.0, 0.0) })
    }

    /// A step of every part in turn; `wanted`: with the inputs' cotangents.
    fn tick(&mut self, wanted: bool) -> Result<Vec<Tick>> {
        let (mut ticks, mut input) = (Vec::new(), None);
        for station in &self.stations {
            let done = station.work(Work::Tick { wanted, input: input.take() })?;
            ticks.extend(done.ticks);
            input = done.output;
            self.copied = (self.copied.0 + done.copied.0, self.copied.1 + done.copied.1);
        }
        Ok(ticks)
    }

    /// An update of every part that leaves its parameters as they are.
    fn update(&mut self) -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        for station in &self.stations {
            seconds.extend(station.work(Work::Update)?.updates);
        }
        Ok(seconds)
    }

    fn measure(&mut self) -> Result<(Vec<Times>, f64)> {
        // Buffers and choices are made at the first step.
        self.tick(false)?;
        self.tick(true)?;
        let parts = self.update()?.len();
        self.copied = (0.0, 0.0);
        let mut samples = vec![[const { Vec::new() }; 4]; parts];
        let begun = Instant::now();
        for round in 0..ROUNDS.1 {
            let seconds = begun.elapsed().as_secs_f64();
            if round >= 2 && (seconds > SECONDS.1 || round >= ROUNDS.0 && seconds > SECONDS.0) {
                break;
            }
            let (first, then, leaf) = (self.tick(true)?, self.tick(true)?, self.tick(false)?);
            let update = self.update()?;
            for (k, [forward, backward, without, changed]) in samples.iter_mut().enumerate() {
                forward.extend([then[k][0], leaf[k][0]]);
                backward.push(then[k][1]);
                without.push(leaf[k][1]);
                // The step after an update pays for what was made of the parameters before.
                changed.push(update[k] + (first[k][0] + first[k][1] - then[k][0] - then[k][1]));
            }
        }
        let times = samples.iter_mut().map(|[forward, backward, without, changed]| Times {
            forward: median(forward),
            backward: median(backward),
            backward_leaf: median(without),
            update: median(changed).max(0.0),
        });
        let (bytes, seconds) = self.copied;
        let copy = if bytes > 0.0 { bytes / seconds.max(1e-9) } else { copy_rate() };
        Ok((times.collect(), copy))
    }
}

/// What a station is to do.
enum Work {
    /// A step of its parts; with what the station before has made.
    Tick { wanted: bool, input: Option<Tensor> },
    /// An update that changes nothing.
    Update,
}

/// What it did.
#[derive(Default)]
struct Done {
    ticks: Vec<Tick>,
    output: Option<Tensor>,
    /// Seconds of each part's update.
    updates: Vec<f64>,
    /// Bytes copied, and the seconds it took.
    copied: (f64, f64),
}

/// Parts on a thread of their own.
struct Station {
    work: Option<Sender<Work>>,
    done: Receiver<Result<Done>>,
    thread: Option<JoinHandle<()>>,
}

impl Station {
    fn new(conditions: Conditions) -> Result<Self> {
        let (work, to_do) = channel();
        let (answer, done) = channel();
        let thread = std::thread::Builder::new().name("measure".into()).spawn(move || {
            let outcome = cpu::with_threads(conditions.threads, || {
                let mut chain = Chain::new(&conditions)?;
                for work in to_do {
                    // Whoever asked may be gone.
                    let _ = answer.send(chain.work(work));
                }
                Ok(())
            });
            if let Err(e) = outcome.and_then(|result| result) {
                let _ = answer.send(Err(e));
            }
        });
        let thread = thread.map_err(|e| Error::Run(format!("starting a thread to measure layers: {e}")))?;
        Ok(Station { work: Some(work), done, thread: Some(thread) })
    }

    fn work(&self, work: Work) -> Result<Done> {
        // A station that has failed takes no more work, and has said why.
        if let Some(sender) = &self.work {
            let _ = sender.send(work);
        }
        self.done.recv().unwrap_or_else(|_| Err(Error::Run("measuring layers panicked (a bug)".into())))
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Seconds of one part's forward pass and vector–Jacobian product.
type Tick = [f64; 2];

/// The parts at work.
struct Chain {
    parts: Vec<(Module, Optimizer, Vec<Tensor>, Tensor)>,
    pass: Pass,
    /// What stands for a link's buffers, if there are messages.
    buffers: Option<Vec<Vec<f32>>>,
    tape: Tape,
}

/// What comes out of a link: a copy of a copy.
fn through(buffer: &mut Vec<f32>, tensor: &Tensor) -> Result<Tensor> {
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return Err(Error::Run("a tensor to be copied is not in host memory".into()));
    };
    let sent = &storage.as_slice::<f32>()?[layout.start_offset()..][..layout.shape().elem_count()];
    buffer.resize(sent.len(), 0.0);
    buffer.copy_from_slice(sent);
    Ok(Tensor::from_slice(buffer, layout.shape(), &Device::Cpu)?)
}

impl Chain {
    fn new(conditions: &Conditions) -> Result<Self> {
        let init = Init { seed: 1, dtype: DType::F32, device: Device::Cpu };
        let noise = |[h, w, c]: Shape, scale: f32| {
            Ok::<_, Error>(Tensor::randn(0f32, scale, (conditions.batch, h, w, c), &Device::Cpu)?)
        };
        let parts = conditions.parts.iter().enumerate().map(|(k, part)| {
            let skips: Vec<SkipInput> =
                part.skips.iter().enumerate().map(|(from, &shape)| SkipInput { from, shape }).collect();
            let module = Module::new(k + 1, &part.layers, part.main, &skips, conditions.fuse, &init)?;
            let inputs = std::iter::once(&part.main).chain(&part.skips).map(|&shape| noise(shape, 1.0));
            let inputs = inputs.collect::<Result<Vec<Tensor>>>()?;
            // Small, so that sums over many steps stay finite.
            let cotangent = noise(module.output_shape(), 1e-3)?;
            Ok((module, Optimizer::new(conditions.optimizer), inputs, cotangent))
        });
        let parts: Vec<_> = parts.collect::<Result<_>>()?;
        let links = parts.iter().map(|(_, _, inputs, _)| inputs.len() + 1).sum();
        let buffers = conditions.messages.then(|| vec![Vec::new(); links]);
        Ok(Chain { parts, pass: Pass { training: true, key: 1 }, buffers, tape: Tape::new() })
    }

    fn work(&mut self, work: Work) -> Result<Done> {
        match work {
            Work::Tick { wanted, input } => self.tick(wanted, input),
            Work::Update => self.update(),
        }
    }

    /// A step of every part in turn, of which the first is offered `last` as its main input.
    fn tick(&mut self, wanted: bool, mut last: Option<Tensor>) -> Result<Done> {
        let Chain { parts, pass, buffers, tape } = self;
        let mut buffers = buffers.iter_mut().flatten();
        let mut copied = (0.0, 0.0);
        let ticks = parts
            .iter_mut()
            .map(|(module, _, inputs, cotangent)| {
                if let Some(y) = last.take().filter(|y| y.shape() == inputs[0].shape()) {
                    inputs[0] = y;
                }
                let arrives = Instant::now();
                for tensor in inputs.iter_mut().chain([&mut *cotangent]) {
                    if let Some(buffer) = buffers.next() {
                        *tensor = through(buffer, tensor)?;
                        copied.0 += 8.0 * tensor.elem_count() as f64;
                    }
                }
                copied.1 += arrives.elapsed().as_secs_f64();
                let start = Instant::now();
                last = Some(module.forward(inputs, pass, tape)?);
                let middle = Instant::now();
                module.vjp(cotangent, pass, tape, &vec![wanted; inputs.len()])?;
                tape.clear();
                Ok([(middle - start).as_secs_f64(), middle.elapsed().as_secs_f64()])
            })
            .collect::<Result<_>>()?;
        Ok(Done { ticks, output: last, copied, ..Done::default() })
    }

    /// An update of every part that leaves its parameters as they are.
    fn update(&mut self) -> Result<Done> {
        let seconds = self.parts.iter_mut().map(|(module, optimizer, ..)| {
            let start = Instant::now();
            optimizer.step(&mut |f| module.visit(f), 0.0, 1.0, None)?;
            Ok(start.elapsed().as_secs_f64())
        });
        Ok(Done { updates: seconds.collect::<Result<_>>()?, ..Done::default() })
    }
}

/// Bytes a second that this thread copies, of buffers that together are larger than most caches.
fn copy_rate() -> f64 {
    let mut buffers = vec![vec![1u8; 8 << 20]; 8];
    let mut seconds = Vec::new();
    for round in 0..16 {
        let (from, to) = buffers.split_at_mut(4);
        let start = Instant::now();
        to[round % 4].copy_from_slice(std::hint::black_box(&from[round % 4]));
        seconds.push(start.elapsed().as_secs_f64());
    }
    (8 << 20) as f64 / median(&mut seconds).max(1e-9)
}
