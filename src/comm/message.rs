//! What travels on a link: a 64-byte header in front of a payload of 32-bit floats, in one buffer.
//!
//! | word | 0 | 1 | 2 | 3 | 4–5 | 6–7 | 8 | 9 | 10–13 | 14 | 15 |
//! |---|---|---|---|---|---|---|---|---|---|---|---|
//! | holds | magic | version, kind | edge | step | clip | tick | flags | words | shape | sequence | zero |
//!
//! Every message says what it is, so that a receiver finds a message that is out of place at once and can
//! name both what came and what was due, instead of computing with the wrong frame.

use std::fmt;

use crate::{Error, Result};

/// Words (of 32 bits) the header takes: 64 bytes, so that the payload starts on a cache line too.
pub const HEADER_WORDS: usize = 16;
/// First word of every message.
const MAGIC: u32 = 0x5344_5759;
/// Version of the layout above; programs of different versions refuse each other's messages.
const VERSION: u16 = 1;

/// What a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// What one replica's first module tells the others'.
    Control = 7,
}

impl Kind {
    fn from_code(code: u16) -> Option<Kind> {
        use Kind::*;
        [Activation, Cotangent, Target, Labels, Gradient, Report, Control].into_iter().find(|kind| *kind as u16 == code)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Activation => "activation",
            Kind::Cotangent => "cotangent",
            Kind::Target => "target",
            Kind::Labels => "labels",
            Kind::Gradient => "gradient",
            Kind::Report => "report",
            Kind::Control => "control",
        })
    }
}

/// What a message says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// The link's number ([`super::LinkSpec::id`]).
    pub edge: u32,
    /// Clip batch, counted from the start of training.
    pub clip: u64,
    /// The sender's step within the clip.
    pub step: u32,
    /// The sender's tick; for people reading logs, not verified.
    pub tick: u64,
    /// Bits the engine gives a meaning (a request to stop, to write a checkpoint); not verified.
    pub flags: u32,
    /// The payload's shape; unused trailing dimensions are 1.
    pub shape: [u32; 4],
    /// Payload length in 32-bit words.
    pub words: u32,
}

impl Header {
    /// A header for a payload of `shape` on link `edge`; tick and flags are zero.
    pub fn new(kind: Kind, edge: u32, clip: u64, step: u32, shape: [u32; 4]) -> Self {
        // Saturates instead of wrapping: a shape too large is then refused by the link's capacity check.
        let words = shape.iter().fold(1u32, |product, &dim| product.saturating_mul(dim));
        Header { kind, edge, clip, step, tick: 0, flags: 0, shape, words }
    }

    /// The same header, stamped with the sender's tick and flags.
    pub fn stamped(mut self, tick: u64, flags: u32) -> Self {
        (self.tick, self.flags) = (tick, flags);
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
        let [a, b, c, d] = self.shape;
        let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
        [
            MAGIC,
            u32::from(VERSION) << 16 | u32::from(self.kind as u16),
            self.edge,
            self.step,
            low(self.clip),
            high(self.clip),
            low(self.tick),
            high(self.tick),
            self.flags,
            self.words,
            a,
            b,
            c,
            d,
            sequence,
            0,
        ]
    }

    /// Reads the wire form: the header and its sequence number.
    ///
    /// Fails if the words are no header, or one of another version of this program.
    pub fn decode(words: &[u32; HEADER_WORDS]) -> Result<(Header, u32)> {
        if words[0] != MAGIC {
            return Err(Error::Transport(format!(
                "the first word of a message is {:#010x}, expected {MAGIC:#010x}: not a message of this program",
                words[0]
            )));
        }
        let version = words[1] >> 16;
        if version != u32::from(VERSION) {
            return Err(Error::Transport(format!(
                "a message has format version {version}, this program speaks version {VERSION}: \
                 run the same build on all ranks"
            )));
        }
        let code = words[1] as u16;
        let kind = Kind::from_code(code)
            .ok_or_else(|| Error::Transport(format!("a message has the unknown kind {code} (1 to 7 are known)")))?;
        let long = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let header = Header {
            kind,
            edge: words[2],
            clip: long(words[4], words[5]),
            step: words[3],
            tick: long(words[6], words[7]),
            flags: words[8],
            shape: [words[10], words[11], words[12], words[13]],
            words: words[9],
        };
        Ok((header, words[14]))
    }

