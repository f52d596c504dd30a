//! The GPU that a run would compute on here: what times of modules on it depend on.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::backend::cuda;
use crate::comm::World;
use crate::config::{Config, Precision};
use crate::setup::site::{Site, choose};

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

/// Where modules compute, for people.
pub fn describe(gpu: Option<&OnGpu>) -> String {
    gpu.map_or("the CPU".into(), |on| format!("GPU {} ({})", on.ordinal, on.name))
}

/// The GPU on which a run's modules would compute here; `None` on the processor.
///
/// # Errors
/// [`crate::Error::Input`] if one is asked for and there is none, with what to do.
pub fn chosen(config: &Config) -> Result<Option<OnGpu>> {
    let run = &config.run;
    match choose(&World::Alone, config.run.device)? {
        Site::Cpu => Ok(None),
        Site::Gpu { ordinal, .. } => {
            let (name, cudnn) = cuda::describe(ordinal)?;
            Ok(Some(OnGpu { ordinal, name, cudnn, precision: run.precision, graphs: run.graphs }))
        }
    }
}
