//! The reader thread's work: windows to chunks of cropped frames.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use rayon::prelude::*;

use super::dataset::Dataset;
use super::jpeg;
use super::loader::{Chunk, Clip, Message, StreamOptions};
use super::sampler::{Draw, Sampler, VideoWindow, draw};
use super::shard::{self, Encoding, ShardReader};
use crate::{Error, Result};

/// Shards kept open at a time; a process may have about a thousand files.
const OPEN_SHARDS: usize = 64;

/// Sizes of frames before and after cropping, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    height: usize,
    width: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
}

impl Geometry {
    pub(super) fn new(dataset: &Dataset, crop: Option<usize>) -> Result<Self> {
        let (height, width) = (dataset.height, dataset.width);
        let (out_height, out_width) = crop.map_or((height, width), |c| (c, c));
        if out_height == 0 || out_height > height || out_width > width {
            return Err(Error::input(format!(
                "data.crop = {out_height} does not fit the dataset's {height}x{width} frames (HxW): use 1..={}",
                height.min(width)
            )));
        }
        Ok(Self { height, width, out_height, out_width })
    }

    /// Bytes of a cropped frame.
    pub(super) fn frame_bytes(&self) -> usize {
        self.out_height * self.out_width * 3
    }

    /// Copies the crop out of a whole frame.
    fn cut(&self, frame: &[u8], cut: Cut, out: &mut [u8]) {
        let row = self.out_width * 3;
        for (y, out) in out.chunks_exact_mut(row).enumerate() {
            let at = ((cut.top + y) * self.width + cut.left) * 3;
            let source = &frame[at..at + row];
            if cut.mirrored {
                for (to, from) in out.as_chunks_mut::<3>().0.iter_mut().zip(source.as_chunks::<3>().0.iter().rev()) {
                    *to = *from;
                }
            } else {
                out.copy_from_slice(source);
            }
        }
    }
}

/// Where a window's crop lies; the same in all its frames.
#[derive(Clone, Copy, Debug, Default)]
struct Cut {
    top: usize,
    left: usize,
    mirrored: bool,
}

/// One place of the batch.
struct Slot {
    window: VideoWindow,
    cut: Cut,
}

/// A stored frame that is to become frame (place) `to` of the chunk.
struct Job {
    /// Index into the spans read for the batch.
    read: usize,
    /// The frame's bytes among them.
    bytes: std::ops::Range<usize>,
    encoding: Encoding,
    /// Frame of the video, for error messages.
    source: u64,
}

/// What the reader thread owns.
pub(super) struct Reader {
    dataset: Arc<Dataset>,
    sampler: Sampler,
    geometry: Geometry,
    options: StreamOptions,
    buffers: Receiver<Vec<u8>>,
    pool: Option<rayon::ThreadPool>,
    /// The most recently used last.
    open: Vec<(usize, ShardReader)>,
    clip: u64,
    /// The next frame of the clip; `None` before its beginning has been announced.
    frame: Option<usize>,
    slots: Vec<Option<Slot>>,
}

