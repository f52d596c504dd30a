//! What a worker takes: memory, and bytes sent at a tick.

use crate::comm::all_reduce::BUCKET;
use crate::comm::exchange::Exchange;
use crate::comm::{HEADER_WORDS, Kind, LinkSpec};
use crate::config::{DeviceChoice, Precision};
use crate::nn::module::{Fuse, fused_shape};
use crate::nn::tape_size::tape_elements;
use crate::setup::{Purpose, Setup};

/// Bytes worker `w` keeps: under `bp` and `gpipe` the activations of all steps, with `stash` and under `1f1b` those of as many as a
/// cotangent is behind, else those of one.
pub fn memory(setup: &Setup, w: usize) -> u64 {
    let (i, _) = setup.grid.module_and_replica(w);
    let module = &setup.network.modules[i - 1];
    let parameters = module.params + beside(setup, i);
    let links = setup.wiring.of_worker(w);
    let buffers: usize = links.iter().map(|l| l.depth * (l.words + HEADER_WORDS)).sum();
    let activations = activations(setup, i, setup.schedule.kept_at_once(i).max(1), host_tape(setup, i));
    // More than any machine has is more than any machine has.
    parameters.saturating_add(activations).saturating_add(buffers as u64).saturating_mul(4)
}

/// Elements that a forward pass of module `i` keeps for its vjp, of a batch.
fn host_tape(setup: &Setup, i: usize) -> u64 {
    let (module, batch) = (&setup.network.modules[i - 1], setup.config.data.batch);
    let skips: Vec<[usize; 3]> = module.skips.iter().map(|skip| skip.shape).collect();
    let input = fused_shape(module.main, &skips, setup.network.fuse);
    let layers: Vec<_> = setup.network.layers[module.layers.clone()].iter().collect();
    // An adapter works on what was sent, and keeps it.
    let adapts = |skip: &&[usize; 3]| setup.network.fuse == Fuse::Sum && skip[2] != module.main[2];
    let adapted: usize = skips.iter().filter(adapts).map(|skip| skip.iter().product::<usize>()).sum();
    tape_elements(&layers, input, batch) + (batch * adapted) as u64
}

/// Elements of activations that module `i` keeps, of `tape` elements a step: those of the steps kept, or of one and the
/// kept ones' inputs; and the sums of cotangents of those to come.
fn activations(setup: &Setup, i: usize, kept: usize, tape: u64) -> u64 {
    let (schedule, batch) = (&setup.schedule, setup.config.data.batch as u64);
    let module = &setup.network.modules[i - 1];
    let elements = |shape: &[usize; 3]| shape.iter().product::<usize>() as u64;
    let kept = kept as u64;
    // The tape has the newest step's.
    let (tapes, inputs) = if schedule.recomputes(i) { (1, kept - 1) } else { (kept, 0) };
    let input = elements(&module.main) + module.skips.iter().map(|skip| elements(&skip.shape)).sum::<u64>();
    let sums = (schedule.sums(i) as u64 - 1).saturating_mul(elements(&module.output));
    tapes.saturating_mul(tape).saturating_add(batch.saturating_mul(inputs.saturating_mul(input).saturating_add(sums)))
}

/// Elements that module `i` keeps beside its values in training, for what learns: gradient, the optimiser's memory, moving average.
fn beside(setup: &Setup, i: usize) -> u64 {
    let train = &setup.config.train;
    let copies = 1 + train.optimizer.buffers().len() + usize::from(train.ema.is_some());
    copies as u64 * setup.frozen.learned(i)
}

/// Bytes that worker `w` takes where it computes: of the GPU's memory on a GPU, else of the host's.
pub fn device_memory(setup: &Setup, w: usize) -> u64 {
    match (setup.config.run.device, setup.config.run.precision) {
        (DeviceChoice::Cuda, Precision::Bf16) => gpu_memory(setup, w, 2),
        (DeviceChoice::Cuda, _) => gpu_memory(setup, w, 4),
        _ => memory(setup, w),
    }
}

/// Bytes of messages of these kinds that worker `w` sends at a tick at which it sends on every edge.
pub fn sent(setup: &Setup, w: usize, kinds: &[Kind]) -> u64 {
    let links = setup.wiring.of_worker(w);
    let sent = links.iter().filter(|l| l.from == w && kinds.contains(&l.kind));
    sent.map(|l| 4 * (l.words + HEADER_WORDS) as u64).sum()
}

