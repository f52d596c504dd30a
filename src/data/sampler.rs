//! Which videos, and which windows of them, make up batch number n. A pure function: no files, no state that a
//! resumed run would have to restore.
//!
//! An epoch's order takes the shards in an order of its own, [`MIXED_SHARDS`] at a time, and shuffles the videos of
//! those: few files are open at a time, however many there are, and up to that many shards are shuffled as one.
//!
//! Batch c of replica r is B windows: the places `(c·R + r)·B ..+B` of the epoch's order. So the R
//! replicas together work on exactly what one replica with batch R·B would work on at the same batch.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::dataset::Dataset;
use crate::{Error, Result};

/// Shards whose videos are shuffled together.
pub const MIXED_SHARDS: usize = 32;

/// How often evaluation looks at a video: every clip of it, every crop of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    /// Clips a video, spread evenly from its first frame to its last; one is in the middle.
    pub clips: usize,
    /// Crops a clip: 1, the centre; or 3, spread along the frame's longer side.
    pub crops: usize,
}

impl Views {
    /// The middle of the video, the centre of the frame.
    pub const ONE: Views = Views { clips: 1, crops: 1 };

    /// Views of a video.
    pub fn count(self) -> usize {
        self.clips * self.crops
    }
}

/// What a [`Sampler`] depends on besides the videos' lengths.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Frames of a clip, T.
    pub frames: usize,
    /// Source frames from one frame of a clip to the next.
    pub stride: usize,
    /// Windows a replica works on in lock-step, B.
    pub batch: usize,
    /// Order and window starts drawn at random, in training (evaluation never shuffles).
    pub shuffle: bool,
    /// Training: whole batches only, epoch after epoch. Evaluation: once through all videos, the last batch padded.
    pub training: bool,
    /// Evaluation: through all videos again and again.
    pub again: bool,
    /// Evaluation: the windows of each video, one after another.
    pub views: Views,
    /// The run's seed.
    pub seed: u64,
    /// Replicas, R.
    pub replicas: usize,
    /// This replica, 0..R.
    pub replica: usize,
}

/// A window of one video: frame t of it is [`VideoWindow::source`]`(t)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VideoWindow {
    /// The video, an index into the dataset's videos.
    pub video: usize,
    /// The video's frame that is frame 0 of the window.
    pub start: u64,
    /// Source frames from one frame to the next.
    pub stride: u64,
    /// The video's length in frames; past its end the last frame repeats.
    pub length: u64,
    /// Evaluation: which of [`Views::crops`].
    pub crop: usize,
}

impl VideoWindow {
    /// The video's frame (0-based) that is frame `t` of the window.
    pub fn source(&self, t: usize) -> u64 {
        (self.start + t as u64 * self.stride).min(self.length - 1)
    }
}

/// The order of batches. See the module's page.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    lengths: Vec<u64>,
    /// Where each shard's videos begin, and where the last one's end; empty: all are shuffled as one.
    shards: Vec<usize>,
    /// The order of the epoch last asked for: a cache, nothing more.
    order: Option<(u64, Vec<u32>)>,
}

/// What a random number is for; keeps the draws of one (seed, epoch, video) apart.
#[derive(Clone, Copy, Debug)]
pub(super) enum Draw {
    Order,
    Start,
    CropRow,
    CropColumn,
    Flip,
    // New ones go to the end: a draw depends on its number here.
    Shard,
    CropArea,
    CropRatio,
    Brightness,
    Contrast,
    Saturation,
}

