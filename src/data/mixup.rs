//! Mixup (Zhang et al., ICLR 2018): a batch's clips are mixed with one another, and so are their labels.
//!
//! One weight a batch, out of Beta(alpha, alpha); every clip that counts gets a partner, and each of them is the partner of one: a
//! permutation. Both are a pure function of the seed, the batch, the replica and which clips count.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_distr::{Beta, Distribution};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::cpu::mix::Mixing;
use crate::{Error, Result};

/// How batches are mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixup {
    /// Parameter of the distribution of weights: small ones leave clips nearly as they are.
    pub alpha: f64,
    /// The run's seed.
    pub seed: u64,
    /// The replica.
    pub replica: usize,
}

/// How one batch is mixed: clip n becomes `weight` of itself and the rest of `partners[n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    /// The part of a clip that is its own, 0 to 1.
    pub weight: f32,
    /// By place in the batch, the place of its partner; a clip that does not count is its own.
    pub partners: Vec<usize>,
}

impl Mixup {
    /// Checks the range.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key.
    pub fn validate(alpha: f64) -> Result<()> {
        if alpha > 0.0 && alpha.is_finite() {
            return Ok(());
        }
        Err(Error::input(format!(
            "data.mixup = {alpha}: weights are drawn out of Beta(mixup, mixup), so it is above 0, for instance 0.2; remove the key \
             to leave clips as they are"
        )))
    }

    /// The mixture of `batch`, whose clips have these `labels` (negative: does not count).
    ///
    /// # Errors
    /// As [`Mixup::validate`].
    pub fn draw(&self, batch: u64, labels: &[i32]) -> Result<Mixture> {
        Self::validate(self.alpha)?;
        let wrong = |e| Error::input(format!("data.mixup = {}: {e}", self.alpha));
        let beta = Beta::new(self.alpha, self.alpha).map_err(wrong)?;
        let mut key = [0; 21];
        key[..8].copy_from_slice(&batch.to_le_bytes());
        key[8..16].copy_from_slice(&(self.replica as u64).to_le_bytes());
        key[16..].copy_from_slice(b"mixup");
        let mut random = ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(&key, self.seed));
        let weight = Some(beta.sample(&mut random)).filter(|weight| weight.is_finite()).unwrap_or(1.0) as f32;
        let counted: Vec<usize> = (0..labels.len()).filter(|&n| labels[n] >= 0).collect();
        // Fisher-Yates, written out so that the order cannot change with a library's version.
        let mut shuffled = counted.clone();
        for i in (1..shuffled.len()).rev() {
            let j = (u128::from(random.next_u64()) * (i as u128 + 1)) >> 64;
            shuffled.swap(i, j as usize);
        }
        let mut partners: Vec<usize> = (0..labels.len()).collect();
        for (place, partner) in counted.into_iter().zip(shuffled) {
            partners[place] = partner;
        }
        Ok(Mixture { weight, partners })
    }
}

impl Mixture {
    /// For whoever mixes frames.
    pub fn mixing(&self) -> Mixing<'_> {
        Mixing { weight: self.weight, partners: &self.partners }
    }
}
