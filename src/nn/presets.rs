//! Networks known by name.

use super::spec::{Block, LayerSpec, NormKind, ResidualSpec};
use crate::{Error, Result};

/// Names [`preset`] knows, each with what it is for.
pub const PRESETS: [(&str, &str); 6] = [
    ("motion-small", "recognition of small moving patterns, frames of about 32x32"),
    ("vgg8", "recognition, a plain network of 8 weight layers, frames of about 112x112"),
    ("resnet18", "recognition, residual network of 18 layers, frames of about 224x224"),
    ("resnet50", "recognition, residual bottleneck network of 50 layers, frames of about 224x224"),
    (
        "resnet128",
        "recognition, residual bottleneck network of 128 layers, frames of 128x128 and up: 16 modules balance",
    ),
    ("autoencoder", "future frames: strided encoder, nearest up-sampling decoder; sides a multiple of 8"),
];

/// The layers of the network `name`, whose output has `out` elements or channels: classes for recognition, colour channels
/// (3) for future frames.
///
/// # Errors
/// [`Error::Input`] on an unknown name, with the nearest known one.
pub fn preset(name: &str, out: usize) -> Result<Vec<LayerSpec>> {
    match name {
        "motion-small" => Ok(motion_small(out)),
        "vgg8" => Ok(vgg8(out)),
        "resnet18" => Ok(resnet(&[2, 2, 2, 2], Block::Basic, out)),
        "resnet50" => Ok(resnet(&[3, 4, 6, 3], Block::Bottleneck, out)),
        // ResNet-152 with eight blocks less in its third stage: 16 modules of that come to 0.79 of the costliest, of this to 0.87.
        "resnet128" => Ok(resnet(&[3, 8, 28, 3], Block::Bottleneck, out)),
        "autoencoder" => Ok(autoencoder(out)),
        _ => Err(unknown(name)),
    }
}

fn unknown(name: &str) -> Error {
    let names = PRESETS.map(|(known, _)| known);
    let near = names.into_iter().max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    let hint = near.filter(|near| strsim::jaro_winkler(near, name) > 0.7);
    let hint = hint.map_or(String::new(), |near| format!(" (did you mean {near:?}?)"));
    Error::input(format!("there is no preset {name:?}{hint}; known: {}", names.join(", ")))
}

/// A convolution without bias, a group norm, a relu.
fn unit(out: usize, kernel: usize, stride: usize, groups: usize) -> [LayerSpec; 3] {
    [
        LayerSpec::Conv2d { out, kernel, stride, padding: kernel / 2, groups: 1, bias: false },
        LayerSpec::GroupNorm { groups },
        LayerSpec::Relu {},
    ]
}

fn head(classes: usize) -> [LayerSpec; 2] {
    [LayerSpec::GlobalAvgPool {}, LayerSpec::Linear { out: classes, bias: true }]
}

/// Seven units at half the side, the first 5x5, and a head with batch norm. The widths grow by 4, so that skips of any
/// span between modules get a learned adapter. The batch norm takes away the large constant part of the pooled features,
/// beside which what tells motion is tiny; its momentum is small because the steps of a clip are alike.
fn motion_small(classes: usize) -> Vec<LayerSpec> {
    let widths = [12, 16, 20, 24, 24, 24];
    let mut layers = unit(8, 5, 2, 4).to_vec();
    layers.extend(widths.into_iter().flat_map(|out| unit(out, 3, 1, 4)));
    let [pool, linear] = head(classes);
    layers.extend([pool, LayerSpec::BatchNorm { momentum: 0.01 }, linear]);
    layers
}

/// Seven 3x3 convolutions in four stages, halved between them, and the head: 8 weight layers, as VGG (Simonyan and
/// Zisserman, 2015) cut short.
fn vgg8(classes: usize) -> Vec<LayerSpec> {
    let mut layers = Vec::new();
    for stage in [&[64][..], &[128], &[256, 256], &[512, 512, 512]] {
        if !layers.is_empty() {
            layers.push(LayerSpec::MaxPool { kernel: 2, stride: None, padding: 0 });
        }
        layers.extend(stage.iter().flat_map(|&out| unit(out, 3, 1, 32)));
    }
    layers.extend(head(classes));
    layers
}

/// He et al. (CVPR 2016), the stride of a bottleneck in its 3x3 convolution, group norm in place of batch norm.
fn resnet(blocks: &[usize; 4], block: Block, classes: usize) -> Vec<LayerSpec> {
    let widen = if block == Block::Bottleneck { 4 } else { 1 };
    let mut layers = unit(64, 7, 2, 32).to_vec();
    layers.push(LayerSpec::MaxPool { kernel: 3, stride: Some(2), padding: 1 });
    for (stage, &count) in blocks.iter().enumerate() {
        for n in 0..count {
            let stride = if stage > 0 && n == 0 { 2 } else { 1 };
            let out = (64 << stage) * widen;
            layers.push(LayerSpec::Residual(ResidualSpec { out, stride, block, norm: NormKind::Group, groups: 32 }));
        }
    }
    layers.extend(head(classes));
    layers
}

/// Three strided units down to an eighth of the side, three up-sampled ones back, and a convolution to the frame.
fn autoencoder(channels: usize) -> Vec<LayerSpec> {
    let mut layers: Vec<LayerSpec> =
        [(32, 2), (64, 2), (128, 2), (128, 1)].into_iter().flat_map(|(out, stride)| unit(out, 3, stride, 8)).collect();
    for out in [64, 32, 32] {
        layers.push(LayerSpec::Upsample { factor: 2 });
        layers.extend(unit(out, 3, 1, 8));
    }
    layers.push(LayerSpec::Conv2d { out: channels, kernel: 3, stride: 1, padding: 1, groups: 1, bias: true });
    layers
}
