//! How long modules take on this machine: measured, and remembered with the conditions they were measured under.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::kernels;
use crate::machine::{processor_name, program_hash};
use crate::model::layers::{Pass, Tape};
use crate::model::module::{Fuse, Module, SkipInput};
use crate::model::param::Init;
use crate::model::spec::{LayerSpec, Shape};
use crate::optim::{Optimizer, OptimizerSpec};
use crate::plan::gpu::{self, OnGpu};
use crate::{Error, Result};

/// A module to be timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Its layers with their places in the whole network.
    pub layers: Vec<(usize, LayerSpec)>,
    /// Its main input, `[H, W, C]` of a sample.
    pub main: Shape,
    /// Its skip inputs as sent.
    pub skips: Vec<Shape>,
}

/// All that measured times depend on. Times measured under other conditions are not used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conditions {
    /// The program's version.
    pub version: String,
    /// xxh3-64 of the program's file: another build may have other kernels.
    pub build: String,
    /// What computes convolutions.
    pub kernels: String,
    /// The processor's name.
    pub cpu: String,
    /// Compute threads a module.
    pub threads: usize,
    /// How many modules computed at the same time: they share caches and memory.
    pub busy: usize,
    /// B
    pub batch: usize,
    /// How skips join.
    pub fuse: Fuse,
    /// The optimiser.
    pub optimizer: OptimizerSpec,
    /// Whether parts get their inputs and cotangents as messages, copied twice, or in place.
    pub messages: bool,
    /// The GPU, where they compute on one.
    #[serde(default)]
    pub gpu: Option<OnGpu>,
    /// What was timed.
    pub parts: Vec<Part>,
}

/// Seconds of one part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// A forward pass.
    pub forward: f64,
    /// A vector–Jacobian product with all inputs' cotangents.
    pub backward: f64,
    /// One without any.
    pub backward_leaf: f64,
    /// An update of the parameters, and what it costs the step after it.
    pub update: f64,
}

/// Times with their conditions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// What the times depend on.
    pub conditions: Conditions,
    /// When they were measured, in seconds since 1970.
    pub taken: u64,
    /// Bytes a second that one thread copies; from and to a GPU.
    pub copy: f64,
    /// One entry a part.
    pub times: Vec<Times>,
    /// The file it was read from or written to; `None` where there is none.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Whether it was read from there.
    #[serde(skip)]
    pub cached: bool,
}

impl Conditions {
    /// The conditions of this program on this machine, for parts to be filled in.
    pub fn here(threads: usize, busy: usize, batch: usize, fuse: Fuse, optimizer: OptimizerSpec) -> Self {
        Conditions {
            version: env!("CARGO_PKG_VERSION").into(),
            build: format!("{:016x}", program_hash()),
            kernels: kernels::back_end(),
            cpu: processor_name(),
            threads,
            busy,
            batch,
            fuse,
            optimizer,
            messages: false,
            gpu: None,
            parts: Vec::new(),
        }
    }

    /// The same with these parts.
    pub fn with(&self, parts: Vec<Part>) -> Self {
        Conditions { parts, ..self.clone() }
    }
}

/// Seconds that rounds are repeated for at least, and at most.
const SECONDS: (f64, f64) = (0.6, 8.0);
/// Rounds at least where they are short, and at most.
const ROUNDS: (usize, usize) = (5, 200);

impl Profile {
    /// The times of `conditions`: from the cache if it has them and `fresh` is not asked for, else measured and put there.
    ///
    /// # Errors
    /// [`Error::Input`] where a part's shapes do not fit.
    pub fn get(conditions: Conditions, fresh: bool) -> Result<Self> {
        let file = cache_file(&conditions);
        if let (Some(file), false) = (&file, fresh)
            && let Some(found) = read(file, &conditions)
        {
            return Ok(found);
        }
        let measured = measure_apart(&conditions, conditions.busy)?;
        Ok(Self::keep(conditions, measured, file))
    }

    /// Measures anew, with `copies` of it in this process, and keeps the result; further copies, up to the conditions' `busy`,
    /// are other processes'.
    ///
    /// # Errors
    /// As [`Profile::get`].
    pub fn measure(conditions: Conditions, copies: usize) -> Result<Self> {
        let measured = measure_apart(&conditions, copies)?;
        let file = cache_file(&conditions);
        Ok(Self::keep(conditions, measured, file))
    }

    fn keep(conditions: Conditions, (times, copy): (Vec<Times>, f64), file: Option<PathBuf>) -> Self {
        let taken = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut profile = Profile { conditions, taken, copy, times, file: None, cached: false };
        if let Some(file) = file {
            match write(&file, &profile) {
                Ok(()) => profile.file = Some(file),
                Err(e) => log::warn!("the measured times are not kept: {e}"),
            }
        }
        profile
    }

    /// The times of `conditions` if the cache has them.
    pub fn cached(conditions: &Conditions) -> Option<Self> {
        read(&cache_file(conditions)?, conditions)
    }
}

/// Where profiles are kept: `$SIDEWAYS_CACHE` (`off`: nowhere), else `sideways` in the user's cache folder.
fn cache_file(conditions: &Conditions) -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = match variable("SIDEWAYS_CACHE") {
        Some(off) if off.as_os_str() == "off" => return None,
        Some(folder) => folder,
        None => variable("XDG_CACHE_HOME").or(variable("HOME").map(|home| home.join(".cache")))?.join("sideways"),
    };
    let text = serde_json::to_vec(conditions).ok()?;
    Some(folder.join(format!("profile-{:016x}.json", xxhash_rust::xxh3::xxh3_64(&text))))
}

