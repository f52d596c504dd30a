//! Which GPU a rank's modules compute on.

use crate::comm::World;
use crate::config::DeviceChoice;
#[cfg(feature = "cuda")]
use crate::sys::host::hostname;
use crate::{Error, Result};
#[cfg(feature = "cuda")]
pub use on::{Edges, Place, registers};

/// Where a rank's modules compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// On the processor.
    Cpu,
    /// On the GPU of this number among those the process sees; so many ranks share it.
    #[cfg(feature = "cuda")]
    Gpu {
        /// Its number.
        ordinal: usize,
        /// Ranks on it.
        ranks: usize,
    },
}

/// This rank's site: the k-th rank of a host takes its k-th GPU, from the first again where there are fewer. `auto` takes
/// GPUs where every rank has one. Collective.
///
/// # Errors
/// [`Error::Input`] on all ranks, where GPUs are asked for and a rank has none.
#[cfg(feature = "cuda")]
pub fn choose(world: &World, choice: DeviceChoice) -> Result<Site> {
    if choice == DeviceChoice::Cpu {
        return Ok(Site::Cpu);
    }
    let (count, trouble) = usable();
    let mine = format!("{}\n{count}\n{trouble}", hostname());
    let gathered = world.gather(mine.as_bytes())?;
    let all: Vec<String> = gathered.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let host = |rank: usize| all[rank].lines().next().unwrap_or_default();
    let without = (0..all.len()).find(|&rank| all[rank].lines().nth(1) == Some("0"));
    match (without, choice) {
        (Some(rank), DeviceChoice::Auto) => {
            log::debug!("no GPU on rank {rank} ({}): all ranks compute on the CPU", host(rank));
            return Ok(Site::Cpu);
        }
        (Some(rank), _) => {
            let why = all[rank].lines().skip(2).collect::<Vec<_>>().join(" ");
            return Err(Error::input(format!(
                "rank {rank} on {} has no GPU: {why}. Ask for them (Slurm: --gpus-per-node), or set run.device = \"cpu\"",
                host(rank)
            )));
        }
        (None, _) => {}
    }
    let here: Vec<usize> = (0..all.len()).filter(|&rank| host(rank) == host(world.rank())).collect();
    let place = here.iter().position(|&rank| rank == world.rank()).unwrap_or(0);
    let ordinal = place % count;
    let ranks = (0..here.len()).filter(|k| k % count == ordinal).count();
    if ranks > 1 && place < count {
        log::warn!(
            "{}: {ranks} ranks share GPU {ordinal}, and wait for one another: one rank a GPU is faster",
            host(world.rank())
        );
    }
    Ok(Site::Gpu { ordinal, ranks })
}

/// This rank's site: without CUDA, the processor.
///
/// # Errors
/// [`Error::Input`] where GPUs are asked for.
#[cfg(not(feature = "cuda"))]
pub fn choose(_: &World, choice: DeviceChoice) -> Result<Site> {
    match choice {
        DeviceChoice::Cuda => Err(Error::input(format!("run.device = \"cuda\": {WITHOUT_CUDA}, or set it to \"cpu\""))),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Site::Cpu),
    }
}

/// What to do where a program without CUDA meets GPUs.
pub const WITHOUT_CUDA: &str =
    "this program was built without CUDA; build it with `cargo build --release --features cuda` (README, \"On GPUs\")";

/// The GPUs that the program could use here, or why it cannot use any.
pub fn usable() -> (usize, String) {
    #[cfg(feature = "cuda")]
    match crate::backend::cuda::device_count() {
        Ok(0) => (0, "the driver shows this process none".into()),
        Ok(count) => (count, String::new()),
        Err(e) => (0, e.to_string()),
    }
    #[cfg(not(feature = "cuda"))]
    (0, WITHOUT_CUDA.into())
}

#[cfg(feature = "cuda")]
mod on {
    //! A worker's registers on a GPU.

    use bytesize::ByteSize;

    use crate::backend::cuda::module::{Module, Placing};
    use crate::backend::cuda::{Element, Gpu};
    use crate::config::{OnNonfinite, Precision};
    use crate::nn::module;
    use crate::pipeline::compute::{Compute, Device, Making, Routes};
    use crate::pipeline::worker::Update;
    use crate::setup::Setup;
    use crate::setup::footprint::gpu_memory;
    use crate::{Error, Result};

