//! `[model]`: the network, what it is to learn, how it is cut, and its skips.

use serde::{Deserialize, Serialize};

use crate::nn::head::Task;
use crate::nn::loss::PixelLoss;
use crate::nn::module::Fuse;
use crate::nn::spec::LayerSpec;

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// What the network is to learn.
    pub task: Task,
    /// Future frames: how many frames past the newest seen one the target is.
    pub horizon: usize,
    /// Future frames: the pixel difference.
    pub loss: PixelLoss,
    /// A named network; or write out `layers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// The layers, in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<LayerSpec>>,
    /// Number of classes; absent: the dataset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// D, the number of modules, cut to balance arithmetic; absent: as many as there are ranks for a replica, cut by times
    /// measured on this machine, or as the run's checkpoint was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<usize>,
    /// The layers (counted from 0) before which to cut, instead of `modules`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuts: Option<Vec<usize>>,
    /// Skip connections between modules; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<SkipConfig>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            task: Task::default(),
            horizon: 1,
            loss: PixelLoss::default(),
            preset: None,
            layers: None,
            classes: None,
            modules: None,
            cuts: None,
            skip: None,
        }
    }
}

/// `[model.skip]`: spans, single edges, or both. A skip may join any two modules between whose outputs and main inputs height and width
/// both shrink (or stay) or both grow (or stay): the sender averages to a smaller main input, by ratios that need not be whole; the
/// receiver spreads to a larger one by nearest neighbour, as a decoder's is. So `edges = [[1, 7], [2, 6], [3, 5]]` joins an encoder and a
/// decoder of eight modules as a U.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, such as { spans = [2] }")]
pub struct SkipConfig {
    /// Span s adds every skip from module i − s to module i.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<usize>,
    /// Single skips.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub edges: Vec<SkipEdge>,
    /// How skips join the main path.
    pub fuse: Fuse,
    /// Ticks a skip takes: 1 brings the newest features, the span aligns them with the main path.
    pub delay: Delay,
}

impl Default for SkipConfig {
    fn default() -> Self {
        SkipConfig { spans: Vec::new(), edges: Vec::new(), fuse: Fuse::Sum, delay: Delay::Ticks(1) }
    }
}

/// A skip's delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"aligned\" or a number of ticks")]
pub enum Delay {
    /// So many ticks.
    Ticks(usize),
    /// `"aligned"`: as many as the span, the ordinary non-temporal residual network (an ablation).
    Named(AlignedDelay),
}

/// The one named delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlignedDelay {
    /// The span of each skip.
    Aligned,
}

impl Delay {
    /// For a skip of so many modules.
    pub(super) fn ticks(self, span: usize) -> usize {
        match self {
            Delay::Ticks(n) => n,
            Delay::Named(AlignedDelay::Aligned) => span,
        }
    }
}

/// One skip edge: `[from, to]`, or `{ from, to, delay }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected [from, to] or { from, to, delay }")]
pub enum SkipEdge {
    /// `[1, 3]`
    Pair(usize, usize),
    /// `{ from = 1, to = 3, delay = 2 }`
    Full {
        /// The module whose output travels.
        from: usize,
        /// The module that reads it.
        to: usize,
        /// Ticks it takes.
        delay: Delay,
    },
}
