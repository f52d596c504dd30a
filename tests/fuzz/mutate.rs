//! Inputs that were changed a little, from a seed; and how long to go on with them.

use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Numbers at the edges of their types, as texts have them.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1e400",
    "NaN",
    "255",
    "65536",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999999",
    "0.5",
];

/// A source of changes.
pub struct Mutator(ChaCha8Rng);

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Mutator(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `n`, of which there is at least one.
    pub fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// One of the corpus, changed in one to four places.
    pub fn changed(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let one = self.below(corpus.len());
        let mut bytes = corpus[one].clone();
        for _ in 0..1 + self.below(4) {
            self.change(&mut bytes, corpus);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        if bytes.is_empty() {
            bytes.push(self.below(256) as u8);
            return;
        }
        let at = self.below(bytes.len());
        let length = (1 + self.below(16)).min(bytes.len() - at);
        match self.below(10) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = [0, 0xff, 0x7f, 0x80, b'"', b'\n', b'{', b',', b'['][self.below(9)],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let again = bytes[at..at + length].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let random: Vec<u8> = (0..length).map(|_| self.below(256) as u8).collect();
                bytes.splice(at..at, random);
            }
            // Whole words of all ones or zeros: lengths and addresses of binary files.
            6 => bytes[at..at + length.min(8)].fill([0, 0xff][self.below(2)]),
            7 => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len());
                let part = other[from..(from + 32).min(other.len())].to_vec();
                bytes.splice(at..at + length, part);
            }
            // A number in a text becomes one at an edge.
            _ => match bytes[at..].iter().position(u8::is_ascii_digit) {
                None => bytes[at] = bytes[at].wrapping_add(1),
                Some(first) => {
                    let first = at + first;
                    let digits = bytes[first..].iter().take_while(|b| b.is_ascii_digit()).count();
                    bytes.splice(first..first + digits, NUMBERS[self.below(NUMBERS.len())].bytes());
                }
            },
        }
    }
}

/// Calls `check` with a seed each, from `SIDEWAYS_FUZZ_SEED` or 0 on: so many times, or for as long as `SIDEWAYS_FUZZ_SECONDS` says.
pub fn go_on(times: u64, mut check: impl FnMut(u64)) {
    let seconds = std::env::var("SIDEWAYS_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let begun = Instant::now();
    let mut seed = std::env::var("SIDEWAYS_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let times = seed + times;
    while seconds.map_or(seed < times, |seconds| begun.elapsed() < Duration::from_secs(seconds)) {
        check(seed);
        seed += 1;
    }
    eprintln!("to seed {seed} in {:.1} s", begun.elapsed().as_secs_f64());
}
