//! Layers on the device: each launches its forward pass and its vector–Jacobian product on arrays made once.
//!
//! What a layer computes is said where the host's layer is ([`crate::nn::layers`]); here is how. A layer reads its input
//! and output again in the backward pass: the arrays between layers are the tape.

mod conv;
mod norm;
mod residual;
mod sequence;
mod simple;

use super::gpu::{Array, Element, Gpu};
use super::param::{HostParams, Param};
use crate::Result;
use crate::nn::layers::Pass;
use crate::nn::spec::{LayerSpec, Shape};

pub use conv::Conv2d;
pub use sequence::Sequence;

/// Where and for what a pass is launched.
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    /// The worker's GPU.
    pub gpu: &'a Gpu,
    /// Arrays that hold nothing from one layer to the next.
    pub scratch: &'a Scratch,
    /// Which of the steps kept it is for.
    pub place: usize,
    /// A forward pass once more: running statistics stay.
    pub again: bool,
}

/// What forward passes leave for backward passes: an array for each step kept.
#[derive(Clone)]
pub struct Kept(Vec<Array>);

impl Kept {
    /// For `steps` steps, `elements` each.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory.
    pub fn new(gpu: &Gpu, steps: usize, elements: usize, element: Element) -> Result<Self> {
        (0..steps).map(|_| gpu.array(elements, element)).collect::<Result<_>>().map(Kept)
    }

    /// The same, zeroed.
    ///
    /// # Errors
    /// As [`Kept::new`].
    pub fn zeros(gpu: &Gpu, steps: usize, elements: usize, element: Element) -> Result<Self> {
        (0..steps).map(|_| gpu.zeros(elements, element)).collect::<Result<_>>().map(Kept)
    }

    /// The same array for every step.
    pub fn shared(array: &Array) -> Self {
        Kept(vec![array.clone()])
    }

    /// That of the step in `place`, counted round.
    pub fn at(&self, place: usize) -> &Array {
        &self.0[place % self.0.len()]
    }
}

/// The arrays of one backward pass of a layer.
pub struct Backward<'a> {
    /// The layer's input.
    pub x: &'a Array,
    /// Its output.
    pub y: &'a Array,
    /// The output's cotangent, which the layer may change.
    pub gy: &'a Array,
    /// Where the input's cotangent goes, if it is wanted; neither `x`, `y` nor `gy`.
    pub gx: Option<&'a Array>,
}

/// A layer on the device.
pub trait Layer: Send {
    /// Launches `y = H(x)`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if a launch fails.
    fn forward(&mut self, at: &Launch, x: &Array, y: &Array) -> Result<()>;

    /// Launches the vector–Jacobian product: adds the parameters' gradients, writes the input's cotangent if wanted, or leaves that to
    /// [`Layer::backward_input`], which is called next.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn backward(&mut self, at: &Launch, arrays: &Backward) -> Result<()>;

    /// Launches what of it is left once the parameters' gradients are there.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn backward_input(&mut self, at: &Launch, arrays: &Backward) -> Result<()> {
        let _ = (at, arrays);
        Ok(())
    }

    /// What a pass needs that changes from one to the next, launched outside of graphs: before its forward pass, of which there
    /// is a graph for training and one for evaluation.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn prepare(&mut self, gpu: &Gpu, pass: &Pass) -> Result<()> {
        let _ = (gpu, pass);
        Ok(())
    }

    /// Whether the output may take the input's place: neither is needed again by this layer and those before it.
    fn in_place(&self) -> bool {
        false
    }

    /// Calls `f` on every parameter and buffer, in the order of the host's module.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        let _ = f;
        Ok(())
    }
}

/// Uses of arrays that hold nothing from one layer to the next; each is as large as its largest user needs.
#[derive(Clone, Copy, Debug)]
pub enum Use {
    /// Cotangents between the layers of a module, two in turn.
    Outer(usize),
    /// The same within a residual block.
    Inner(usize),
    /// The cotangent of a residual block's sum.
    Sum,
    /// The cotangent that comes through a residual block's shortcut.
    Shortcut,
    /// Partial sums of reductions (32-bit floats).
    Partial,
}

const USES: usize = 7;

impl Use {
    fn place(self) -> usize {
        match self {
            Use::Outer(k) => k % 2,
            Use::Inner(k) => 2 + k % 2,
            Use::Sum => 4,
            Use::Shortcut => 5,
            Use::Partial => 6,
        }
    }
}

