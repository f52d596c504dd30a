//! The whole network before a tensor is made: layers, cuts, shapes, edges, sizes. Every rank computes the same.

pub mod blocks;
pub mod freeze;
pub mod partition;

use std::ops::Range;

use crate::config::{Config, Task};
use crate::method::graph::{Edge, Graph};
use crate::network::blocks::Blocks;
use crate::nn::module::{Fuse, SkipInput, fused_shape, sent_shape};
use crate::nn::presets::preset;
use crate::nn::spec::LayerSpec;
use crate::nn::tensors::{self, TensorSpec};
use crate::{Error, Result};

/// Parameters of a module, at most: its memory is still counted right.
const MOST_PARAMS: u64 = 1 << 44;

/// One module's share of the network. Shapes are `[H, W, C]` of one sample.
#[derive(Clone, Debug)]
pub struct ModuleSpec {
    /// Its layers, by their place in the whole network.
    pub layers: Range<usize>,
    /// The main input.
    pub main: [usize; 3],
    /// The skip inputs as sent, in growing span.
    pub skips: Vec<SkipInput>,
    /// The output.
    pub output: [usize; 3],
    /// Arithmetic of a sample's forward pass (a multiply–add counts two).
    pub flops: u64,
    /// Parameters, skip adapters included.
    pub params: u64,
}

/// What travels along an edge.
#[derive(Clone, Debug)]
pub struct EdgeSpec {
    /// The edge.
    pub edge: Edge,
    /// Whether the sender averages its output down before sending.
    pub pooled: bool,
    /// `[H, W, C]` of one sample as sent; the receiver spreads it where its main input is larger.
    pub shape: [usize; 3],
}

/// Layers cut into modules, with every shape inferred.
#[derive(Clone, Debug)]
pub struct Network {
    /// All layers, in order.
    pub layers: Vec<LayerSpec>,
    /// Modules and edges.
    pub graph: Graph,
    /// How skips join.
    pub fuse: Fuse,
    /// `[H, W, C]` of a frame.
    pub input: [usize; 3],
    /// The modules, first to last.
    pub modules: Vec<ModuleSpec>,
    /// The edges, in the graph's order.
    pub edges: Vec<EdgeSpec>,
}

impl Network {
    /// The network `config` describes for frames of `input` (`[H, W, C]`) and, in recognition, `classes` classes.
    /// `ranks` is the number of modules where the configuration gives none.
    ///
    /// # Errors
    /// [`Error::Input`] naming layer or edge and both shapes for whatever does not fit.
    pub fn new(config: &Config, input: [usize; 3], classes: usize, ranks: usize) -> Result<Self> {
        let outputs = match config.model.task {
            Task::Recognition => classes,
            Task::FutureFrames => input[2],
        };
        let layers = match (&config.model.layers, &config.model.preset) {
            (Some(layers), _) => layers.clone(),
            (None, Some(name)) => preset(name, outputs)?,
            (None, None) => return Err(Error::input("no network: set model.preset or model.layers")),
        };
        let (cuts, graph) = match &config.model.cuts {
            Some(cuts) => {
                let cuts = checked_cuts(cuts, layers.len())?;
                let graph = config.graph(cuts.len() + 1)?;
                (cuts, graph)
            }
            None => {
                let graph = config.graph(config.model.modules.unwrap_or(ranks))?;
                (Blocks::new(&layers, input)?.cut_by_arithmetic(&layers, &graph)?, graph)
            }
        };
        let network = Self::infer(layers, &cuts, graph, config.fuse(), input)?;
        network.check_output(config.model.task, classes)?;
        Ok(network)
    }

    /// Shapes of every module and edge, in one pass from the first module to the last.
    fn infer(layers: Vec<LayerSpec>, cuts: &[usize], graph: Graph, fuse: Fuse, input: [usize; 3]) -> Result<Self> {
        let mut modules: Vec<ModuleSpec> = Vec::with_capacity(graph.modules());
        let mut edges = Vec::with_capacity(graph.edges().len());
        for i in 1..=graph.modules() {
            let start = if i == 1 { 0 } else { cuts[i - 2] };
            let end = cuts.get(i - 1).copied().unwrap_or(layers.len());
            let main = modules.last().map_or(input, |m| m.output);
            let mut skips = Vec::new();
            for edge in graph.inputs(i) {
                let sent = modules[edge.from - 1].output;
                let shape = shape_as_sent(*edge, sent, main)?;
                edges.push(EdgeSpec { edge: *edge, pooled: shape != sent, shape });
                if !edge.is_main() {
                    skips.push(SkipInput { from: edge.from, shape });
                }
            }
            let skip_shapes: Vec<[usize; 3]> = skips.iter().map(|s| s.shape).collect();
            let mut shape = fused_shape(main, &skip_shapes, fuse);
            let (mut flops, mut params) = (0u64, 0u64);
            for s in skip_shapes.iter().filter(|s| fuse == Fuse::Sum && s[2] != main[2]) {
                // An adapter works on what was sent.
                let adapter = ((s[2] + 1) * main[2]) as u64;
                flops += 2 * adapter * (s[0] * s[1]) as u64;
                params += adapter;
            }
            for (n, layer) in layers.iter().enumerate().take(end).skip(start) {
                let output = layer
                    .output_shape(shape)
                    .map_err(|e| Error::input(format!("layer {n} (in module {i} of {}): {e}", graph.modules())))?;
                flops = flops.saturating_add(layer.flops(shape));
                params += layer.params(shape);
                shape = output;
            }
            if params > MOST_PARAMS {
                return Err(Error::input(format!(
                    "module {i} of {} has {params} parameters: more than {MOST_PARAMS} are not taken",
                    graph.modules()
                )));
            }
            modules.push(ModuleSpec { layers: start..end, main, skips, output: shape, flops, params });
        }
        Ok(Network { layers, graph, fuse, input, modules, edges })
    }

