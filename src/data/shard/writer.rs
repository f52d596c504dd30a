//! Writing a shard: append videos, then [`ShardWriter::finish`].

use std::fs::File;
use std::path::{Path, PathBuf};

use hdf5::plist::dataset_create::FillTime;
use ndarray::ArrayView4;
use xxhash_rust::xxh3::Xxh3;

use super::{Encoding, ShardHeader, attributes, check};
use crate::sys::files::{begin_sync, free_space};
use crate::{Error, Result};

/// Bytes of a chunk of `/frames` or `/jpeg`.
const CHUNK: usize = 256 << 10;
/// Bytes collected before they are written, about.
const BLOCK: usize = 4 << 20;

/// Writes one shard, video by video. The file appears under its name only when [`ShardWriter::finish`] has it
/// complete on disk; dropped before, it leaves nothing.
///
/// Memory: a few MiB and the current video's offsets, whatever the shard's size.
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    header: ShardHeader,
    /// `None` once closed.
    open: Option<(hdf5::File, hdf5::Dataset)>,
    /// The same file, for syncing.
    file: File,
    /// Bytes collected before they are written: whole chunks, where frames are of one size.
    block: usize,
    /// Frame bytes not yet written, which begin at `written` (bytes).
    pending: Vec<u8>,
    written: u64,
    labels: Vec<i32>,
    ids: Vec<String>,
    video_offsets: Vec<u64>,
    frame_offsets: Vec<u64>,
    checksums: Vec<u64>,
}

impl ShardWriter {
    /// Starts the shard `path`; until it is finished its file is called `path` + `.partial`.
    ///
    /// # Errors
    /// [`Error::Input`] when the header makes no sense or the file cannot be made.
    pub fn create(path: &Path, header: ShardHeader) -> Result<Self> {
        check::header(path, &header)?;
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let rows = (CHUNK / header.frame_bytes()).max(1);
        let chunk = if header.encoding == Encoding::Raw { rows * header.frame_bytes() } else { CHUNK };
        let make = || -> hdf5::Result<_> {
            // No file locks: the name is this writer's alone, and some clusters' file systems have none.
            let mut access = hdf5::File::with_options();
            access.with_fapl(|access| access.file_locking(false));
            let file = access.create(&partial)?;
            attributes::write(&file, &header)?;
            // What is written at a time is many chunks: a cache would only copy each once more.
            let builder = file.new_dataset::<u8>().fill_time(FillTime::Never).chunk_cache(1, 0, 1.0);
            let frames = match header.encoding {
                Encoding::Raw => {
                    let (h, w) = (header.height, header.width);
                    builder.shape((0.., h, w, 3)).chunk((rows, h, w, 3)).create("frames")?
                }
                Encoding::Jpeg => builder.shape((0..,)).chunk((CHUNK,)).create("jpeg")?,
            };
            Ok((file, frames))
        };
        let open = make().map_err(|e| {
            let why = system_error(&e.to_string(), &partial);
            Error::input(format!("{}: cannot write this shard: {why}", partial.display()))
        })?;
        let file = File::open(&partial).map_err(|e| {
            let _ = std::fs::remove_file(&partial);
            Error::io(&partial, e)
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            partial,
            header,
            open: Some(open),
            file,
            block: BLOCK.next_multiple_of(chunk),
            pending: Vec::new(),
            written: 0,
            labels: Vec::new(),
            ids: Vec::new(),
            video_offsets: vec![0],
            frame_offsets: vec![0],
            checksums: Vec::new(),
        })
    }

    /// The number of videos so far.
    pub fn videos(&self) -> usize {
        self.labels.len()
    }

    /// The number of frames so far.
    pub fn frames(&self) -> u64 {
        self.video_offsets.last().copied().unwrap_or(0)
    }

    /// Adds one video of class `label`. Each frame is stored as given: `height * width * 3` bytes of RGB, or one
    /// JPEG file of that size (see [`crate::data::jpeg::encode`]).
    ///
    /// # Errors
    /// [`Error::Input`] for no frames, a frame of the wrong length, or a label that is no class; then, as after a
    /// failed write, the shard must be given up.
    pub fn append<F: AsRef<[u8]>>(&mut self, id: &str, label: i32, frames: impl IntoIterator<Item = F>) -> Result<()> {
        check::label(&self.path, id, label, self.header.class_names.len())?;
        if id.contains('\0') {
            return Err(Error::input(format!("{}: video id {id:?} holds a zero byte", self.path.display())));
        }
        let mut hash = Xxh3::new();
        let mut count = 0u64;
        for frame in frames {
            let frame = frame.as_ref();
            let wanted = self.header.frame_bytes();
            if self.header.encoding == Encoding::Raw && frame.len() != wanted {
                return Err(Error::input(format!(
                    "{}: frame {count} of video {id} has {} bytes, not {wanted}",
                    self.path.display(),
                    frame.len()
                )));
            }
            hash.update(frame);
            self.pending.extend_from_slice(frame);
            if self.header.encoding == Encoding::Jpeg {
                self.frame_offsets.push(self.written + self.pending.len() as u64);
            }
            count += 1;
            if self.pending.len() >= self.block {
                self.flush()?;
            }
        }
        if count == 0 {
            return Err(Error::input(format!("{}: video {id} has no frames", self.path.display())));
        }
        self.labels.push(label);
        self.ids.push(id.to_string());
        self.video_offsets.push(self.frames() + count);
        self.checksums.push(hash.digest());
        Ok(())
    }

