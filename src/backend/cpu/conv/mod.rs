//! Two-dimensional convolution of NHWC tensors and its gradients.
//!
//! Input `[B, H, W, C]`, weight `[O, C/g, kH, kW]` (as PyTorch stores it), bias `[O]`, output `[B, H', W', O]`. A layer
//! holds a [`Convolution`], which chooses among four ways by the shape alone and keeps what it made ready:
//! `winograd` for 3x3 kernels of stride 1, `large_weights` where weights outweigh activations, oneDNN where the program was
//! built with it, else `patches`.

use candle_core::{Tensor, TensorId, WithDType};

use super::im2col::{Shape, add};
use super::{
    Host, Real, Window, activation, by_dtype, host, large_weights, overwritten, patches, reduce, tensor, winograd,
};
use crate::{Error, Result};

#[cfg(onednn)]
mod products;
#[cfg(onednn)]
use products::{floats, floats_mut};

/// A convolution's geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Kernel extent, stride and zero padding.
    pub window: Window,
    /// Groups the channels fall into; each output channel sees one group's inputs.
    pub groups: usize,
}

impl Conv {
    /// A 1x1 convolution: a product over channels.
    pub fn pointwise() -> Self {
        Conv { window: Window::square(1, 1, 0), groups: 1 }
    }

    pub(crate) fn shape(&self, x: &[usize], w: &[usize]) -> Result<Shape> {
        let (&[b, h, width, c], &[o, cg, kh, kw]) = (x, w) else {
            return Err(Error::Run(format!(
                "convolution of {x:?} (want [B, H, W, C]) with {w:?} (want [O, C/g, kH, kW])"
            )));
        };
        let g = self.groups;
        if g == 0 || c != cg * g || o % g != 0 || [kh, kw] != self.window.kernel {
            return Err(Error::Run(format!(
                "convolution of {x:?} with a weight {w:?} does not fit kernel {:?} and {g} groups",
                self.window.kernel
            )));
        }
        let [oh, ow] = self.window.output(h, width)?;
        Ok(Shape { b, h, w: width, c, oh, ow, o, g, window: self.window })
    }
}

/// What [`Convolution::vjp`] does about the input's cotangent.
#[derive(Debug)]
pub enum InputCotangent {
    /// It is not computed.
    Skip,
    /// It is returned.
    Compute,
    /// It is added to this tensor `[B, H, W, C]`, and the sum returned. Nobody else holds the tensor (it may be changed in place), and
    /// it shares memory with no other argument.
    AddTo(Tensor),
}

impl InputCotangent {
    /// Computed where `needed`.
    pub fn new(needed: bool) -> Self {
        if needed { InputCotangent::Compute } else { InputCotangent::Skip }
    }
}

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Winograd's minimal filtering, with our own transforms.
    Winograd,
    /// Patches, and products with the weights as they lie.
    LargeWeights,
    /// oneDNN's direct convolution.
    OneDnn,
    /// Patches laid out as matrix rows, and a matrix product.
    Patches,
}

fn choose(s: &Shape, f32: bool) -> Algorithm {
    if winograd::suits(s) {
        Algorithm::Winograd
    } else if large_weights::suits(s) {
        Algorithm::LargeWeights
    } else if cfg!(onednn) && f32 {
        Algorithm::OneDnn
    } else {
        Algorithm::Patches
    }
}

impl Conv {
    /// Elements that a forward pass on inputs of shape `x` in 32-bit floats keeps in place of its input: of the input's transform, where
    /// the algorithm has one.
    pub fn transform_elements(&self, x: [usize; 4], out: usize) -> Option<usize> {
        let [kh, kw] = self.window.kernel;
        let shape = self.shape(&x, &[out, x[3] / self.groups.max(1), kh, kw]).ok()?;
        (choose(&shape, true) == Algorithm::Winograd).then(|| winograd::transformed_len(&shape))
    }
}

/// A convolution of one layer: geometry, and what was made ready for a shape and a weight. Weights in the algorithm's
/// layout are kept until the weight changes, which for Sideways is once a batch or less.
pub struct Convolution {
    conv: Conv,
    ready: Option<Ready>,
}

/// What is kept from call to call.
struct Ready {
    shape: Shape,
    float: bool,
    algorithm: Algorithm,
    weight: TensorId,
    forward: Option<Tensor>,
    backward: Option<Tensor>,
    #[cfg(onednn)]
    products: products::Products,
}

impl Convolution {
    /// Nothing is made ready yet.
    pub fn new(conv: Conv) -> Self {
        Convolution { conv, ready: None }
    }

    /// Its geometry.
    pub fn geometry(&self) -> &Conv {
        &self.conv
    }

    /// How inputs of shape `x` are convolved with weights of shape `w` in 32-bit floats.
    ///
    /// # Errors
    /// [`Error::Run`] on shapes that do not fit.
    pub fn algorithm(&self, x: &[usize], w: &[usize]) -> Result<Algorithm> {
        Ok(choose(&self.conv.shape(x, w)?, true))
    }

