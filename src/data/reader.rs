//! The reader thread's work: windows to chunks of frames, and which videos are fit to be read.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use nix::sys::resource::{Resource, getrlimit};

use super::augment::{Geometry, Scaling, View};
use super::dataset::Dataset;
use super::jpeg;
use super::loader::{BatchVideos, Chunk, StreamOptions};
use super::sampler::{Sampler, VideoWindow};
use super::shard::{Encoding, ShardReader};
use crate::backend::cpu::{overwritten, tensor};
use crate::{Error, Result};

/// Shards kept open at a time: twice as many as are shuffled together, or fewer where the process may not have so many files.
fn open_shards() -> usize {
    const FILES: u64 = 2 * super::sampler::MIXED_SHARDS as u64;
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    // A stream a replica, and validation's: others need files as well.
    (limit / 8).clamp(1, FILES) as usize
}

/// One place of the batch.
struct Slot {
    window: VideoWindow,
    view: View,
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
    pool: rayon::ThreadPool,
    /// The most recently used last.
    open: Vec<(usize, ShardReader)>,
    batch: u64,
    /// The next frame of the clip.
    frame: usize,
    /// `None` where the batch is padded or a damaged video is passed over.
    slots: Vec<Option<Slot>>,
    /// The places of the latter.
    skipped: Vec<usize>,
    /// Of each video met so far, whether it is sound.
    sound: Vec<Option<bool>>,
}