    /// A GPU by its number, and how many ranks share it.
    #[derive(Clone, Copy, Debug)]
    pub struct Place {
        /// Its number among those the process sees.
        pub ordinal: usize,
        /// Ranks on it.
        pub ranks: usize,
    }

    /// Edges of a worker: whether cotangents go back along each edge in, and come back along each edge out; and where
    /// messages are put.
    pub struct Edges<'a> {
        /// Edges in.
        pub returned: Vec<bool>,
        /// Edges out.
        pub returns: Vec<bool>,
        /// Both.
        pub routes: Routes<'a>,
    }

    /// Puts worker `w`'s module, as the host's `module` and `update` have it, on a GPU.
    ///
    /// # Errors
    /// [`Error::Input`] if the GPU is too small for it, before anything is allocated; [`Error::Run`] if CUDA fails.
    pub fn registers(
        setup: &Setup,
        w: usize,
        module: &mut module::Module,
        update: Option<&Update>,
        place: Place,
        edges: Edges,
    ) -> Result<Compute> {
        let (i, _) = setup.grid.module_and_replica(w);
        let run = &setup.config.run;
        let gpu = Gpu::open(place.ordinal, run.precision == Precision::Tf32)?;
        let element = if run.precision == Precision::Bf16 { Element::Bf16 } else { Element::F32 };
        let (free, all) = gpu.memory()?;
        let here = setup.grid.workers().div_ceil(setup.grid.ranks) * place.ranks;
        let needed = gpu_memory(setup, w, element.size() as u64);
        if needed * here as u64 > all as u64 || needed > free as u64 {
            return Err(Error::input(format!(
                "module {i} needs {} of GPU memory, and {here} module(s) share {} of {} ({} are free): use more GPUs, a \
                 smaller data.batch, more modules, or run.precision = \"bf16\"",
                ByteSize(needed),
                ByteSize(all as u64),
                gpu.name(),
                ByteSize(free as u64)
            )));
        }
        let batch = setup.config.data.batch;
        let placing = Placing { batch, element, training: update.is_some(), graphs: run.graphs };
        let mut on_gpu = Module::new(&gpu, &setup.network, i, module, placing)?;
        restore_gradients(&gpu, module, &mut on_gpu)?;
        let spec = &setup.network.modules[i - 1];
        let mut inputs = vec![spec.main];
        inputs.extend(spec.skips.iter().map(|skip| skip.shape));
        let Edges { mut returned, returns, routes } = edges;
        returned.resize(inputs.len(), false);
        let outputs = setup.network.outputs(i).into_iter().zip(&returns);
        let making = Making {
            outputs: outputs.map(|(edge, &returns)| (edge.pool, edge.shape, returns)).collect(),
            returned,
            inputs,
            output: spec.output,
            batch,
            element,
            wire: if run.halves_messages() { Element::Bf16 } else { Element::F32 },
            routes,
            loss: (i == setup.grid.modules).then_some(setup.ahead.is_some()),
            leaves_out: run.on_nonfinite == OnNonfinite::Skip,
            optimizer: update.map(|update| &update.optimizer),
        };
        let device = Device::new(&gpu, on_gpu, making)?;
        log::info!(
            "module {i} computes on GPU {} ({}) in {:?}: {} of its memory, {} predicted",
            place.ordinal,
            gpu.name(),
            run.precision,
            ByteSize(gpu.allocated() as u64),
            ByteSize(needed)
        );
        Ok(Compute::Device(Box::new(device)))
    }

    /// Gradients of an update that was not due yet when the checkpoint was written.
    fn restore_gradients(gpu: &Gpu, module: &mut module::Module, on_gpu: &mut Module) -> Result<()> {
        let mut gradients = std::collections::HashMap::new();
        module.visit(&mut |p| {
            gradients.extend(p.grad.take().map(|grad| (p.name.clone(), grad)));
            Ok(())
        })?;
        on_gpu.visit(&mut |p| match (gradients.remove(&p.name), &p.grad) {
            (Some(tensor), Some(grad)) => p.write(gpu, &tensor, grad),
            _ => Ok(()),
        })
    }
}
