//! Which GPU a rank's modules compute on.

use crate::backend::cuda;
use crate::comm::World;
use crate::config::DeviceChoice;
use crate::sys::host::{hostname, nvidia_gpus};
use crate::{Error, Result};

/// Where a rank's modules compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// On the processor.
    Cpu,
    /// On a GPU.
    Gpu {
        /// Its number among those the process sees.
        ordinal: usize,
        /// Ranks that share it.
        ranks: usize,
    },
}

/// This rank's site: the k-th rank of a host takes its k-th GPU, from the first again where there are fewer. `auto` takes
/// GPUs where every rank has one, and says so where some stay idle. Collective.
///
/// # Errors
/// [`Error::Input`] on all ranks, where GPUs are asked for and a rank has none.
pub fn choose(world: &World, choice: DeviceChoice) -> Result<Site> {
    if choice == DeviceChoice::Cpu {
        return Ok(Site::Cpu);
    }
    let (count, trouble) = cuda::usable();
    let mine = format!("{}\n{count}\n{}\n{trouble}", hostname(), count.max(nvidia_gpus()));
    let gathered = world.gather(mine.as_bytes())?;
    let all: Vec<String> = gathered.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let host = |rank: usize| all[rank].lines().next().unwrap_or_default();
    let without = (0..all.len()).find(|&rank| all[rank].lines().nth(1) == Some("0"));
    let why = |rank: usize| all[rank].lines().skip(3).collect::<Vec<_>>().join(" ");
    match (without, choice) {
        (Some(rank), DeviceChoice::Auto) => {
            let idle = all.iter().any(|place| place.lines().nth(2) != Some("0"));
            if idle && world.rank() == 0 {
                let (host, why) = (host(rank), why(rank));
                log::warn!("GPUs stay idle, all ranks compute on the CPU: rank {rank} on {host} can use none: {why}");
            }
            return Ok(Site::Cpu);
        }
        (Some(rank), _) => {
            let why = why(rank);
            return Err(Error::input(format!(
                "run.device = \"cuda\": rank {rank} on {} has no GPU: {why}. Ask for them (Slurm: --gpus-per-node), or set \
                 run.device = \"cpu\"",
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
