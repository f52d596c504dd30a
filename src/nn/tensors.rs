//! The tensors of layers by name and shape, before one is made.

use super::spec::{LayerSpec, NormKind, Shape};

/// A tensor of a network: a parameter, or a buffer that is saved with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the whole network.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// False for a buffer such as `running_mean`.
    pub learned: bool,
}

impl TensorSpec {
    fn learned(name: String, shape: &[usize]) -> Self {
        TensorSpec { name, shape: shape.to_vec(), learned: true }
    }

    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

impl LayerSpec {
    /// The tensors of this layer, number `n` of the network, for an input `[H, W, C]`; in the order in which the layer visits them.
    pub fn tensors(&self, n: usize, [h, w, c]: Shape) -> Vec<TensorSpec> {
        let prefix = format!("layers.{n}.{}", self.kind());
        match *self {
            LayerSpec::Conv2d { out, kernel, groups, bias, .. } => {
                product(&prefix, &[out, c / groups.max(1), kernel, kernel], bias)
            }
            LayerSpec::Linear { out, bias } => product(&prefix, &[out, h * w * c], bias),
            LayerSpec::GroupNorm { .. } => norm(NormKind::Group, &prefix, c),
            LayerSpec::BatchNorm { .. } => norm(NormKind::Batch, &prefix, c),
            LayerSpec::Residual(ref block) => {
                let mut tensors = Vec::new();
                for (k, (conv, from, to)) in block.convolutions(c).into_iter().enumerate() {
                    let [kh, kw] = conv.window.kernel;
                    tensors.extend(product(&format!("{prefix}.conv{}", k + 1), &[to, from, kh, kw], false));
                    tensors.extend(norm(block.norm, &format!("{prefix}.norm{}", k + 1), to));
                }
                if block.projection(c).is_some() {
                    tensors.extend(product(&format!("{prefix}.projection"), &[block.out, c, 1, 1], false));
                    tensors.extend(norm(block.norm, &format!("{prefix}.projection-norm"), block.out));
                }
                tensors
            }
            LayerSpec::Relu {}
            | LayerSpec::Gelu {}
            | LayerSpec::MaxPool { .. }
            | LayerSpec::AvgPool { .. }
            | LayerSpec::GlobalAvgPool {}
            | LayerSpec::Upsample { .. }
            | LayerSpec::Dropout { .. } => Vec::new(),
        }
    }
}

/// A weight of these dimensions, and perhaps a bias of the first.
pub(crate) fn product(prefix: &str, dims: &[usize], bias: bool) -> Vec<TensorSpec> {
    let mut tensors = vec![TensorSpec::learned(format!("{prefix}.weight"), dims)];
    tensors.extend(bias.then(|| TensorSpec::learned(format!("{prefix}.bias"), &dims[..1])));
    tensors
}

fn norm(kind: NormKind, prefix: &str, channels: usize) -> Vec<TensorSpec> {
    let of = |name: &str| TensorSpec::learned(format!("{prefix}.{name}"), &[channels]);
    let mut tensors = ["weight", "bias"].map(of).to_vec();
    if kind == NormKind::Batch {
        tensors.extend(["running_mean", "running_var"].map(|name| TensorSpec { learned: false, ..of(name) }));
    }
    tensors
}
