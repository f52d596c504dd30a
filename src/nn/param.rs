//! Parameters, and their initial values.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::cpu::activation;
use crate::{Error, Result};

/// A named tensor of a network: learned, or a buffer that is saved with it.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name in the whole network, such as `layers.3.conv2d.weight`. Names know nothing of ranks.
    pub name: String,
    /// The present value. Updates replace it, so a clone taken earlier keeps the old one.
    pub value: Tensor,
    /// The sum of pseudo-gradients since the last update, if there were any.
    pub grad: Option<Tensor>,
    /// False for what no optimiser touches: a buffer such as `running_mean`, and what is frozen.
    pub trainable: bool,
}

impl Param {
    /// Adds `delta`, of the value's shape, to the gradient of a parameter that learns.
    ///
    /// # Errors
    /// [`Error::Run`] where the shapes differ.
    pub fn accumulate(&mut self, delta: Tensor) -> Result<()> {
        if delta.dims() != self.value.dims() {
            return Err(Error::Run(format!(
                "the gradient of {} is {:?}, its value {:?}",
                self.name,
                delta.dims(),
                self.value.dims()
            )));
        }
        if !self.trainable {
            return Ok(());
        }
        self.grad = Some(match self.grad.take() {
            Some(sum) => activation::add(&sum, &delta)?,
            None => delta,
        });
        Ok(())
    }

    /// Replaces the value, as from a checkpoint, by one of the same shape; it is converted to this one's type and device.
    ///
    /// # Errors
    /// [`Error::Input`] with both shapes where they differ.
    pub fn set(&mut self, value: &Tensor) -> Result<()> {
        if value.dims() != self.value.dims() {
            return Err(Error::input(format!(
                "parameter {} has shape {:?} here and {:?} in what is loaded: the network differs from the saved one",
                self.name,
                self.value.dims(),
                value.dims()
            )));
        }
        self.value = value.to_dtype(self.value.dtype())?.to_device(self.value.device())?.contiguous()?;
        Ok(())
    }
}

/// Makes initial values, each a pure function of (seed, parameter name).
#[derive(Clone, Debug)]
pub struct Init {
    /// The run's seed.
    pub seed: u64,
    /// Element type of parameters.
    pub dtype: DType,
    /// Where parameters live.
    pub device: Device,
    /// The place in the whole network of the layer whose output is logits or pixels.
    pub last_layer: Option<usize>,
}

impl Init {
    /// Weights of a convolution or linear map, `[O, I, ...]`. Kaiming normal with fan-out and the gain for ReLU (He et al., 2015):
    /// standard deviation sqrt(2 / fan), where fan is the first dimension times those past the second, as PyTorch counts it. The
    /// last layer's: sqrt(1 / (3 fan-in)), with the dimensions past the first, or its first outputs would be several times
    /// too large. Drawn in f64, so that types agree to rounding.
    pub fn weight(&self, name: String, shape: &[usize]) -> Result<Param> {
        let of = |kind: &str| self.last_layer.is_some_and(|n| name == format!("layers.{n}.{kind}.weight"));
        let deviation = if of("conv2d") || of("linear") {
            (1.0 / (3 * shape.iter().skip(1).product::<usize>().max(1)) as f64).sqrt()
        } else {
            let fan = shape.first().unwrap_or(&1) * shape.iter().skip(2).product::<usize>();
            (2.0 / fan.max(1) as f64).sqrt()
        };
        let mut rng = ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(name.as_bytes(), self.seed));
        let normal = StandardNormal.sample_iter(&mut rng).map(|v: f64| v * deviation);
        let normal = normal.take(shape.iter().product());
        // Rounded one by one: the largest weight's values in f64 would be twice its size, for once.
        let value = match self.dtype {
            DType::F32 => Tensor::from_vec(normal.map(|v| v as f32).collect(), shape, &Device::Cpu)?,
            _ => Tensor::from_vec(normal.collect::<Vec<f64>>(), shape, &Device::Cpu)?.to_dtype(self.dtype)?,
        };
        let value = value.to_device(&self.device)?;
        Ok(Param { name, value, grad: None, trainable: true })
    }

    /// A learned vector of equal values: biases (0), norm scales (1).
    pub fn constant(&self, name: String, length: usize, value: f64) -> Result<Param> {
        let value = Tensor::full(value, length, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?;
        Ok(Param { name, value, grad: None, trainable: true })
    }

    /// As [`Init::constant`], but not learned.
    pub fn buffer(&self, name: String, length: usize, value: f64) -> Result<Param> {
        Ok(Param { trainable: false, ..self.constant(name, length, value)? })
    }
}
