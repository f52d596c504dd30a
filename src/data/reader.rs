//! The reader thread's work: windows to chunks of cropped frames.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use rayon::prelude::*;

use super::dataset::Dataset;
use super::jpeg;
use super::loader::{Chunk, Clip, StreamOptions};
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

/// A stored frame that is to be delivered.
struct Job {
    /// Index into what was read for the window.
    read: usize,
    /// The frame's bytes in there.
    bytes: std::ops::Range<usize>,
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
    /// The next frame of the clip.
    frame: usize,
    slots: Vec<Option<Slot>>,
    /// A whole decoded frame, before it is cropped.
    scratch: Vec<u8>,
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
        let (open, slots, scratch) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { dataset, sampler, geometry, options, buffers, pool, open, clip, frame: 0, slots, scratch })
    }

    /// The next chunk; `None` after the last clip.
    pub(super) fn next(&mut self) -> Result<Option<Chunk>> {
        if self.clip >= self.options.end_clip {
            return Ok(None);
        }
        let first = self.frame;
        let begins = if first == 0 { Some(self.begin()?) } else { None };
        let frames = self.options.chunk.min(self.options.frames - first);
        let chunk = Chunk { clip: self.clip, begins, first, frames, data: self.chunk(first, frames)? };
        self.frame = first + frames;
        if self.frame == self.options.frames {
            self.frame = 0;
            self.clip += 1;
        }
        Ok(Some(chunk))
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

    /// Frames `first..first + frames` of all windows: `[frames, B, h, w, 3]`. Read window by window, so that no more
    /// than one window's stored frames are in memory at a time.
    fn chunk(&mut self, first: usize, frames: usize) -> Result<Vec<u8>> {
        let (batch, frame) = (self.slots.len(), self.geometry.frame_bytes());
        let mut data = self.buffers.try_recv().unwrap_or_default();
        data.resize(frames * batch * frame, 0);
        for (b, slot) in self.slots.iter().enumerate() {
            let Some(Slot { window, cut }) = slot else { continue };
            let video = &self.dataset.videos[window.video];
            let shard = shard_reader(&mut self.open, &self.dataset, video.shard)?;
            let (stored, jobs) = read_window(shard, video.offset, window, first, frames)?;
            let unpack = Unpack { geometry: self.geometry, encoding: shard.header.encoding, cut: *cut };
            let one = |scratch: &mut Vec<u8>, job: &Job, out: &mut [u8]| {
                unpack
                    .run(&stored[job.read][job.bytes.clone()], scratch, out)
                    .map_err(|why| shard::damaged(&self.dataset.shards[video.shard], &video.id, job.source, &why))
            };
            match &self.pool {
                Some(pool) if unpack.encoding == Encoding::Jpeg => pool.install(|| {
                    let places = data.par_chunks_exact_mut(frame).skip(b).step_by(batch);
                    places.zip(&jobs).try_for_each_init(Vec::new, |scratch, (out, job)| one(scratch, job, out))
                })?,
                _ => {
                    let places = data.chunks_exact_mut(frame).skip(b).step_by(batch);
                    places.zip(&jobs).try_for_each(|(out, job)| one(&mut self.scratch, job, out))?;
                }
            }
        }
        Ok(data)
    }
}

/// Reads frames `first..first + frames` of a window as they are stored, as many at a time as lie side by side in the
/// file; the video begins at frame `offset` of the shard. A repeated last frame is read once.
fn read_window(
    shard: &ShardReader,
    offset: u64,
    window: &VideoWindow,
    first: usize,
    frames: usize,
) -> Result<(Vec<Vec<u8>>, Vec<Job>)> {
    let mut stored = Vec::new();
    let mut jobs = Vec::with_capacity(frames);
    let mut t = 0;
    while t < frames {
        let start = window.source(first + t);
        let (mut next, mut last) = (t + 1, start);
        while next < frames && window.source(first + next) - last <= 1 {
            last = window.source(first + next);
            next += 1;
        }
        let (bytes, spans) = shard.read(offset + start..offset + last + 1)?;
        for k in t..next {
            let source = window.source(first + k);
            jobs.push(Job { read: stored.len(), bytes: spans[(source - start) as usize].clone(), source });
        }
        stored.push(bytes);
        t = next;
    }
    Ok((stored, jobs))
}

/// How a stored frame becomes a delivered one.
struct Unpack {
    geometry: Geometry,
    encoding: Encoding,
    cut: Cut,
}

impl Unpack {
    /// Decodes (through `scratch`) and crops one frame into `out`. On failure says what is wrong with it.
    fn run(&self, stored: &[u8], scratch: &mut Vec<u8>, out: &mut [u8]) -> std::result::Result<(), String> {
        let Geometry { height, width, .. } = self.geometry;
        if self.encoding == Encoding::Raw {
            self.geometry.cut(stored, self.cut, out);
            return Ok(());
        }
        scratch.resize(height * width * 3, 0);
        jpeg::decode(stored, height, width, scratch)?;
        self.geometry.cut(scratch, self.cut, out);
        Ok(())
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
