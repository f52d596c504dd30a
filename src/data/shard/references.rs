//! A look at the references that stand for strings of variable length, before HDF5 follows them: it trusts that a collection holds the
//! object they name, and that it is as long as they say (H5HG_read of HDF5 1.10); and at the size of the heap that has the names of
//! datasets (H5HL_protect).
//!
//! A reference is 16 bytes: the string's length (4), the address of its collection (8), the number of an object in it (4). Those of
//! attributes lie in the root's object header, those of a dataset where its elements are (HDF5 File Format Specification, III.E, IV.A).

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::heap;

const REFERENCE: usize = 16;
/// More than a root's object header or a collection has.
const MOST: usize = 64 << 20;
/// Messages of object headers.
const ATTRIBUTE: u16 = 0x0c;
const CONTINUATION: u16 = 0x10;
const SYMBOL_TABLE: u16 = 0x11;
/// How the datatype of a string of variable length begins: its class (in the lower half, above it a version), and the kind in it.
const VARIABLE_LENGTH: u8 = 9;
const STRING: u8 = 1;

/// A file whose references are looked at.
pub(super) struct References {
    file: File,
    /// Where its addresses count from: behind what a program put before HDF5's part (a user block).
    base: u64,
}

/// Bytes, the least first.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(size)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

impl References {
    /// Of the HDF5 file `path`; nothing if it is of a form that this does not know, or cannot be read.
    pub(super) fn of(path: &Path) -> Option<(Self, u64)> {
        const SIGNATURE: &[u8; 8] = b"\x89HDF\r\n\x1a\n";
        let mut file = Self { file: File::open(path).ok()?, base: 0 };
        let starts = std::iter::once(0).chain((9..40).map(|power| 1 << power));
        let (base, superblock) = starts
            .map_while(|at| Some((at, file.read(at, 96)?)))
            .find(|(_, superblock)| superblock.starts_with(SIGNATURE))?;
        file.base = base;
        // Where the sizes of addresses and lengths, and the root's address, stand.
        let (sizes, root) = match superblock[8] {
            0 => (13, 64),
            1 => (13, 68),
            2 | 3 => (9, 36),
            _ => return None,
        };
        let root = (superblock[sizes..sizes + 2] == [8, 8]).then(|| number(&superblock, root, 8))??;
        Some((file, root))
    }

    fn read(&self, at: u64, size: usize) -> Option<Vec<u8>> {
        if size > MOST {
            return None;
        }
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, self.base.checked_add(at)?).ok()?;
        Some(bytes)
    }

    /// Whether the references of all attributes in the object header of a group at `header` hold, and its names' heap lies in the file.
    pub(super) fn group_holds(&self, header: u64) -> bool {
        let check = |kind, message: &[u8]| {
            let holds = match kind {
                ATTRIBUTE => references(message).is_none_or(|all| self.hold(all)),
                SYMBOL_TABLE => number(message, 8, 8).is_none_or(|heap| self.names_lie_inside(heap)),
                _ => true,
            };
            if holds { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        self.messages(header, check).is_none_or(|done| done.is_continue())
    }

    /// Whether the local heap at `heap` lies in the file (III.D: its name, a version, its size, the first that is free, where it begins).
    fn names_lie_inside(&self, heap: u64) -> bool {
        let end = || {
            let fields = self.read(heap, 32).filter(|fields| fields.starts_with(b"HEAP"))?;
            number(&fields, 8, 8)?.checked_add(number(&fields, 24, 8)?)?.checked_add(self.base)
        };
        end().is_some_and(|end| self.file.metadata().is_ok_and(|file| end <= file.len()))
    }

    /// Whether those `count` references hold that lie one after the other from byte `at` of the file.
    pub(super) fn stored_hold(&self, at: u64, count: usize) -> bool {
        let all = at.checked_sub(self.base).and_then(|at| self.read(at, count.checked_mul(REFERENCE)?));
        all.is_none_or(|all| self.hold(&all))
    }

    /// Each message of the object header at `header`, by kind, until one is enough; nothing where it cannot be read on.
    fn messages(&self, header: u64, mut each: impl FnMut(u16, &[u8]) -> ControlFlow<()>) -> Option<ControlFlow<()>> {
        let prefix = self.read(header, 40)?;
        let new = prefix.starts_with(b"OHDR");
        let flags = prefix[5];
        // A message's kind, size and flags; with an old header three zeros, with a new one perhaps a number.
        let fields = if new { 4 + 2 * usize::from(flags >> 2 & 1) } else { 8 };
        let (at, size) = if new {
            let times = if flags & 0x20 == 0 { 6 } else { 22 };
            let at = times + if flags & 0x10 == 0 { 0 } else { 4 };
            let width = 1 << (flags & 3);
            (at + width, number(&prefix, at, width)?)
        } else {
            (16, number(&prefix, 8, 4)?)
        };
        let mut blocks = vec![(header.checked_add(at as u64)?, size)];
        let mut read = 0;
        while let Some((at, size)) = blocks.pop() {
            let block = self.read(at, usize::try_from(size).ok()?)?;
            // Damaged continuations may lead round and round.
            read += block.len().max(1);
            if read > MOST {
                return None;
            }
            let mut rest = &block[..];
            while rest.len() >= fields {
                let (kind, size) = if new {
                    (u16::from(rest[0]), number(rest, 1, 2)?)
                } else {
                    (number(rest, 0, 2)? as u16, number(rest, 2, 2)?)
                };
                let Some(message) = rest.get(fields..fields + size as usize) else { break };
                if kind == CONTINUATION {
                    let (at, size) = (number(message, 0, 8)?, number(message, 8, 8)?);
                    // A new one begins with its name, `OCHK`, and ends with a checksum.
                    blocks.push(if new { (at.checked_add(4)?, size.checked_sub(8)?) } else { (at, size) });
                } else if each(kind, message).is_break() {
                    return Some(ControlFlow::Break(()));
                }
                rest = &rest[fields + size as usize..];
            }
        }
        Some(ControlFlow::Continue(()))
    }

    /// Whether each leads to an object of its length. What is no collection HDF5 itself refuses.
    fn hold(&self, references: &[u8]) -> bool {
        let mut last: Option<(u64, Vec<u8>)> = None;
        references.chunks_exact(REFERENCE).all(|reference| {
            let field = |at, size| number(reference, at, size).unwrap_or_default();
            let (length, address, object) = (field(0, 4), field(4, 8), field(12, 4));
            if address == 0 {
                return true;
            }
            if last.as_ref().is_none_or(|(at, _)| *at != address) {
                let size = self.read(address, heap::HEADER).and_then(|fields| heap::size(&fields));
                last = size.and_then(|size| self.read(address, size)).map(|collection| (address, collection));
            }
            last.as_ref().is_none_or(|(_, collection)| heap::object(collection, object) == Some(length))
        })
    }
}

/// The references that an attribute's message ends with, if its values are strings of variable length.
fn references(message: &[u8]) -> Option<&[u8]> {
    let version = message.first()?;
    let size = |at| number(message, at, 2).map(|size| size as usize);
    let sizes = [size(2)?, size(4)?, size(6)?];
    let first = if *version == 3 { 9 } else { 8 };
    let [name, datatype, dataspace] = match version {
        1 => sizes.map(|size| size.next_multiple_of(8)),
        _ => sizes,
    };
    let [class, kind] = *message.get(first + name..)?.first_chunk::<2>()?;
    let is_string = class & 0x0f == VARIABLE_LENGTH && kind & 0x0f == STRING;
    is_string.then(|| message.get(first + name + datatype + dataspace..)).flatten()
}
