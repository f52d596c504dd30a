//! What layers cost: arithmetic, parameters and memory of one sample, counted from shapes alone. Shapes that do not fit
//! cost 0; [`LayerSpec::output_shape`] is the place where they are refused.

use super::spec::{LayerSpec, NormKind, ResidualSpec, Shape};
use crate::backend::cpu::conv::Conv;

impl LayerSpec {
    /// Floating-point operations of one sample's forward pass: two a multiply-add of the products, which dominate; cheap
    /// layers count 0. The backward pass takes about twice as many, or once without the input's gradient.
    pub fn flops(&self, input: Shape) -> u64 {
        match self {
            LayerSpec::Conv2d { out, groups, .. } => {
                self.window().map_or(0, |window| conv_flops(&Conv { window, groups: *groups }, input, *out).0)
            }
            LayerSpec::Linear { out, .. } => 2 * product(&input) * *out as u64,
            LayerSpec::Residual(block) => block.walk(input).iter().map(|step| step.flops).sum(),
            _ => 0,
        }
    }

    /// Learned elements.
    pub fn params(&self, input: Shape) -> u64 {
        let c = input[2] as u64;
        match *self {
            LayerSpec::Conv2d { out, kernel, groups, bias, .. } => {
                let (out, area) = (out as u64, (kernel * kernel) as u64);
                out * area * c / groups.max(1) as u64 + if bias { out } else { 0 }
            }
            LayerSpec::Linear { out, bias } => (product(&input) + u64::from(bias)) * out as u64,
            LayerSpec::GroupNorm { .. } | LayerSpec::BatchNorm { .. } => 2 * c,
            LayerSpec::Residual(ref block) => block.walk(input).iter().map(|step| step.params).sum(),
            _ => 0,
        }
    }

    /// Activation elements that the tape keeps for one sample. What two neighbours keep in common is counted by both, so
    /// this is an upper bound.
    pub fn tape_elements(&self, input: Shape) -> u64 {
        let output = self.output_shape(input).map_or(0, |s| product(&s));
        match self {
            LayerSpec::Conv2d { .. } | LayerSpec::Linear { .. } | LayerSpec::BatchNorm { .. } | LayerSpec::Gelu {} => {
                product(&input)
            }
            LayerSpec::GroupNorm { groups } => product(&input) + 2 * *groups as u64,
            LayerSpec::Relu {} => output,
            // One byte an element.
            LayerSpec::MaxPool { .. } => output.div_ceil(4),
            LayerSpec::Residual(block) => output + block.walk(input).iter().map(|step| step.kept).sum::<u64>(),
            LayerSpec::AvgPool { .. }
            | LayerSpec::GlobalAvgPool {}
            | LayerSpec::Upsample { .. }
            | LayerSpec::Dropout { .. } => 0,
        }
    }
}

/// A convolution inside a residual block, with its norm and relu.
struct Step {
    flops: u64,
    params: u64,
    kept: u64,
}

impl ResidualSpec {
    fn walk(&self, input: Shape) -> Vec<Step> {
        let mut shape = input;
        let mut steps = Vec::new();
        let convolutions = self.convolutions(input[2]);
        for (i, &(conv, _, to)) in convolutions.iter().enumerate() {
            let relu = i + 1 < convolutions.len();
            let (step, output) = self.step(&conv, shape, to, relu);
            steps.push(step);
            shape = output;
        }
        steps.extend(self.projection(input[2]).map(|conv| self.step(&conv, input, self.out, false).0));
        steps
    }

    fn step(&self, conv: &Conv, input: Shape, out: usize, relu: bool) -> (Step, Shape) {
        let (flops, output) = conv_flops(conv, input, out);
        let weights = conv.window.kernel.iter().product::<usize>() * input[2] * out;
        let statistics = if self.norm == NormKind::Group { 2 * self.groups as u64 } else { 0 };
        // The convolution keeps its input, the norm its own, relu its output.
        let kept = product(&input) + product(&output) * (1 + u64::from(relu)) + statistics;
        (Step { flops, params: (weights + 2 * out) as u64, kept }, output)
    }
}

fn conv_flops(conv: &Conv, [h, w, c]: Shape, out: usize) -> (u64, Shape) {
    let [oh, ow] = conv.window.output(h, w).unwrap_or([0, 0]);
    let patch = conv.window.kernel.iter().product::<usize>() * c / conv.groups.max(1);
    (2 * patch as u64 * product(&[oh, ow, out]), [oh, ow, out])
}

fn product(shape: &Shape) -> u64 {
    shape.iter().map(|&n| n as u64).product()
}
