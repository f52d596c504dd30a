//! What `sideways bench data` sets the loader beside: video files decoded by `ffmpeg` when their frames are wanted.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::data::Dataset;
use crate::data::augment::View;
use crate::{Error, Result};

/// Video files, and the frames to make of them.
pub struct Videos<'a> {
    files: &'a [PathBuf],
    filter: String,
    frame: Vec<u8>,
    fps: f64,
    /// Frames of each file, once known.
    lengths: Vec<u64>,
    clips: u64,
}

impl<'a> Videos<'a> {
    /// Frames as `dataset`'s: scaled to cover its size and cut to it, at its rate.
    pub fn new(files: &'a [PathBuf], dataset: &Dataset) -> Self {
        let (h, w, fps) = (dataset.height, dataset.width, dataset.fps);
        let filter = format!("fps={fps},scale={w}:{h}:force_original_aspect_ratio=increase:flags=bicubic,crop={w}:{h}");
        Videos { files, filter, frame: vec![0; h * w * 3], fps, lengths: Vec::new(), clips: 0 }
    }

    /// All frames of all files in order. Returns the frames, and the files' bytes.
    ///
    /// # Errors
    /// [`Error::Input`] where `ffmpeg` cannot be run, or fails on a file.
    pub fn whole(&mut self, view: &View, out: &mut [f32]) -> Result<(u64, u64)> {
        let (mut frames, mut bytes, mut lengths) = (0, 0, Vec::new());
        for path in self.files {
            let found = self.decode(path, &[], &[], view, out)?;
            if found == 0 {
                return Err(Error::input(format!("{}: ffmpeg finds no frames in it", path.display())));
            }
            frames += found;
            bytes += path.metadata().map_err(|e| Error::io(path, e))?.len();
            lengths.push(found);
        }
        self.lengths = lengths;
        Ok((frames, bytes))
    }

    /// A window of `frames` frames at a pseudo-random place of the next file: what training from video files would ask
    /// for. Call [`Videos::whole`] before.
    ///
    /// # Errors
    /// As [`Videos::whole`].
    pub fn window(&mut self, frames: usize, view: &View, out: &mut [f32]) -> Result<(u64, u64)> {
        let n = self.clips as usize % self.files.len();
        let slack = self.lengths.get(n).map_or(0, |l| l.saturating_sub(frames as u64)) + 1;
        let start = xxhash_rust::xxh3::xxh3_64(&self.clips.to_le_bytes()) % slack;
        self.clips += 1;
        let (seek, count) = (format!("{:.6}", start as f64 / self.fps), frames.to_string());
        let found = self.decode(&self.files[n], &["-ss", &seek], &["-frames:v", &count], view, out)?;
        Ok((found, 0))
    }

    fn decode(&mut self, path: &Path, before: &[&str], after: &[&str], view: &View, out: &mut [f32]) -> Result<u64> {
        let mut input = std::ffi::OsString::from("file:");
        input.push(path);
        let failed = |why: String| Error::input(format!("{}: ffmpeg: {why}", path.display()));
        let mut child = Command::new("ffmpeg")
            .args(["-nostdin", "-hide_banner", "-loglevel", "error", "-threads", "1"])
            .args(before)
            .arg("-i")
            .arg(input)
            .args(["-map", "0:v:0", "-vf", &self.filter, "-filter_threads", "1"])
            .args(after)
            .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(format!("cannot be run ({e}); install it (Debian: apt install ffmpeg)")))?;
        let mut frames = 0;
        if let Some(mut stdout) = child.stdout.take() {
            while stdout.read_exact(&mut self.frame).is_ok() {
                view.apply(&self.frame, out);
                frames += 1;
            }
        }
        let status = child.wait().map_err(|e| failed(e.to_string()))?;
        if !status.success() {
            return Err(failed(format!("it ended with {status}")));
        }
        Ok(frames)
    }
}
