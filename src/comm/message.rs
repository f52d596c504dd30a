//! What travels on a link: a 64-byte header ([`Header`]) in front of a payload of 32-bit words, in one buffer.
//!
//! Every message says what it is, so that a receiver finds a message that is out of place at once and can
//! name both what came and what was due, instead of computing with the wrong frame.

use std::fmt;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Words (of 32 bits) the header takes: 64 bytes, so that the payload starts on a cache line too.
pub const HEADER_WORDS: usize = 16;
/// First word of every message.
const MAGIC: u32 = 0x5344_5759;
/// Version of headers and payloads; programs of different versions refuse each other's messages.
const VERSION: u16 = 4;

/// What a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u16)]
pub enum Kind {
    /// A module's output on its way to a later module.
    Activation = 1,
    /// A gradient with respect to an earlier module's output, on its way back.
    Cotangent = 2,
    /// Target frames, from the module that reads the clip to the one that computes the loss.
    Target = 3,
    /// Class labels, on the same way.
    Labels = 4,
    /// Parameter gradients among the replicas of one module.
    Gradient = 5,
    /// Losses, counts and times on their way to whoever prints them.
    Report = 6,
    /// What the first module of replica 0 tells the other replicas'.
    Control = 7,
}

impl Kind {
    fn from_code(code: u16) -> Option<Kind> {
        use Kind::*;
        [Activation, Cotangent, Target, Labels, Gradient, Report, Control].into_iter().find(|kind| *kind as u16 == code)
    }
}

impl Kind {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Activation => "activation",
            Kind::Cotangent => "cotangent",
            Kind::Target => "target",
            Kind::Labels => "labels",
            Kind::Gradient => "gradient",
            Kind::Report => "report",
            Kind::Control => "control",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

bitflags::bitflags! {
    /// What is to be done when a batch ends, or behind it: asked for, or decided. Travels in the headers of messages that are sent anyway.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Orders: u32 {
        /// Write a checkpoint and go on.
        const CHECKPOINT = 1;
        /// Write a checkpoint and end, to be resumed (exit code 75).
        const STOP = 2;
        /// Write a checkpoint and end for good (exit code 0).
        const FINISH = 4;
        /// The batch's frames cannot be read: undo it, write a checkpoint of what was before it, and end with the reader's error.
        /// Decided by module 1 alone, never asked for.
        const UNDO = 8;
        /// Record the next batches (see `sideways trace`).
        const TRACE = 16;
        /// Any of those that end a run.
        const ENDS = Self::STOP.bits() | Self::FINISH.bits() | Self::UNDO.bits();
    }
}

/// Which batch of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchId {
    /// In training its number, counted from the start; in a validation how many batches were trained on before.
    pub number: u64,
    /// 0 in training; in a validation the batch's place there, from 1.
    pub validation: u32,
}

impl BatchId {
    /// Batch `place` (from 0) of the validation after `done` batches of training.
    pub fn of_validation(done: u64, place: u64) -> Self {
        BatchId { number: done, validation: place as u32 + 1 }
    }

    /// Whether it is a validation's first.
    pub fn begins_validation(self) -> bool {
        self.validation == 1
    }

    /// Whether it is trained on.
    pub fn is_training(self) -> bool {
        self.validation == 0
    }
}

impl From<u64> for BatchId {
    fn from(number: u64) -> Self {
        BatchId { number, validation: 0 }
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.number, self.validation) {
            (number, 0) => write!(f, "batch {number}"),
            (done, place) => write!(f, "batch {} of the validation after {done} batches", place - 1),
        }
    }
}

/// What a message says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// The link's number ([`super::LinkSpec::id`]).
    pub link: u32,
    /// The batch.
    pub batch: BatchId,
    /// The sender's step within the clip.
    pub step: u32,
    /// The sender's tick; for people reading logs, not verified.
    pub tick: u64,
    /// What is asked for, or was decided; not verified.
    pub orders: Orders,
    /// The payload's shape; unused trailing dimensions are 1.
    pub shape: [u32; 4],
    /// Payload length in 32-bit words.
    pub words: u32,
}

/// A header in a message, little-endian as all machines that this program runs on.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Wire {
    magic: u32,
    kind: u16,
    version: u16,
    link: u32,
    step: u32,
    batch: u64,
    tick: u64,
    orders: u32,
    words: u32,
    shape: [u32; 4],
    sequence: u32,
    validation: u32,
}

