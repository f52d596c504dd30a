//! A module: the layers one worker runs, and how its inputs become one.
//!
//! Module i computes `y = H(a)` with `a = fuse(main, skips)`. All inputs are brought to the main input's height and width, at that end of
//! an edge which lets the link carry less: a larger output is averaged down by its sender ([`pool_for_edge`]), a smaller one spread by
//! nearest neighbour by the receiver ([`resample::spread`]), here. A sum needs equal channels too, which a learned 1x1
//! convolution, the *adapter*, provides where they differ (Skip-Sideways, arXiv 2106.08318). It works on what was sent, before
//! spreading: the other order has the same result, since both leave the other's axes alone, and needs more arithmetic.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::layers::{Conv2d, Layer, Pass, Tape};
use super::param::{Init, Param};
use super::spec::{LayerSpec, Shape};
use crate::backend::cpu::conv::Conv;
use crate::backend::cpu::{activation, pool, resample};
use crate::{Error, Result};

/// How a module's inputs become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fuse {
    /// Element by element, adapters making channels equal.
    #[default]
    Sum,
    /// Channels of the main input, then of each skip in the order of growing span.
    Concat,
}

/// One skip input of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkipInput {
    /// The module it comes from.
    pub from: usize,
    /// Height, width and channels as sent ([`sent_shape`]): height and width are at most the main input's.
    pub shape: Shape,
}

/// The layers of one module, its adapters, and their parameters.
pub struct Module {
    fuse: Fuse,
    /// The main input, then each skip as sent.
    inputs: Vec<Shape>,
    adapters: Vec<Option<Conv2d>>,
    layers: Vec<Box<dyn Layer>>,
    /// Whether an adapter, or one of the first k layers, has something to learn: then a cotangent must get so far back.
    learned: Vec<bool>,
    output: Shape,
}

impl Module {
    /// Module number `index` (from 1), of `layers` (each with its place in the whole network), for a `main` input of
    /// `[H, W, C]` and `skips` in the order of growing span.
    ///
    /// # Errors
    /// [`Error::Input`] where shapes do not fit, with the shapes and the layer's or skip's place.
    pub fn new(
        index: usize,
        layers: &[(usize, LayerSpec)],
        main: Shape,
        skips: &[SkipInput],
        fuse: Fuse,
        init: &Init,
    ) -> Result<Module> {
        let mut adapters = Vec::new();
        for skip in skips {
            if sent_shape(skip.shape, main) != Some(skip.shape) {
                return Err(Error::input(format!(
                    "the skip from module {} to {index} brings {:?} where the main input is {main:?} (height, width, \
                     channels): its height and width may be at most the main input's, since the sender averages",
                    skip.from, skip.shape
                )));
            }
            let needed = fuse == Fuse::Sum && skip.shape[2] != main[2];
            let name = format!("skips.{}_{index}", skip.from);
            let adapter = || Conv2d::new(&name, Conv::pointwise(), skip.shape[2], main[2], true, init);
            adapters.push(needed.then(adapter).transpose()?);
        }
        let skip_shapes: Vec<Shape> = skips.iter().map(|s| s.shape).collect();
        let mut output = fused_shape(main, &skip_shapes, fuse);
        let mut built = Vec::new();
        for (n, spec) in layers {
            let place = |e: Error| match e {
                Error::Input(text) => Error::Input(format!("layer {n} (module {index}): {text}")),
                other => other,
            };
            let absorbed = built.last_mut().is_some_and(|layer: &mut Box<dyn Layer>| layer.absorb(spec));
            if !absorbed {
                built.push(spec.build(*n, output, init).map_err(place)?);
            }
            output = spec.output_shape(output).map_err(place)?;
        }
        let inputs = std::iter::once(main).chain(skips.iter().map(|s| s.shape)).collect();
        let mut module = Module { fuse, inputs, adapters, layers: built, learned: Vec::new(), output };
        module.freeze(&|_| false)?;
        Ok(module)
    }

    /// From now on, the parameters whose names `frozen` accepts do not learn: they get no gradients, and a batch norm of which neither
    /// scale nor shift learns computes as in evaluation.
    ///
    /// # Errors
    /// None of its own.
    pub fn freeze(&mut self, frozen: &dyn Fn(&str) -> bool) -> Result<()> {
        let mut learned = false;
        let mut freeze = |layer: &mut dyn Layer| {
            layer.visit(&mut |p| {
                p.trainable &= !frozen(&p.name);
                learned |= p.trainable;
                Ok(())
            })?;
            Ok::<_, Error>(learned)
        };
        let mut by_adapters = false;
        for adapter in self.adapters.iter_mut().flatten() {
            by_adapters = freeze(adapter)?;
        }
        self.learned = vec![by_adapters];
        for layer in &mut self.layers {
            self.learned.push(freeze(layer.as_mut())?);
        }
        Ok(())
    }

    /// Height, width and channels of the output.
    pub fn output_shape(&self) -> Shape {
        self.output
    }

