//! Batch normalisation: the shape stays.

use candle_core::Tensor;

use super::{Layer, Pass, Tape};
use crate::Result;
use crate::backend::cpu::batch_norm;
use crate::nn::param::{Init, Param};

/// Added to the variance, as in PyTorch.
const EPSILON: f64 = 1e-5;
/// Weight of a new batch in the running statistics unless the layer says otherwise, as in PyTorch. A batch here is one
/// step of B clips, and the steps of a clip are alike: small B asks for a smaller weight.
pub const MOMENTUM: f64 = 0.1;

/// Each channel brought to mean 0 and variance 1 over the batch and all positions, in evaluation by running means; then
/// a scale and a shift. Training moves the running statistics at every forward pass (mean, and unbiased variance). Where neither scale
/// nor shift learns, training is as evaluation: the running statistics stay, and are what is normalised by.
pub struct BatchNorm {
    weight: Param,
    bias: Param,
    mean: Param,
    variance: Param,
    momentum: f64,
}

impl BatchNorm {
    /// Parameters `{prefix}.weight` (ones) and `{prefix}.bias` (zeros), buffers `{prefix}.running_mean` and
    /// `{prefix}.running_var`, all `[channels]`; `momentum` is the weight of a new batch in these.
    pub fn new(prefix: &str, channels: usize, momentum: f64, init: &Init) -> Result<Self> {
        Ok(BatchNorm {
            momentum,
            weight: init.constant(format!("{prefix}.weight"), channels, 1.0)?,
            bias: init.constant(format!("{prefix}.bias"), channels, 0.0)?,
            mean: init.buffer(format!("{prefix}.running_mean"), channels, 0.0)?,
            variance: init.buffer(format!("{prefix}.running_var"), channels, 1.0)?,
        })
    }

    fn is_frozen(&self) -> bool {
        !self.weight.trainable && !self.bias.trainable
    }

    fn follow(&mut self, statistics: &Tensor, values: usize) -> Result<()> {
        let unbias = values as f64 / (values as f64 - 1.0);
        let momentum = self.momentum;
        let blend = |old: &Tensor, new: Tensor| Ok((old.affine(1.0 - momentum, 0.0)? + new)?);
        let blend: &dyn Fn(&Tensor, Tensor) -> Result<Tensor> = &blend;
        self.mean.value = blend(&self.mean.value, statistics.get(0)?.affine(momentum, 0.0)?)?;
        self.variance.value = blend(&self.variance.value, statistics.get(1)?.affine(momentum * unbias, 0.0)?)?;
        Ok(())
    }
}

impl Layer for BatchNorm {
    fn forward(&mut self, x: &Tensor, pass: &Pass, tape: &mut Tape) -> Result<Tensor> {
        let statistics = if pass.training && !self.is_frozen() {
            let statistics = batch_norm::statistics(x)?;
            if !pass.again {
                self.follow(&statistics, x.elem_count() / x.dim(3)?)?;
            }
            statistics
        } else {
            Tensor::stack(&[&self.mean.value, &self.variance.value], 0)?
        };
        let y = batch_norm::apply(x, &self.weight.value, &self.bias.value, &statistics, EPSILON)?;
        tape.push(x.clone());
        tape.push(statistics);
        Ok(y)
    }

    fn vjp(&mut self, gy: &Tensor, pass: &Pass, tape: &mut Tape, need_input: bool) -> Result<Option<Tensor>> {
        let statistics = tape.pop()?;
        let x = tape.pop()?;
        let (weight, training) = (&self.weight.value, pass.training && !self.is_frozen());
        let (gx, gw, gb) = batch_norm::vjp(&x, weight, &statistics, gy, EPSILON, training, need_input)?;
        self.weight.accumulate(gw)?;
        self.bias.accumulate(gb)?;
        Ok(gx)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param) -> Result<()>) -> Result<()> {
        [&mut self.weight, &mut self.bias, &mut self.mean, &mut self.variance].into_iter().try_for_each(f)
    }
}
