//! What is odd about a run and may not be what was meant: said before it starts.

use std::collections::HashSet;

use super::{Purpose, Setup};
use crate::config::{DataConfig, Task, UpdateEvery};
use crate::data::{Dataset, missing_shards};
use crate::method::Rule;
use crate::nn::optim::LrSchedule;

/// Deviations below this part of the range of pixel values are no deviation of pictures.
const TINY: f32 = 0.02;

impl Setup {
    /// The warnings a user should see before training starts.
    pub fn warnings(&self) -> Vec<String> {
        if self.purpose != Purpose::Train {
            return Vec::new();
        }
        let (d, lowest) = (self.grid.modules, self.frozen.lowest());
        let needed = 2 * (d - lowest) + 1;
        let mut warnings = Vec::new();
        if self.schedule.frames() < needed && !self.config.train.rule.is_exact() {
            let formula = if lowest == 1 { "2D - 1".to_string() } else { format!("2(D - {lowest}) + 1") };
            warnings.push(format!(
                "clips of {} frames are shorter than {formula} = {needed} for D = {d} modules: module {lowest} is trained through \
                 skips only, the main path's cotangent never reaches it",
                self.schedule.frames(),
            ));
        }
        if self.config.train.rule == Rule::SkipSideways && self.config.model.skip.is_none() {
            warnings.push("train.rule = \"skip-sideways\" without model.skip is plain Sideways".into());
        }
        warnings.extend(self.without_effect());
        if let Ok(total) = self.total_batches()
            && total > 0
        {
            warnings.extend(self.never(total));
        }
        if let Some(dataset) = &self.dataset {
            warnings.extend(self.data_warnings(dataset));
            warnings.extend(self.validation_warnings(dataset));
        }
        warnings
    }

    /// Keys that are set and do nothing.
    fn without_effect(&self) -> Vec<String> {
        let (data, model, train) = (&self.config.data, &self.config.model, &self.config.train);
        let mut warnings = Vec::new();
        if data.crop_scale.is_none() && data.crop_ratio != DataConfig::default().crop_ratio {
            warnings.push("data.crop_ratio has no effect without data.crop_scale".into());
        }
        if !data.validation.list().is_empty() && train.validate_every == 0 {
            warnings
                .push("data.validation is not looked at: train.validate_every says how often, and is not set".into());
        }
        if model.task == Task::Recognition && model.horizon != 1 {
            warnings.push(format!("model.horizon = {} has no effect in recognition", model.horizon));
        }
        if data.std.iter().any(|std| *std < TINY) {
            warnings.push(format!(
                "data.std = {:?} is much smaller than pictures have: it is of pixel values divided by 255, some 0.2",
                data.std
            ));
        }
        warnings
    }

    /// What never happens in a run of `total` batches.
    fn never(&self, total: u64) -> Vec<String> {
        let train = &self.config.train;
        let mut warnings = Vec::new();
        if let UpdateEvery::Steps(every) = train.update_every {
            let steps = |i: usize| total.saturating_mul(self.schedule.backwards(i).count() as u64);
            let learns = |i: &usize| self.frozen.learned(*i) > 0;
            let all: Vec<usize> = (1..=self.grid.modules).filter(learns).collect();
            let never: Vec<usize> = all.iter().copied().filter(|&i| steps(i) < every).collect();
            if let Some(&first) = never.first() {
                let list = never.iter().take(8).map(usize::to_string).collect::<Vec<_>>().join(", ");
                let which = match never.len() {
                    n if n == all.len() => "no parameter ever changes".to_string(),
                    1 => format!("the parameters of module {list} never change"),
                    n => format!("the parameters of modules {list}{} never change", if n > 8 { ", …" } else { "" }),
                };
                warnings.push(format!(
                    "train.update_every = {every} steps, but in the whole run of {total} batches module {first} has {} with a gradient: \
                     {which}",
                    steps(first)
                ));
            }
        }
        if let Some(batches) = self.config.run.trace.filter(|batches| batches.first >= total) {
            warnings.push(format!("run.trace = \"{batches}\": nothing is recorded, the run has {total} batches"));
        }
        if train.optimizer.lr() == 0.0 {
            warnings.push("train.optimizer.lr = 0: no parameter ever changes".into());
        }
        let (LrSchedule::Constant { warmup } | LrSchedule::Step { warmup, .. } | LrSchedule::Cosine { warmup, .. }) =
            train.lr_schedule;
        if warmup > total {
            warnings.push(format!(
                "train.lr_schedule.warmup = {warmup} batches is longer than the run, which has {total}: the learning rate never \
                 reaches {}",
                train.optimizer.lr()
            ));
        }
        if let LrSchedule::Step { every, .. } = train.lr_schedule
            && every >= total
        {
            warnings.push(format!(
                "train.lr_schedule.every = {every} batches: in a run of {total} the learning rate never drops"
            ));
        }
        if let Some(decay) = train.ema {
            let updates = match train.update_every {
                UpdateEvery::Steps(every) => total.saturating_mul(self.schedule.frames() as u64) / every.max(1),
                UpdateEvery::Named(_) => total,
            };
            let left = decay.powf(updates as f64);
            if left > 0.5 {
                warnings.push(format!(
                    "train.ema = {decay}: after the run's {updates} updates the moving average, which evaluation uses, is still {:.0} % \
                     initial values",
                    100.0 * left
                ));
            }
        }
        warnings
    }

