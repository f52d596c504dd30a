//! What torchvision's ResNets call the parts of a residual network (He et al., CVPR 2016): `conv1`, `bn1`, `layer1.0.conv1`, …, `fc`.

use std::collections::BTreeSet;

use crate::nn::spec::{LayerSpec, NormKind};

/// A part of a network: how the names of its tensors begin here and there.
pub struct Part {
    /// Here.
    pub ours: String,
    /// There.
    pub theirs: String,
    /// Which norm it is here, where it is one: there it is always a batch norm.
    pub norm: Option<NormKind>,
}

/// Whether these are names of torchvision's.
pub fn knows<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| block(name).is_some())
}

/// The parts of a network of `layers` beside those of the file with these `names`: its first convolution and norm, its residual
/// blocks in order, and its last linear map.
pub fn parts<'a>(layers: &[LayerSpec], names: impl Iterator<Item = &'a str>) -> Vec<Part> {
    let part = |ours: String, theirs: String, norm: Option<NormKind>| Part { ours, theirs, norm };
    let place = |n: usize| format!("layers.{n}.{}", layers[n].kind());
    let mut parts = Vec::new();
    let stem = layers.iter().position(LayerSpec::is_heavy).filter(|&n| matches!(layers[n], LayerSpec::Conv2d { .. }));
    if let Some(n) = stem {
        parts.push(part(place(n), "conv1".into(), None));
        match layers.get(n + 1) {
            Some(LayerSpec::BatchNorm { .. }) => {
                parts.push(part(place(n + 1), "bn1".into(), Some(NormKind::Batch)));
            }
            Some(LayerSpec::GroupNorm { .. }) => {
                parts.push(part(place(n + 1), "bn1".into(), Some(NormKind::Group)));
            }
            _ => {}
        }
    }
    let blocks: BTreeSet<(usize, usize)> = names.filter_map(block).collect();
    let residual = layers.iter().enumerate().filter_map(|(n, layer)| match layer {
        LayerSpec::Residual(block) => Some((n, block.norm)),
        _ => None,
    });
    for ((n, norm), (stage, block)) in residual.zip(blocks) {
        let (ours, theirs) = (place(n), format!("layer{stage}.{block}"));
        for k in 1..=3 {
            parts.push(part(format!("{ours}.conv{k}"), format!("{theirs}.conv{k}"), None));
            parts.push(part(format!("{ours}.norm{k}"), format!("{theirs}.bn{k}"), Some(norm)));
        }
        parts.push(part(format!("{ours}.projection"), format!("{theirs}.downsample.0"), None));
        parts.push(part(format!("{ours}.projection-norm"), format!("{theirs}.downsample.1"), Some(norm)));
    }
    if let Some(n) = layers.iter().rposition(|layer| matches!(layer, LayerSpec::Linear { .. })) {
        parts.push(part(place(n), "fc".into(), None));
    }
    parts
}

/// Stage and place of the block that a tensor `layer1.0.…` belongs to.
fn block(name: &str) -> Option<(usize, usize)> {
    let mut words = name.strip_prefix("layer")?.split('.');
    let (stage, block) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().map(|_| (stage, block))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::presets::preset;

    #[test]
    fn blocks_come_in_their_order() {
        let names =
            ["layer2.0.conv1.weight", "layer10.0.conv1.weight", "layer2.10.bn1.bias", "layer2.2.bn1.bias", "fc.bias"];
        let parts = parts(&preset("resnet18", 4).unwrap(), names.into_iter());
        let theirs = |ours: &str| parts.iter().find(|part| part.ours == ours).map(|part| part.theirs.as_str());
        assert_eq!(theirs("layers.0.conv2d"), Some("conv1"));
        assert_eq!(theirs("layers.1.group-norm"), Some("bn1"));
        assert_eq!(theirs("layers.4.residual.conv1"), Some("layer2.0.conv1"));
        assert_eq!(theirs("layers.5.residual.norm2"), Some("layer2.2.bn2"));
        assert_eq!(theirs("layers.6.residual.projection"), Some("layer2.10.downsample.0"));
        assert_eq!(theirs("layers.7.residual.projection-norm"), Some("layer10.0.downsample.1"));
        assert_eq!((theirs("layers.8.residual.conv1"), theirs("layers.13.linear")), (None, Some("fc")));
        assert!(knows(names.into_iter()) && !knows(["layers.0.conv2d.weight", "layer1", "layer1.0"].into_iter()));
    }
}
