//! How much the tape of a forward pass keeps in host memory, counted from shapes alone.

use super::spec::{LayerSpec, NormKind, ResidualSpec, Shape};
use crate::backend::cpu::conv::Conv;

/// Elements of four bytes that the tape keeps of `layers` for `batch` inputs `[H, W, C]`; tensors that layers share count once, and
/// layers that take over the next one's work ([`super::layers::Layer::absorb`]) keep what they then need.
pub fn tape_elements(layers: &[&LayerSpec], input: Shape, batch: usize) -> u64 {
    let mut walk = Walk { batch, shape: input, kept: false, elements: 0 };
    let mut rest = layers.iter().copied().peekable();
    while let Some(layer) = rest.next() {
        let output = layer.output_shape(walk.shape).unwrap_or(walk.shape);
        let mut kept = false;
        match layer {
            LayerSpec::Conv2d { out, groups, .. } => {
                if let Some(window) = layer.window() {
                    walk.convolution(&Conv { window, groups: *groups }, *out);
                }
            }
            LayerSpec::Linear { .. } | LayerSpec::Gelu {} => walk.keep_input(),
            LayerSpec::BatchNorm { .. } => walk.norm(2 * walk.shape[2]),
            LayerSpec::GroupNorm { groups } => {
                walk.norm(2 * groups * batch);
                let relu = rest.next_if(|next| **next == LayerSpec::Relu {}).is_some();
                if let Some(pool) = rest.next_if(|next| relu && matches!(next, LayerSpec::MaxPool { .. })) {
                    walk.shape = pool.output_shape(output).unwrap_or(output);
                    // The largest inputs, and a byte each for where they were.
                    let largest = walk.size(walk.shape);
                    walk.elements += largest + largest.div_ceil(4);
                    walk.kept = false;
                    continue;
                }
            }
            LayerSpec::Relu {} => {
                walk.elements += walk.size(output);
                kept = true;
            }
            LayerSpec::MaxPool { .. } => walk.elements += walk.size(output).div_ceil(4),
            LayerSpec::Residual(block) => {
                walk.residual(block);
                kept = true;
            }
            LayerSpec::AvgPool { .. }
            | LayerSpec::GlobalAvgPool {}
            | LayerSpec::Upsample { .. }
            | LayerSpec::Dropout { .. } => {}
        }
        (walk.shape, walk.kept) = (output, kept);
    }
    walk.elements
}

/// A forward pass on its way.
struct Walk {
    batch: usize,
    /// Of the present tensor, one sample.
    shape: Shape,
    /// Whether the tape has it.
    kept: bool,
    elements: u64,
}

impl Walk {
    fn size(&self, shape: Shape) -> u64 {
        (self.batch * shape.iter().product::<usize>()) as u64
    }

    fn keep_input(&mut self) {
        if !std::mem::replace(&mut self.kept, true) {
            self.elements += self.size(self.shape);
        }
    }

    /// A convolution keeps its input, or its input's transform.
    fn convolution(&mut self, conv: &Conv, out: usize) {
        let [h, w, c] = self.shape;
        match conv.transform_elements([self.batch, h, w, c], out) {
            Some(transform) => self.elements += transform as u64,
            None => self.keep_input(),
        }
    }

    fn norm(&mut self, statistics: usize) {
        self.keep_input();
        self.elements += statistics as u64;
    }

    fn residual(&mut self, block: &ResidualSpec) {
        let (input, c) = (self.shape, self.shape[2]);
        let statistics = |out: usize, batch: usize| match block.norm {
            NormKind::Group => 2 * block.groups * batch,
            NormKind::Batch => 2 * out,
        };
        let convolutions = block.convolutions(c);
        let mut input_kept = self.kept;
        for (n, (conv, _, out)) in convolutions.iter().enumerate() {
            self.convolution(conv, *out);
            if n == 0 {
                input_kept = self.kept;
            }
            self.shape = output_of(conv, self.shape, *out);
            self.kept = false;
            self.norm(statistics(*out, self.batch));
            // Group norm does the relu behind it too; behind batch norm the relu keeps its output.
            self.kept = n + 1 < convolutions.len() && block.norm == NormKind::Batch;
            if self.kept {
                self.elements += self.size(self.shape);
            }
        }
        let output = self.shape;
        if let Some(conv) = block.projection(c) {
            (self.shape, self.kept) = (input, input_kept);
            self.convolution(&conv, block.out);
            (self.shape, self.kept) = (output, false);
            self.norm(statistics(block.out, self.batch));
        }
        self.elements += self.size(output);
    }
}

fn output_of(conv: &Conv, [h, w, _]: Shape, out: usize) -> Shape {
    let [oh, ow] = conv.window.output(h, w).unwrap_or([h, w]);
    [oh, ow, out]
}
