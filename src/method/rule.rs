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
    /// Exact back-propagation through the same unrolled graph: all steps forward, then all back; in one process.
    Bp,
}

/// Which activations a step's vector–Jacobian product is taken at, under `sideways` and `skip-sideways`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stash {
    /// Those of the step at hand, fresh, with the cotangent that has just arrived: the papers' pseudo-gradients.
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
        self == Rule::Bp
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Rule::Sideways => "sideways",
            Rule::SkipSideways => "skip-sideways",
            Rule::Bp => "bp",
        })
    }
}
