//! Times of modules on a GPU, by its own clock.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::{Precision, RunConfig};
#[cfg(feature = "cuda")]
pub use on::{Ticks, measure, ticks};

/// What times on a GPU depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OnGpu {
    /// Its number among those the process sees.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// cuDNN's version.
    pub cudnn: usize,
    /// Number format.
    pub precision: Precision,
    /// Whether passes are replayed as CUDA graphs.
    pub graphs: bool,
}

impl OnGpu {
    /// Bytes of an activation's element.
    pub fn element_bytes(&self) -> u64 {
        if self.precision == Precision::Bf16 { 2 } else { 4 }
    }
}

/// The GPU on which a run's modules would compute here; `None` on the processor.
///
/// # Errors
/// [`crate::Error::Input`] if one is asked for and there is none, with what to do.
pub fn chosen(run: &RunConfig) -> Result<Option<OnGpu>> {
    match crate::setup::site::choose(&crate::comm::World::Alone, run.device)? {
        crate::setup::site::Site::Cpu => Ok(None),
        #[cfg(feature = "cuda")]
        crate::setup::site::Site::Gpu { ordinal, .. } => on::describe(ordinal, run).map(Some),
    }
}

/// Without CUDA there are no such times.
///
/// # Errors
/// [`crate::Error::Input`], always.
#[cfg(not(feature = "cuda"))]
pub fn measure(_: &super::profile::Conditions, gpu: &OnGpu) -> Result<(Vec<super::profile::Times>, f64)> {
    Err(crate::Error::input(format!("times on {} cannot be measured: this program was built without CUDA", gpu.name)))
}

#[cfg(feature = "cuda")]
mod on {
    use std::sync::Arc;
    use std::time::Instant;

    use candle_core::{DType, Device};
    use cudarc::driver::CudaEvent;

    use super::OnGpu;
    use crate::backend::cuda::gpu::failed;
    use crate::backend::cuda::module::{Module, Placing, Plan};
    use crate::backend::cuda::optim::Optimizer;
    use crate::backend::cuda::{Element, Gpu, peak};
    use crate::config::{Precision, RunConfig};
    use crate::nn::layers::Pass;
    use crate::nn::module::{self, SkipInput};
    use crate::nn::optim;
    use crate::nn::param::Init;
    use crate::plan::profile::{Conditions, Part, Times, median};
    use crate::{Error, Result};

    /// Seconds that rounds are repeated for at least, and at most.
    const SECONDS: (f64, f64) = (0.2, 4.0);
    /// Rounds at least, and at most.
    const ROUNDS: (usize, usize) = (3, 100);
    const PASS: Pass = Pass { training: true, key: 1 };

    pub(super) fn describe(ordinal: usize, run: &RunConfig) -> Result<OnGpu> {
        let (name, cudnn) = crate::backend::cuda::gpu::describe(ordinal)?;
        Ok(OnGpu { ordinal, name, cudnn, precision: run.precision, graphs: run.graphs })
    }

    /// A part on the GPU.
    struct Placed {
        module: Module,
        optimizer: Optimizer,
        inputs: usize,
        /// Before the forward pass, behind it, behind the vector–Jacobian product, behind the update.
        clocks: [CudaEvent; 4],
    }

    /// Parts at work, one after the other in one stream.
    struct Chain {
        gpu: Arc<Gpu>,
        parts: Vec<Placed>,
    }

    impl Chain {
        fn new(conditions: &Conditions, on: &OnGpu, graphs: bool) -> Result<Self> {
            let gpu = Gpu::open(on.ordinal, on.precision == Precision::Tf32)?;
            let parts = conditions.parts.iter().enumerate();
            let parts = parts.map(|(k, part)| Placed::new(&gpu, conditions, on, graphs, k, part));
            let parts = parts.collect::<Result<_>>()?;
            Ok(Chain { gpu, parts })
        }

        /// A tick of every part; `wanted`: with the inputs' cotangents. Seconds of forward pass, product and update.
        fn tick(&mut self, wanted: bool) -> Result<Vec<[f64; 3]>> {
            for part in &mut self.parts {
                part.tick(&self.gpu, wanted)?;
            }
            self.parts.iter().map(Placed::seconds).collect()
        }
    }

