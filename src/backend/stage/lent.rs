//! A stage's sums of gradients, lent out to be averaged: on the host, on their way there piece by piece, or in a GPU's memory.

use std::ops::Range;

use crate::Result;
use crate::backend::cuda::{Flat, Locked};
use crate::backend::slots::Done;

/// Sums of gradients, one parameter after another; the last ones come first.
pub struct Lent {
    memory: Memory,
    /// Words of a piece; the last one may have fewer.
    piece: usize,
    /// When each piece is there.
    arrived: Vec<Done>,
    /// When the backward pass is through.
    computed: Done,
}

enum Memory {
    Plain(Vec<f32>),
    /// That a GPU copies to and from.
    Locked(Locked),
    /// A GPU's.
    Flat(Flat),
}

/// How sums of gradients are lent out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lends {
    /// Words of the pieces in which they come.
    pub piece: usize,
    /// Where they stay in a GPU's memory: how many messages copies are made to or from at once.
    pub on_gpu: Option<usize>,
}

impl Lent {
    /// Sums that are there.
    pub fn new(values: Vec<f32>) -> Self {
        Lent {
            piece: values.len().max(1),
            arrived: vec![Done::Now],
            computed: Done::Now,
            memory: Memory::Plain(values),
        }
    }

    /// Sums that a GPU copies into `memory` in pieces of `piece` words, each there when its `arrived`, behind a backward pass that is
    /// through when `computed`.
    pub fn arriving(memory: Locked, piece: usize, arrived: Vec<Done>, computed: Done) -> Self {
        Lent { memory: Memory::Locked(memory), piece, arrived, computed }
    }

    /// Sums that stay in a GPU's memory, behind a backward pass that is through when `computed`.
    pub fn staying(flat: Flat, computed: Done) -> Self {
        Lent { piece: flat.words().max(1), memory: Memory::Flat(flat), arrived: Vec::new(), computed }
    }

    /// How many words they are.
    pub fn words(&self) -> usize {
        match &self.memory {
            Memory::Flat(flat) => flat.words(),
            Memory::Plain(values) => values.len(),
            Memory::Locked(locked) => locked.length(),
        }
    }

    /// Whether `words` of them are there; in a GPU's memory, whatever is done with them there waits for them by itself.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched on the GPU before failed.
    pub fn is_there(&self, words: &Range<usize>) -> Result<bool> {
        // Pieces behind came before.
        self.arrived.get(words.start / self.piece).map_or(Ok(true), Done::is_done)
    }

    /// They themselves, where they are in a GPU's memory.
    pub fn flat(&mut self) -> Option<&mut Flat> {
        match &mut self.memory {
            Memory::Flat(flat) => Some(flat),
            _ => None,
        }
    }

    /// `words` of them, which are there; none of what is in a GPU's memory.
    pub fn at(&mut self, words: &Range<usize>) -> &mut [f32] {
        match &mut self.memory {
            Memory::Flat(_) => &mut [],
            Memory::Plain(values) => &mut values[words.clone()],
            Memory::Locked(locked) => locked.part(words.clone()),
        }
    }

    /// When the backward pass before them is through.
    pub fn computed(&self) -> Done {
        self.computed.clone()
    }

    /// The values, where they never were on a GPU.
    pub fn into_values(self) -> Vec<f32> {
        match self.memory {
            Memory::Plain(values) => values,
            Memory::Locked(_) | Memory::Flat(_) => Vec::new(),
        }
    }

    /// The memory, where a GPU copied into it.
    pub fn into_locked(self) -> Option<Locked> {
        match self.memory {
            Memory::Locked(locked) => Some(locked),
            Memory::Plain(_) | Memory::Flat(_) => None,
        }
    }

    /// The memory, where it is a GPU's.
    pub fn into_flat(self) -> Option<Flat> {
        match self.memory {
            Memory::Flat(flat) => Some(flat),
            Memory::Plain(_) | Memory::Locked(_) => None,
        }
    }
}