/// Bytes of GPU memory that worker `w` takes with activations of `element` bytes each, but for cuDNN's workspace and the
/// driver's own: parameters with gradient, the optimiser's memory, moving average and a copy of all to go back to, every layer's
/// output, the cotangents between layers, skips, and messages on their way.
pub fn gpu_memory(setup: &Setup, w: usize, element: u64) -> u64 {
    let (i, _) = setup.grid.module_and_replica(w);
    let module = &setup.network.modules[i - 1];
    let batch = setup.config.data.batch as u64;
    let training = setup.purpose == Purpose::Train;
    let parameters = match training {
        true => 2 * (module.params + beside(setup, i)),
        false => module.params,
    };
    // Weights and, in training, one pass's gradients in the type of activations.
    let rounded = if element < 4 { element * (1 + u64::from(training)) } else { 0 };
    let elements = |[h, w, c]: [usize; 3]| batch * (h * w * c) as u64;
    let skips: Vec<[usize; 3]> = module.skips.iter().map(|skip| skip.shape).collect();
    let mut shape = fused_shape(module.main, &skips, setup.network.fuse);
    let (mut tape, mut largest) = (0, elements(shape));
    for (_, layer) in setup.network.layers_of(i) {
        tape += layer.tape_elements(shape);
        shape = layer.output_shape(shape).unwrap_or(shape);
        largest = largest.max(elements(shape));
    }
    let kept = if training { activations(setup, i, setup.schedule.kept(i), batch * tape) } else { batch * tape };
    // Each step kept has the fused input and the output too, which no tape of a neighbouring layer may count.
    let kept_steps = if training { setup.schedule.kept(i) as u64 - 1 } else { 0 };
    let ends = elements(fused_shape(module.main, &skips, setup.network.fuse)) + elements(module.output);
    let kept = kept.saturating_add(kept_steps.saturating_mul(ends));
    let skips = batch.saturating_mul(skip_elements(setup, i, training));
    let passing = if training { 4 * largest } else { largest };
    let activations = elements(module.main).saturating_add(kept).saturating_add(skips).saturating_add(passing);
    let messages: u64 = setup.wiring.of_worker(w).iter().map(|l| l.words as u64 * places(setup, l, w)).sum();
    // Where replicas' gradients are averaged on GPUs, they are there once more, with a bucket of others'.
    let averaged = match setup.config.run.exchange {
        Exchange::Staged => None,
        _ => setup.wiring.averaging(i, |group| (group.words + BUCKET) as u64),
    };
    let messages = messages + averaged.unwrap_or(0);
    let all = [4 * parameters, rounded * module.params, element.saturating_mul(activations), 4 * messages];
    all.into_iter().fold(0, u64::saturating_add)
}

/// Elements of one sample in what module `i`'s skips take on a GPU: inputs as sent and as an adapter gives them, each with its cotangent;
/// spread; and outputs averaged before they are sent, each with its cotangent.
fn skip_elements(setup: &Setup, i: usize, training: bool) -> u64 {
    let (network, copies) = (&setup.network, 1 + usize::from(training));
    let module = &network.modules[i - 1];
    let [height, width, channels] = module.main;
    let inputs = module.skips.iter().map(|skip| {
        let [h, w, c] = skip.shape;
        let adapted = network.fuse == Fuse::Sum && c != channels;
        let joined = if adapted { channels } else { c };
        let spread = if [h, w] == [height, width] { 0 } else { height * width * joined };
        copies * h * w * (c + if adapted { channels } else { 0 }) + spread
    });
    let outputs = network.edges.iter().filter(|e| e.edge.from == i && e.pooled);
    let outputs = outputs.map(|e| copies * e.shape.iter().product::<usize>());
    inputs.chain(outputs).sum::<usize>() as u64
}

/// How many messages of a link worker `w` has room for in its GPU's memory, at most.
fn places(setup: &Setup, link: &LinkSpec, w: usize) -> u64 {
    let travels = matches!(link.kind, Kind::Activation | Kind::Cotangent | Kind::Gradient);
    match (link.from == w, link.to == w) {
        (_, true) if travels && setup.config.run.exchange != Exchange::Staged => 2 * link.depth as u64,
        (true, _) if travels && setup.config.run.exchange == Exchange::CudaAware => link.depth as u64,
        _ => 1,
    }
}