    impl Placed {
        fn new(
            gpu: &Arc<Gpu>,
            conditions: &Conditions,
            on: &OnGpu,
            graphs: bool,
            k: usize,
            part: &Part,
        ) -> Result<Self> {
            let init = Init { seed: 1, dtype: DType::F32, device: Device::Cpu };
            let skips: Vec<SkipInput> =
                part.skips.iter().enumerate().map(|(from, &shape)| SkipInput { from, shape }).collect();
            let mut host = module::Module::new(k + 1, &part.layers, part.main, &skips, conditions.fuse, &init)?;
            let element = if on.precision == Precision::Bf16 { Element::Bf16 } else { Element::F32 };
            let placing = Placing { batch: conditions.batch, element, training: true, graphs };
            let plan =
                Plan { index: k + 1, layers: &part.layers, main: part.main, skips: &skips, fuse: conditions.fuse };
            let mut module = Module::planned(gpu, &plan, &mut host, placing)?;
            for input in 0..=skips.len() {
                peak::fill(gpu, module.input(input), 1.0)?;
            }
            // Small, so that sums over many steps stay finite.
            peak::fill(gpu, module.output_cotangent()?, 1e-3)?;
            let optimizer = Optimizer::new(gpu, &optim::Optimizer::new(conditions.optimizer), &mut module)?;
            let clocks = [gpu.clock()?, gpu.clock()?, gpu.clock()?, gpu.clock()?];
            Ok(Placed { module, optimizer, inputs: skips.len() + 1, clocks })
        }

        fn launch(&mut self, gpu: &Gpu, wanted: bool) -> Result<()> {
            self.module.forward(&PASS)?;
            self.module.backward(&vec![wanted; self.inputs])?;
            // Leaves the parameters as they are.
            self.optimizer.step(gpu, 0.0, 1.0, None)
        }

        fn tick(&mut self, gpu: &Gpu, wanted: bool) -> Result<()> {
            let record = |event: &CudaEvent| event.record(&gpu.compute).map_err(|e| failed("a clock", &e));
            record(&self.clocks[0])?;
            self.module.forward(&PASS)?;
            record(&self.clocks[1])?;
            self.module.backward(&vec![wanted; self.inputs])?;
            record(&self.clocks[2])?;
            self.optimizer.step(gpu, 0.0, 1.0, None)?;
            record(&self.clocks[3])
        }

        fn seconds(&self) -> Result<[f64; 3]> {
            let between = |k: usize| {
                let ms = self.clocks[k].elapsed_ms(&self.clocks[k + 1]).map_err(|e| failed("reading a clock", &e))?;
                Ok::<f64, Error>(f64::from(ms) * 1e-3)
            };
            Ok([between(0)?, between(1)?, between(2)?])
        }
    }

    /// As [`crate::plan::measure::measure`]: a part's passes and updates on the GPU. The second value is the bytes a second of
    /// copies between GPU and host, the slower way.
    ///
    /// # Errors
    /// As [`Gpu::open`]; [`Error::Run`] if CUDA fails.
    pub fn measure(conditions: &Conditions, on: &OnGpu) -> Result<(Vec<Times>, f64)> {
        let mut chain = Chain::new(conditions, on, on.graphs)?;
        // Launched, captured, replayed: from the third on all are alike.
        for wanted in [true, false, true, false, true, false] {
            chain.tick(wanted)?;
        }
        let mut samples = vec![[const { Vec::new() }; 4]; chain.parts.len()];
        let begun = Instant::now();
        for round in 0..ROUNDS.1 {
            let seconds = begun.elapsed().as_secs_f64();
            if round >= 2 && (seconds > SECONDS.1 || round >= ROUNDS.0 && seconds > SECONDS.0) {
                break;
            }
            let (with, without) = (chain.tick(true)?, chain.tick(false)?);
            for (k, [forward, backward, leaf, update]) in samples.iter_mut().enumerate() {
                forward.extend([with[k][0], without[k][0]]);
                backward.push(with[k][1]);
                leaf.push(without[k][1]);
                update.extend([with[k][2], without[k][2]]);
            }
        }
        let times = samples.iter_mut().map(|[forward, backward, leaf, update]| Times {
            forward: median(forward),
            backward: median(backward),
            backward_leaf: median(leaf),
            update: median(update),
        });
        let times = times.collect();
        let (to_device, to_host) = peak::host_copies(&chain.gpu)?;
        Ok((times, to_device.min(to_host)))
    }

    /// A part's whole ticks.
    #[derive(Clone, Copy, Debug, serde::Serialize)]
    pub struct Ticks {
        /// Seconds of a tick (forward pass, vector–Jacobian product, update), launched kernel by kernel: the mean of many
        /// back to back.
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
            let one = conditions.with(vec![conditions.parts[k].clone()]);
            let mut seconds = [0.0; 2];
            let mut allocated = 0;
            for (graphs, seconds) in [false, true].into_iter().zip(&mut seconds) {
                let mut chain = Chain::new(&one, on, graphs)?;
                let Chain { gpu, parts } = &mut chain;
                let part = &mut parts[0];
                for _ in 0..3 {
                    part.tick(gpu, k > 0)?;
                }
                let alone = part.seconds()?.iter().sum::<f64>().max(1e-6);
                let count = ((SECONDS.0 / 2.0 / alone) as usize).clamp(1, 500);
                *seconds = peak::fastest(gpu, || (0..count).try_for_each(|_| part.launch(gpu, k > 0)))? / count as f64;
                allocated = gpu.allocated();
            }
            all.push(Ticks { launches: seconds[0], graphs: seconds[1], allocated });
        }
        Ok(all)
    }
}