    /// Is `self`, which came, the message that was due? Compares kind, edge, clip, step, shape and words.
    ///
    /// The error text shows both headers and names the fields that differ.
    pub fn verify(&self, expected: &Header) -> std::result::Result<(), String> {
        let fields = [
            ("kind", self.kind == expected.kind),
            ("edge", self.edge == expected.edge),
            ("clip", self.clip == expected.clip),
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
        let Header { kind, edge, clip, step, tick, words, .. } = self;
        write!(f, "[{kind} edge {edge} clip {clip} step {step} tick {tick} shape {a}x{b}x{c}x{d} ({words} words)]")
    }
}

/// 64 bytes, the unit buffers are made of: one header, or 16 payload words.
#[derive(Clone)]
#[repr(C, align(64))]
struct Block([u32; HEADER_WORDS]);

/// One message's place in memory: header and payload side by side, made once and used again and again.
pub(super) struct Buffer {
    /// The header, then the payload rounded up to whole blocks.
    blocks: Vec<Block>,
    /// Payload capacity in words.
    words: usize,
}

impl Buffer {
    /// A zeroed buffer for up to `words` payload words.
    pub(super) fn new(words: usize) -> Self {
        let number = 1 + words.div_ceil(HEADER_WORDS);
        let mut blocks = Vec::with_capacity(number);
        advise_huge_pages(&mut blocks);
        blocks.resize(number, Block([0; HEADER_WORDS]));
        Buffer { blocks, words }
    }

    /// The header's words.
    pub(super) fn header(&self) -> &[u32; HEADER_WORDS] {
        &self.blocks[0].0
    }

    /// The header's words, to be written.
    pub(super) fn header_mut(&mut self) -> &mut [u32; HEADER_WORDS] {
        &mut self.blocks[0].0
    }

    /// The payload at full capacity.
    pub(super) fn payload(&self) -> &[f32] {
        // SAFETY: the blocks behind the header are contiguous u32 memory of at least `words` words (see `new`);
        // f32 has the size and alignment of u32 and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(self.blocks[1..].as_ptr().cast(), self.words) }
    }

    /// The payload at full capacity, to be written.
    pub(super) fn payload_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `payload`, and `&mut self` makes this the only view.
        unsafe { std::slice::from_raw_parts_mut(self.blocks[1..].as_mut_ptr().cast(), self.words) }
    }

    /// Where header and payload start, for a library that fills or reads them itself.
    pub(super) fn start(&mut self) -> *mut u32 {
        self.blocks.as_mut_ptr().cast()
    }
}

/// Buffers of this many bytes and more are asked for in huge pages.
const LARGE: usize = 4 << 20;

/// Asks for huge pages behind a large buffer before it is first touched. MPI copies between processes of a node through
/// the kernel, which looks up every page: with small ones 16 MiB took half as long again.
fn advise_huge_pages(blocks: &mut Vec<Block>) {
    let bytes = blocks.capacity() * size_of::<Block>();
    if bytes < LARGE {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let unaligned = (blocks.as_mut_ptr() as usize).wrapping_neg() % PAGE;
        // SAFETY: whole pages inside the vector's own memory; the advice changes no contents, and may be refused.
        unsafe {
            let start = blocks.as_mut_ptr().cast::<u8>().add(unaligned);
            libc::madvise(start.cast(), (bytes - unaligned) / PAGE * PAGE, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header::new(Kind::Cotangent, 7, 1 << 40, 5, [16, 28, 28, 64]).stamped(123_456_789_012, 3)
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
        assert!(Header::decode(&words).unwrap_err().to_string().contains("version 2"));
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
        assert!(sample().stamped(9, 9).verify(&sample()).is_ok(), "tick and flags are not compared");
    }

    #[test]
    fn a_payload_starts_on_a_cache_line() {
        let mut buffer = Buffer::new(33);
        assert_eq!((buffer.payload().len(), buffer.payload_mut().len()), (33, 33));
        assert_eq!(buffer.payload().as_ptr() as usize % 64, 0);
        assert_eq!(buffer.start() as usize + 64, buffer.payload().as_ptr() as usize);
    }
}