impl Header {
    /// A header for a payload of `shape` on link `link`, without tick and orders.
    pub fn new(kind: Kind, link: u32, batch: impl Into<BatchId>, step: u32, shape: [u32; 4]) -> Self {
        // Saturates instead of wrapping: a shape too large is then refused by the link's capacity check.
        let words = shape.iter().fold(1u32, |product, &dim| product.saturating_mul(dim));
        Header { kind, link, batch: batch.into(), step, tick: 0, orders: Orders::empty(), shape, words }
    }

    /// The same header, stamped with the sender's tick, and orders.
    pub fn stamped(mut self, tick: u64, orders: Orders) -> Self {
        (self.tick, self.orders) = (tick, orders);
        self
    }

    /// The same header in front of a payload of `words` 32-bit words: of another number format than 32-bit floats, or none
    /// where the values travel otherwise.
    pub fn carrying(mut self, words: u32) -> Self {
        self.words = words;
        self
    }

    /// The wire form; `sequence` counts the messages of a link (modulo 2³²).
    pub fn encode(&self, sequence: u32) -> [u32; HEADER_WORDS] {
        let Header { kind, link, batch, step, tick, orders, shape, words } = *self;
        bytemuck::cast(Wire {
            magic: MAGIC,
            kind: kind as u16,
            version: VERSION,
            link,
            step,
            batch: batch.number,
            tick,
            orders: orders.bits(),
            words,
            shape,
            sequence,
            validation: batch.validation,
        })
    }

    /// Reads the wire form: the header and its sequence number.
    ///
    /// Fails if the words are no header, or one of another version of this program.
    pub fn decode(words: &[u32; HEADER_WORDS]) -> Result<(Header, u32)> {
        let wire: Wire = bytemuck::cast(*words);
        if wire.magic != MAGIC {
            return Err(Error::Transport(format!(
                "the first word of a message is {:#010x}, expected {MAGIC:#010x}: not a message of this program",
                wire.magic
            )));
        }
        if wire.version != VERSION {
            return Err(Error::Transport(format!(
                "a message has format version {}, this program speaks version {VERSION}: run the same build on all ranks",
                wire.version
            )));
        }
        let kind = Kind::from_code(wire.kind).ok_or_else(|| {
            Error::Transport(format!("a message has the unknown kind {} (1 to 7 are known)", wire.kind))
        })?;
        let Wire { link, step, tick, words, shape, sequence, .. } = wire;
        let batch = BatchId { number: wire.batch, validation: wire.validation };
        let orders = Orders::from_bits_truncate(wire.orders);
        Ok((Header { kind, link, batch, step, tick, orders, shape, words }, sequence))
    }

    /// Is `self`, which came, the message that was due? Compares kind, link, batch, step, shape and words.
    ///
    /// The error text shows both headers and names the fields that differ.
    pub fn verify(&self, expected: &Header) -> std::result::Result<(), String> {
        let fields = [
            ("kind", self.kind == expected.kind),
            ("link", self.link == expected.link),
            ("batch", self.batch == expected.batch),
            ("step", self.step == expected.step),
            ("shape", self.shape == expected.shape),
            ("words", self.words == expected.words),
        ];
        if fields.iter().all(|(_, same)| *same) {
            return Ok(());
        }
        let differ: Vec<&str> = fields.iter().filter(|(_, same)| !same).map(|(name, _)| *name).collect();
        Err(format!("expected {expected}; got {self}: {} differ", differ.join(", ")))
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.shape;
        let Header { kind, link, batch, step, tick, words, .. } = self;
        write!(f, "[{kind} link {link} {batch} step {step} tick {tick} shape {a}x{b}x{c}x{d} ({words} words)]")
    }
}

/// Words of a page, the unit buffers are made of: a page that nothing else shares can be locked for a GPU's copies.
const PAGE_WORDS: usize = 1024;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u32; PAGE_WORDS]);

/// Words of a cache line, the unit of buffers that no GPU copies.
const LINE_WORDS: usize = 16;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; LINE_WORDS]);

enum Memory {
    Pages(Vec<Page>),
    Lines(Vec<Line>),
}

/// One message's place in memory: header and payload side by side, made once and used again and again.
pub(super) struct Buffer {
    /// The header, then the payload, filled up to whole pages or lines.
    memory: Memory,
    /// Payload capacity in words.
    words: usize,
}

impl Buffer {
    /// A zeroed buffer for up to `words` payload words, in whole `pages` or in lines.
    pub(super) fn new(words: usize, pages: bool) -> Self {
        if !pages {
            let memory = Memory::Lines(vec![Line::zeroed(); (HEADER_WORDS + words).div_ceil(LINE_WORDS)]);
            return Buffer { memory, words };
        }
        let number = (HEADER_WORDS + words).div_ceil(PAGE_WORDS);
        let mut pages = Vec::with_capacity(number);
        advise_huge_pages(&mut pages);
        pages.resize(number, Page::zeroed());
        Buffer { memory: Memory::Pages(pages), words }
    }

