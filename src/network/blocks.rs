//! A network's layers as blocks: what a cut may not part.
//!
//! A block is a layer that does real work (convolution, linear, residual block) with the cheap ones behind it; cheap layers
//! at the front belong to the first.

use std::ops::Range;

use crate::method::graph::{Edge, Graph};
use crate::network::partition::{Partition, Piece, partition};
use crate::nn::module::sent_shape;
use crate::nn::spec::{LayerSpec, Shape};
use crate::{Error, Result};

/// The blocks of a chain of layers.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// The first layer of each, and behind the last the number of layers.
    bounds: Vec<usize>,
    /// The shape before each block, and behind the last the output's: `[H, W, C]` of a sample, without skips.
    shapes: Vec<Shape>,
}

impl Blocks {
    /// The blocks of `layers` on an input of `[H, W, C]`.
    ///
    /// # Errors
    /// [`Error::Input`] naming the layer whose shapes do not fit.
    pub fn new(layers: &[LayerSpec], input: Shape) -> Result<Self> {
        let (mut bounds, mut shapes) = (Vec::new(), Vec::new());
        let mut shape = input;
        for (n, layer) in layers.iter().enumerate() {
            if n == 0 || layer.is_heavy() && layers[..n].iter().any(LayerSpec::is_heavy) {
                bounds.push(n);
                shapes.push(shape);
            }
            shape = layer.output_shape(shape).map_err(|e| Error::input(format!("layer {n}: {e}")))?;
        }
        bounds.push(layers.len());
        shapes.push(shape);
        Ok(Blocks { bounds, shapes })
    }

    /// How many there are: the most modules there can be.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The layers of blocks `from..to`.
    pub fn layers(&self, from: usize, to: usize) -> Range<usize> {
        self.bounds[from]..self.bounds[to]
    }

    /// The shape before block `b`, or behind the last.
    pub fn shape(&self, b: usize) -> Shape {
        self.shapes[b]
    }

    /// The shapes of a piece's skip inputs as sent; `None` where one cannot be brought to its main input's height and width.
    pub fn skip_shapes(&self, piece: &Piece) -> Option<Vec<Shape>> {
        piece.skips.iter().map(|&end| sent_shape(self.shapes[end], self.shapes[piece.start])).collect()
    }

    /// [`partition`], in layer numbers: the layers before which to cut.
    ///
    /// # Errors
    /// [`Error::Input`] if there are more modules than blocks, or skips fit nowhere.
    pub fn cut(
        &self,
        graph: &Graph,
        slack: f64,
        cost: &mut dyn FnMut(&Piece) -> Option<f64>,
    ) -> Result<(Vec<usize>, Partition)> {
        let modules = graph.modules();
        if modules > self.len() {
            return Err(Error::input(format!(
                "model.modules = {modules}: the network's {} layers can be cut into 1 to {} modules (before layers with \
                 weights); lower model.modules, start fewer ranks, or give model.cuts",
                self.bounds[self.len()],
                self.len()
            )));
        }
        let found = partition(self.len(), graph, slack, cost)?;
        Ok((found.cuts.iter().map(|&b| self.bounds[b]).collect(), found))
    }

    /// Cuts by arithmetic alone: the same on every machine. Where no cut fits the skips they are left out of account, so that
    /// whoever goes through the shapes next can say which one does not fit.
    ///
    /// # Errors
    /// As [`Blocks::cut`].
    pub fn cut_by_arithmetic(&self, layers: &[LayerSpec], graph: &Graph) -> Result<Vec<usize>> {
        let mut before = vec![0.0];
        let mut shape = self.shapes[0];
        for layer in layers {
            let output = layer.output_shape(shape)?;
            let elements = shape.iter().product::<usize>() + output.iter().product::<usize>();
            // A small share for memory traffic, so that cheap layers count too.
            let cost = layer.flops(shape) + 8 * elements as u64;
            before.push(before[before.len() - 1] + cost as f64);
            shape = output;
        }
        let own = |p: &Piece| before[self.bounds[p.end]] - before[self.bounds[p.start]];
        let fitting = self.cut(graph, 0.0, &mut |p| self.skip_shapes(p).map(|_| own(p)));
        let (cuts, _) = match fitting {
            Err(_) if graph.edges().iter().any(|e: &Edge| !e.is_main()) => {
                self.cut(graph, 0.0, &mut |p| Some(own(p)))?
            }
            other => other?,
        };
        Ok(cuts)
    }
}
