//! The frames of a video as ffmpeg writes them: into memory, which is a file to it. Through a pipe decoding takes a fifteenth longer:
//! each half a frame wakes the reader, on a processor that decodes.

use std::fs::File;
use std::io::{BufRead, Read, Seek};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{Mmap, MmapOptions};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Memory for children to write into, used again and again: fresh pages take the system longer than a child takes to fill them.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool(Arc<Mutex<Vec<Memory>>>);

/// Bytes of memory that wait to be used again, at most, in all.
const KEPT: usize = 1 << 30;
/// Memory of more bytes does not wait: it would stay as large as the largest video.
const LARGEST: usize = 128 << 20;

impl Pool {
    /// Memory that nobody uses.
    pub(super) fn lend(&self) -> std::io::Result<Memory> {
        if let Some(mut memory) = self.kept().pop() {
            memory.file.rewind()?;
            return Ok(memory);
        }
        // The system may demand that it cannot be executed (vm.memfd_noexec); Linux before 6.3 does not know the flag.
        const NOT_EXECUTABLE: MFdFlags = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
        let file = match memfd_create("frames", MFdFlags::MFD_CLOEXEC | NOT_EXECUTABLE) {
            Err(Errno::EINVAL) => memfd_create("frames", MFdFlags::MFD_CLOEXEC)?,
            made => made?,
        };
        Ok(Memory { file: file.into(), bytes: None })
    }

    /// Gives back to the system what waits to be used again.
    pub(super) fn clear(&self) {
        self.kept().clear();
    }

