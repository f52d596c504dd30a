//! A module on the device: its layers, how its inputs become one, and graphs of both passes.

use std::collections::HashMap;
use std::sync::Arc;

use super::gpu::{Array, Element, Gpu};
use super::graphs::{Captured, Cuts};
use super::layers::{Backward, Builder, Conv2d, Kept, Launch, Layer, Needs, Scratch, Sequence, Use};
use super::ops::{self, Accumulation};
use super::param::{HostParams, Param};
use super::parts::{Gradient, Part, accumulation, parts};
use crate::backend::cpu::conv::Conv;
use crate::nn::layers::Pass;
use crate::nn::module::{self, Fuse, SkipInput, fused_shape};
use crate::nn::spec::{LayerSpec, Shape};
use crate::{Error, Result};

/// An input of a module.
struct Input {
    x: Array,
    /// As sent.
    shape: Shape,
    adapter: Option<Adapter>,
    spread: Option<Spread>,
    /// Its cotangent, where that is not the fused input's.
    gx: Option<Array>,
}

/// A learned 1x1 convolution that makes a skip's channels the main input's.
struct Adapter {
    conv: Conv2d,
    /// Its inputs, by step kept.
    x: Kept,
    y: Array,
}

/// A skip's way from its own height and width to the main input's, behind its adapter.
struct Spread {
    /// What is spread: `[B, H, W, C]`.
    shape: [usize; 4],
    /// Height and width to spread to.
    to: [usize; 2],
    /// The outcome; in the backward pass, the part of the fused input's cotangent that is this input's, where that has to be copied.
    wide: Array,
    /// The cotangent of the adapter's output.
    narrow: Option<Array>,
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
    /// Of how many steps in a row the fused inputs are kept.
    pub kept: usize,
    /// Whether only these are: a backward pass begins with the forward pass once more.
    pub recompute: bool,
    /// Words of the pieces in which sums of gradients are lent out, where they are.
    pub lends: Option<usize>,
    /// Whether passes are captured into CUDA graphs at their second use, and replayed.
    pub graphs: bool,
}

/// The layers of one module on a GPU, with every array they need.
pub struct Module {
    gpu: Arc<Gpu>,
    placing: Placing,
    fuse: Fuse,
    inputs: Vec<Input>,
    fused: Kept,
    fused_cotangent: Option<Array>,
    sequence: Sequence,
    gy: Option<Array>,
    scratch: Scratch,
    accumulation: Option<Accumulation>,
    /// Where the last backward pass before gradients are lent out is cut, from the last layer's to the first's.
    parts: Vec<Part>,
    /// By place; of training, and of evaluation: they are not the same kernels.
    forward: Vec<[Captured; 2]>,
    /// By place and the inputs whose cotangents are wanted.
    backward: HashMap<(usize, Vec<bool>), Captured>,
    /// The same, in parts.
    lending: HashMap<(usize, Vec<bool>), Captured>,
    /// Where the newest step is.
    newest: usize,
}

