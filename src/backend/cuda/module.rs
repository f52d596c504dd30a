//! A module on the device: its layers, how its inputs become one, and graphs of both passes.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::capture;
use super::gpu::{Array, Element, Gpu, failed};
use super::layers::{Backward, Builder, Conv2d, Layer, Needs, Scratch, Sequence, Use};
use super::ops::{self, Accumulation};
use super::param::{HostParams, Param};
use crate::backend::cpu::conv::Conv;
use crate::nn::layers::Pass;
use crate::nn::module::{self, Fuse, SkipInput, fused_shape};
use crate::nn::spec::{LayerSpec, Shape};
use crate::{Error, Result};

/// An input of a module.
struct Input {
    x: Array,
    channels: usize,
    adapter: Option<(Conv2d, Array)>,
    /// Its cotangent, where that is not the fused input's.
    gx: Option<Array>,
}

/// What a module is made of.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Its number, from 1.
    pub index: usize,
    /// Its layers with their places in the whole network.
    pub layers: &'a [(usize, LayerSpec)],
    /// `[H, W, C]` of the main input.
    pub main: Shape,
    /// Its skip inputs.
    pub skips: &'a [SkipInput],
    /// How they join.
    pub fuse: Fuse,
}

/// How a module is put on the device.
#[derive(Clone, Copy, Debug)]
pub struct Placing {
    /// B
    pub batch: usize,
    /// The type of activations.
    pub element: Element,
    /// Whether there will be backward passes.
    pub training: bool,
    /// Whether passes are captured into CUDA graphs at their second use, and replayed.
    pub graphs: bool,
}

/// The layers of one module on a GPU, with every array they need.
pub struct Module {
    gpu: Arc<Gpu>,
    placing: Placing,
    fuse: Fuse,
    inputs: Vec<Input>,
    fused: Array,
    fused_cotangent: Option<Array>,
    sequence: Sequence,
    gy: Option<Array>,
    scratch: Scratch,
    accumulation: Option<Accumulation>,
    forward: Captured,
    backward: HashMap<Vec<bool>, Captured>,
}

/// A pass, captured or on its way to it.
#[derive(Default)]
enum Captured {
    /// Never run: the first run is launched kernel by kernel, since libraries may do something once.
    #[default]
    New,
    /// Run once: the next is captured.
    Warm,
    /// To be replayed.
    Ready(CudaGraph),
}

impl Module {
    /// The module of `plan` with the parameters of the host's `module`.
    ///
    /// # Errors
    /// [`Error::Input`] where shapes do not fit, [`Error::Run`] if the GPU has no memory for it.
    pub fn new(gpu: &Arc<Gpu>, plan: &Plan, module: &mut module::Module, placing: Placing) -> Result<Self> {
        let Placing { batch, element, training, .. } = placing;
        let &Plan { index, main, fuse, .. } = plan;
        let params = HostParams::of(module, element, training)?;
        let mut builder = Builder { gpu, batch, element, training, params, needs: Needs::default() };
        let array = |[h, w, c]: [usize; 3]| gpu.array(batch * h * w * c, element);
        let mut inputs = vec![Input { x: array(main)?, channels: main[2], adapter: None, gx: None }];
        for skip in plan.skips {
            let adapter = if fuse == Fuse::Sum && skip.shape[2] != main[2] {
                let name = format!("skips.{}_{index}", skip.from);
                let conv = Conv2d::new(&mut builder, &name, Conv::pointwise(), skip.shape, main[2], true)?;
                Some((conv, array(main)?))
            } else {
                None
            };
            let own = training && (adapter.is_some() || fuse == Fuse::Concat);
            let gx = own.then(|| array(skip.shape)).transpose()?;
            inputs.push(Input { x: array(skip.shape)?, channels: skip.shape[2], adapter, gx });
        }
        let several = inputs.len() > 1;
        if training && several && fuse == Fuse::Concat {
            inputs[0].gx = Some(array(main)?);
        }
        let skips: Vec<[usize; 3]> = plan.skips.iter().map(|s| s.shape).collect();
        let input = fused_shape(main, &skips, fuse);
        let learned = inputs.iter().any(|input| input.adapter.is_some());
        let layers: Vec<_> = plan.layers.iter().map(|(n, l)| (format!("layers.{n}.{}", l.kind()), l.clone())).collect();
        let sequence = Sequence::new(&mut builder, &layers, input, learned, Use::Outer)?;
        builder.params.all_taken()?;
        let scratch = builder.needs.meet(gpu, element)?;
        let fused = if several { array(input)? } else { inputs[0].x.clone() };
        let mut module = Module {
            gpu: gpu.clone(),
            placing,
            fuse,
            fused_cotangent: training.then(|| array(input)).transpose()?,
            gy: training.then(|| array(sequence.output_shape())).transpose()?,
            inputs,
            fused,
            sequence,
            scratch,
            accumulation: None,
            forward: Captured::New,
            backward: HashMap::new(),
        };
        let mut pairs = Vec::new();
        module.visit(&mut |p| {
            pairs.extend(p.fresh.clone().zip(p.grad.clone()));
            Ok(())
        })?;
        module.accumulation = (!pairs.is_empty()).then(|| Accumulation::new(gpu, &pairs)).transpose()?;
        Ok(module)
    }

    /// Where input `k` is to be written: main, then skips in growing span.
    pub fn input(&self, k: usize) -> &Array {
        &self.inputs[k].x
    }

