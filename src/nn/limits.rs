//! How large a layer may be: beyond is nothing that any machine computes, and sums and products of what is allowed stay within their
//! types.

use super::spec::{LayerSpec, ResidualSpec, Shape};

/// Elements of one sample's activation, at most: four gigabytes.
const ELEMENTS: usize = 1 << 30;
/// Channels of a convolution's output, at most.
const CHANNELS: usize = 1 << 16;
/// Outputs of a linear layer, at most.
const OUTPUTS: usize = 1 << 24;
/// Side of a kernel, at most.
const KERNEL: usize = 1 << 7;
/// Strides, paddings and factors, at most.
const STEP: usize = 1 << 12;

/// An activation has elements, and not too many.
pub(super) fn elements(shape: Shape) -> Result<(), String> {
    match shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n)) {
        Some(0) => Err("the input is empty".into()),
        Some(n) if n <= ELEMENTS => Ok(()),
        _ => Err(format!("{}x{}x{} elements a sample are more than {ELEMENTS}", shape[0], shape[1], shape[2])),
    }
}

/// The numbers of a layer are within bounds.
pub(super) fn numbers(layer: &LayerSpec) -> Result<(), String> {
    let within = |name: &str, value: usize, most: usize| match value <= most {
        true => Ok(()),
        false => Err(format!("{name} = {value}: it must be at most {most}")),
    };
    match *layer {
        LayerSpec::Conv2d { out, kernel, stride, padding, .. } => {
            within("out", out, CHANNELS)?;
            within("kernel", kernel, KERNEL)?;
            within("stride", stride, STEP)?;
            within("padding", padding, STEP)
        }
        LayerSpec::Linear { out, .. } => within("out", out, OUTPUTS),
        LayerSpec::MaxPool { kernel, stride, padding } | LayerSpec::AvgPool { kernel, stride, padding } => {
            within("kernel", kernel, KERNEL)?;
            within("stride", stride.unwrap_or(1), STEP)?;
            within("padding", padding, STEP)
        }
        LayerSpec::Upsample { factor } => within("factor", factor, STEP),
        LayerSpec::Residual(ResidualSpec { out, stride, .. }) => {
            within("out", out, CHANNELS)?;
            within("stride", stride, STEP)
        }
        _ => Ok(()),
    }
}