impl Module {
    /// The module of `plan` with the parameters of the host's `module`.
    ///
    /// # Errors
    /// [`Error::Input`] where shapes do not fit, [`Error::Run`] if the GPU has no memory for it.
    pub fn new(gpu: &Arc<Gpu>, plan: &Plan, module: &mut module::Module, placing: Placing) -> Result<Self> {
        let Placing { batch, element, training, kept, recompute, .. } = placing;
        let &Plan { index, main, fuse, .. } = plan;
        let params = HostParams::of(module, element, training)?;
        let mut builder = Builder { gpu, batch, element, training, kept, params, needs: Needs::default() };
        let array = |[h, w, c]: [usize; 3]| gpu.array(batch * h * w * c, element);
        let mut inputs = vec![Input { x: array(main)?, shape: main, adapter: None, spread: None, gx: None }];
        for skip in plan.skips {
            let [h, w, channels] = skip.shape;
            let adapts = fuse == Fuse::Sum && channels != main[2];
            let adapted = [h, w, if adapts { main[2] } else { channels }];
            let adapter = if adapts {
                let name = format!("skips.{}_{index}", skip.from);
                let conv = Conv2d::new(&mut builder, &name, Conv::pointwise(), skip.shape, main[2], true)?;
                let elements = batch * skip.shape.iter().product::<usize>();
                let x = if kept > 1 { Some(Kept::new(gpu, kept, elements, element)?) } else { None };
                Some((conv, x, array(adapted)?))
            } else {
                None
            };
            let spread = if [h, w] == main[..2] {
                None
            } else {
                let narrow = (training && adapts).then(|| array(adapted)).transpose()?;
                let (shape, to) = ([batch, h, w, adapted[2]], [main[0], main[1]]);
                Some(Spread { shape, to, wide: array([main[0], main[1], adapted[2]])?, narrow })
            };
            let own = training && (adapts || spread.is_some() || fuse == Fuse::Concat);
            let gx = own.then(|| array(skip.shape)).transpose()?;
            let x = array(skip.shape)?;
            let adapter = adapter.map(|(conv, kept, y)| Adapter { conv, x: kept.unwrap_or(Kept::shared(&x)), y });
            inputs.push(Input { x, shape: skip.shape, adapter, spread, gx });
        }
        let several = inputs.len() > 1;
        if training && several && fuse == Fuse::Concat {
            inputs[0].gx = Some(array(main)?);
        }
        let skips: Vec<[usize; 3]> = plan.skips.iter().map(|s| s.shape).collect();
        let input = fused_shape(main, &skips, fuse);
        let learned = inputs.iter().any(|input| input.adapter.is_some());
        let layers: Vec<_> = plan.layers.iter().map(|(n, l)| (format!("layers.{n}.{}", l.kind()), l.clone())).collect();
        // Adapters come before what is computed once more.
        builder.kept = if recompute { 1 } else { kept };
        let sequence = Sequence::new(&mut builder, &layers, input, learned, Use::Outer)?;
        builder.params.all_taken()?;
        let scratch = builder.needs.meet(gpu, element)?;
        let fused = match several || kept > 1 {
            true => Kept::new(gpu, kept, batch * input.iter().product::<usize>(), element)?,
            false => Kept::shared(&inputs[0].x),
        };
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
            parts: Vec::new(),
            forward: (0..kept).map(|_| Default::default()).collect(),
            backward: HashMap::new(),
            lending: HashMap::new(),
            newest: 0,
        };
        let gradients = module.gradients()?;
        module.accumulation = accumulation(gpu, &gradients)?;
        if let Some(piece) = placing.lends.filter(|_| training) {
            module.parts = parts(gpu, &gradients, piece)?;
        }
        Ok(module)
    }

    /// What there is a gradient of, in the order of [`Module::visit`].
    fn gradients(&mut self) -> Result<Vec<Gradient>> {
        let mut gradients = Vec::new();
        let mut note = |layer: Option<usize>, p: &Param| {
            let gradient =
                |grad: &Array| Gradient { layer, words: grad.len(), fresh: p.fresh.clone().zip(Some(grad.clone())) };
            gradients.extend(p.grad.as_ref().map(gradient));
            Ok(())
        };
        for adapter in self.inputs.iter_mut().filter_map(|input| input.adapter.as_mut()) {
            adapter.conv.visit(&mut |p| note(None, p))?;
        }
        self.sequence.visit_layers(&mut |layer, p| note(Some(layer), p))?;
        Ok(gradients)
    }

    /// Where input `k` is to be written: main, then skips in growing span.
    pub fn input(&self, k: usize) -> &Array {
        &self.inputs[k].x
    }

    /// The output of the newest step.
    pub fn output(&self) -> &Array {
        self.sequence.output(self.newest, self.fused.at(self.newest))
    }

    /// Whether backward passes write over the newest step's output.
    pub fn recomputes(&self) -> bool {
        self.placing.recompute
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

    /// Launches the forward pass of `step` from the inputs' arrays to the output's.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn forward(&mut self, step: usize, pass: &Pass) -> Result<()> {
        self.sequence.prepare(&self.gpu, pass)?;
        let place = step % self.placing.kept;
        self.newest = place;
        let (gpu, kind) = (self.gpu.clone(), usize::from(!pass.training));
        let captured = std::mem::take(&mut self.forward[place][kind]);
        let graphs = self.placing.graphs;
        self.forward[place][kind] = captured.run(&gpu, graphs, |_| self.launch_forward(place), &mut |_| Ok(()))?;
        Ok(())
    }

    /// Launches the vector–Jacobian product of `step` with the output's cotangent at the activations of that step, which adds to
    /// the parameters' gradients and leaves the inputs' cotangents where `wanted`. Where only inputs are kept, the newest step's
    /// output is written over.
    ///
    /// # Errors
    /// [`Error::Run`] if a launch fails.
    pub fn backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<()> {
        let key = self.prepare_backward(step, pass, wanted)?;
        let (gpu, graphs, captured) = (self.gpu.clone(), self.placing.graphs, self.backward.remove(&key));
        let pass = |_: &mut Cuts| self.launch_backward(key.0, wanted, None);
        let captured = captured.unwrap_or_default().run(&gpu, graphs, pass, &mut |_| Ok(()))?;
        self.backward.insert(key, captured);
        Ok(())
    }

    /// The same in parts. `behind` is called behind each: from the word that it is given on, of all sums of gradients in a row, they are
    /// as this leaves them.
    ///
    /// # Errors
    /// As [`Module::backward`]; those of `behind`.
    pub fn backward_in_parts(
        &mut self,
        step: usize,
        pass: &Pass,
        wanted: &[bool],
        behind: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let key = self.prepare_backward(step, pass, wanted)?;
        let (gpu, graphs, captured) = (self.gpu.clone(), self.placing.graphs, self.lending.remove(&key));
        let pass = |cuts: &mut Cuts| self.launch_backward(key.0, wanted, Some(cuts));
        let captured = captured.unwrap_or_default().run(&gpu, graphs, pass, behind)?;
        self.lending.insert(key, captured);
        behind(0)
    }

    /// By what the graphs of the backward pass of `step` are known.
    fn prepare_backward(&mut self, step: usize, pass: &Pass, wanted: &[bool]) -> Result<(usize, Vec<bool>)> {
        if wanted.len() != self.inputs.len() {
            return Err(Error::Run(format!("a module has {} inputs, not {}", self.inputs.len(), wanted.len())));
        }
        if self.placing.kept > 1 {
            // The newest forward pass was another step's.
            self.sequence.prepare(&self.gpu, pass)?;
        }
        Ok((step % self.placing.kept, wanted.to_vec()))
    }

    fn launch_forward(&mut self, place: usize) -> Result<()> {
        let gpu = &self.gpu;
        let at = Launch { gpu, scratch: &self.scratch, place, again: false };
        let fused = self.fused.at(place);
        if self.inputs.len() == 1 && self.placing.kept > 1 {
            gpu.copy(&self.inputs[0].x, fused)?;
        }
        if self.inputs.len() > 1 {
            let channels = fused_channels(&self.inputs, fused);
            let mut first = 0;
            for k in 0..self.inputs.len() {
                let Input { x, shape: [_, _, own], adapter, spread, .. } = &mut self.inputs[k];
                if let Some(Adapter { conv, x: kept, y }) = adapter {
                    if self.placing.kept > 1 {
                        gpu.copy(x, kept.at(place))?;
                    }
                    conv.forward(&at, kept.at(place), y)?;
                }
                let mut part = adapter.as_ref().map_or(&*x, |adapter| &adapter.y);
                if let Some(Spread { shape, to, wide, .. }) = spread {
                    ops::spread(gpu, *shape, *to, part, wide)?;
                    part = wide;
                }
                match (self.fuse, k) {
                    (Fuse::Concat, _) => ops::put_channels(gpu, part, fused, *own, channels, first)?,
                    (Fuse::Sum, 0) => gpu.copy(part, fused)?,
                    (Fuse::Sum, _) => ops::add_to(gpu, part, fused)?,
                }
                first += *own;
            }
        }
        self.sequence.forward(&at, fused)
    }

    fn launch_backward(&mut self, place: usize, wanted: &[bool], mut cuts: Option<&mut Cuts>) -> Result<()> {
        let gpu = &self.gpu;
        let (at, fused) = (Launch { gpu, scratch: &self.scratch, place, again: true }, self.fused.at(place));
        if self.placing.recompute {
            self.sequence.forward(&at, fused)?;
        }
        let (Some(gy), Some(gf)) = (&self.gy, &self.fused_cotangent) else { return Err(not_training()) };
        let needed = wanted.contains(&true) || self.inputs.iter().any(|input| input.adapter.is_some());
        let mut behind = |layer: usize| {
            let part = self.parts.iter().find(|part| part.layer == Some(layer));
            let (Some(part), Some(cuts)) = (part, cuts.as_deref_mut()) else { return Ok(()) };
            part.accumulation.as_ref().map_or(Ok(()), |accumulation| accumulation.launch(gpu))?;
            cuts.cut(part.from)
        };
        self.sequence.backward_telling(&at, fused, gy, needed.then_some(gf), &mut behind)?;
        let channels = fused_channels(&self.inputs, fused);
        let mut first = 0;
        for (input, &wanted) in self.inputs.iter_mut().zip(wanted) {
            let (gx, own) = (input.gx.as_ref().filter(|_| wanted), input.shape[2]);
            match (&mut input.adapter, gx, &input.spread) {
                (Some(Adapter { conv, x, y }), gx, spread) => {
                    let gy = spread.as_ref().map_or(Ok(gf), |spread| spread.narrowed(gpu, gf))?;
                    let arrays = Backward { x: x.at(place), y, gy, gx };
                    conv.backward(&at, &arrays)?;
                    conv.backward_input(&at, &arrays)?;
                }
                (None, Some(gx), Some(Spread { shape, to, wide, .. })) => {
                    // In a sum the cotangent is the fused input's.
                    let part = if self.fuse == Fuse::Sum { gf } else { wide };
                    if self.fuse == Fuse::Concat {
                        ops::get_channels(gpu, gf, part, own, channels, first)?;
                    }
                    ops::spread_vjp(gpu, *shape, *to, part, gx)?;
                }
                (None, Some(gx), None) => ops::get_channels(gpu, gf, gx, own, channels, first)?,
                (None, None, _) => {}
            }
            first += own;
        }
        let rest = self.parts.last().filter(|_| cuts.is_some()).map(|part| &part.accumulation);
        rest.unwrap_or(&self.accumulation).as_ref().map_or(Ok(()), |accumulation| accumulation.launch(gpu))
    }

    /// Calls `f` on every parameter and buffer, in the order of the host's module.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        for adapter in self.inputs.iter_mut().filter_map(|input| input.adapter.as_mut()) {
            adapter.conv.visit(f)?;
        }
        self.sequence.visit(f)
    }
}

impl Spread {
    /// The cotangent of what is spread, in front of an adapter, from the fused input's.
    fn narrowed(&self, gpu: &Gpu, gf: &Array) -> Result<&Array> {
        let narrow = self.narrow.as_ref().ok_or_else(not_training)?;
        ops::spread_vjp(gpu, self.shape, self.to, gf, narrow)?;
        Ok(narrow)
    }
}

/// Channels of the fused input.
fn fused_channels(inputs: &[Input], fused: &Array) -> usize {
    let rows = inputs[0].x.len() / inputs[0].shape[2];
    fused.len() / rows
}

fn not_training() -> Error {
    Error::Run("this module was put on the GPU without its backward pass".into())
}