    fn data_warnings(&self, dataset: &Dataset) -> Vec<String> {
        let mut warnings = Vec::new();
        let data = &self.config.data;
        let wanted = (data.frames as u64 - 1) * data.stride as u64 + 1;
        let short = dataset.videos.iter().filter(|video| video.frames < wanted).count();
        if short > 0 {
            warnings.push(format!(
                "{short} of {} videos have fewer than the {wanted} frames of a clip (data.frames = {}, data.stride = {}): \
                 their last frame is repeated",
                dataset.videos.len(),
                data.frames,
                data.stride
            ));
        }
        let missing = missing_shards(&dataset.shards);
        if let Some(first) = missing.first() {
            warnings.push(format!(
                "data.train: {} shards are not there, though later ones are; the first is {}: was a part of a copy lost?",
                missing.len(),
                first.display()
            ));
        }
        if self.config.model.task == Task::Recognition {
            let present: HashSet<i32> = dataset.videos.iter().map(|video| video.label).collect();
            let classes = dataset.class_names.iter().enumerate();
            let absent: Vec<&str> =
                classes.filter(|(k, _)| !present.contains(&(*k as i32))).map(|(_, name)| name.as_str()).collect();
            if !absent.is_empty() {
                let first = absent.iter().take(8).copied().collect::<Vec<_>>().join(", ");
                let more = if absent.len() > 8 { ", …" } else { "" };
                warnings.push(format!(
                    "data.train has no video of {} of {} classes: {first}{more}",
                    absent.len(),
                    dataset.class_names.len()
                ));
            }
        }
        warnings
    }

    fn validation_warnings(&self, dataset: &Dataset) -> Vec<String> {
        let Some(validation) = &self.validation else { return Vec::new() };
        let mut warnings = Vec::new();
        let content = |video: &crate::data::Video| (video.checksum, video.frames);
        let trained: HashSet<(u64, u64)> = dataset.videos.iter().map(content).collect();
        let shared: Vec<_> =
            validation.dataset.videos.iter().filter(|video| trained.contains(&content(video))).collect();
        if let Some(first) = shared.first() {
            warnings.push(format!(
                "{} of {} videos to validate on are also trained on, the first is {}",
                shared.len(),
                validation.dataset.videos.len(),
                first.id
            ));
        }
        let others = &validation.dataset;
        warnings.extend(other_frames(
            "the shards to validate on",
            (others.height, others.width, others.fps),
            "those trained on",
            (Some([dataset.height, dataset.width]), Some(dataset.fps)),
        ));
        warnings
    }

    /// Says where the shards' frames are of another size or rate than those that a network was `trained` on.
    pub fn unlike_trained(&self, stored: Option<[usize; 2]>, input: [usize; 3], fps: Option<f64>) -> Vec<String> {
        let Some(dataset) = &self.dataset else { return Vec::new() };
        let mut warnings = other_frames(
            "the shards",
            (dataset.height, dataset.width, dataset.fps),
            "what the network was trained on",
            (stored, fps),
        );
        let now = self.network.input;
        if stored.is_none() && now != input {
            warnings.push(format!(
                "frames of {}x{} (height x width), but the network was trained on {}x{}",
                now[0], now[1], input[0], input[1]
            ));
        }
        warnings
    }
}

/// What differs between the frames of `these` shards and of `those`.
fn other_frames(
    these: &str,
    (height, width, fps): (usize, usize, f64),
    those: &str,
    (size, rate): (Option<[usize; 2]>, Option<f64>),
) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some([h, w]) = size.filter(|size| *size != [height, width]) {
        warnings.push(format!("{these} have frames of {height}x{width} pixels (height x width), {those} {h}x{w}"));
    }
    if let Some(rate) = rate.filter(|rate| (*rate - fps).abs() > 1e-3 * fps) {
        warnings.push(format!("{these} have {fps} frames a second, {those} {rate}: what moves is faster or slower"));
    }
    warnings
}