impl Reader {
    pub(super) fn new(
        dataset: Arc<Dataset>,
        sampler: Sampler,
        geometry: Geometry,
        options: StreamOptions,
    ) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.decoders)
            .thread_name(|i| format!("decode-{i}"))
            .build()
            .map_err(|e| Error::Run(format!("cannot start {} decoder threads: {e}", options.decoders)))?;
        let batch = options.first_batch;
        let sound = vec![None; dataset.videos.len()];
        let (open, slots, skipped) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { dataset, sampler, geometry, options, pool, open, batch, frame: 0, slots, skipped, sound })
    }

    /// The next chunk; `None` after the last batch.
    pub(super) fn next(&mut self) -> Result<Option<Chunk>> {
        if self.batch >= self.options.end_batch {
            return Ok(None);
        }
        let first = self.frame;
        let mut begins = if first == 0 { Some(self.begin()?) } else { None };
        let frames = self.options.chunk.min(self.options.frames - first);
        let frames = self.chunk(first, frames)?;
        let skipped = self.skipped.clone();
        if let Some(batch) = &mut begins {
            skipped.iter().for_each(|&place| batch.labels[place] = -1);
        }
        self.frame = first + frames.len();
        let chunk = Chunk { batch: self.batch, begins, first, frames, skipped };
        if self.frame == self.options.frames {
            self.frame = 0;
            self.batch += 1;
        }
        Ok(Some(chunk))
    }

    /// Chooses the batch's windows and views.
    fn begin(&mut self) -> Result<BatchVideos> {
        let epoch = self.sampler.epoch(self.batch);
        let windows = self.sampler.batch(self.batch);
        self.skipped.clear();
        let mut checked = Vec::new();
        for (place, window) in windows.iter().enumerate() {
            let Some(window) = window else { continue };
            let shard = self.dataset.videos[window.video].shard;
            if !checked.contains(&shard) {
                shard_reader(&mut self.open, &self.dataset, shard)?.still_there()?;
                checked.push(shard);
            }
            if !self.is_sound(window.video)? {
                self.skipped.push(place);
            }
        }
        let slot = |(place, window): (usize, &Option<VideoWindow>)| {
            let window = window.filter(|_| !self.skipped.contains(&place))?;
            Some(Slot { window, view: self.view(epoch, window) })
        };
        self.slots = windows.iter().enumerate().map(slot).collect();
        let of = |w: &Option<VideoWindow>| w.map(|w| &self.dataset.videos[w.video]);
        Ok(BatchVideos {
            labels: windows.iter().map(|w| of(w).map_or(-1, |v| v.label)).collect(),
            ids: windows.iter().map(|w| of(w).map_or_else(String::new, |v| v.id.clone())).collect(),
            videos: windows.iter().map(|w| w.map(|w| w.video)).collect(),
        })
    }

    /// Whether a video may be read; compares its checksum when it is first met.
    fn is_sound(&mut self, video: usize) -> Result<bool> {
        if let Some(sound) = self.sound[video] {
            return Ok(sound);
        }
        if self.options.verify {
            let (index, shard) = (self.dataset.videos[video].index, self.dataset.videos[video].shard);
            let reader = shard_reader(&mut self.open, &self.dataset, shard)?;
            let (found, stored) = (reader.digest(index)?, reader.checksums[index]);
            if found != stored {
                let why = format!("its checksum is {found:016x}, not {stored:016x}");
                self.damaged(video, &why)?;
                return Ok(false);
            }
        }
        self.sound[video] = Some(true);
        Ok(true)
    }

    /// A damaged video is passed over in training, from now on; in evaluation it is an error, and so is a file that is
    /// gone or cut short.
    fn damaged(&mut self, video: usize, why: &str) -> Result<()> {
        let known = &self.dataset.videos[video];
        shard_reader(&mut self.open, &self.dataset, known.shard)?.still_there()?;
        let text = format!("{}: video {} is damaged: {why}", self.dataset.shards[known.shard].display(), known.id);
        if !self.options.training {
            return Err(Error::input(text));
        }
        log::warn!("{text}; it is skipped, now and in every epoch");
        self.sound[video] = Some(false);
        Ok(())
    }

    /// What is made of a window's frames: drawn from (seed, epoch, video) in training, the window's crop in evaluation.
    fn view(&self, epoch: u64, window: VideoWindow) -> View {
        let o = &self.options;
        let scaling = Scaling { mean: o.mean, std: o.std };
        if !o.training {
            return View::fixed(self.geometry, scaling, (window.crop, o.views.crops));
        }
        View::drawn(self.geometry, scaling, &o.augmentation, (o.seed, epoch, window.video as u64))
    }

    /// Frames `first..first + frames` of all windows, each `[B, h, w, 3]`. This thread reads, the pool does the rest
    /// meanwhile.
    fn chunk(&mut self, first: usize, frames: usize) -> Result<Vec<Tensor>> {
        let (batch, frame) = (self.slots.len(), self.geometry.frame_len());
        let mut data: Vec<Vec<f32>> = (0..frames).map(|_| overwritten(batch * frame)).collect();
        let mut places: Vec<Vec<&mut [f32]>> = (0..batch).map(|_| Vec::with_capacity(frames)).collect();
        for data in &mut data {
            places.iter_mut().zip(data.chunks_exact_mut(frame)).for_each(|(outs, out)| outs.push(out));
        }
        let failures = Mutex::new(Vec::new());
        let (dataset, open, geometry) = (&self.dataset, &mut self.open, &self.geometry);
        let read = self.pool.in_place_scope(|pool| {
            for ((place, slot), outs) in self.slots.iter().enumerate().zip(places) {
                let Some(Slot { window, view }) = slot else {
                    outs.into_iter().for_each(|out| out.fill(0.0));
                    continue;
                };
                let video = &dataset.videos[window.video];
                let shard = shard_reader(open, dataset, video.shard)?;
                let encoding = shard.header.encoding;
                let (stored, jobs) = read_window(shard, video.offset, window, first, frames)?;
                let stored = Arc::new(stored);
                for (job, out) in jobs.into_iter().zip(outs) {
                    let (stored, failures) = (stored.clone(), &failures);
                    pool.spawn(move |_| {
                        if let Err(why) = unpack(&stored[job.read][job.bytes], encoding, geometry, view, out) {
                            let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                            failures.push((place, job.source, why));
                        }
                    });
                }
            }
            Ok::<_, Error>(())
        });
        read?;
        let mut failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
        failures.sort();
        for (place, source, why) in failures {
            let Some(Slot { window, .. }) = self.slots[place].take() else { continue };
            self.damaged(window.video, &format!("frame {source}: {why}"))?;
            self.skipped.push(place);
            data.iter_mut().for_each(|data| data[place * frame..][..frame].fill(0.0));
        }
        self.still_there()?;
        let shape = (batch, self.geometry.out_height, self.geometry.out_width, 3);
        data.into_iter().map(|data| tensor(data, shape)).collect()
    }

    /// Whether the shards that are being read are there and whole: past the end of a file that has been cut short HDF5
    /// finds zeros, without a word.
    fn still_there(&mut self) -> Result<()> {
        let videos = &self.dataset.videos;
        let mut shards: Vec<usize> = self.slots.iter().flatten().map(|slot| videos[slot.window.video].shard).collect();
        shards.sort_unstable();
        shards.dedup();
        shards.into_iter().try_for_each(|s| shard_reader(&mut self.open, &self.dataset, s)?.still_there())
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

thread_local! {
    /// A whole decoded frame, before it is cropped.
    static DECODED: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Makes a delivered frame of a stored one. On failure says what is wrong with it.
fn unpack(
    stored: &[u8],
    encoding: Encoding,
    geometry: &Geometry,
    view: &View,
    out: &mut [f32],
) -> std::result::Result<(), String> {
    if encoding == Encoding::Raw {
        view.apply(stored, out);
        return Ok(());
    }
    DECODED.with_borrow_mut(|decoded| {
        decoded.resize(geometry.stored_len(), 0);
        jpeg::decode(stored, geometry.height, geometry.width, decoded)?;
        view.apply(decoded, out);
        Ok(())
    })
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
        while open.len() >= open_shards() {
            open.remove(0);
        }
        let reader = ShardReader::open(&dataset.shards[shard])?;
        let mut known = dataset.videos.iter().filter(|v| v.shard == shard);
        let same = (0..reader.videos()).all(|v| {
            known.next().is_some_and(|k| {
                reader.frames_of(v) == (k.offset..k.offset + k.frames)
                    && (reader.labels[v], reader.checksums[v]) == (k.label, k.checksum)
            })
        });
        if !same || (reader.header.height, reader.header.width) != (dataset.height, dataset.width) {
            let path = dataset.shards[shard].display();
            return Err(Error::input(format!("{path}: the shard has changed since the run began")));
        }
        open.push((shard, reader));
    }
    match open.last() {
        Some((_, reader)) => Ok(reader),
        None => Err(Error::Run("no shard is open".into())),
    }
}
