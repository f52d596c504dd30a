//! Layers one after another.

use super::{Backward, Builder, Kept, Launch, Layer, Use, elements, takes_relu};
use crate::Result;
use crate::backend::cuda::gpu::{Array, Gpu};
use crate::backend::cuda::param::Param;
use crate::nn::layers::Pass;
use crate::nn::spec::{LayerSpec, Shape};

/// A layer with its output.
struct Step {
    layer: Box<dyn Layer>,
    y: Kept,
    /// Whether one before it has something to learn: then its input's cotangent is needed.
    learned_before: bool,
    /// The same of it or one before it: then a cotangent must reach it.
    learned: bool,
}

/// Layers one after another, with the arrays between them.
pub struct Sequence {
    steps: Vec<Step>,
    use_: fn(usize) -> Use,
    output: Shape,
}

impl Sequence {
    /// The layers `specs`, by name, for inputs `[H, W, C]`; `learned` says whether something before them has parameters,
    /// `use_` which scratch the cotangents between them take.
    ///
    /// # Errors
    /// [`crate::Error::Input`] where shapes do not fit, [`crate::Error::Run`] if there is no memory.
    pub fn new(
        builder: &mut Builder,
        specs: &[(String, LayerSpec)],
        input: Shape,
        mut learned: bool,
        use_: fn(usize) -> Use,
    ) -> Result<Self> {
        let (mut steps, mut shape): (Vec<Step>, Shape) = (Vec::new(), input);
        let mut specs = specs.iter().peekable();
        while let Some((name, spec)) = specs.next() {
            let relu = takes_relu(spec) && specs.next_if(|(_, next)| *next == LayerSpec::Relu {}).is_some();
            let mut layer = builder.layer(spec, name, shape, relu)?;
            let cotangent = elements(builder.batch, shape);
            builder.needs.raise(use_(0), cotangent);
            builder.needs.raise(use_(1), cotangent);
            let learned_before = learned;
            layer.visit(&mut |p| {
                learned |= p.grad.is_some();
                Ok(())
            })?;
            shape = spec.output_shape(shape)?;
            let y = match steps.last() {
                Some(last) if layer.in_place() => last.y.clone(),
                _ => {
                    let elements = elements(builder.batch, shape);
                    Kept::new(builder.gpu, builder.kept, elements, builder.element)?
                }
            };
            steps.push(Step { layer, y, learned_before, learned });
        }
        Ok(Sequence { steps, use_, output: shape })
    }

    /// Height, width and channels of the output.
    pub fn output_shape(&self) -> Shape {
        self.output
    }

    /// The output's array of the step in `place`; the input's, `x`, where there are no layers.
    pub fn output<'a>(&'a self, place: usize, x: &'a Array) -> &'a Array {
        self.steps.last().map_or(x, |last| last.y.at(place))
    }

    /// Launches all layers.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn forward(&mut self, at: &Launch, x: &Array) -> Result<()> {
        let mut x = x;
        for step in &mut self.steps {
            let y = step.y.at(at.place);
            step.layer.forward(at, x, y)?;
            x = y;
        }
        Ok(())
    }

    /// Launches all vector–Jacobian products, from the output's cotangent to the input's, if that is wanted or something
    /// before the layers has parameters.
    ///
    /// # Errors
    /// As [`Layer::backward`].
    pub fn backward(&mut self, at: &Launch, x: &Array, gy: &Array, gx: Option<&Array>) -> Result<()> {
        self.backward_telling(at, x, gy, gx, &mut |_| Ok(()))
    }

    /// The same; `behind` is called with a layer's number when its parameters' gradients are launched.
    ///
    /// # Errors
    /// As [`Layer::backward`]; those of `behind`.
    pub fn backward_telling(
        &mut self,
        at: &Launch,
        x: &Array,
        gy: &Array,
        gx: Option<&Array>,
        behind: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let mut g = gy.clone();
        if let (true, Some(gx)) = (self.steps.is_empty(), gx) {
            return at.gpu.copy(&g, gx);
        }
        for k in (0..self.steps.len()).rev() {
            let (before, rest) = self.steps.split_at_mut(k);
            let step = &mut rest[0];
            if gx.is_none() && !step.learned {
                return Ok(());
            }
            let x = before.last().map_or(x, |last| last.y.at(at.place));
            let wanted = match (k, gx) {
                (0, gx) => gx.cloned(),
                _ if gx.is_some() || step.learned_before => Some(at.scratch.get((self.use_)(k), x.len())?),
                _ => None,
            };
            let arrays = Backward { x, y: step.y.at(at.place), gy: &g, gx: wanted.as_ref() };
            step.layer.backward(at, &arrays)?;
            behind(k)?;
            step.layer.backward_input(at, &arrays)?;
            match wanted {
                Some(gx) => g = gx,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// As [`Layer::prepare`].
    ///
    /// # Errors
    /// The first error of a layer.
    pub fn prepare(&mut self, gpu: &Gpu, pass: &Pass) -> Result<()> {
        self.steps.iter_mut().try_for_each(|step| step.layer.prepare(gpu, pass))
    }

    /// As [`Sequence::visit`], with the number of the layer.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn visit_layers(&mut self, f: &mut dyn FnMut(usize, &mut Param) -> Result<()>) -> Result<()> {
        self.steps.iter_mut().enumerate().try_for_each(|(k, step)| step.layer.visit(&mut |p| f(k, p)))
    }

    /// As [`Layer::visit`].
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        self.steps.iter_mut().try_for_each(|step| step.layer.visit(f))
    }
}