    /// The output `[B, H, W, C]` for `inputs`: main, then skips as sent in the order of growing span. What the vjp needs goes
    /// on `tape`, which should be empty.
    ///
    /// # Errors
    /// [`Error::Run`] or [`Error::Tensor`] where shapes do not fit.
    pub fn forward(&mut self, inputs: &[Tensor], pass: &Pass, tape: &mut Tape) -> Result<Tensor> {
        if inputs.len() != self.inputs.len() {
            return Err(Error::Run(format!("a module got {} inputs and has {}", inputs.len(), self.inputs.len())));
        }
        let size = self.size();
        let mut y = match self.fuse {
            Fuse::Concat if self.inputs.iter().any(|s| s[..2] != size) => {
                let spread = inputs.iter().map(|x| resample::spread(x, size)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&spread, 3)?.contiguous()?
            }
            Fuse::Concat if inputs.len() > 1 => Tensor::cat(inputs, 3)?.contiguous()?,
            Fuse::Sum | Fuse::Concat => {
                let mut sum = inputs[0].clone();
                for (skip, adapter) in inputs[1..].iter().zip(&mut self.adapters) {
                    let skip = match adapter {
                        Some(adapter) => adapter.forward(skip, pass, tape)?,
                        None => skip.clone(),
                    };
                    sum = activation::add(&sum, &resample::spread(&skip, size)?)?;
                }
                sum
            }
        };
        for layer in &mut self.layers {
            y = layer.forward(&y, pass, tape)?;
        }
        Ok(y)
    }

    /// Adds the parameters' gradients for the output's cotangent `gy` into [`Param::grad`], at the activations on `tape`,
    /// which it leaves empty. Returns for each input its cotangent where `wanted`; what nobody wants is not computed.
    ///
    /// # Errors
    /// As [`Module::forward`].
    pub fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if wanted.len() != self.inputs.len() {
            return Err(Error::Run(format!("a module has {} inputs, not {}", self.inputs.len(), wanted.len())));
        }
        let result = self.pull_back(gy, pass, tape, wanted);
        tape.clear();
        result
    }

    fn pull_back(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let any = wanted.contains(&true);
        let mut g = gy.clone();
        for (k, layer) in self.layers.iter_mut().enumerate().rev() {
            if !any && !self.learned[k + 1] {
                return Ok(vec![None; wanted.len()]);
            }
            match layer.vjp(&g, pass, tape, any || self.learned[k])? {
                Some(gx) => g = gx,
                None => return Ok(vec![None; wanted.len()]),
            }
        }
        match self.fuse {
            Fuse::Sum => {
                let mut cotangents = vec![None; wanted.len()];
                // The tape is a stack: the last adapter's input lies on top.
                for (k, adapter) in self.adapters.iter_mut().enumerate().rev() {
                    let [h, w, _] = self.inputs[k + 1];
                    cotangents[k + 1] = match adapter {
                        Some(adapter) => adapter.vjp(&resample::spread_vjp([h, w], &g)?, pass, tape, wanted[k + 1])?,
                        None => wanted[k + 1].then(|| resample::spread_vjp([h, w], &g)).transpose()?,
                    };
                }
                cotangents[0] = wanted[0].then_some(g);
                Ok(cotangents)
            }
            Fuse::Concat => {
                let mut first = 0;
                let parts = self.inputs.iter().zip(wanted).map(|(&[h, w, channels], &wanted)| {
                    let part = || resample::spread_vjp([h, w], &g.narrow(3, first, channels)?.contiguous()?);
                    let part = wanted.then(part).transpose();
                    first += channels;
                    part
                });
                parts.collect()
            }
        }
    }

    /// Height and width of the fused input: the main input's.
    fn size(&self) -> [usize; 2] {
        let [h, w, _] = self.inputs[0];
        [h, w]
    }

    /// Calls `f` on every parameter and buffer in a fixed order: adapters, then layers.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.adapters.iter_mut().flatten().try_for_each(|adapter| adapter.visit(f))?;
        self.layers.iter_mut().try_for_each(|layer| layer.visit(f))
    }
}

/// The shape of a module's fused input; see [`Fuse`].
pub fn fused_shape(main: Shape, skips: &[Shape], fuse: Fuse) -> Shape {
    let [h, w, c] = main;
    match fuse {
        Fuse::Sum => main,
        Fuse::Concat => [h, w, c + skips.iter().map(|s| s[2]).sum::<usize>()],
    }
}

/// The shape in which an output of shape `sent` travels to a module whose main input is `main`: averaged down to its height and width,
/// or as it is where the receiver spreads it. `None` where one of height and width would shrink and the other grow.
pub fn sent_shape(sent: Shape, main: Shape) -> Option<Shape> {
    if sent[0] >= main[0] && sent[1] >= main[1] {
        return Some([main[0], main[1], sent[2]]);
    }
    (sent[0] <= main[0] && sent[1] <= main[1]).then_some(sent)
}

/// The sender's average pooling of an output `[B, H, W, C]` to any height and width up to its own: `[B, h, w, C]`, as
/// [`pool::adaptive_average`]. To its own nothing is copied.
///
/// # Errors
/// [`Error::Run`] where the output is smaller than that.
pub fn pool_for_edge(y: &Tensor, [h, w]: [usize; 2]) -> Result<Tensor> {
    let (_, from_h, from_w, _) = y.dims4()?;
    if [from_h, from_w] == [h, w] {
        return Ok(y.clone());
    }
    pool::adaptive_average(y, [h, w])
}

/// The transpose of [`pool_for_edge`]: from the pooled cotangent `g` to that of the output, whose height and width are `[h, w]`.
///
/// # Errors
/// As [`pool_for_edge`].
pub fn pool_for_edge_vjp(g: &Tensor, [h, w]: [usize; 2]) -> Result<Tensor> {
    let (_, pooled_h, pooled_w, _) = g.dims4()?;
    if [pooled_h, pooled_w] == [h, w] {
        return Ok(g.clone());
    }
    pool::adaptive_average_vjp([h, w], g)
}