/// A number in `0..n` that depends on the arguments alone.
pub(super) fn draw(seed: u64, epoch: u64, video: u64, what: Draw, n: u64) -> u64 {
    let mut key = [0; 17];
    key[..8].copy_from_slice(&epoch.to_le_bytes());
    key[8..16].copy_from_slice(&video.to_le_bytes());
    key[16] = what as u8;
    let bits = xxh3_64_with_seed(&key, seed);
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

impl Sampler {
    /// A sampler over videos of these lengths (frames).
    ///
    /// # Errors
    /// [`Error::Input`] for zero frames, stride, batch or replicas, a replica that is none, a video without frames,
    /// or fewer videos than one training batch of all replicas.
    pub fn new(lengths: Vec<u64>, options: SamplerOptions) -> Result<Self> {
        let o = &options;
        let sizes = [
            ("frames", o.frames),
            ("stride", o.stride),
            ("batch", o.batch),
            ("replicas", o.replicas),
            ("clips of a video", o.views.clips),
        ];
        for (name, value) in sizes {
            if value == 0 {
                return Err(Error::input(format!("data: {name} must be at least 1")));
            }
        }
        if !matches!(o.views.crops, 1 | 3) {
            return Err(Error::input(format!("{} crops of a clip: 1 or 3 are possible", o.views.crops)));
        }
        if o.replica >= o.replicas {
            return Err(Error::input(format!("replica {} does not exist: there are {}", o.replica, o.replicas)));
        }
        if lengths.is_empty() || lengths.contains(&0) {
            return Err(Error::input("the data hold no videos, or a video without frames"));
        }
        if u32::try_from(lengths.len()).is_err() {
            return Err(Error::input(format!("{} videos are more than this program can order", lengths.len())));
        }
        let whole = o.batch.checked_mul(o.replicas);
        if whole.is_none_or(|w| o.training && w > lengths.len()) {
            return Err(Error::input(format!(
                "{} videos are fewer than one batch of {} x {} replicas: use a smaller batch or more data",
                lengths.len(),
                o.batch,
                o.replicas
            )));
        }
        Ok(Self { options, lengths, shards: Vec::new(), order: None })
    }

    /// A sampler over a dataset's videos.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn of(dataset: &Dataset, options: SamplerOptions) -> Result<Self> {
        let mut sampler = Self::new(dataset.videos.iter().map(|v| v.frames).collect(), options)?;
        if dataset.shards.len() > MIXED_SHARDS {
            let begins = |s: usize| dataset.videos.partition_point(|v| v.shard < s);
            sampler.shards = (0..=dataset.shards.len()).map(begins).collect();
        }
        Ok(sampler)
    }

    /// Clips (batches of all replicas) in one pass over the videos.
    pub fn batches_per_epoch(&self) -> u64 {
        let batch = self.options.batch * self.options.replicas;
        let batches = if self.options.training { self.lengths.len() / batch } else { self.views().div_ceil(batch) };
        batches as u64
    }

    /// Windows of all videos in evaluation.
    fn views(&self) -> usize {
        self.lengths.len() * self.options.views.count()
    }

    /// The epoch that a batch belongs to: always 0 in evaluation.
    pub fn epoch(&self, batch: u64) -> u64 {
        if self.options.training { batch / self.batches_per_epoch() } else { 0 }
    }

    /// The B windows of a batch of this replica; `None` pads an evaluation's last batch (and any past it).
    pub fn batch(&mut self, number: u64) -> Vec<Option<VideoWindow>> {
        let (b, r, replicas) = (self.options.batch as u64, self.options.replica as u64, self.options.replicas as u64);
        let epoch = self.epoch(number);
        let repeats = self.options.training || self.options.again;
        let within = if repeats { number % self.batches_per_epoch() } else { number };
        let first = within.saturating_mul(replicas).saturating_add(r).saturating_mul(b);
        (0..b).map(|i| self.window_at(epoch, first.saturating_add(i))).collect()
    }

    /// The window at a place of an epoch's order.
    fn window_at(&mut self, epoch: u64, place: u64) -> Option<VideoWindow> {
        let views = if self.options.training { Views::ONE } else { self.options.views };
        let view = place % views.count() as u64;
        self.video_at(epoch, place / views.count() as u64).map(|video| self.window(epoch, video, view as usize))
    }

    /// The video at a place of an epoch's order.
    fn video_at(&mut self, epoch: u64, place: u64) -> Option<usize> {
        let place = usize::try_from(place).ok().filter(|&p| p < self.lengths.len())?;
        if !(self.options.training && self.options.shuffle) {
            return Some(place);
        }
        if self.order.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.order = Some((epoch, self.shuffled(epoch)));
        }
        self.order.as_ref().map(|(_, order)| order[place] as usize)
    }

    /// The videos in an epoch's order.
    fn shuffled(&self, epoch: u64) -> Vec<u32> {
        // Fisher-Yates, written out so that the order cannot change with a library's version.
        let shuffle = |list: &mut [u32], at: usize, what: Draw| {
            for i in (1..list.len()).rev() {
                list.swap(i, draw(self.options.seed, epoch, (at + i) as u64, what, i as u64 + 1) as usize);
            }
        };
        let mut order: Vec<u32> = (0..self.lengths.len() as u32).collect();
        if self.shards.is_empty() {
            shuffle(&mut order, 0, Draw::Order);
            return order;
        }
        let mut shards: Vec<u32> = (0..self.shards.len() as u32 - 1).collect();
        shuffle(&mut shards, 0, Draw::Shard);
        order.clear();
        for mixed in shards.chunks(MIXED_SHARDS) {
            let begin = order.len();
            for &shard in mixed {
                let (first, end) = (self.shards[shard as usize], self.shards[shard as usize + 1]);
                order.extend(first as u32..end as u32);
            }
            shuffle(&mut order[begin..], begin, Draw::Order);
        }
        order
    }

    /// Training: drawn from (seed, epoch, video), or 0 unshuffled. Evaluation: one of the views, the crops of a clip side by side.
    fn window(&self, epoch: u64, video: usize, view: usize) -> VideoWindow {
        let o = &self.options;
        let length = self.lengths[video];
        let span = (o.frames as u64 - 1).saturating_mul(o.stride as u64).saturating_add(1);
        let slack = length.saturating_sub(span);
        let start = match (o.training, o.shuffle) {
            (true, true) => draw(o.seed, epoch, video as u64, Draw::Start, slack + 1),
            (true, false) => 0,
            (false, _) => match (o.views.clips as u64, (view / o.views.crops) as u64) {
                (1, _) => slack / 2,
                (clips, clip) => slack.saturating_mul(clip) / (clips - 1),
            },
        };
        VideoWindow { video, start, stride: o.stride as u64, length, crop: view % o.views.crops }
    }
}