    fn check_output(&self, task: Task, classes: usize) -> Result<()> {
        let output = self.modules[self.modules.len() - 1].output;
        match task {
            Task::Recognition if output != [1, 1, classes] => Err(Error::input(format!(
                "the network's output is {output:?} (height, width, channels), but {classes} classes need \
                 [1, 1, {classes}]: end with global-avg-pool and a linear layer of {classes} outputs"
            ))),
            Task::FutureFrames if output != self.input => Err(Error::input(format!(
                "the network's output is {output:?} (height, width, channels), but future frames need the frame's \
                 shape, {:?}: the input's height and width must be multiples of the network's stride",
                self.input
            ))),
            _ => Ok(()),
        }
    }

    /// The edges into module `i`, main first, then growing span.
    pub fn inputs(&self, i: usize) -> Vec<&EdgeSpec> {
        self.edges.iter().filter(|e| e.edge.to == i).collect()
    }

    /// The layer whose output is logits or pixels: the last with weights.
    pub fn last_layer(&self) -> usize {
        self.layers.iter().rposition(LayerSpec::is_heavy).unwrap_or(0)
    }

    /// The edges out of module `i`, main first, then growing span.
    pub fn outputs(&self, i: usize) -> Vec<&EdgeSpec> {
        let mut edges: Vec<&EdgeSpec> = self.edges.iter().filter(|e| e.edge.from == i).collect();
        edges.sort_by_key(|e| e.edge.span());
        edges
    }

    /// The tensors of module `i`, parameters and buffers, those of its skips' adapters first.
    pub fn tensors(&self, i: usize) -> Vec<TensorSpec> {
        let module = &self.modules[i - 1];
        let mut all = Vec::new();
        for skip in module.skips.iter().filter(|s| self.fuse == Fuse::Sum && s.shape[2] != module.main[2]) {
            let shape = [module.main[2], skip.shape[2], 1, 1];
            all.extend(tensors::product(&format!("skips.{}_{i}", skip.from), &shape, true));
        }
        all.extend(self.layers_with_inputs(i).into_iter().flat_map(|(n, layer, input)| layer.tensors(n, input)));
        all
    }

    /// The learned parameters of module `i`: names and elements.
    pub fn learned(&self, i: usize) -> Vec<(String, u64)> {
        let named = |tensor: &TensorSpec| (tensor.name.clone(), tensor.elements());
        self.tensors(i).iter().filter(|tensor| tensor.learned).map(named).collect()
    }

    /// Module `i`'s layers with their places in the whole network and their inputs' shapes.
    pub fn layers_with_inputs(&self, i: usize) -> Vec<(usize, LayerSpec, [usize; 3])> {
        let module = &self.modules[i - 1];
        let skips: Vec<[usize; 3]> = module.skips.iter().map(|s| s.shape).collect();
        let mut shape = fused_shape(module.main, &skips, self.fuse);
        let with_input = |(n, layer): (usize, LayerSpec)| {
            let output = layer.output_shape(shape).unwrap_or(shape);
            (n, layer, std::mem::replace(&mut shape, output))
        };
        self.layers_of(i).into_iter().map(with_input).collect()
    }

    /// Module `i`'s layers with their places in the whole network.
    pub fn layers_of(&self, i: usize) -> Vec<(usize, LayerSpec)> {
        self.modules[i - 1].layers.clone().map(|n| (n, self.layers[n].clone())).collect()
    }
}

/// [`sent_shape`], or why there is none.
fn shape_as_sent(edge: Edge, sent: [usize; 3], main: [usize; 3]) -> Result<[usize; 3]> {
    sent_shape(sent, main).ok_or_else(|| {
        Error::input(format!(
            "{edge}: the skip brings {}x{} pixels (height x width) and the main input of module {} has {}x{}; height and \
             width must both shrink (or stay), or both grow (or stay): choose other skips or cuts",
            sent[0], sent[1], edge.to, main[0], main[1]
        ))
    })
}

fn checked_cuts(cuts: &[usize], layers: usize) -> Result<Vec<usize>> {
    let grows = cuts.windows(2).all(|w| w[0] < w[1]);
    if !grows || cuts.iter().any(|&c| c == 0 || c >= layers) {
        return Err(Error::input(format!(
            "model.cuts = {cuts:?}: cuts are growing layer numbers from 1 to {} (there are {layers} layers)",
            layers.saturating_sub(1)
        )));
    }
    Ok(cuts.to_vec())
}