    /// Completes the file, forces it to disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::Input`] for a shard without videos, [`Error::Run`] or [`Error::Io`] when the disk refuses.
    pub fn finish(mut self) -> Result<PathBuf> {
        if self.labels.is_empty() {
            return Err(Error::input(format!("{}: a shard needs at least one video", self.path.display())));
        }
        self.flush()?;
        let Some((file, frames)) = self.open.take() else { return Err(self.failed("already closed")) };
        let close = || -> hdf5::Result<()> {
            let ids = self.ids.iter().map(|s| attributes::text(s)).collect::<hdf5::Result<Vec<_>>>()?;
            let mut datasets = vec![
                frames,
                file.new_dataset_builder().with_data(&self.labels[..]).create("labels")?,
                file.new_dataset_builder().with_data(&ids[..]).create("video_ids")?,
                file.new_dataset_builder().with_data(&self.video_offsets[..]).create("video_offsets")?,
                file.new_dataset_builder().with_data(&self.checksums[..]).create("video_checksums")?,
            ];
            if self.header.encoding == Encoding::Jpeg {
                datasets.push(file.new_dataset_builder().with_data(&self.frame_offsets[..]).create("frame_offsets")?);
            }
            // HDF5 still keeps parts of them in memory. A dataset's closing would write these too, but tell no one of a
            // failure: it is dropped.
            file.flush()?;
            drop(datasets);
            file.close()
        };
        close().map_err(|e| self.failed(e))?;
        self.file.sync_all().map_err(|e| Error::io(&self.partial, e))?;
        std::fs::rename(&self.partial, &self.path).map_err(|e| Error::io(&self.path, e))?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| Error::io(folder, e))?;
        Ok(self.path.clone())
    }

    /// Writes what is pending. HDF5 grows the file; the frames' place in it is `written`.
    fn flush(&mut self) -> Result<()> {
        let Some((_, dataset)) = &self.open else { return Err(self.failed("already closed")) };
        let (h, w, bytes) = (self.header.height, self.header.width, self.header.frame_bytes());
        let end = self.written as usize + self.pending.len();
        let write = || -> hdf5::Result<()> {
            match self.header.encoding {
                Encoding::Raw => {
                    let rows = self.written as usize / bytes..end / bytes;
                    dataset.resize((rows.end, h, w, 3))?;
                    let view = ArrayView4::from_shape((rows.len(), h, w, 3), &self.pending)?;
                    dataset.write_slice(view, (rows, .., .., ..))
                }
                Encoding::Jpeg => {
                    dataset.resize((end,))?;
                    dataset.write_slice(&self.pending[..], self.written as usize..end)
                }
            }
        };
        write().map_err(|e| self.failed(e))?;
        begin_sync(&self.file);
        self.written = end as u64;
        self.pending.clear();
        Ok(())
    }

    fn failed(&self, why: impl std::fmt::Display) -> Error {
        let why = system_error(&why.to_string(), &self.partial);
        Error::Run(format!("{}: writing this shard failed: {why}", self.partial.display()))
    }
}

/// HDF5 tells much about a failed write; what the operating system said is somewhere within, or can be guessed.
fn system_error(why: &str, partial: &Path) -> String {
    let quoted = why.split_once("error message = '").and_then(|(_, rest)| rest.split('\'').next());
    let folder = partial.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match quoted {
        Some(quoted) => quoted.to_string(),
        None if free_space(folder).is_some_and(|free| free < FULL) => "No space left on device".into(),
        None => why.to_string(),
    }
}

/// With less room than this a disk is full.
const FULL: u64 = 64 << 10;

impl Drop for ShardWriter {
    fn drop(&mut self) {
        drop(self.open.take());
        // After a finished shard there is nothing under this name; a failure to tidy up has no one to tell.
        let _ = std::fs::remove_file(&self.partial);
    }
}