fn read(file: &PathBuf, conditions: &Conditions) -> Option<Profile> {
    let text = std::fs::read(file).ok()?;
    // Numbers read from text may differ in the last bit from those written: both are compared as read.
    let conditions: Conditions = serde_json::from_slice(&serde_json::to_vec(conditions).ok()?).ok()?;
    match serde_json::from_slice::<Profile>(&text) {
        Ok(found) if found.conditions == conditions && found.times.len() == conditions.parts.len() => {
            Some(Profile { file: Some(file.clone()), cached: true, ..found })
        }
        Ok(_) => None,
        Err(e) => {
            log::warn!("{}: not a profile, measuring anew: {e}", file.display());
            None
        }
    }
}

/// Whole or not at all: two programs may write at once.
fn write(file: &PathBuf, profile: &Profile) -> Result<()> {
    let folder = file.parent().unwrap_or(file);
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let text = serde_json::to_vec_pretty(profile).map_err(|e| Error::io(file, e.into()))?;
    let partial = file.with_extension(format!("{}.partial", std::process::id()));
    std::fs::write(&partial, text).map_err(|e| Error::io(&partial, e))?;
    std::fs::rename(&partial, file).map_err(|e| Error::io(file, e))
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

/// The middle one, or the mean of the two in the middle; 0 of none.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The name of the command that [`measure_on_request`] answers.
pub const COMMAND: &str = "measure-layers";

/// [`measure`] in a process of its own, another of this program, whose memory is gone when it is done: a rank that planned
/// would otherwise keep what the whole network took. Where that is not to be had, in this process.
fn measure_apart(conditions: &Conditions, copies: usize) -> Result<(Vec<Times>, f64)> {
    let request = serde_json::to_vec(&(conditions, copies)).map_err(|e| Error::Run(e.to_string()))?;
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&request)?;
        }
        Ok(child.wait_with_output()?.stdout)
    };
    match ask().and_then(|answer| Ok(serde_json::from_slice(&answer)?)) {
        Ok(measured) => Ok(measured),
        Err(e) => {
            log::debug!("layers are measured in this process: {e}");
            measure(conditions, copies)
        }
    }
}

/// Reads conditions from the standard input, measures, and writes the times to the standard output.
///
/// # Errors
/// [`Error::Input`] if the input is not what this program asks with; as [`measure`].
pub fn measure_on_request() -> Result<()> {
    let (conditions, copies): (Conditions, usize) = serde_json::from_reader(std::io::stdin().lock())
        .map_err(|e| Error::input(format!("{COMMAND} is for the program itself (`sideways plan` is for you): {e}")))?;
    let measured = measure(&conditions, copies)?;
    serde_json::to_writer(std::io::stdout().lock(), &measured).map_err(|e| Error::Run(e.to_string()))
}

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
                let mut chain = Chain::new(conditions)?;
                kernels::with_threads(conditions.threads, || {
                    while !stop.load(Ordering::Relaxed) {
                        chain.tick(true)?;
                    }
                    Ok::<_, Error>(())
                })?
            });
        }
        // On a thread of its own: the caller's pool is left alone.
        let measured = scope.spawn(|| {
            let mut chain = Chain::new(conditions)?;
            kernels::with_threads(conditions.threads, || chain.measure()).and_then(|times| times)
        });
        let times = measured.join().unwrap_or_else(|_| Err(Error::Run("measuring layers panicked (a bug)".into())));
        stop.store(true, Ordering::Relaxed);
        times
    })
}

/// Seconds of one part's forward pass and vector–Jacobian product.
type Tick = [f64; 2];

/// The parts at work.
struct Chain {
    parts: Vec<(Module, Optimizer, Vec<Tensor>, Tensor)>,
    pass: Pass,
    /// What stands for a link's buffers, if there are messages.
    buffers: Option<Vec<Vec<f32>>>,
    /// Bytes copied so, and the seconds it took.
    copied: (f64, f64),
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
        Ok(Chain { parts, pass: Pass { training: true, key: 1 }, buffers, copied: (0.0, 0.0) })
    }

    /// A step of every part in turn; `wanted`: with the inputs' cotangents.
    fn tick(&mut self, wanted: bool) -> Result<Vec<Tick>> {
        let mut last: Option<Tensor> = None;
        let mut tape = Tape::new();
        let pass = self.pass;
        let mut buffers = self.buffers.iter_mut().flatten();
        let copied = &mut self.copied;
        self.parts
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
                last = Some(module.forward(inputs, &pass, &mut tape)?);
                let middle = Instant::now();
                module.vjp(cotangent, &pass, &mut tape, &vec![wanted; inputs.len()])?;
                tape.clear();
                Ok([(middle - start).as_secs_f64(), middle.elapsed().as_secs_f64()])
            })
            .collect()
    }

    /// An update of every part that leaves its parameters as they are.
    fn update(&mut self) -> Result<Vec<f64>> {
        self.parts
            .iter_mut()
            .map(|(module, optimizer, ..)| {
                let start = Instant::now();
                optimizer.step(&mut |f| module.visit(f), 0.0, 1.0, None)?;
                Ok(start.elapsed().as_secs_f64())
            })
            .collect()
    }

    fn measure(&mut self) -> Result<(Vec<Times>, f64)> {
        // Buffers and choices are made at the first step.
        self.tick(false)?;
        self.tick(true)?;
        self.update()?;
        self.copied = (0.0, 0.0);
        let mut samples = vec![[const { Vec::new() }; 4]; self.parts.len()];
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
