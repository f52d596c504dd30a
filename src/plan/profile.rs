//! How long modules take on this machine: measured, and remembered with the conditions they were measured under.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::measure::measure;
use crate::backend::cpu;
use crate::backend::stage::{OutputPort, StageSpec};
use crate::nn::module::{Fuse, SkipInput, fused_shape};
use crate::nn::optim::OptimizerSpec;
use crate::nn::spec::{LayerSpec, Shape};
use crate::plan::gpu::OnGpu;
use crate::sys::cpus::processor_name;
use crate::sys::files::{self, write_whole};
use crate::sys::host::program_hash;
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

impl Part {
    /// Operations of a forward pass of one sample through its layers.
    pub fn flops(&self) -> u64 {
        let mut shape = self.main;
        let mut sum = 0;
        for (_, layer) in &self.layers {
            sum += layer.flops(shape);
            shape = layer.output_shape(shape).unwrap_or(shape);
        }
        sum
    }
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
    /// The operations a second that the times are made of; `None`: they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assumed: Option<f64>,
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
            kernels: cpu::back_end(),
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

    /// What the stage of part `k` is made from.
    ///
    /// # Errors
    /// [`Error::Input`] where shapes do not fit.
    pub fn spec(&self, k: usize, part: &Part) -> Result<StageSpec> {
        let mut output = fused_shape(part.main, &part.skips, self.fuse);
        for (_, layer) in &part.layers {
            output = layer.output_shape(output)?;
        }
        Ok(StageSpec {
            index: k + 1,
            layers: part.layers.clone(),
            main: part.main,
            skips: part.skips.iter().enumerate().map(|(from, &shape)| SkipInput { from, shape }).collect(),
            fuse: self.fuse,
            output,
            frames: false,
            outputs: vec![OutputPort { shape: output, returns: true }],
            returns: vec![true; 1 + part.skips.len()],
            batch: self.batch,
            seed: 1,
            last_layer: None,
            kept: 1,
            sums: 1,
            recompute: false,
            optimizer: Some(self.optimizer),
            ema: None,
            frozen: Default::default(),
            lends: None,
            head: None,
            leave_out: false,
        })
    }

    /// The same with these parts.
    pub fn with(&self, parts: Vec<Part>) -> Self {
        Conditions { parts, ..self.clone() }
    }
}

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
        let mut profile = Profile { conditions, taken, copy, times, assumed: None, file: None, cached: false };
        if let Some(file) = file {
            match write(&file, &profile) {
                Ok(()) => profile.file = Some(file),
                Err(e) => log::warn!("the measured times are not kept: {e}"),
            }
        }
        profile
    }

    /// Seconds of all parts' passes together, forward and backward.
    pub fn passes(&self) -> f64 {
        self.times.iter().map(|times| times.forward + times.backward).sum()
    }

    /// The same with passes that take so many times as long.
    pub fn with_passes(mut self, by: f64) -> Self {
        for times in &mut self.times {
            times.forward *= by;
            times.backward *= by;
            times.backward_leaf *= by;
        }
        self
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

fn read(file: &Path, conditions: &Conditions) -> Option<Profile> {
    let text = files::read(file).ok()?;
    // Numbers read from text may differ in the last bit from those written: both are compared as read.
    let conditions: Conditions = serde_json::from_slice(&serde_json::to_vec(conditions).ok()?).ok()?;
    match serde_json::from_slice::<Profile>(&text) {
        Ok(found) if found.conditions == conditions && found.times.len() == conditions.parts.len() => {
            Some(Profile { file: Some(file.to_path_buf()), cached: true, ..found })
        }
        Ok(_) => None,
        Err(e) => {
            log::warn!("{}: not a profile, measuring anew: {e}", file.display());
            None
        }
    }
}

fn write(file: &Path, profile: &Profile) -> Result<()> {
    let folder = file.parent().unwrap_or(file);
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    write_whole(file, &serde_json::to_vec_pretty(profile).map_err(|e| Error::io(file, e.into()))?)
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