    fn take_back(&self, memory: Memory) {
        let mut kept = self.kept();
        let all: usize = kept.iter().map(Memory::size).sum();
        if memory.size() <= LARGEST && all + memory.size() <= KEPT {
            kept.push(memory);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory with a file's interface.
#[derive(Debug)]
pub(super) struct Memory {
    file: File,
    /// All of it, as large as it was when it was last read.
    bytes: Option<Mmap>,
}

impl Memory {
    /// What a child writes to, as its standard output for instance. All writers share one position.
    pub(super) fn writer(&self) -> std::io::Result<File> {
        self.file.try_clone()
    }

    /// Bytes written since it was lent.
    pub(super) fn written(&mut self) -> std::io::Result<usize> {
        Ok(self.file.stream_position()? as usize)
    }

    /// The frames in what was written, which `cut` finds, or why it finds none. Whoever could write has ended.
    pub(super) fn frames(
        mut self,
        pool: &Pool,
        cut: impl FnOnce(&[u8]) -> Result<Vec<Range<usize>>, String>,
    ) -> std::io::Result<Result<Frames, String>> {
        let written = self.written()?;
        let bytes = match self.bytes.take() {
            Some(bytes) if bytes.len() >= written => bytes,
            // SAFETY: ffmpeg, which alone was given the file, has ended and leaves no process behind; this process has it written to
            // again only when it is lent again, and frames in use prevent that. Nobody makes it shorter.
            _ => unsafe { MmapOptions::new().populate().map(&self.file) }?,
        };
        let places = cut(&bytes[..written]);
        Ok(places.map(|places| Frames {
            memory: Some(Memory { bytes: Some(bytes), ..self }),
            pool: pool.clone(),
            places,
        }))
    }

    fn size(&self) -> usize {
        self.bytes.as_ref().map_or(0, |bytes| bytes.len())
    }
}

/// A video's frames, in order.
#[derive(Debug, Default)]
pub struct Frames {
    memory: Option<Memory>,
    pool: Pool,
    places: Vec<Range<usize>>,
}

impl Frames {
    /// How many.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// One after another.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let bytes = self.memory.as_ref().and_then(|memory| memory.bytes.as_deref()).unwrap_or_default();
        self.places.iter().map(|place| &bytes[place.clone()])
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.take_back(memory);
        }
    }
}

const CUT_SHORT: &str = "ffmpeg's output ends within a frame";

/// Frames of `size` bytes.
pub(super) fn of_size(bytes: &[u8], size: usize) -> Result<Vec<Range<usize>>, String> {
    if !bytes.len().is_multiple_of(size) {
        return Err(CUT_SHORT.into());
    }
    Ok((0..bytes.len() / size).map(|n| n * size..(n + 1) * size).collect())
}

/// Bytes of a line, at most.
const LINE: u64 = 1 << 10;

/// Parts of ffmpeg's `mpjpeg`: lines, one of which has the part's length, an empty line, that many bytes.
pub(super) fn in_parts(bytes: &[u8]) -> Result<Vec<Range<usize>>, String> {
    let (mut places, mut rest) = (Vec::new(), bytes);
    let (mut length, mut line) = (None, String::new());
    loop {
        line.clear();
        (&mut rest).take(LINE).read_line(&mut line).map_err(|_| "ffmpeg's output has lost its form")?;
        if line.is_empty() {
            return if length.is_none() { Ok(places) } else { Err(CUT_SHORT.into()) };
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            let value = value.trim();
            let known: usize = value.parse().map_err(|_| format!("ffmpeg announces a frame of {value:?} bytes"))?;
            length = Some(known);
        }
        // Before the first part and after each there are lines without a length.
        let Some(length) = length.take_if(|_| line.trim_end().is_empty()) else { continue };
        let begin = bytes.len() - rest.len();
        rest = rest.get(length..).ok_or(CUT_SHORT)?;
        places.push(begin..begin + length);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn frames_of_one_size_are_cut_and_a_rest_is_told() {
        assert_eq!(of_size(b"", 2), Ok(vec![]));
        assert_eq!(of_size(b"abcd", 2), Ok(vec![0..2, 2..4]));
        assert!(of_size(b"abc", 2).unwrap_err().contains("within a frame"));
    }

    #[test]
    fn parts_have_the_length_they_say_whatever_is_in_them() {
        let two = b"--ffmpeg\r\nContent-type: image/jpeg\r\nContent-length: 4\r\n\r\n\r\n\r\n\r\n--ffmpeg\r\n\
            Content-type: image/jpeg\r\nContent-length: 1\r\n\r\n\xff\r\n--ffmpeg\r\n";
        let places = in_parts(two).unwrap();
        let parts: Vec<&[u8]> = places.into_iter().map(|place| &two[place]).collect();
        assert_eq!(parts, [&b"\r\n\r\n"[..], b"\xff"]);
        assert_eq!(in_parts(b""), Ok(vec![]));
        assert_eq!(in_parts(b"--ffmpeg\r\n"), Ok(vec![]));
        // Cut within a frame, and before it.
        for end in [two.len() - 13, two.len() - 17] {
            assert!(in_parts(&two[..end]).unwrap_err().contains("within a frame"), "{end}");
        }
        for length in ["-1", "x"] {
            let why = in_parts(format!("Content-length: {length}\r\n\r\n0123456789").as_bytes()).unwrap_err();
            assert!(why.contains(&format!("a frame of {length:?} bytes")), "{why}");
        }
        for length in [11, usize::MAX] {
            let why = in_parts(format!("Content-length: {length}\r\n\r\n0123456789").as_bytes()).unwrap_err();
            assert!(why.contains("within a frame"), "{why}");
        }
        assert!(in_parts(b"\xff\xd8\xff\xe0").unwrap_err().contains("lost its form"));
    }

    #[test]
    fn memory_is_used_again_once_its_frames_are_done_with() {
        let pool = Pool::default();
        let written = |bytes: &[u8]| {
            let memory = pool.lend().unwrap();
            memory.writer().unwrap().write_all(bytes).unwrap();
            memory.frames(&pool, |bytes| of_size(bytes, 2)).unwrap()
        };
        let one = written(b"abcdef").unwrap();
        let other = written(b"gh").unwrap();
        drop(one);
        assert_eq!(pool.kept().len(), 1);
        // Shorter than what is there, then longer.
        let shorter = written(b"ij").unwrap();
        assert!(pool.kept().is_empty() && shorter.iter().eq([b"ij"]) && other.iter().eq([b"gh"]));
        drop(shorter);
        let longer = written(b"klmnopqr").unwrap();
        assert!(longer.iter().eq([b"kl", b"mn", b"op", b"qr"]) && longer.len() == 4);
        drop(longer);
        let none = written(b"").unwrap();
        assert!(none.is_empty() && none.iter().next().is_none());
        // What is not as it should be may still be written to: it is not used again.
        assert!(written(b"x").is_err() && pool.kept().is_empty());
        drop((none, other));
        assert_eq!(pool.kept().len(), 2);
        pool.clear();
        let large = pool.lend().unwrap();
        large.file.set_len(LARGEST as u64 + 2).unwrap();
        drop(large.frames(&pool, |_| Ok(vec![])).unwrap().unwrap());
        assert!(pool.kept().is_empty());
    }
}