impl Reader {
    pub(super) fn new(
        dataset: Arc<Dataset>,
        sampler: Sampler,
        geometry: Geometry,
        options: StreamOptions,
        buffers: Receiver<Vec<u8>>,
    ) -> Result<Self> {
        let pool = match options.decoders {
            0 | 1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .thread_name(|i| format!("decode-{i}"))
                    .build()
                    .map_err(|e| Error::Run(format!("cannot start {n} decoder threads: {e}")))?,
            ),
        };
        let clip = options.first_clip;
        let (open, slots) = (Vec::new(), Vec::new());
        Ok(Self { dataset, sampler, geometry, options, buffers, pool, open, clip, frame: None, slots })
    }

    /// The next message; `None` after the last clip.
    pub(super) fn next(&mut self) -> Result<Option<Message>> {
        let Some(first) = self.frame else {
            if self.clip >= self.options.end_clip {
                return Ok(None);
            }
            self.frame = Some(0);
            return Ok(Some(Message::Begin(self.clip, self.begin()?)));
        };
        let frames = self.options.chunk.min(self.options.frames - first);
        let data = self.chunk(first, frames)?;
        let chunk = Chunk { clip: self.clip, first, frames, data };
        self.frame = Some(first + frames);
        if first + frames == self.options.frames {
            self.frame = None;
            self.clip += 1;
        }
        Ok(Some(Message::Frames(chunk)))
    }

    /// Chooses the clip's windows and crops.
    fn begin(&mut self) -> Result<Clip> {
        let epoch = self.sampler.epoch(self.clip);
        let windows = self.sampler.batch(self.clip);
        self.slots = windows.iter().map(|w| w.map(|window| Slot { window, cut: self.cut(epoch, window) })).collect();
        let mut checked = Vec::new();
        for window in windows.iter().flatten() {
            let shard = self.dataset.videos[window.video].shard;
            if !checked.contains(&shard) {
                shard_reader(&mut self.open, &self.dataset, shard)?.still_there()?;
                checked.push(shard);
            }
        }
        let of = |w: &Option<VideoWindow>| w.map(|w| &self.dataset.videos[w.video]);
        Ok(Clip {
            labels: windows.iter().map(|w| of(w).map_or(-1, |v| v.label)).collect(),
            ids: windows.iter().map(|w| of(w).map_or_else(String::new, |v| v.id.clone())).collect(),
            videos: windows.iter().map(|w| w.map(|w| w.video)).collect(),
        })
    }

    /// Crop and mirroring: from (seed, epoch, video) in training, the centre in evaluation.
    fn cut(&self, epoch: u64, window: VideoWindow) -> Cut {
        let g = &self.geometry;
        let (down, across) = (g.height - g.out_height, g.width - g.out_width);
        if !self.options.training {
            return Cut { top: down / 2, left: across / 2, mirrored: false };
        }
        let draw = |what, n: usize| draw(self.options.seed, epoch, window.video as u64, what, n as u64) as usize;
        Cut {
            top: draw(Draw::CropRow, down + 1),
            left: draw(Draw::CropColumn, across + 1),
            mirrored: self.options.flip && draw(Draw::Flip, 2) == 1,
        }
    }

    /// Frames `first..first + frames` of all windows: `[frames, B, h, w, 3]`.
    fn chunk(&mut self, first: usize, frames: usize) -> Result<Vec<u8>> {
        let batch = self.slots.len();
        let mut reads: Vec<Vec<u8>> = Vec::new();
        let mut jobs: Vec<Option<Job>> = Vec::with_capacity(frames * batch);
        jobs.resize_with(frames * batch, || None);
        for (b, slot) in self.slots.iter().enumerate() {
            let Some(Slot { window, .. }) = slot else { continue };
            let video = &self.dataset.videos[window.video];
            let shard = shard_reader(&mut self.open, &self.dataset, video.shard)?;
            let mut t = 0;
            while t < frames {
                // As many as lie side by side in the file; a repeated last frame is read once and used again.
                let source = window.source(first + t);
                let mut next = t + 1;
                let mut last = source;
                while next < frames && window.source(first + next).saturating_sub(last) <= 1 {
                    last = window.source(first + next);
                    next += 1;
                }
                let (bytes, spans) = shard.read(video.offset + source..video.offset + last + 1)?;
                for k in t..next {
                    let frame = window.source(first + k);
                    let bytes = spans[(frame - source) as usize].clone();
                    jobs[k * batch + b] =
                        Some(Job { read: reads.len(), bytes, encoding: shard.header.encoding, source: frame });
                }
                reads.push(bytes);
                t = next;
            }
        }
        let mut data = self.buffers.try_recv().unwrap_or_default();
        data.resize(frames * batch * self.geometry.frame_bytes(), 0);
        self.unpack(&reads, &jobs, &mut data)?;
        Ok(data)
    }

    /// Decodes and crops every job's frame into its place of `data`.
    fn unpack(&self, reads: &[Vec<u8>], jobs: &[Option<Job>], data: &mut [u8]) -> Result<()> {
        let (geometry, dataset, slots) = (self.geometry, &self.dataset, &self.slots);
        let whole = geometry.height * geometry.width * 3;
        let work = |scratch: &mut Vec<u8>, place: usize, job: &Option<Job>, out: &mut [u8]| -> Result<()> {
            let (Some(job), Some(Slot { window, cut })) = (job, &slots[place % slots.len()]) else { return Ok(()) };
            let bytes = &reads[job.read][job.bytes.clone()];
            if job.encoding == Encoding::Raw {
                geometry.cut(bytes, *cut, out);
                return Ok(());
            }
            scratch.resize(whole, 0);
            jpeg::decode(bytes, geometry.height, geometry.width, scratch).map_err(|why| {
                let video = &dataset.videos[window.video];
                shard::damaged(&dataset.shards[video.shard], &video.id, job.source, &why)
            })?;
            geometry.cut(scratch, *cut, out);
            Ok(())
        };
        let frame = geometry.frame_bytes();
        match &self.pool {
            Some(pool) => pool.install(|| {
                data.par_chunks_exact_mut(frame)
                    .zip(jobs)
                    .enumerate()
                    .try_for_each_init(Vec::new, |scratch, (place, (out, job))| work(scratch, place, job, out))
            }),
            None => {
                let mut scratch = Vec::new();
                data.chunks_exact_mut(frame)
                    .zip(jobs)
                    .enumerate()
                    .try_for_each(|(place, (out, job))| work(&mut scratch, place, job, out))
            }
        }
    }
}

/// The open shard number `shard`, opened now if it is not.
///
/// # Errors
/// As [`ShardReader::open`], and when the shard is no longer the one the dataset was made from.
fn shard_reader<'a>(
    open: &'a mut Vec<(usize, ShardReader)>,
    dataset: &Dataset,
    shard: usize,
) -> Result<&'a ShardReader> {
    if let Some(at) = open.iter().position(|(i, _)| *i == shard) {
        let entry = open.remove(at);
        open.push(entry);
    } else {
        let reader = ShardReader::open(&dataset.shards[shard])?;
        let mut known = dataset.videos.iter().filter(|v| v.shard == shard);
        let same = (0..reader.videos()).all(|v| {
            known
                .next()
                .is_some_and(|k| reader.frames_of(v) == (k.offset..k.offset + k.frames) && reader.labels[v] == k.label)
        });
        if !same || (reader.header.height, reader.header.width) != (dataset.height, dataset.width) {
            let path = dataset.shards[shard].display();
            return Err(Error::input(format!("{path}: the shard has changed since the run began")));
        }
        if open.len() >= OPEN_SHARDS {
            open.remove(0);
        }
        open.push((shard, reader));
    }
    match open.last() {
        Some((_, reader)) => Ok(reader),
        None => Err(Error::Run("no shard is open".into())),
    }
}
