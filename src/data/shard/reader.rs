//! Reading a shard.

use std::ops::Range;
use std::path::{Path, PathBuf};

use hdf5::types::TypeDescriptor as D;
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use xxhash_rust::xxh3::Xxh3;

use super::references::References;
use super::rows::Rows;
use super::{Encoding, ShardHeader, attributes, check, heap, values};
use crate::data::jpeg;
use crate::{Error, Result};

/// Reads one shard. Everything but the frames is in memory; frames are read when asked for.
///
/// Opened read-only and without file locks, so that many processes (and file systems without locks) can share it.
pub struct ShardReader {
    /// The shard's file.
    pub path: PathBuf,
    /// Its root attributes.
    pub header: ShardHeader,
    /// Each video's class.
    pub labels: Vec<i32>,
    /// Each video's name.
    pub ids: Vec<String>,
    /// Video v is frames `offsets[v]..offsets[v + 1]`.
    pub offsets: Vec<u64>,
    /// XXH3-64 of each video's stored bytes.
    pub checksums: Vec<u64>,
    /// Bytes of the file when it was opened.
    pub bytes: u64,
    data: Rows,
    frame_offsets: Option<hdf5::Dataset>,
}

impl ShardReader {
    /// Opens a shard and checks all of it that can be checked without reading frames.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = check::file(path)?;
        let damaged = || {
            Error::input(format!("{}: its names or strings are damaged (truncated or overwritten?)", path.display()))
        };
        let references = References::of(path);
        if !heap::is_whole(path, bytes) || references.as_ref().is_some_and(|(all, root)| !all.group_holds(*root)) {
            return Err(damaged());
        }
        // No chunk cache: unfiltered chunks are then read only where asked.
        let mut options = hdf5::File::with_options();
        options.with_fapl(|access| access.file_locking(false).chunk_cache(1, 0, 1.0));
        let file = options.open(path).map_err(|e| Error::input(format!("{}: {}", path.display(), unopened(&e))))?;
        let header = attributes::read(path, &file, bytes)?;
        let dataset = |name: &str| attributes::dataset(path, &file, name);
        let labels: Vec<i32> = attributes::list(path, &dataset("labels")?, "labels", bytes, values::numbers)?;
        let ids = dataset("video_ids")?;
        if let Some((all, _)) = &references
            && !values::pieces(&ids).into_iter().all(|(at, count)| all.stored_hold(at, count))
        {
            return Err(damaged());
        }
        let ids = attributes::list(path, &ids, "video_ids", bytes, values::strings)?;
        let offsets: Vec<u64> =
            attributes::list(path, &dataset("video_offsets")?, "video_offsets", bytes, values::numbers)?;
        let checksums = attributes::list(path, &dataset("video_checksums")?, "video_checksums", bytes, values::words)?;
        let frames = check::videos(path, &labels, &ids, &offsets, &checksums, header.class_names.len())?;
        let (name, frame_offsets) = match header.encoding {
            Encoding::Raw => ("frames", None),
            Encoding::Jpeg => ("jpeg", Some(dataset("frame_offsets")?)),
        };
        if let Some(index) = &frame_offsets
            && !matches!(index.dtype().and_then(|d| d.to_descriptor()), Ok(D::Integer(_) | D::Unsigned(_)))
        {
            let kind = values::kind(index);
            return Err(Error::input(format!(
                "{}: dataset /frame_offsets holds {kind}, not whole numbers: store uint64",
                path.display()
            )));
        }
        let data =
            Rows::new(dataset(name)?).map_err(|e| Error::input(format!("{}: dataset /{name}: {e}", path.display())))?;
        check::frame_shapes(path, &header, frames, &data.shape(), frame_offsets.as_ref().map(|d| d.shape()))?;
        let reader =
            Self { path: path.to_path_buf(), header, labels, ids, offsets, checksums, bytes, data, frame_offsets };
        reader.check_frame_offsets(frames)?;
        Ok(reader)
    }

    /// The number of videos.
    pub fn videos(&self) -> usize {
        self.labels.len()
    }

    /// The frames of the shard that are video `v`'s.
    pub fn frames_of(&self, v: usize) -> Range<u64> {
        self.offsets[v]..self.offsets[v + 1]
    }

    /// Reads the frames `range` of the shard as they are stored: their bytes one after the other, and where each
    /// begins and ends among them.
    ///
    /// # Errors
    /// [`Error::Input`] when the file can no longer be read there.
    pub fn read(&self, range: Range<u64>) -> Result<(Vec<u8>, Vec<Range<usize>>)> {
        let count = (range.end - range.start) as usize;
        let Some(index) = &self.frame_offsets else {
            let frame = self.header.frame_bytes();
            let bytes = self.data.read(range.clone()).map_err(|e| self.unreadable(&range, e))?;
            return Ok((bytes, (0..count).map(|i| i * frame..(i + 1) * frame).collect()));
        };
        let rows = range.start as usize..range.end as usize + 1;
        let at = index.read_slice_1d::<u64, _>(rows).map_err(|e| self.unreadable(&range, e))?.to_vec();
        check::growing(&self.path, "frame_offsets", &at, range.start)?;
        let (first, last) = (at[0], at[count]);
        check::jpeg_span(&self.path, first as usize, last as usize, self.data.rows() as usize, count)?;
        let bytes = self.data.read(first..last).map_err(|e| self.unreadable(&range, e))?;
        let spans = at.windows(2).map(|w| (w[0] - first) as usize..(w[1] - first) as usize).collect();
        Ok((bytes, spans))
    }

    /// The checksum of video `v`'s bytes as they now are.
    ///
    /// # Errors
    /// [`Error::Input`] when the file can no longer be read there.
    pub fn digest(&self, v: usize) -> Result<u64> {
        let mut hash = Xxh3::new();
        let range = self.frames_of(v);
        let mut at = range.start;
        while at < range.end {
            let end = (at + 64).min(range.end);
            hash.update(&self.read(at..end)?.0);
            at = end;
        }
        Ok(hash.digest())
    }

    /// Reads all of video `v`, compares its checksum and decodes its frames.
    ///
    /// # Errors
    /// [`Error::Input`] naming file and video when it is unreadable, its bytes have changed, or a frame is no picture of this size.
    pub fn verify(&self, v: usize) -> Result<()> {
        const BLOCK: u64 = 64;
        let mut hash = Xxh3::new();
        let range = self.frames_of(v);
        let (height, width) = (self.header.height, self.header.width);
        let mut at = range.start;
        while at < range.end {
            let end = (at + BLOCK).min(range.end);
            let (bytes, spans) = self.read(at..end)?;
            hash.update(&bytes);
            if self.header.encoding == Encoding::Jpeg {
                // All of each, as training does: one that ends early has a good beginning.
                let failed = spans.into_par_iter().enumerate().find_map_first(|(i, span)| {
                    jpeg::decode_and_forget(&bytes[span], height, width).err().map(|why| (i, why))
                });
                if let Some((i, why)) = failed {
                    return Err(damaged(&self.path, &self.ids[v], at + i as u64 - range.start, &why));
                }
            }
            at = end;
        }
        if hash.digest() != self.checksums[v] {
            return Err(Error::input(format!(
                "{}: video {} (number {v}) is damaged: the checksum of its stored bytes (XXH3-64) is {:016x}, not {:016x} as \
                 /video_checksums says",
                self.path.display(),
                self.ids[v],
                hash.digest(),
                self.checksums[v]
            )));
        }
        Ok(())
    }

    /// Is the file still there and whole? HDF5 reads zeros past a truncated file's end without a word, so this is
    /// asked before a video is read.
    ///
    /// # Errors
    /// [`Error::Input`] when it is gone or has shrunk.
    pub fn still_there(&self) -> Result<()> {
        let now = check::file(&self.path)?;
        if now < self.bytes {
            return Err(Error::input(format!(
                "{}: truncated while in use: {now} bytes, {} when it was opened",
                self.path.display(),
                self.bytes
            )));
        }
        Ok(())
    }

    fn check_frame_offsets(&self, frames: u64) -> Result<()> {
        const BLOCK: u64 = 1 << 20;
        let Some(index) = &self.frame_offsets else { return Ok(()) };
        let mut at = 0;
        while at < frames {
            let end = (at + BLOCK).min(frames);
            let part = index
                .read_slice_1d::<u64, _>(at as usize..end as usize + 1)
                .map_err(|e| self.unreadable(&(at..end), e))?
                .to_vec();
            check::growing(&self.path, "frame_offsets", &part, at)?;
            check::frame_ends(&self.path, &part, at == 0, end == frames, self.data.rows() as usize)?;
            at = end;
        }
        Ok(())
    }

    fn unreadable(&self, frames: &Range<u64>, e: hdf5::Error) -> Error {
        let (a, b) = (frames.start, frames.end);
        Error::input(format!("{}: frames {a}..{b} cannot be read: {e}", self.path.display()))
    }
}

/// Why HDF5 did not open a file.
fn unopened(e: &hdf5::Error) -> String {
    let text = e.to_string();
    match text.contains("Too many open files") || text.contains("errno = 24") {
        true => "cannot be opened, for this process has too many files open: raise the limit (ulimit -n 4096)".into(),
        false => format!("not a readable HDF5 file (truncated or damaged?): {text}"),
    }
}

/// The error for frame `t` (counted in its video) of video `id` of the shard `path`.
fn damaged(path: &Path, id: &str, t: u64, why: &str) -> Error {
    Error::input(format!("{}: video {id}, frame {t}: {why}", path.display()))
}
