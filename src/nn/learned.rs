//! The learned parameters of layers, by name and size, before a tensor is made.

use super::spec::{LayerSpec, Shape};

/// Names (in the whole network) and elements of parameters.
pub type Learned = Vec<(String, u64)>;

impl LayerSpec {
    /// The learned parameters of this layer, number `n` of the network, for an input `[H, W, C]`; in the order in which the layer
    /// visits them.
    pub fn learned(&self, n: usize, [h, w, c]: Shape) -> Learned {
        let prefix = format!("layers.{n}.{}", self.kind());
        match *self {
            LayerSpec::Conv2d { out, kernel, groups, bias, .. } => {
                product(&prefix, [out, c / groups.max(1), kernel, kernel], bias)
            }
            LayerSpec::Linear { out, bias } => product(&prefix, [out, c, h, w], bias),
            LayerSpec::GroupNorm { .. } | LayerSpec::BatchNorm { .. } => norm(&prefix, c),
            LayerSpec::Residual(ref block) => {
                let mut learned = Learned::new();
                let mut from = c;
                for (k, (conv, _, to)) in block.convolutions(c).into_iter().enumerate() {
                    let [kh, kw] = conv.window.kernel;
                    learned.extend(product(&format!("{prefix}.conv{}", k + 1), [to, from, kh, kw], false));
                    learned.extend(norm(&format!("{prefix}.norm{}", k + 1), to));
                    from = to;
                }
                if block.projection(c).is_some() {
                    learned.extend(product(&format!("{prefix}.projection"), [block.out, c, 1, 1], false));
                    learned.extend(norm(&format!("{prefix}.projection-norm"), block.out));
                }
                learned
            }
            LayerSpec::Relu {}
            | LayerSpec::Gelu {}
            | LayerSpec::MaxPool { .. }
            | LayerSpec::AvgPool { .. }
            | LayerSpec::GlobalAvgPool {}
            | LayerSpec::Upsample { .. }
            | LayerSpec::Dropout { .. } => Learned::new(),
        }
    }
}

/// A weight of these dimensions, and perhaps a bias of the first.
pub(crate) fn product(prefix: &str, dims: [usize; 4], bias: bool) -> Learned {
    let mut learned = vec![(format!("{prefix}.weight"), dims.iter().map(|&n| n as u64).product())];
    learned.extend(bias.then(|| (format!("{prefix}.bias"), dims[0] as u64)));
    learned
}

fn norm(prefix: &str, channels: usize) -> Learned {
    ["weight", "bias"].map(|name| (format!("{prefix}.{name}"), channels as u64)).to_vec()
}
