//! What a worker takes: memory, and bytes sent at a tick.

use crate::comm::exchange::Exchange;
use crate::comm::{HEADER_WORDS, Kind, LinkSpec};
use crate::setup::{Purpose, Setup};

/// Bytes worker `w` keeps: under `bp` the activations of all steps, else those of one.
pub fn memory(setup: &Setup, w: usize) -> u64 {
    let (i, _) = setup.grid.module_and_replica(w);
    let module = &setup.network.modules[i - 1];
    // Values and gradient.
    let copies = 2 + setup.config.train.optimizer.buffers().len() as u64;
    let links = setup.wiring.links.iter().filter(|l| l.from == w || l.to == w);
    let buffers: usize = links.map(|l| l.depth * (l.words + HEADER_WORDS)).sum();
    let kept = setup.schedule.kept() as u64;
    4 * (copies * module.params + kept * setup.config.data.batch as u64 * module.tape + buffers as u64)
}

/// Bytes of messages of these kinds that worker `w` sends at a tick at which it sends on every edge.
pub fn sent(setup: &Setup, w: usize, kinds: &[Kind]) -> u64 {
    let links = setup.wiring.links.iter().filter(|l| l.from == w && kinds.contains(&l.kind));
    links.map(|l| 4 * (l.words + HEADER_WORDS) as u64).sum()
}

/// Bytes of GPU memory that worker `w` takes with activations of `element` bytes each, but for cuDNN's workspace and the
/// driver's own: parameters with gradient, the optimiser's memory and a copy of all three to go back to, every layer's output, the
/// cotangents between layers, and messages on their way.
pub fn gpu_memory(setup: &Setup, w: usize, element: u64) -> u64 {
    let (i, _) = setup.grid.module_and_replica(w);
    let module = &setup.network.modules[i - 1];
    let batch = setup.config.data.batch as u64;
    let training = setup.purpose == Purpose::Train;
    let copies = if training { 2 * (2 + setup.config.train.optimizer.buffers().len() as u64) } else { 1 };
    // Weights and, in training, one pass's gradients in the type of activations.
    let rounded = if element < 4 { element * (1 + u64::from(training)) } else { 0 };
    let elements = |[h, w, c]: [usize; 3]| batch * (h * w * c) as u64;
    let (mut shape, mut outputs, mut largest) = (module.main, elements(module.main), elements(module.main));
    for (_, layer) in setup.network.layers_of(i) {
        outputs += batch * layer.tape_elements(shape);
        shape = layer.output_shape(shape).unwrap_or(shape);
        largest = largest.max(elements(shape));
    }
    let activations = outputs + if training { 4 * largest } else { largest };
    let messages: u64 = setup.wiring.links.iter().map(|l| l.words as u64 * places(setup, l, w)).sum();
    (4 * copies + rounded) * module.params + element * activations + 4 * messages
}

/// How many messages of a link worker `w` has room for in its GPU's memory, at most.
fn places(setup: &Setup, link: &LinkSpec, w: usize) -> u64 {
    let neighbours = matches!(link.kind, Kind::Activation | Kind::Cotangent);
    match (link.from == w, link.to == w) {
        (_, true) if neighbours && setup.config.run.exchange != Exchange::Staged => 2 * link.depth as u64,
        (false, false) => 0,
        _ => 1,
    }
}
