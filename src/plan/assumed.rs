//! Modules' times by arithmetic: of a machine that is not at hand.

use super::gpu::OnGpu;
use super::predict::{Parts, block_parts, module_parts};
use super::profile::{Conditions, Part, Profile, Times};
use crate::config::DeviceChoice;
use crate::setup::Setup;

/// Bytes a second that messages are taken to be copied at, where that is not beside the passes.
const COPY: f64 = 10e9;

/// Times of parts of `setup`'s network where they all reach `rate` operations a second: those of a forward pass over that, twice that
/// for a backward pass, as long as a forward pass where no input's cotangent is wanted. Updates take no time.
pub fn assumed(setup: &Setup, parts: Parts, rate: f64) -> Profile {
    let config = &setup.config;
    let gpu = (config.run.device == DeviceChoice::Cuda).then(|| OnGpu {
        ordinal: 0,
        name: "assumed".into(),
        cudnn: 0,
        precision: config.run.precision,
        graphs: config.run.graphs,
    });
    let here = Conditions::here(config.run.threads, 1, config.data.batch, setup.network.fuse, config.train.optimizer);
    let here = Conditions { cpu: "assumed".into(), gpu, ..here };
    let (parts, flops): (Vec<Part>, Vec<u64>) = match parts {
        Parts::Modules => (module_parts(setup), setup.network.modules.iter().map(|module| module.flops).collect()),
        Parts::Blocks(blocks) => {
            let parts = block_parts(setup, blocks);
            let flops = parts.iter().map(Part::flops).collect();
            (parts, flops)
        }
    };
    let times = |flops: u64| {
        let forward = (flops * config.data.batch as u64) as f64 / rate;
        Times { forward, backward: 2.0 * forward, backward_leaf: forward, update: 0.0 }
    };
    let times = flops.into_iter().map(times).collect();
    let conditions = Conditions { messages: setup.grid.modules > 1, ..here.with(parts) };
    Profile { conditions, taken: 0, copy: COPY, times, assumed: Some(rate), file: None, cached: false }
}
