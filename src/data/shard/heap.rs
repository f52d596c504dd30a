//! A look at the collections that strings of variable length lie in, before HDF5 reads them: in one whose lengths are damaged it would
//! search without an end, or past its memory.
//!
//! A collection is `GCOL`, a version, three zeros and its size; then objects: number, references, four zeros, size, and as many bytes,
//! up to a multiple of eight. Number 0 is what is free, whose size counts these fields.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SIGNATURE: &[u8; 8] = b"GCOL\x01\0\0\0";
/// Bytes before a collection's objects, and before an object's content.
pub(super) const HEADER: usize = 16;
/// Where collections of shards are: near the beginning (attributes) and the end (names of videos), this far.
const FIRST: u64 = 64 << 10;
const LAST: u64 = 256 << 10;

/// Whether all collections found near the beginning and the end of the file of `bytes` bytes are whole; what cannot be read is HDF5's to
/// tell.
pub(super) fn is_whole(path: &Path, bytes: u64) -> bool {
    let read = |from: u64, to: u64| -> Option<Vec<u8>> {
        let mut part = vec![0; (to - from) as usize];
        File::open(path).and_then(|file| file.read_exact_at(&mut part, from)).ok()?;
        Some(part)
    };
    if bytes <= FIRST + LAST {
        return read(0, bytes).is_none_or(|all| collections(&all, true));
    }
    read(0, FIRST).is_none_or(|first| collections(&first, false))
        && read(bytes - LAST, bytes).is_none_or(|last| collections(&last, true))
}

/// The same of a part of the file; one that goes on behind it counts as whole unless the file ends there.
fn collections(part: &[u8], is_end: bool) -> bool {
    let found = part.windows(SIGNATURE.len()).enumerate().filter(|(_, bytes)| bytes == SIGNATURE);
    found.map(|(at, _)| at).all(|at| match length(part, at + 8) {
        Some(size) if size >= HEADER && size <= part.len() - at => objects(&part[at + HEADER..at + size]),
        Some(_) => !is_end,
        // Cut off within its own size.
        None => !is_end,
    })
}

fn objects(mut rest: &[u8]) -> bool {
    // What is too little for an object is free.
    while rest.len() >= HEADER {
        match whole(rest) {
            Some(bytes) => rest = &rest[bytes..],
            None => return false,
        }
    }
    true
}

/// Bytes of the first object with its fields, if it is whole.
fn whole(rest: &[u8]) -> Option<usize> {
    let size = length(rest, 8)?;
    let bytes = match rest[..2] {
        [0, 0] => size,
        _ => size.checked_next_multiple_of(8)?.checked_add(HEADER)?,
    };
    (HEADER..=rest.len()).contains(&bytes).then_some(bytes)
}

/// The size of the collection that begins with these bytes, [`HEADER`] at least.
pub(super) fn size(fields: &[u8]) -> Option<usize> {
    let size = fields.starts_with(SIGNATURE).then(|| length(fields, 8))?;
    size.filter(|size| *size >= HEADER)
}

/// The length of the object of this number in a collection, if it is there.
pub(super) fn object(collection: &[u8], number: u64) -> Option<u64> {
    let mut rest = collection.get(HEADER..)?;
    while number > 0 && rest.len() >= HEADER {
        if u64::from(u16::from_le_bytes([rest[0], rest[1]])) == number {
            return length(rest, 8).map(|size| size as u64);
        }
        rest = &rest[whole(rest)?..];
    }
    None
}

/// Eight bytes, the least first.
fn length(bytes: &[u8], at: usize) -> Option<usize> {
    let field: [u8; 8] = bytes.get(at..at + 8)?.try_into().ok()?;
    usize::try_from(u64::from_le_bytes(field)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A collection of objects of these numbers and sizes, in `size` bytes.
    fn collection(size: u64, objects: &[(u16, u64)]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend(size.to_le_bytes());
        for (number, size) in objects {
            bytes.extend(number.to_le_bytes());
            bytes.extend([1, 0, 0, 0, 0, 0]);
            bytes.extend(size.to_le_bytes());
            bytes.extend(vec![7; size.next_multiple_of(8).min(64) as usize]);
        }
        bytes.resize(bytes.len().max(size.min(1 << 12) as usize), 0);
        bytes
    }

    #[test]
    fn damaged_lengths_are_found() {
        let whole = |size, objects: &[(u16, u64)]| collections(&collection(size, objects), true);
        assert!(whole(16 + 24 + 32, &[(1, 3), (2, 16)]));
        assert!(whole(16 + 24 + 48, &[(1, 3), (0, 48)]), "with free space");
        assert!(whole(16 + 24 + 8, &[(1, 3)]), "with less free space than an object's fields");
        assert!(!whole(4096, &[(1, 3), (0, 0)]), "free space of no size: no step on");
        assert!(!whole(4096, &[(1, u64::MAX - 9)]), "a size that wraps around");
        assert!(!whole(4096, &[(1, 5000)]), "an object beyond its collection");
        assert!(!whole(1 << 40, &[(1, 3)]) && !whole(3, &[]), "a collection of another size");
        assert!(collections(&collection(1 << 40, &[(1, 3)]), false), "it goes on behind what was read");
        assert!(collections(b"no collection", true));
    }

    #[test]
    fn objects_are_found_by_number() {
        let whole = collection(16 + 24 + 32 + 24, &[(1, 3), (4, 16), (2, 7)]);
        assert_eq!([1, 2, 3, 4, 5].map(|number| object(&whole, number)), [Some(3), Some(7), None, Some(16), None]);
        assert_eq!(object(&whole, 0), None, "what is free is no object");
        assert_eq!((size(&whole), size(b"GCOL")), (Some(96), None));
    }
}
