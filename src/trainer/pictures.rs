//! Predicted frames as pictures, beside what they are to be.

use std::sync::Arc;

use crate::Result;
use crate::config::Config;
use crate::data::{Dataset, FrameStream, StreamOptions};
use crate::setup::Setup;

/// Three pictures of one step, `[H, W, 3]` in 0..=1: newest frame seen, target, prediction.
pub type Step = [Vec<f32>; 3];

/// The pixels, in 0..=1, of values as the network has them: (pixel - mean) / std.
pub fn pixels(config: &Config, values: &[f32]) -> Vec<f32> {
    let (mean, std) = (config.data.mean, config.data.std);
    values.iter().enumerate().map(|(n, v)| (v * std[n % 3] + mean[n % 3]).clamp(0.0, 1.0)).collect()
}

/// The frames of a clip that predictions are set beside.
pub struct Truth {
    frames: Vec<Vec<f32>>,
    /// How many frames after a step's own its target is.
    ahead: usize,
    /// How many frames before its target the newest one seen is.
    horizon: usize,
}

impl Truth {
    /// Reads clip `clip` of `stream`, which has batches of one.
    ///
    /// # Errors
    /// As [`FrameStream`].
    pub fn read(setup: &Setup, stream: &mut FrameStream, clip: u64) -> Result<Self> {
        stream.begin(clip)?;
        let frame = |t| Ok(pixels(&setup.config, &stream.frame(t)?.flatten_all()?.to_vec1::<f32>()?));
        let frames = (0..setup.config.data.frames).map(frame).collect::<Result<_>>()?;
        Ok(Truth { frames, ahead: setup.ahead.unwrap_or(1), horizon: setup.config.model.horizon })
    }

    /// The first clip of a validation.
    ///
    /// # Errors
    /// As [`FrameStream`].
    pub fn of_validation(setup: &Setup, dataset: &Arc<Dataset>) -> Result<Self> {
        let options = setup.validation_stream(0);
        let options = StreamOptions { batch: 1, replicas: 1, again: false, end_batch: 1, ..options };
        Self::read(setup, &mut FrameStream::open(dataset.clone(), options)?, 0)
    }

    /// The steps from `first` on, with their `outputs`, pixels `[steps, H, W, 3]`; those without a target are left out.
    pub fn beside(&self, first: usize, outputs: &[f32]) -> Vec<Step> {
        let size = self.frames.first().map_or(1, Vec::len);
        let steps = outputs.chunks_exact(size).zip(first + self.ahead..self.frames.len());
        steps.map(|(y, to)| [self.frames[to - self.horizon].clone(), self.frames[to].clone(), y.to_vec()]).collect()
    }
}

/// Pictures of `h` x `w` side by side, as bytes.
pub fn row(pictures: &[&[f32]], h: usize, w: usize) -> Vec<u8> {
    let line = |y: usize| pictures.iter().flat_map(move |picture| &picture[y * w * 3..(y + 1) * w * 3]);
    (0..h).flat_map(line).map(|x| (x * 255.0).round() as u8).collect()
}

/// Columns: steps; rows: newest frame seen, target, prediction. RGB bytes of `3 h` x `w` for each step.
pub fn strip(steps: &[Step], h: usize, w: usize) -> Vec<u8> {
    [0, 1, 2].map(|k| row(&steps.iter().map(|step| &step[k][..]).collect::<Vec<_>>(), h, w)).concat()
}
