//! Evaluation of future frames: errors of pixels, whatever the loss is, and the frames themselves.

use std::ops::Range;

use candle_core::Tensor;

use crate::Result;
use crate::backend::stage::with_values;
use crate::nn::head::Target;

/// How far predicted pixels are from true ones: squared differences within 0..=1, where white is 1.
pub struct PixelError {
    clips: usize,
    mean: [f32; 3],
    std: [f32; 3],
    /// Of every clip and step the mean over pixels and channels, added up.
    sum: f64,
}

impl PixelError {
    /// Of batches of `clips`, whose values are (pixel − mean) / std.
    pub fn new(clips: usize, mean: [f32; 3], std: [f32; 3]) -> Self {
        PixelError { clips, mean, std, sum: 0.0 }
    }

    /// Adds the errors of a step's frames, `[B, H, W, 3]`; a negative label marks a clip that does not count.
    pub(super) fn add(&mut self, frames: &Tensor, truth: &[f32], labels: &[i32]) -> Result<()> {
        let PixelError { mean, std, sum, .. } = self;
        let clip = truth.len() / labels.len().max(1);
        let pixel = |n: usize, value: f32| (value * std[n % 3] + mean[n % 3]).clamp(0.0, 1.0);
        with_values(frames, |frames| {
            let clips = frames.chunks_exact(clip).zip(truth.chunks_exact(clip)).zip(labels);
            for ((frames, truth), _) in clips.filter(|(_, label)| **label >= 0) {
                let squares = frames.iter().zip(truth).enumerate();
                let squares = squares.map(|(n, (a, b))| f64::from(pixel(n, *a) - pixel(n, *b)).powi(2));
                *sum += squares.sum::<f64>() / clip as f64;
            }
            Ok(())
        })
    }

    /// Adds those of an output beside a message of [`Target`].
    pub(super) fn add_target(&mut self, output: &Tensor, message: &[f32]) -> Result<()> {
        let (labels, frames) = Target::read(message, self.clips)?;
        self.add(output, frames, labels)
    }

    /// The sum, which starts anew.
    pub(super) fn take(&mut self) -> f32 {
        std::mem::take(&mut self.sum) as f32
    }
}

/// Outputs of module D that are kept for the console: predicted frames.
pub struct Predictions {
    /// Of so many of the batch's clips, the first ones.
    clips: usize,
    /// And these steps.
    steps: Range<usize>,
    values: Vec<f32>,
}

impl Predictions {
    /// Of the first `clips` of a batch, at `steps`; none yet.
    pub fn new(clips: usize, steps: Range<usize>) -> Self {
        Predictions { clips, steps, values: Vec::new() }
    }

    /// Adds an output, `[B, H, W, C]`, where its step is one of them.
    pub(super) fn add(&mut self, step: usize, output: &Tensor) -> Result<()> {
        if self.steps.contains(&step) {
            self.values.extend(output.narrow(0, 0, self.clips)?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    /// `[steps, clips, H, W, C]`; the next ones are of another batch.
    pub(super) fn take(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn errors_are_of_pixels_between_black_and_white() {
        // One pixel a clip; values are (pixel - mean) / std.
        let mut pixels = PixelError::new(3, [0.5, 0.0, 0.5], [0.5, 1.0, 0.25]);
        let output = [[0.0f32, 0.25, 8.0], [1.0, 1.0, 1.0], [-9.0, 1.0, 2.0]].concat();
        let truth = [[1.0, 0.75, 2.0], [0.0, 0.0, 0.0], [-1.0, 2.0, -2.0]].concat();
        let output = Tensor::from_vec(output, (3, 1, 1, 3), &Device::Cpu).unwrap();
        // The second clip does not count; 8 is beyond white, -9 beyond black.
        pixels.add(&output, &truth, &[4, -1, 0]).unwrap();
        let expected = (0.5f64.powi(2) + 0.5f64.powi(2)) / 3.0 + (0.0 + 0.0 + 1.0) / 3.0;
        assert!((f64::from(pixels.take()) - expected).abs() < 1e-7);
        assert_eq!(pixels.take(), 0.0);
    }
}