    fn ready(&mut self, x: &[usize], weight: &Tensor, float: bool) -> Result<&mut Ready> {
        let shape = self.conv.shape(x, weight.dims())?;
        let fits = self.ready.as_ref().is_some_and(|r| r.shape == shape && r.float == float);
        if !fits {
            self.ready = None;
        }
        let algorithm = choose(&shape, float);
        let ready = self.ready.get_or_insert_with(|| Ready {
            shape,
            float,
            algorithm,
            weight: weight.id(),
            forward: None,
            backward: None,
            #[cfg(onednn)]
            products: products::Products::default(),
        });
        if ready.weight != weight.id() {
            (ready.weight, ready.forward, ready.backward) = (weight.id(), None, None);
        }
        Ok(ready)
    }

    /// `(y, kept)`: `y = x * weight (+ bias)`, and what [`Convolution::vjp`] needs of this call: x, or its transform.
    ///
    /// # Errors
    /// [`Error::Run`] on shapes that do not fit, element types other than f32 and f64, or devices without a kernel.
    pub fn forward(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        by_dtype!(x, T => {
            let ready = self.ready(x.dims(), &weight, T::DTYPE == f32::DTYPE)?;
            let s = ready.shape;
            let bias = bias.map(Host::of).transpose()?;
            let bias = bias.as_ref().map(|b| b.slice::<T>()).transpose()?;
            if let Some(bias) = bias {
                same(bias.len(), s.o, "bias")?;
            }
            let (input, w) = (Host::of(&x)?, Host::of(&weight)?);
            let (input, w) = (input.slice::<T>()?, w.slice::<T>()?);
            let mut y = overwritten::<T>(s.b * s.oh * s.ow * s.o);
            let kept = match ready.algorithm {
                Algorithm::Winograd => {
                    let u = keep(&mut ready.forward, || winograd::transform_weight(&s, w))?;
                    let mut v = overwritten(winograd::transformed_len(&s));
                    winograd::transform_input(&s, input, &mut v);
                    winograd::forward(&s, &v, Host::of(&u)?.slice()?, bias, &mut y);
                    let length = v.len();
                    tensor(v, length)?
                }
                Algorithm::LargeWeights => {
                    large_weights::forward(&s, input, w, bias, &mut y);
                    x.clone()
                }
                #[cfg(onednn)]
                Algorithm::OneDnn => {
                    let bias = bias.map(floats).transpose()?;
                    ready.onednn_forward(floats(input)?, floats(w)?, bias, floats_mut(&mut y)?)?;
                    x.clone()
                }
                _ => {
                    let packed = keep(&mut ready.forward, || patches::pack(&s, w))?;
                    patches::forward(&s, input, Host::of(&packed)?.slice()?, bias, &mut y);
                    x.clone()
                }
            };
            Ok((tensor(y, (s.b, s.oh, s.ow, s.o))?, kept))
        })
    }

    /// `(gw, gx)` from the output's cotangent `gy`, for an input of shape `x` and what its forward call kept: `gw` is the
    /// weight's gradient added to `sum`, a gradient so far that nobody else holds (it is changed in place); `gx` the input's
    /// cotangent as `wanted`.
    ///
    /// # Errors
    /// As [`Convolution::forward`].
    pub fn vjp(
        &mut self,
        x: &[usize],
        kept: Tensor,
        weight: &Tensor,
        gy: &Tensor,
        sum: Option<Tensor>,
        wanted: InputCotangent,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let sum = match sum {
            Some(sum) => sum,
            None => by_dtype!(gy, T => tensor(vec![T::ZERO; weight.elem_count()], weight.dims()))?,
        };
        let gx = self.pull_back(x, weight, gy, Some((kept, &sum)), wanted)?;
        Ok((sum, gx))
    }

    /// The second part of [`Convolution::vjp`] alone, for a weight that does not learn.
    ///
    /// # Errors
    /// As [`Convolution::forward`].
    pub fn input_vjp(
        &mut self,
        x: &[usize],
        weight: &Tensor,
        gy: &Tensor,
        wanted: InputCotangent,
    ) -> Result<Option<Tensor>> {
        if matches!(wanted, InputCotangent::Skip) {
            return Ok(None);
        }
        self.pull_back(x, weight, gy, None, wanted)
    }