    fn all(&self) -> &[u32] {
        match &self.memory {
            Memory::Pages(pages) => bytemuck::cast_slice(pages),
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
        }
    }

    fn all_mut(&mut self) -> &mut [u32] {
        match &mut self.memory {
            Memory::Pages(pages) => bytemuck::cast_slice_mut(pages),
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
        }
    }

    /// The header's words.
    pub(super) fn header(&self) -> [u32; HEADER_WORDS] {
        std::array::from_fn(|n| self.all()[n])
    }

    /// Writes the header's words.
    pub(super) fn set_header(&mut self, words: [u32; HEADER_WORDS]) {
        self.all_mut()[..HEADER_WORDS].copy_from_slice(&words);
    }

    /// The payload at full capacity.
    pub(super) fn payload(&self) -> &[f32] {
        bytemuck::cast_slice(&self.all()[HEADER_WORDS..HEADER_WORDS + self.words])
    }

    /// The payload at full capacity, to be written.
    pub(super) fn payload_mut(&mut self) -> &mut [f32] {
        let words = self.words;
        bytemuck::cast_slice_mut(&mut self.all_mut()[HEADER_WORDS..HEADER_WORDS + words])
    }

    /// Where header and payload start, for a library that fills or reads them itself.
    pub(super) fn start(&mut self) -> *mut u32 {
        self.all_mut().as_mut_ptr()
    }
}

/// Buffers of this many bytes and more are asked for in huge pages.
const LARGE: usize = 4 << 20;

/// Asks for huge pages behind a large buffer before it is first touched. MPI copies between processes of a node through
/// the kernel, which looks up every page: with small ones 16 MiB took half as long again.
fn advise_huge_pages(pages: &mut Vec<Page>) {
    let bytes = pages.capacity() * size_of::<Page>();
    #[cfg(target_os = "linux")]
    if bytes >= LARGE {
        // SAFETY: whole pages of the vector's own memory; the advice changes no contents, and may be refused.
        unsafe { libc::madvise(pages.as_mut_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header::new(Kind::Cotangent, 7, 1 << 40, 5, [16, 28, 28, 64]).stamped(123_456_789_012, Orders::STOP)
    }

    #[test]
    fn encode_and_decode_are_inverse() {
        let (header, sequence) = Header::decode(&sample().encode(42)).unwrap();
        assert_eq!((header, sequence), (sample(), 42));
        assert_eq!(header.words, 16 * 28 * 28 * 64);
    }

    #[test]
    fn foreign_bytes_and_versions_are_refused() {
        let mut words = sample().encode(0);
        words[1] += 1 << 16;
        assert!(Header::decode(&words).unwrap_err().to_string().contains("version 5"));
        words = sample().encode(0);
        words[1] |= 0xff;
        assert!(Header::decode(&words).unwrap_err().to_string().contains("unknown kind 255"));
        words[0] = 1;
        assert!(Header::decode(&words).unwrap_err().to_string().contains("not a message"));
    }

    #[test]
    fn a_mismatch_shows_both_and_names_the_fields() {
        let mut other = sample();
        (other.step, other.shape[3], other.tick) = (6, 32, 1);
        other.words /= 2;
        let text = other.verify(&sample()).unwrap_err();
        for part in ["step 5", "step 6", "28x64", "28x32", "step, shape, words differ"] {
            assert!(text.contains(part), "{part:?} not in {text:?}");
        }
        assert!(sample().stamped(9, Orders::UNDO).verify(&sample()).is_ok(), "tick and orders are not compared");
    }

    #[test]
    fn a_header_has_64_bytes_and_a_payload_starts_behind_it() {
        assert_eq!(size_of::<Wire>(), 4 * HEADER_WORDS);
        let sizes = [0, 33, PAGE_WORDS, 3 * PAGE_WORDS];
        for (words, pages) in sizes.into_iter().flat_map(|words| [(words, true), (words, false)]) {
            let mut buffer = Buffer::new(words, pages);
            assert_eq!((buffer.payload().len(), buffer.payload_mut().len()), (words, words));
            assert_eq!(buffer.start() as usize % if pages { size_of::<Page>() } else { size_of::<Line>() }, 0);
            assert_eq!(buffer.start() as usize + 64, buffer.payload().as_ptr() as usize);
            let header = sample().encode(7);
            buffer.set_header(header);
            assert_eq!(buffer.header(), header);
        }
    }
}