    /// The output.
    pub fn output(&self) -> &Array {
        self.sequence.output(&self.fused)
    }

    /// Where the output's cotangent is to be written.
    ///
    /// # Errors
    /// [`Error::Run`] if the module is not for training.
    pub fn output_cotangent(&self) -> Result<&Array> {
        self.gy.as_ref().ok_or_else(not_training)
    }

    /// The cotangent of input `k`, after a backward pass that wanted it.
    ///
    /// # Errors
    /// [`Error::Run`] if the module is not for training.
    pub fn input_cotangent(&self, k: usize) -> Result<&Array> {
        self.inputs[k].gx.as_ref().or(self.fused_cotangent.as_ref()).ok_or_else(not_training)
    }

    /// Launches a forward pass from the inputs' arrays to the output's.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn forward(&mut self, pass: &Pass) -> Result<()> {
        self.sequence.prepare(&self.gpu, pass)?;
        let (gpu, captured) = (self.gpu.clone(), std::mem::take(&mut self.forward));
        self.forward = captured.run(&gpu, self.placing.graphs, || self.launch_forward())?;
        Ok(())
    }

    /// Launches a vector–Jacobian product with the output's cotangent at the present activations, which adds to the
    /// parameters' gradients and leaves the inputs' cotangents where `wanted`.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn backward(&mut self, wanted: &[bool]) -> Result<()> {
        if wanted.len() != self.inputs.len() {
            return Err(Error::Run(format!("a module has {} inputs, not {}", self.inputs.len(), wanted.len())));
        }
        let (gpu, captured) = (self.gpu.clone(), self.backward.remove(wanted).unwrap_or_default());
        let captured = captured.run(&gpu, self.placing.graphs, || self.launch_backward(wanted))?;
        self.backward.insert(wanted.to_vec(), captured);
        Ok(())
    }

    fn launch_forward(&mut self) -> Result<()> {
        let gpu = &self.gpu;
        if self.inputs.len() > 1 {
            let rows = self.inputs[0].x.len() / self.inputs[0].channels;
            let channels: usize = self.fused.len() / rows;
            let mut first = 0;
            for k in 0..self.inputs.len() {
                let Input { x, channels: own, adapter, .. } = &mut self.inputs[k];
                if let Some((conv, adapted)) = adapter {
                    conv.forward(gpu, x, adapted, &self.scratch)?;
                }
                let part = adapter.as_ref().map_or(&*x, |(_, adapted)| adapted);
                match (self.fuse, k) {
                    (Fuse::Concat, _) => ops::put_channels(gpu, part, &self.fused, *own, channels, first)?,
                    (Fuse::Sum, 0) => gpu.copy(part, &self.fused)?,
                    (Fuse::Sum, _) => ops::add_to(gpu, part, &self.fused)?,
                }
                first += *own;
            }
        }
        self.sequence.forward(gpu, &self.fused, &self.scratch)
    }

    fn launch_backward(&mut self, wanted: &[bool]) -> Result<()> {
        let gpu = &self.gpu;
        let (Some(gy), Some(gf)) = (&self.gy, &self.fused_cotangent) else { return Err(not_training()) };
        let needed = wanted.contains(&true) || self.inputs.iter().any(|input| input.adapter.is_some());
        self.sequence.backward(gpu, &self.fused, gy, needed.then_some(gf), &self.scratch)?;
        let rows = self.inputs[0].x.len() / self.inputs[0].channels;
        let channels = self.fused.len() / rows;
        let mut first = 0;
        for (input, &wanted) in self.inputs.iter_mut().zip(wanted) {
            let gx = input.gx.as_ref().filter(|_| wanted);
            match (&mut input.adapter, gx) {
                (Some((conv, y)), gx) => {
                    conv.backward(gpu, &Backward { x: &input.x, y, gy: gf, gx }, &self.scratch)?;
                }
                (None, Some(gx)) => ops::get_channels(gpu, gf, gx, input.channels, channels, first)?,
                (None, None) => {}
            }
            first += input.channels;
        }
        self.accumulation.as_ref().map_or(Ok(()), |accumulation| accumulation.launch(gpu))
    }

    /// Calls `f` on every parameter and buffer, in the order of the host's module.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        for (conv, _) in self.inputs.iter_mut().filter_map(|input| input.adapter.as_mut()) {
            conv.visit(f)?;
        }
        self.sequence.visit(f)
    }
}

impl Captured {
    /// Launches what `launch` launches: itself, or as a graph of it.
    fn run(self, gpu: &Gpu, graphs: bool, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        match self {
            Captured::New => launch().map(|()| if graphs { Captured::Warm } else { Captured::New }),
            Captured::Warm => {
                let _capturing = capture::capturing();
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                gpu.compute.begin_capture(mode).map_err(|e| failed("capturing a graph", &e))?;
                let launched = launch();
                // A value of the enumeration that stands for no flag does not exist.
                let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
                let graph = gpu.compute.end_capture(flags).map_err(|e| failed("making a graph", &e));
                launched?;
                let graph = graph?.ok_or_else(|| Error::Run("a captured graph is empty".into()))?;
                graph.launch().map_err(|e| failed("launching a graph", &e))?;
                Ok(Captured::Ready(graph))
            }
            Captured::Ready(graph) => {
                graph.launch().map_err(|e| failed("launching a graph", &e))?;
                Ok(Captured::Ready(graph))
            }
        }
    }
}

fn not_training() -> Error {
    Error::Run("this module was put on the GPU without its backward pass".into())
}