    /// Of [`Convolution::vjp`]: `learned` is what the forward call kept and the sum of gradients, where that grows.
    fn pull_back(
        &mut self,
        x: &[usize],
        weight: &Tensor,
        gy: &Tensor,
        learned: Option<(Tensor, &Tensor)>,
        wanted: InputCotangent,
    ) -> Result<Option<Tensor>> {
        let (weight, gy) = (weight.contiguous()?, gy.contiguous()?);
        by_dtype!(gy, T => {
            let ready = self.ready(x, &weight, T::DTYPE == f32::DTYPE)?;
            let s = ready.shape;
            same(gy.elem_count(), s.b * s.oh * s.ow * s.o, "cotangent")?;
            if let InputCotangent::AddTo(onto) = &wanted && onto.dims() != [s.b, s.h, s.w, s.c] {
                let found = onto.shape();
                return Err(Error::Run(format!("an input of {x:?} whose cotangent is to be added to a tensor of {found:?}")));
            }
            let (gy, w) = (Host::of(&gy)?, Host::of(&weight)?);
            let (gy, w) = (gy.slice::<T>()?, w.slice::<T>()?);
            if ready.algorithm == Algorithm::Winograd {
                return ready.winograd_vjp::<T>(w, gy, learned, wanted);
            }
            if let Some((kept, sum)) = learned {
                ready.add_weight_gradient::<T>(Host::of(&kept)?.slice()?, gy, sum)?;
            }
            let onto = match wanted {
                InputCotangent::Skip => return Ok(None),
                InputCotangent::Compute => None,
                InputCotangent::AddTo(onto) => Some(onto),
            };
            let mut gx = overwritten::<T>(s.b * s.h * s.w * s.c);
            ready.input_gradient(gy, w, &mut gx)?;
            let gx = tensor(gx, (s.b, s.h, s.w, s.c))?;
            let gx = match onto {
                Some(onto) => activation::add(&gx, &onto)?,
                None => gx,
            };
            Ok(Some(gx))
        })
    }
}

impl Ready {
    /// [`Convolution::vjp`] by Winograd's way, which transforms the cotangent `gy` once for both gradients.
    fn winograd_vjp<T: Real>(
        &mut self,
        w: &[T],
        gy: &[T],
        learned: Option<(Tensor, &Tensor)>,
        wanted: InputCotangent,
    ) -> Result<Option<Tensor>> {
        let s = self.shape;
        let mut z = overwritten(winograd::transformed_len(&s) / s.c * s.o);
        winograd::transform_cotangent(&s, gy, &mut z);
        // What follows can use the memory of what was kept.
        if let Some((kept, sum)) = learned {
            let input = Host::of(&kept)?;
            let v = input.slice()?;
            host::update::<T>(sum, |sum| winograd::add_weight_gradient(&s, v, &z, sum))?;
        }
        let (gx, fresh) = match wanted {
            InputCotangent::Skip => return Ok(None),
            InputCotangent::Compute => (tensor(overwritten::<T>(s.b * s.h * s.w * s.c), (s.b, s.h, s.w, s.c))?, true),
            InputCotangent::AddTo(onto) => (onto.contiguous()?, false),
        };
        let u = keep(&mut self.forward, || winograd::transform_weight(&s, w))?;
        let u = Host::of(&u)?;
        let u = u.slice()?;
        host::update::<T>(&gx, |gx| winograd::add_input_gradient(&s, &z, u, gx, fresh))?;
        Ok(Some(gx))
    }

    /// Adds the weight's gradient to `sum`, in any other way.
    fn add_weight_gradient<T: Real>(&mut self, x: &[T], gy: &[T], sum: &Tensor) -> Result<()> {
        let s = self.shape;
        match self.algorithm {
            algorithm if algorithm == Algorithm::LargeWeights || large_weights::suits_weight_gradient(&s) => {
                host::update::<T>(sum, |sum| large_weights::add_weight_gradient(&s, x, gy, sum))
            }
            #[cfg(onednn)]
            Algorithm::OneDnn => {
                let gw = self.onednn_weight_gradient(floats(x)?, floats(gy)?)?;
                host::update::<f32>(sum, |sum| add(sum, &gw))
            }
            _ => {
                let gw = patches::weight_gradient(&s, x, gy);
                host::update::<T>(sum, |sum| add(sum, &gw))
            }
        }
    }

    /// Writes the input's cotangent to `gx`, in any way but Winograd's.
    fn input_gradient<T: Real>(&mut self, gy: &[T], w: &[T], gx: &mut [T]) -> Result<()> {
        let s = self.shape;
        match self.algorithm {
            Algorithm::LargeWeights => large_weights::input_gradient(&s, gy, w, gx),
            #[cfg(onednn)]
            Algorithm::OneDnn => self.onednn_input_gradient(floats(gy)?, floats(w)?, floats_mut(gx)?)?,
            _ => {
                let packed = keep(&mut self.backward, || patches::pack_backward(&s, w))?;
                patches::input_gradient(&s, gy, Host::of(&packed)?.slice()?, gx);
            }
        }
        Ok(())
    }
}

/// What `slot` holds, made first where it is empty.
fn keep<T: Real>(slot: &mut Option<Tensor>, make: impl FnOnce() -> Vec<T>) -> Result<Tensor> {
    if let Some(kept) = slot {
        return Ok(kept.clone());
    }
    let made = make();
    let length = made.len();
    Ok(slot.insert(tensor(made, length)?).clone())
}

/// The gradient of the bias `[O]`: the cotangent `gy` `[.., O]` summed over all but channels.
///
/// # Errors
/// As [`Convolution::forward`].
pub fn bias_gradient(gy: &Tensor) -> Result<Tensor> {
    let gy = gy.contiguous()?;
    let channels = gy.dims().last().copied().unwrap_or(1).max(1);
    by_dtype!(gy, T => {
        let gy = Host::of(&gy)?;
        tensor(reduce::column_sums::<T>(gy.slice()?, channels), channels)
    })
}

fn same(found: usize, expected: usize, what: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Run(format!("a convolution's {what} has {found} elements where its shapes give {expected}")))
}
