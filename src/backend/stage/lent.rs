//! A stage's sums of gradients, lent out to be averaged: on the host, or on their way there piece by piece.

use std::ops::Range;

use crate::Result;
use crate::backend::cuda::Locked;
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

    /// How many words they are.
    pub fn words(&self) -> usize {
        match &self.memory {
            Memory::Plain(values) => values.len(),
            Memory::Locked(locked) => locked.length(),
        }
    }

    /// Whether `words` of them are there.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what was launched on the GPU before failed.
    pub fn is_there(&self, words: &Range<usize>) -> Result<bool> {
        // Pieces behind came before.
        self.arrived.get(words.start / self.piece).map_or(Ok(true), Done::is_done)
    }

    /// `words` of them, which are there.
    pub fn at(&mut self, words: &Range<usize>) -> &mut [f32] {
        match &mut self.memory {
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
            Memory::Locked(_) => Vec::new(),
        }
    }

    /// The memory, where a GPU copied into it.
    pub fn into_locked(self) -> Option<Locked> {
        match self.memory {
            Memory::Plain(_) => None,
            Memory::Locked(locked) => Some(locked),
        }
    }
}
