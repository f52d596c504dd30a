//! A stream of batches of frames: a thread reads ahead, the network's first (and last) module takes frame by frame.
//!
//! The reader works in *chunks*: up to [`StreamOptions::chunk`] successive frames of all B windows. It reads stored frames
//! one after the other (HDF5 has one lock), while a pool decodes, crops and scales them straight into the tensors that the
//! first module reads. Chunks pass through a bounded channel, so memory depends on B, the chunk and the read-ahead, and
//! not on the length T of a clip.
//!
//! In training a damaged video is passed over: its place in the batch has label -1 and frames of zeros, so that it
//! counts nowhere. Nothing takes its place. In evaluation it is an error: a score has to be over all videos.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use candle_core::Tensor;

use super::augment::{Augmentation, Geometry};
use super::dataset::Dataset;
use super::reader::Reader;
use super::sampler::{Sampler, SamplerOptions, Views};
use crate::{Error, Result};

/// Frames read at a time from each video where as many are to be made ahead: enough to make little of what a read costs
/// beside copying, and few enough to stay in a processor's cache until module 1 reads them.
const CHUNK: usize = 8;

/// What a [`FrameStream`] delivers.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamOptions {
    /// Frames of a clip, T.
    pub frames: usize,
    /// Source frames from one to the next.
    pub stride: usize,
    /// Windows worked on in lock-step, B.
    pub batch: usize,
    /// Side of the square taken out of each frame: at random in training, the centre in evaluation.
    pub crop: Option<usize>,
    /// Training: random changes of clips.
    pub augmentation: Augmentation,
    /// Compare each video with its checksum when it is first met.
    pub verify: bool,
    /// Training: order and windows at random.
    pub shuffle: bool,
    /// The run's seed.
    pub seed: u64,
    /// Training or evaluation (see [`SamplerOptions::training`]).
    pub training: bool,
    /// Evaluation: through all videos again and again.
    pub again: bool,
    /// Evaluation: how often each video is looked at.
    pub views: Views,
    /// Subtracted from each channel of u8/255.
    pub mean: [f32; 3],
    /// Then divided by.
    pub std: [f32; 3],
    /// Replicas, R.
    pub replicas: usize,
    /// This replica, 0..R.
    pub replica: usize,
    /// How many frames past the newest one asked for may be asked for before it again: frame t and frame
    /// t + `ahead` are both to be had at step t.
    pub ahead: usize,
    /// The first batch (counted from the start of the run, across epochs) to deliver.
    pub first_batch: u64,
    /// The batch to stop before; `u64::MAX` for no end.
    pub end_batch: u64,
    /// Frames read at a time from each video.
    pub chunk: usize,
    /// Chunks that wait to be used, at most.
    pub prefetch: usize,
    /// Threads that decode, crop and scale.
    pub decoders: usize,
}

impl Default for StreamOptions {
    fn default() -> Self {
        StreamOptions {
            frames: 16,
            stride: 1,
            batch: 1,
            crop: None,
            augmentation: Augmentation::default(),
            verify: true,
            shuffle: false,
            seed: 1,
            training: false,
            again: false,
            views: Views::ONE,
            mean: [0.43216, 0.394666, 0.37645],
            std: [0.22803, 0.22145, 0.216989],
            replicas: 1,
            replica: 0,
            ahead: 0,
            first_batch: 0,
            end_batch: u64::MAX,
            chunk: CHUNK,
            prefetch: 3,
            decoders: 1,
        }
    }
}

impl StreamOptions {
    /// With about `frames` frames of each clip made ahead of the one in use.
    pub fn reading_ahead(mut self, frames: usize) -> Self {
        self.chunk = frames.clamp(1, CHUNK);
        // One chunk is in the making while the others wait.
        self.prefetch = frames.div_ceil(CHUNK).max(1) - 1;
        self
    }

    /// Whether crops fit the dataset's frames.
    ///
    /// # Errors
    /// [`Error::Input`] where they do not.
    pub fn fits(&self, dataset: &Dataset) -> Result<()> {
        self.geometry(dataset).map(drop)
    }

    fn geometry(&self, dataset: &Dataset) -> Result<Geometry> {
        let geometry = Geometry::new(dataset.height, dataset.width, self.crop)?;
        geometry.check_crops(self.views.crops).map(|()| geometry)
    }

