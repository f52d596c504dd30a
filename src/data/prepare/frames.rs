//! Frames out of what ffmpeg writes.

use std::io::{BufRead, BufReader, ErrorKind, Read};

use crate::Result;

type Store<'a> = &'a mut dyn FnMut(Vec<u8>) -> Result<()>;
/// True if bytes of an unfinished frame were left; what could not be read or stored.
type Outcome = std::result::Result<bool, String>;

/// Reads frames of `size` bytes to the end.
pub(super) fn of_size(from: &mut impl Read, size: usize, store: Store) -> Outcome {
    loop {
        let mut frame = Vec::with_capacity(size);
        from.take(size as u64).read_to_end(&mut frame).map_err(unread)?;
        if frame.len() < size {
            return Ok(!frame.is_empty());
        }
        store(frame).map_err(|e| e.to_string())?;
    }
}

/// Bytes of a line, at most.
const LINE: u64 = 1 << 10;

/// The most bytes that are taken for a JPEG file of a frame of `size` bytes: more than any needs.
pub(super) fn most(size: usize) -> usize {
    4 * size + (1 << 16)
}

/// Reads parts (ffmpeg's `mpjpeg`: lines with the part's length, an empty line, that many bytes) of `most` bytes to the end.
pub(super) fn in_parts(from: &mut impl Read, most: usize, store: Store) -> Outcome {
    let mut from = BufReader::new(from);
    let (mut length, mut line) = (None, String::new());
    loop {
        line.clear();
        (&mut from).take(LINE).read_line(&mut line).map_err(unread)?;
        if line.is_empty() {
            return Ok(length.is_some());
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            let known = value.trim().parse().ok().filter(|length| *length <= most);
            length = Some(known.ok_or_else(|| format!("ffmpeg announces a frame of {} bytes", value.trim()))?);
        }
        // Before the first part and after each there are lines without a length.
        let Some(wanted) = length.filter(|_| line.trim_end().is_empty()) else { continue };
        let mut frame = Vec::with_capacity(wanted);
        (&mut from).take(wanted as u64).read_to_end(&mut frame).map_err(unread)?;
        if frame.len() < wanted {
            return Ok(true);
        }
        length = None;
        store(frame).map_err(|e| e.to_string())?;
    }
}

fn unread(e: std::io::Error) -> String {
    match e.kind() {
        ErrorKind::InvalidData => "ffmpeg's output has lost its form".into(),
        _ => format!("reading from ffmpeg: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(how: impl Fn(&mut &[u8], Store) -> Outcome, mut bytes: &[u8]) -> (Outcome, Vec<Vec<u8>>) {
        let mut frames = Vec::new();
        let outcome = how(&mut bytes, &mut |frame| {
            frames.push(frame);
            Ok(())
        });
        (outcome, frames)
    }

    #[test]
    fn frames_of_one_size_are_cut_and_a_rest_is_told() {
        let of = |bytes: &[u8]| read(|from, store| of_size(from, 2, store), bytes);
        assert_eq!(of(b""), (Ok(false), vec![]));
        assert_eq!(of(b"abcd"), (Ok(false), vec![b"ab".to_vec(), b"cd".to_vec()]));
        assert_eq!(of(b"abc"), (Ok(true), vec![b"ab".to_vec()]));
    }

    #[test]
    fn parts_have_the_length_they_say_whatever_is_in_them() {
        let of = |bytes: &[u8]| read(|from, store| in_parts(from, 9, store), bytes);
        let two = b"--ffmpeg\r\nContent-type: image/jpeg\r\nContent-length: 4\r\n\r\n\r\n\r\n\r\n--ffmpeg\r\n\
            Content-type: image/jpeg\r\nContent-length: 1\r\n\r\n\xff\r\n--ffmpeg\r\n";
        assert_eq!(of(two), (Ok(false), vec![b"\r\n\r\n".to_vec(), b"\xff".to_vec()]));
        assert_eq!(of(b""), (Ok(false), vec![]));
        assert_eq!(of(b"--ffmpeg\r\n"), (Ok(false), vec![]));
        // Cut within a frame, and before it.
        for end in [two.len() - 13, two.len() - 17] {
            let (outcome, frames) = of(&two[..end]);
            assert_eq!((outcome, frames.len()), (Ok(true), 1), "{end}");
        }
        for length in ["10", "-1", "x"] {
            let (outcome, _) = of(format!("Content-length: {length}\r\n\r\n0123456789").as_bytes());
            assert!(outcome.unwrap_err().contains(&format!("a frame of {length} bytes")));
        }
        assert!(of(b"\xff\xd8\xff\xe0").0.unwrap_err().contains("lost its form"));
    }
}
