//! Times of parts of a network, each a stage at work as it would be in a pipeline.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use candle_core::{Device, Tensor};

use super::gpu::OnGpu;
use super::profile::{Conditions, Part, Times, median};
use crate::backend::cuda::{Place, Probe};
use crate::backend::slots::{Slot, SlotMut};
use crate::backend::stage::{Clock, CpuStage, Stage};
use crate::backend::{GpuPlacement, Precision, cpu, cuda};
use crate::method::Keep;
use crate::nn::layers::Pass;
use crate::nn::spec::Shape;
use crate::sys::cpus::{keep_to, own_processors};
use crate::{Error, Result};

/// Seconds that rounds are repeated for at least, and at most.
const SECONDS: (f64, f64) = (0.6, 8.0);
/// Rounds at least where they are short, and at most.
const ROUNDS: (usize, usize) = (5, 200);

/// Repetitions of many ticks in a row; the fastest counts.
const REPEAT: usize = 5;
const PASS: Pass = Pass { training: true, key: 1, again: false };

/// Times all parts in turn, as a pipeline of them in one process would work: each finds the caches as its neighbours left
/// them. With more than one of `copies`, the others run beside and are not timed; each keeps to its share of the processors, as
/// ranks do. The second value is the bytes a second at which one thread copies, or a GPU from and to the host.
///
/// # Errors
/// [`Error::Input`] where a part's shapes do not fit.
pub fn measure(conditions: &Conditions, copies: usize) -> Result<(Vec<Times>, f64)> {
    let stop = AtomicBool::new(false);
    let own = own_processors();
    let shares: Vec<&[usize]> = match own.len() / copies.max(1) {
        each if copies > 1 && each > 0 => own.chunks(each).collect(),
        _ => vec![&[]; copies.max(1)],
    };
    let shares = &shares;
    std::thread::scope(|scope| {
        let beside = |copy: usize| {
            let mut pipeline = Pipeline::new(conditions, shares[copy])?;
            while !stop.load(Ordering::Relaxed) {
                pipeline.tick(true)?;
            }
            Ok::<_, Error>(())
        };
        let others: Vec<_> = (1..copies).map(|copy| scope.spawn(move || beside(copy))).collect();
        let times = Pipeline::new(conditions, shares[0]).and_then(|mut pipeline| pipeline.measure());
        let times = match (&conditions.gpu, times) {
            (Some(on), Ok((times, _))) => gpu_copy_rate(on).map(|copy| (times, copy)),
            (_, times) => times,
        };
        stop.store(true, Ordering::Relaxed);
        // Alone on the machine it would have been too fast.
        for other in others {
            other.join().map_err(|_| Error::Run("a measurement panicked (a bug)".into()))??;
        }
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
    /// On `processors`; on any where there are none.
    fn new(conditions: &Conditions, processors: &[usize]) -> Result<Self> {
        let stations = match conditions.messages {
            true => conditions.parts.iter().map(|part| conditions.with(vec![part.clone()])).collect(),
            false => vec![conditions.clone()],
        };
        let stations = stations.into_iter().map(|s| Station::new(s, processors.to_vec())).collect::<Result<_>>()?;
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
        // Buffers and choices are made at the first steps, graphs captured at the second of a kind.
        for wanted in [false, true, false, true] {
            self.tick(wanted)?;
        }
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
    Tick { wanted: bool, input: Option<Vec<f32>> },
    /// An update that changes nothing.
    Update,
}

/// What it did.
#[derive(Default)]
struct Done {
    ticks: Vec<Tick>,
    output: Option<Vec<f32>>,
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
    fn new(conditions: Conditions, processors: Vec<usize>) -> Result<Self> {
        let (work, to_do) = channel();
        let (answer, done) = channel();
        let thread = std::thread::Builder::new().name("measure".into()).spawn(move || {
            if !processors.is_empty() {
                keep_to(&processors);
            }
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

/// Seconds of one part's forward pass and backward pass.
type Tick = [f64; 2];

/// A part at work, and the messages that come to it and go from it.
struct PartAtWork {
    stage: Box<dyn Stage>,
    inputs: Vec<Message>,
    output: Message,
    cotangent: Message,
    steps: usize,
}

/// What stands for a link's buffer.
enum Message {
    Host(Vec<f32>),
    Device(Place),
}

impl Message {
    fn slot(&self) -> Slot<'_> {
        match self {
            Message::Host(words) => Slot::Host(words),
            Message::Device(place) => Slot::Device(place),
        }
    }

    /// With numbers from `-scale` to `scale` in host memory; zeros in a GPU's.
    fn new(on: Option<&OnGpu>, words: usize, scale: f32) -> Result<Self> {
        if let Some(on) = on {
            return Ok(Message::Device(Place::allocate(on.ordinal, 4 * words)?));
        }
        let noise = Tensor::rand(-scale, scale, words, &Device::Cpu)?;
        Ok(Message::Host(noise.to_vec1::<f32>()?))
    }
}

impl PartAtWork {
    fn new(conditions: &Conditions, k: usize, part: &Part) -> Result<Self> {
        let spec = conditions.spec(k, part)?;
        let words = |shape: Shape| conditions.batch * shape.iter().product::<usize>();
        let on = conditions.gpu.as_ref();
        let message = |shape: Shape, scale: f32| Message::new(on, words(shape), scale);
        let shapes = std::iter::once(part.main).chain(part.skips.iter().copied());
        let inputs = shapes.map(|shape| message(shape, 1.0)).collect::<Result<Vec<_>>>()?;
        let output = message(spec.output, 1.0)?;
        // Small, so that sums over many steps stay finite.
        let cotangent = message(spec.output, 1e-3)?;
        let host = CpuStage::new(spec)?;
        let mut stage: Box<dyn Stage> = match on {
            None => Box::new(host),
            Some(on) => {
                let &OnGpu { ordinal, precision, graphs, .. } = on;
                let half_messages = precision == Precision::Bf16;
                cuda::stage(
                    host,
                    &GpuPlacement { ordinal, precision, half_messages, graphs, needed: 0, modules_on_it: 1 },
                )?
            }
        };
        for (k, input) in inputs.iter().enumerate() {
            stage.receive(k, input.slot())?;
        }
        Ok(PartAtWork { stage, inputs, output, cotangent, steps: 0 })
    }

    /// Takes its messages, but for the main input where `main` says so: bytes copied, and the seconds.
    fn receive(&mut self, main: bool) -> Result<(f64, f64)> {
        let (mut words, start) = (0, Instant::now());
        for (k, input) in self.inputs.iter().enumerate().skip(usize::from(!main)) {
            self.stage.receive(k, input.slot())?;
            if let Message::Host(values) = input {
                words += values.len();
            }
        }
        Ok((4.0 * words as f64, start.elapsed().as_secs_f64()))
    }

    /// Forward pass, backward pass with the inputs' cotangents if `wanted`.
    fn passes(&mut self, wanted: bool) -> Result<[Clock; 3]> {
        let step = self.steps;
        self.steps += 1;
        self.stage.add_cotangent(0, step, self.cotangent.slot())?;
        let start = self.stage.clock()?;
        self.stage.forward(step, &PASS, Keep::Activations, &[true])?;
        let middle = self.stage.clock()?;
        self.stage.backward(step, &PASS, &vec![wanted; self.inputs.len()])?;
        Ok([start, middle, self.stage.clock()?])
    }

    fn update(&mut self) -> Result<f64> {
        let start = self.stage.clock()?;
        // Leaves the parameters as they are.
        self.stage.update(0.0, 1.0, None)?;
        let end = self.stage.clock()?;
        start.until(&end)
    }
}

/// The parts at work.
struct Chain {
    parts: Vec<PartAtWork>,
    messages: bool,
}

impl Chain {
    fn new(conditions: &Conditions) -> Result<Self> {
        let parts = conditions.parts.iter().enumerate();
        let parts = parts.map(|(k, part)| PartAtWork::new(conditions, k, part)).collect::<Result<_>>()?;
        Ok(Chain { parts, messages: conditions.messages })
    }

    fn work(&mut self, work: Work) -> Result<Done> {
        match work {
            Work::Tick { wanted, input } => self.tick(wanted, input),
            Work::Update => self.update(),
        }
    }

    /// A step of every part in turn, of which the first is offered `last` as its main input's message.
    fn tick(&mut self, wanted: bool, mut last: Option<Vec<f32>>) -> Result<Done> {
        let mut done = Done::default();
        let mut y: Option<Tensor> = None;
        for part in &mut self.parts {
            match (&mut part.inputs[0], last.take(), y.take()) {
                (Message::Host(words), Some(received), _) if received.len() == words.len() => *words = received,
                // Without messages a part finds what the one before has made.
                (Message::Host(words), _, Some(y)) if y.elem_count() == words.len() => {
                    part.stage.set_input(0, y, None)?
                }
                _ => {}
            }
            if self.messages {
                let (bytes, seconds) = part.receive(true)?;
                done.copied = (done.copied.0 + bytes, done.copied.1 + seconds);
            }
            let [start, middle, end] = part.passes(wanted)?;
            done.ticks.push([start.until(&middle)?, middle.until(&end)?]);
            if let (true, Message::Host(words)) = (self.messages, &mut part.output) {
                let start = Instant::now();
                part.stage.send(0, SlotMut::Host(words))?;
                done.copied.0 += 4.0 * words.len() as f64;
                done.copied.1 += start.elapsed().as_secs_f64();
                last = Some(words.clone());
            } else if part.stage.is_synchronous() {
                y = Some(part.stage.output()?);
            }
            part.stage.end_tick();
        }
        done.output = last;
        Ok(done)
    }

    /// An update of every part that leaves its parameters as they are.
    fn update(&mut self) -> Result<Done> {
        let updates = self.parts.iter_mut().map(PartAtWork::update).collect::<Result<_>>()?;
        Ok(Done { updates, ..Done::default() })
    }
}

/// A part's whole ticks on a GPU.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Ticks {
    /// Seconds of a tick (forward pass, backward pass, update), launched kernel by kernel: the mean of many back to back.
    pub launches: f64,
    /// The same with passes as CUDA graphs.
    pub graphs: f64,
    /// Bytes of GPU memory that the module, its optimiser and cuDNN's workspace take.
    pub allocated: usize,
}

/// Whole ticks of each part by itself, many in a row: what the host needs for launching counts where the GPU waits for it.
/// The first part never computes its input's cotangent.
///
/// # Errors
/// As [`measure`].
pub fn ticks(conditions: &Conditions, on: &OnGpu) -> Result<Vec<Ticks>> {
    let mut all = Vec::new();
    for k in 0..conditions.parts.len() {
        let (mut seconds, mut allocated) = ([0.0; 2], 0);
        for (graphs, seconds) in [false, true].into_iter().zip(&mut seconds) {
            let gpu = Some(OnGpu { graphs, ..on.clone() });
            let one = Conditions { gpu, ..conditions.with(vec![conditions.parts[k].clone()]) };
            let mut part = PartAtWork::new(&one, k, &one.parts[0])?;
            let tick = |part: &mut PartAtWork| {
                part.passes(k > 0)?;
                part.stage.update(0.0, 1.0, None).map(|_| ())
            };
            let mut alone = 0.0;
            for _ in 0..3 {
                let start = part.stage.clock()?;
                tick(&mut part)?;
                alone = start.until(&part.stage.clock()?)?;
            }
            let count = ((SECONDS.0 / 2.0 / alone.max(1e-6)) as usize).clamp(1, 500);
            let mut least = f64::INFINITY;
            for _ in 0..REPEAT {
                let start = part.stage.clock()?;
                (0..count).try_for_each(|_| tick(&mut part))?;
                least = least.min(start.until(&part.stage.clock()?)? / count as f64);
            }
            *seconds = least;
            allocated = part.stage.allocated().unwrap_or(0);
        }
        all.push(Ticks { launches: seconds[0], graphs: seconds[1], allocated });
    }
    Ok(all)
}

/// Bytes a second of copies between a GPU and the host, the slower way.
fn gpu_copy_rate(on: &OnGpu) -> Result<f64> {
    const WORDS: usize = 8 << 20;
    let [to_host, to_device] = Probe::new(on.ordinal, WORDS)?.host_copies()?;
    Ok(4.0 * WORDS as f64 / to_host.max(to_device).max(1e-9))
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