/// How much of each use is needed.
#[derive(Clone, Debug, Default)]
pub struct Needs([usize; USES]);

impl Needs {
    /// At least `elements` for `use_`.
    pub fn raise(&mut self, use_: Use, elements: usize) {
        let most = &mut self.0[use_.place()];
        *most = (*most).max(elements);
    }

    /// The arrays.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if there is no memory for them.
    pub fn meet(&self, gpu: &Gpu, element: Element) -> Result<Scratch> {
        let partial = Use::Partial.place();
        let array = |(k, &n): (usize, &usize)| gpu.array(n, if k == partial { Element::F32 } else { element });
        Ok(Scratch(self.0.iter().enumerate().map(array).collect::<Result<_>>()?))
    }
}

/// Arrays for the uses.
pub struct Scratch(Vec<Array>);

impl Scratch {
    /// The first `elements` for `use_`.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if fewer were asked for.
    pub fn get(&self, use_: Use, elements: usize) -> Result<Array> {
        self.0[use_.place()].first(elements)
    }

    /// All there is for partial sums.
    pub fn partial(&self) -> &Array {
        &self.0[Use::Partial.place()]
    }
}

/// What layers are made from.
pub struct Builder<'a> {
    /// The worker's GPU.
    pub gpu: &'a Gpu,
    /// B
    pub batch: usize,
    /// The type of activations.
    pub element: Element,
    /// Whether there will be backward passes.
    pub training: bool,
    /// Of how many steps activations are kept.
    pub kept: usize,
    /// Where parameters come from.
    pub params: HostParams,
    /// What the layers made so far need.
    pub needs: Needs,
}

impl Builder<'_> {
    /// A layer, with the relu that follows it where `relu` says so and the kind can ([`takes_relu`]).
    fn layer(&mut self, spec: &LayerSpec, name: &str, input: Shape, relu: bool) -> Result<Box<dyn Layer>> {
        let [h, w, c] = input;
        let output = spec.output_shape(input)?;
        Ok(match spec {
            LayerSpec::Conv2d { out, groups, bias, .. } => {
                let window = spec.window().unwrap_or(crate::backend::cpu::Window::square(1, 1, 0));
                let conv = crate::backend::cpu::conv::Conv { window, groups: *groups };
                Box::new(Conv2d::new(self, name, conv, input, *out, *bias)?.with_relu(relu))
            }
            LayerSpec::Linear { out, bias } => {
                let conv = crate::backend::cpu::conv::Conv::pointwise();
                Box::new(Conv2d::new(self, name, conv, [1, 1, h * w * c], *out, *bias)?)
            }
            LayerSpec::GroupNorm { groups } => Box::new(norm::GroupNorm::new(self, name, input, *groups, relu)?),
            LayerSpec::BatchNorm { momentum } => Box::new(norm::BatchNorm::new(self, name, input, *momentum, relu)?),
            LayerSpec::Relu {} => Box::new(simple::Relu),
            LayerSpec::Gelu {} => Box::new(simple::Gelu),
            LayerSpec::MaxPool { .. } | LayerSpec::AvgPool { .. } => {
                let window = spec.window().unwrap_or(crate::backend::cpu::Window::square(1, 1, 0));
                simple::pool(self, matches!(spec, LayerSpec::MaxPool { .. }), window, input, output)?
            }
            LayerSpec::GlobalAvgPool {} => Box::new(simple::GlobalAvgPool::new(self.batch, input)),
            LayerSpec::Residual(block) => Box::new(residual::Residual::new(self, name, block, input)?),
            LayerSpec::Upsample { factor } => Box::new(simple::Upsample::new(self.batch, input, *factor)),
            LayerSpec::Dropout { rate } => Box::new(simple::Dropout::new(self, name, *rate)?),
        })
    }
}

/// Whether a layer of this kind can do the relu behind it in the same pass.
fn takes_relu(spec: &LayerSpec) -> bool {
    matches!(spec, LayerSpec::GroupNorm { .. } | LayerSpec::BatchNorm { .. } | LayerSpec::Conv2d { bias: true, .. })
}

/// Elements of a batch of activations.
fn elements(batch: usize, shape: Shape) -> usize {
    batch * shape.iter().product::<usize>()
}
