//! Notes in the run folder what a run is started as.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::SystemTime;

use crate::comm::World;
use crate::metrics::attempt::{Attempt, FILE, PlacedEdge, PlacedModule, counted};
use crate::pipeline::RunRange;
use crate::setup::Setup;
use crate::setup::footprint::device_memory;
use crate::sys::cpus::processor_name;
use crate::sys::host::{hostname, nvidia_driver};
use crate::{Error, Result};

/// Appends to [`FILE`], or begins it where the run does, if the range is to be recorded. Collective; only rank 0 writes.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written.
pub(super) fn note(world: &World, setup: &Setup, range: &RunRange) -> Result<()> {
    if !range.record {
        return Ok(());
    }
    let hosts = world.gather_at_first(hostname().as_bytes())?;
    if world.rank() != 0 {
        return Ok(());
    }
    let attempt = Attempt {
        begun: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        first: range.first,
        version: env!("CARGO_PKG_VERSION").into(),
        job: std::env::var("SLURM_JOB_ID").ok(),
        requeues: std::env::var("SLURM_RESTART_COUNT").ok().and_then(|count| count.parse().ok()).unwrap_or(0),
        processor: processor_name(),
        driver: nvidia_driver(),
        mpi: world.mpi_library().map(|library| library.trim().to_string()),
        hosts: counted(hosts.iter().map(|host| String::from_utf8_lossy(host).into_owned())),
        replicas: setup.grid.replicas,
        modules: (1..=setup.grid.modules).map(|i| module(setup, i)).collect(),
        edges: edges(setup),
    };
    let path = setup.config.run.dir.join(FILE);
    let mut line = serde_json::to_vec(&attempt).map_err(|e| Error::io(&path, e.into()))?;
    line.push(b'\n');
    let mut how = OpenOptions::new();
    match range.first {
        0 => how.write(true).truncate(true),
        _ => how.append(true),
    };
    let mut file = how.create(true).open(&path).map_err(|e| Error::io(&path, e))?;
    file.write_all(&line).map_err(|e| Error::io(&path, e))
}

fn module(setup: &Setup, i: usize) -> PlacedModule {
    let module = &setup.network.modules[i - 1];
    let w = setup.grid.worker(i, 0);
    PlacedModule {
        layers: setup.network.layers[module.layers.clone()].iter().map(|layer| layer.kind().into()).collect(),
        output: module.output,
        parameters: module.params,
        rank: setup.grid.rank_of(w),
        memory: device_memory(setup, w),
    }
}

fn edges(setup: &Setup) -> Vec<PlacedEdge> {
    let bytes = |shape: &[usize; 3]| 4 * (shape.iter().product::<usize>() * setup.config.data.batch) as u64;
    let placed = setup.network.edges.iter().map(|spec| PlacedEdge {
        from: spec.edge.from,
        to: spec.edge.to,
        delay: spec.edge.delay,
        bytes: bytes(&spec.shape),
    });
    placed.collect()
}
