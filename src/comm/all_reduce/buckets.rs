//! What is averaged, wherever it is: how parts of it get into messages, are added up and come out of messages.

use std::ops::Range;

use super::LARGEST;
use crate::backend::slots::{Done, Slot, SlotMut};
use crate::{Error, Result};

/// Words of a sum made at a time, in the nearest cache.
const BLOCK: usize = 2048;

/// Values in buckets that come and go one by one, wherever they are. What is asked for takes place in that order, and has when its
/// [`Done`] says so. Messages may be longer than what is asked of them, which begins them.
pub trait Buckets {
    /// How many values there are.
    fn words(&self) -> usize;

    /// Whether `bucket`'s have come, or what makes them come first.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if what makes them failed.
    fn is_there(&self, bucket: &Range<usize>) -> Result<bool>;

    /// Copies `words` of them, which have come, into a message.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be copied.
    fn write(&mut self, words: Range<usize>, to: SlotMut<'_>) -> Result<Done>;

    /// Makes `words` of them the sum of `terms` in their order, times `scale`: what is in messages, and, where there is none, what
    /// these words are.
    ///
    /// # Errors
    /// As [`Buckets::write`].
    fn sum(&mut self, words: Range<usize>, terms: &[Option<Slot<'_>>], scale: f32) -> Result<Done>;

    /// Makes `words` of them what is in a message.
    ///
    /// # Errors
    /// As [`Buckets::write`].
    fn read(&mut self, words: Range<usize>, from: Slot<'_>) -> Result<Done>;

    /// `bucket`'s are what they are to be.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if they cannot be taken.
    fn done(&mut self, bucket: &Range<usize>) -> Result<()>;
}

/// Values that are there, in host memory.
impl Buckets for &mut [f32] {
    fn words(&self) -> usize {
        self.len()
    }

    fn is_there(&self, _: &Range<usize>) -> Result<bool> {
        Ok(true)
    }

    fn write(&mut self, words: Range<usize>, to: SlotMut<'_>) -> Result<Done> {
        let SlotMut::Host(to) = to else { return Err(elsewhere()) };
        to[..words.len()].copy_from_slice(&self[words]);
        Ok(Done::Now)
    }

    fn sum(&mut self, words: Range<usize>, terms: &[Option<Slot<'_>>], scale: f32) -> Result<Done> {
        let mut values = [None; LARGEST];
        for (value, term) in values.iter_mut().zip(terms) {
            *value = match term {
                Some(Slot::Host(term)) => Some(*term),
                Some(Slot::Device(_)) => return Err(elsewhere()),
                None => None,
            };
        }
        sum(&mut self[words], &values[..terms.len()], scale);
        Ok(Done::Now)
    }

    fn read(&mut self, words: Range<usize>, from: Slot<'_>) -> Result<Done> {
        let Slot::Host(from) = from else { return Err(elsewhere()) };
        let values = &mut self[words];
        values.copy_from_slice(&from[..values.len()]);
        Ok(Done::Now)
    }

    fn done(&mut self, _: &Range<usize>) -> Result<()> {
        Ok(())
    }
}

fn elsewhere() -> Error {
    Error::Run("gradients in host memory meet a message in a GPU's".into())
}

/// Replaces `values`, which are the term that is none, by the sum of all `terms` in their order, times `scale`.
fn sum(values: &mut [f32], terms: &[Option<&[f32]>], scale: f32) {
    if let [Some(other), None] | [None, Some(other)] = terms {
        // Two terms may change places, and the sum is the same.
        return values.iter_mut().zip(*other).for_each(|(x, y)| *x = (*x + y + 0.0) * scale);
    }
    let mut block = [0.0; BLOCK];
    for (n, values) in values.chunks_mut(BLOCK).enumerate() {
        let sum = &mut block[..values.len()];
        sum.fill(0.0);
        for term in terms {
            let term = term.map_or(&*values, |term| &term[n * BLOCK..][..values.len()]);
            sum.iter_mut().zip(term).for_each(|(sum, x)| *sum += x);
        }
        values.iter_mut().zip(sum).for_each(|(x, sum)| *x = *sum * scale);
    }
}