    /// The part that decides which windows are read.
    pub fn sampler(&self) -> SamplerOptions {
        SamplerOptions {
            frames: self.frames,
            stride: self.stride,
            batch: self.batch,
            shuffle: self.shuffle,
            training: self.training,
            again: self.again,
            views: self.views,
            seed: self.seed,
            replicas: self.replicas,
            replica: self.replica,
        }
    }
}

/// The videos of one batch: B places, in the order of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchVideos {
    /// Their classes; -1 where the batch is padded, or a damaged video is passed over.
    pub labels: Vec<i32>,
    /// Their names; empty where the batch is padded.
    pub ids: Vec<String>,
    /// Their indices into [`Dataset::videos`].
    pub videos: Vec<Option<usize>>,
}

/// Some successive frames of a clip, each `[B, h, w, 3]` values. (There is no message for a batch's
/// beginning alone: it would take a chunk's place in the channel, and memory would depend on T after all.)
pub(super) struct Chunk {
    pub(super) batch: u64,
    /// With the first chunk of a batch, its videos.
    pub(super) begins: Option<BatchVideos>,
    pub(super) first: usize,
    pub(super) frames: Vec<Tensor>,
    /// Places that this batch's damaged videos leave empty, as far as is known by the end of the chunk.
    pub(super) skipped: Vec<usize>,
}

/// Clips of a dataset, in the sampler's order, frame by frame. See the module's page.
pub struct FrameStream {
    options: StreamOptions,
    geometry: Geometry,
    incoming: Option<Receiver<Result<Chunk>>>,
    thread: Option<JoinHandle<()>>,
    next: u64,
    current: Option<u64>,
    chunks: VecDeque<Chunk>,
    /// The newest frame of the current batch asked for.
    newest: usize,
    /// Places of the current batch that damaged videos leave empty.
    skipped: Vec<usize>,
    failure: Option<String>,
}

impl FrameStream {
    /// Starts the reader thread.
    ///
    /// # Errors
    /// [`Error::Input`] for options that do not fit the dataset (see also [`Sampler::new`]).
    pub fn open(dataset: Arc<Dataset>, options: StreamOptions) -> Result<Self> {
        for (name, value) in [("chunk", options.chunk), ("decoders", options.decoders)] {
            if value == 0 {
                return Err(Error::input(format!("data: {name} must be at least 1")));
            }
        }
        if options.std.iter().any(|&s| !(s.is_finite() && s > 0.0)) || options.mean.iter().any(|m| !m.is_finite()) {
            return Err(Error::input(format!(
                "data: mean {:?} must be finite and std {:?} above 0",
                options.mean, options.std
            )));
        }
        options.augmentation.validate(options.crop)?;
        let geometry = options.geometry(&dataset)?;
        let sampler = Sampler::of(&dataset, options.sampler())?;
        let (send, incoming) = sync_channel(options.prefetch);
        let mut reader = Reader::new(dataset, sampler, geometry, options.clone())?;
        let thread = std::thread::Builder::new()
            .name("frames".into())
            .spawn(move || deliver(&mut reader, &send))
            .map_err(|e| Error::Run(format!("cannot start the frame reader's thread: {e}")))?;
        Ok(Self {
            next: options.first_batch,
            options,
            geometry,
            incoming: Some(incoming),
            thread: Some(thread),
            current: None,
            chunks: VecDeque::new(),
            newest: 0,
            skipped: Vec::new(),
            failure: None,
        })
    }

    /// The shape of a frame as delivered: height, width, 3.
    pub fn shape(&self) -> [usize; 3] {
        [self.geometry.out_height, self.geometry.out_width, 3]
    }

    /// Goes on to batch `batch`, dropping what is left of the one before. Batches come in order, from
    /// [`StreamOptions::first_batch`] on.
    ///
    /// # Errors
    /// [`Error::Run`] for another batch than the next; whatever went wrong in reading, naming shard and video.
    pub fn begin(&mut self, batch: u64) -> Result<BatchVideos> {
        if batch != self.next || batch >= self.options.end_batch {
            return Err(Error::Run(format!(
                "the frame stream was asked for batch {batch}; its next is {} and it ends before {}",
                self.next, self.options.end_batch
            )));
        }
        self.chunks.clear();
        loop {
            let mut chunk = self.receive()?;
            let Some(info) = chunk.begins.take() else { continue };
            if chunk.batch != batch {
                return Err(Error::Run(format!("the frame reader sent batch {} instead of {batch}", chunk.batch)));
            }
            self.skipped.clone_from(&chunk.skipped);
            self.chunks.push_back(chunk);
            self.next = batch + 1;
            self.newest = 0;
            self.current = Some(batch);
            return Ok(info);
        }
    }

