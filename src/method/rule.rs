//! The training rules: an order of work, and which activations a vector–Jacobian product is taken at.

use serde::{Deserialize, Serialize};

/// How gradients are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Pseudo-gradients, main path only (Malinowski et al., CVPR 2020).
    Sideways,
    /// Pseudo-gradients with skips (Malinowski et al., CVPR 2021).
    #[default]
    SkipSideways,
    /// Exact gradients in a pipeline: as with `stash`, and the clip's last cotangents are waited for (PipeDream's 1F1B with a flush).
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// Exact gradients in a pipeline: all steps forward, then all back (Huang et al., NeurIPS 2019).
    Gpipe,
    /// Exact back-propagation through the same unrolled graph: as `gpipe`, in one process.
    Bp,
}

/// Which activations a step's vector–Jacobian product is taken at under `sideways` and `skip-sideways`; under the exact rules, which
/// take it at its own, what is kept for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stash {
    /// Those of the step at hand, fresh, with the cotangent that has just arrived: the papers' pseudo-gradients. Under the exact
    /// rules: as `Activations`.
    #[default]
    None,
    /// The cotangent's own: the inputs are kept until it comes, and the forward pass is done once more.
    Inputs,
    /// The cotangent's own, kept until it comes.
    Activations,
}

impl std::fmt::Display for Stash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stash::None => "none",
            Stash::Inputs => "inputs",
            Stash::Activations => "activations",
        })
    }
}

impl Rule {
    /// Whether every step's activations are kept until its own cotangents have come, so that gradients are exact.
    pub fn is_exact(self) -> bool {
        matches!(self, Rule::OneForwardOneBackward | Rule::Gpipe | Rule::Bp)
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Rule::Sideways => "sideways",
            Rule::SkipSideways => "skip-sideways",
            Rule::OneForwardOneBackward => "1f1b",
            Rule::Gpipe => "gpipe",
            Rule::Bp => "bp",
        })
    }
}
