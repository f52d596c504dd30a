//! A convolution's products by oneDNN: in pieces, which threads share, with weights kept as oneDNN lays them out.

use candle_core::Tensor;

use super::super::im2col::{Shape, add};
use super::super::{Host, Real, onednn, overwritten, tensor, threads};
use super::Ready;
use crate::{Error, Result};

/// oneDNN's products for pieces of a batch, made when first used. A batch falls into pieces by its shape alone, so that
/// threads may share it and results do not depend on their number.
#[derive(Default)]
pub(super) struct Products {
    forward: Option<onednn::Product>,
    input: Option<onednn::Product>,
    weight: Option<onednn::Product>,
}

/// Multiply-adds above which a sample is a piece of its own.
const PIECE: usize = 5_000_000;

fn piece_of(s: &Shape) -> Shape {
    let per_sample = s.oh * s.ow * s.o * s.patch();
    Shape { b: if per_sample > PIECE { 1 } else { s.b }, ..*s }
}

/// Pieces of the weight's gradient: each has a whole gradient, so there are few, and one where weights are many.
fn weight_piece_of(s: &Shape) -> Shape {
    let cheap = s.b * s.oh * s.ow * (s.c + s.o) > 8 * s.o * s.patch();
    let pieces = (1..=4).rev().find(|n| cheap && s.b.is_multiple_of(*n)).unwrap_or(1);
    Shape { b: s.b / pieces, ..*s }
}

impl Ready {
    pub(super) fn onednn_forward(&mut self, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
        let piece = piece_of(&self.shape);
        let product = made(&mut self.products.forward, &piece, onednn::Kind::Forward, bias.is_some())?;
        let packed = keep_packed(&mut self.forward, product, w)?;
        let (packed, failed) = (Host::of(&packed)?, Failed::default());
        let (packed, samples) = (packed.slice::<f32>()?, piece.b * piece.h * piece.w * piece.c);
        threads::chunks(
            y,
            piece.b * piece.oh * piece.ow * piece.o,
            || product.scratch(),
            |scratch, i, y| {
                failed.keep(product.forward(&x[i * samples..][..samples], packed, bias, y, scratch));
            },
        );
        failed.result()
    }

    pub(super) fn onednn_input_gradient(&mut self, gy: &[f32], w: &[f32], gx: &mut [f32]) -> Result<()> {
        let piece = piece_of(&self.shape);
        let product = made(&mut self.products.input, &piece, onednn::Kind::InputGradient, false)?;
        let packed = keep_packed(&mut self.backward, product, w)?;
        let (packed, failed) = (Host::of(&packed)?, Failed::default());
        let (packed, samples) = (packed.slice::<f32>()?, piece.b * piece.oh * piece.ow * piece.o);
        threads::chunks(
            gx,
            piece.b * piece.h * piece.w * piece.c,
            || product.scratch(),
            |scratch, i, gx| {
                failed.keep(product.input_gradient(gx, packed, &gy[i * samples..][..samples], scratch));
            },
        );
        failed.result()
    }

    /// The weight's gradient, as the weight lies.
    pub(super) fn onednn_weight_gradient(&mut self, x: &[f32], gy: &[f32]) -> Result<Vec<f32>> {
        let (s, piece) = (self.shape, weight_piece_of(&self.shape));
        let product = made(&mut self.products.weight, &piece, onednn::Kind::WeightGradient, false)?;
        let (below, above) = (piece.b * s.h * s.w * s.c, piece.b * s.oh * s.ow * s.o);
        let failed = Failed::default();
        let mut parts = overwritten::<f32>(s.b / piece.b * product.packed_len());
        threads::chunks(
            &mut parts,
            product.packed_len(),
            || product.scratch(),
            |scratch, i, gw| {
                failed.keep(product.weight_gradient(&x[i * below..][..below], gw, &gy[i * above..][..above], scratch));
            },
        );
        failed.result()?;
        let (total, rest) = parts.split_at_mut(product.packed_len());
        rest.chunks_exact(product.packed_len()).for_each(|part| add(total, part));
        product.unpack(total)
    }
}

/// The product of `slot`, made first where it is empty.
fn made<'a>(
    slot: &'a mut Option<onednn::Product>,
    piece: &Shape,
    kind: onednn::Kind,
    bias: bool,
) -> Result<&'a onednn::Product> {
    if slot.is_none() {
        let product = onednn::Product::new(piece, kind, bias)?;
        log::debug!("{kind:?} of {piece:?}: {}", product.name());
        *slot = Some(product);
    }
    slot.as_ref().ok_or_else(mistaken)
}

fn keep_packed(slot: &mut Option<Tensor>, product: &onednn::Product, w: &[f32]) -> Result<Tensor> {
    if slot.is_none() {
        *slot = Some(tensor(product.pack(w)?, product.packed_len())?);
    }
    slot.clone().ok_or_else(mistaken)
}

/// The first failure of products that run on several threads.
#[derive(Default)]
struct Failed(std::sync::Mutex<Option<Error>>);

impl Failed {
    fn keep(&self, result: Result<()>) {
        if let (Err(e), Ok(mut slot)) = (result, self.0.lock()) {
            slot.get_or_insert(e);
        }
    }

    fn result(self) -> Result<()> {
        self.0.into_inner().ok().flatten().map_or(Ok(()), Err)
    }
}

/// The same slice, which is of f32 where oneDNN was chosen.
pub(super) fn floats<T: Real>(values: &[T]) -> Result<&[f32]> {
    T::as_f32(values).ok_or_else(mistaken)
}

/// As [`floats`], to be written.
pub(super) fn floats_mut<T: Real>(values: &mut [T]) -> Result<&mut [f32]> {
    T::as_f32_mut(values).ok_or_else(mistaken)
}

fn mistaken() -> Error {
    Error::Run("oneDNN was chosen for a product that it does not compute here (a bug)".into())
}