    /// Frame `t` of the current batch's clips, `[B, h, w, 3]`, as `(u8/255 - mean)/std`; places that are padded or passed over
    /// are 0.
    ///
    /// Any frame may be asked for again until one more than [`StreamOptions::ahead`] past it has been asked for.
    ///
    /// # Errors
    /// [`Error::Run`] before the first [`FrameStream::begin`], and for a frame past the clip or no longer held; whatever
    /// went wrong in reading, naming shard and video.
    pub fn frame(&mut self, t: usize) -> Result<Tensor> {
        let Some(batch) = self.current else {
            return Err(Error::Run(format!("frame {t} was asked for before any batch was begun")));
        };
        if t >= self.options.frames {
            return Err(Error::Run(format!("frame {t} of {} was asked for", self.options.frames)));
        }
        self.newest = self.newest.max(t);
        let done = self.newest.saturating_sub(self.options.ahead);
        while self.chunks.front().is_some_and(|c| c.first + c.frames.len() <= done) {
            self.chunks.pop_front();
        }
        while self.chunks.back().is_none_or(|c| c.first + c.frames.len() <= t) {
            let chunk = self.receive()?;
            if chunk.batch != batch {
                return Err(Error::Run(format!(
                    "the frame reader sent batch {} before the end of {batch}",
                    chunk.batch
                )));
            }
            self.skipped.clone_from(&chunk.skipped);
            self.chunks.push_back(chunk);
        }
        let holds = |c: &&Chunk| (c.first..c.first + c.frames.len()).contains(&t);
        let Some(chunk) = self.chunks.iter().find(holds) else {
            return Err(Error::Run(format!(
                "frame {t} is no longer held: {} was asked for, and only {} frames back are kept",
                self.newest, self.options.ahead
            )));
        };
        Ok(chunk.frames[t - chunk.first].clone())
    }

    /// Places of the current batch that damaged videos leave empty.
    pub fn skipped(&self) -> &[usize] {
        &self.skipped
    }

    fn receive(&mut self) -> Result<Chunk> {
        if let Some(failure) = &self.failure {
            return Err(Error::input(failure.clone()));
        }
        let message = match &self.incoming {
            Some(incoming) => incoming.recv(),
            None => return Err(Error::Run("the frame stream is closed".into())),
        };
        match message {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(error)) => {
                self.failure = Some(error.to_string());
                Err(error)
            }
            Err(_) => Err(Error::Run("the frame reader's thread ended unexpectedly (it panicked, see above)".into())),
        }
    }
}

/// Batches of frames, in order: what the first module reads.
pub trait Frames: Send {
    /// Goes on to batch `batch`; the labels of its clips, −1 where a place is padded or a damaged video passed over.
    ///
    /// # Errors
    /// Whatever went wrong in reading.
    fn begin(&mut self, batch: u64) -> Result<Vec<i32>>;

    /// Frame `t` of the batch's clips, `[B, H, W, 3]`.
    ///
    /// # Errors
    /// As [`Frames::begin`].
    fn frame(&mut self, t: usize) -> Result<Tensor>;

    /// Places of the batch that damaged videos leave empty, as far as is known.
    fn skipped(&self) -> &[usize];
}

impl Frames for FrameStream {
    fn begin(&mut self, batch: u64) -> Result<Vec<i32>> {
        FrameStream::begin(self, batch).map(|videos| videos.labels)
    }

    fn frame(&mut self, t: usize) -> Result<Tensor> {
        FrameStream::frame(self, t)
    }

    fn skipped(&self) -> &[usize] {
        FrameStream::skipped(self)
    }
}

impl Drop for FrameStream {
    fn drop(&mut self) {
        // Closing the channel is what ends the thread: its next send fails.
        drop(self.incoming.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the frame reader's thread panicked");
        }
    }
}

/// The reader thread: everything, in order, until the end, an error, or nobody listens.
fn deliver(reader: &mut Reader, to: &SyncSender<Result<Chunk>>) {
    loop {
        match reader.next() {
            Ok(Some(chunk)) => {
                if to.send(Ok(chunk)).is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                let _ = to.send(Err(error));
                return;
            }
        }
    }
}
