//! What TensorBoard shows of a run while it goes on: the lines of `metrics.jsonl`, and predicted frames.

use std::path::Path;

use serde_json::Value;

use super::pictures::{Truth, pixels, strip};
use crate::Result;
use crate::config::{Config, Task};
use crate::data::inspect::png_into;
use crate::setup::{Predicted, Setup};
use crate::tensorboard::{EventFile, event, scalars};

/// The tag of predicted frames.
const FRAMES: &str = "validation/predicted_frames";

/// An attempt's event file.
pub(super) struct Board {
    /// Until it cannot be written.
    file: Option<EventFile>,
    config: Config,
    /// Height and width of a frame.
    size: [usize; 2],
    /// Future frames: which are shown, and what they are to be.
    frames: Option<(Predicted, Truth)>,
}

impl Board {
    /// Begins the file in the run's folder, if there is to be one, for an attempt that goes on where `done` batches are done.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be written.
    pub fn begin(setup: &Setup, done: u64) -> Result<Option<Self>> {
        let config = &setup.config;
        if !config.run.tensorboard {
            return Ok(None);
        }
        let shown = setup.predicted.clone().zip(setup.validation.as_ref());
        let truth = shown.map(|(shown, validation)| Ok((shown, Truth::of_validation(setup, &validation.dataset)?)));
        let frames = truth.transpose().unwrap_or_else(|e: crate::Error| {
            log::warn!("TensorBoard will show no predicted frames: {e}");
            None
        });
        let [h, w, _] = setup.network.input;
        let file = Some(EventFile::begin(&config.run.dir, done)?);
        Ok(Some(Board { file, config: config.clone(), size: [h, w], frames }))
    }

    /// A line of `metrics.jsonl`.
    pub fn line(&mut self, line: &Value) {
        let recognition = self.config.model.task == Task::Recognition;
        if let Some((step, found)) = scalars(line, recognition) {
            self.add(step, found.into_iter().map(|(tag, value)| event::Value::scalar(tag, value)).collect());
        }
    }

    /// The outputs of a validation's first clip after `done` batches.
    ///
    /// # Errors
    /// [`crate::Error::Input`] where the picture would be larger than PNG allows.
    pub fn frames(&mut self, done: u64, outputs: &[f32]) -> Result<()> {
        let Some((shown, truth)) = &self.frames else { return Ok(()) };
        let steps = truth.beside(shown.steps.start, &pixels(&self.config, outputs));
        if steps.is_empty() {
            return Ok(());
        }
        let ([h, w], mut png) = (self.size, Vec::new());
        let mut writer = png_into(&mut png, Path::new(FRAMES), w * steps.len(), 3 * h, None)?;
        let written = writer.write_image_data(&strip(&steps, h, w)).and_then(|()| writer.finish());
        written.map_err(|e| crate::Error::io(FRAMES, e.into()))?;
        self.add(done, vec![event::Value::picture(FRAMES, 3 * h, w * steps.len(), png)]);
        Ok(())
    }

    /// A disk that refuses does not end the run: `metrics.jsonl` has what counts.
    fn add(&mut self, step: u64, values: Vec<event::Value>) {
        let Some(file) = &mut self.file else { return };
        if let Err(e) = file.add(step, values) {
            log::warn!(
                "TensorBoard sees no more of this attempt (`sideways report --tensorboard` makes its file anew): {e}"
            );
            self.file = None;
        }
    }
}
