//! Update rules as configured.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// An update rule and its settings. Below, g is the gradient, p the parameter, l the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OptimizerSpec {
    /// g += decay p; b = momentum b + g (b = g at first); p -= l b, or with Nesterov p -= l (g + momentum b).
    Sgd {
        /// Learning rate.
        #[serde(default = "sgd_lr")]
        lr: f64,
        /// Momentum.
        #[serde(default)]
        momentum: f64,
        /// L2 penalty, added to the gradient.
        #[serde(default)]
        weight_decay: f64,
        /// Nesterov's form of momentum.
        #[serde(default)]
        nesterov: bool,
        /// Whether norms' scales and shifts and all biases are left as they are by `weight_decay`.
        #[serde(default)]
        no_decay: bool,
    },
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019): p *= 1 - l decay, then Adam's bias-corrected step.
    Adamw {
        /// Learning rate.
        #[serde(default = "adamw_lr")]
        lr: f64,
        /// Decay rates of the means of g and of g squared.
        #[serde(default = "adamw_betas")]
        betas: [f64; 2],
        /// Added to the denominator.
        #[serde(default = "small")]
        eps: f64,
        /// Decoupled weight decay.
        #[serde(default = "adamw_decay")]
        weight_decay: f64,
        /// Whether norms' scales and shifts and all biases are left as they are by `weight_decay`.
        #[serde(default)]
        no_decay: bool,
    },
    /// g += decay p; s = alpha s + (1 - alpha) g g; p -= l g / (sqrt(s) + eps), or with momentum by way of a buffer.
    Rmsprop {
        /// Learning rate.
        #[serde(default = "rmsprop_lr")]
        lr: f64,
        /// Decay rate of the mean of g squared.
        #[serde(default = "rmsprop_alpha")]
        alpha: f64,
        /// Added to the denominator.
        #[serde(default = "small")]
        eps: f64,
        /// Momentum.
        #[serde(default)]
        momentum: f64,
        /// L2 penalty, added to the gradient.
        #[serde(default)]
        weight_decay: f64,
        /// Whether norms' scales and shifts and all biases are left as they are by `weight_decay`.
        #[serde(default)]
        no_decay: bool,
    },
}

fn sgd_lr() -> f64 {
    1e-3
}
fn adamw_lr() -> f64 {
    1e-3
}
fn adamw_betas() -> [f64; 2] {
    [0.9, 0.999]
}
fn adamw_decay() -> f64 {
    1e-2
}
fn rmsprop_lr() -> f64 {
    1e-2
}
fn rmsprop_alpha() -> f64 {
    0.99
}
fn small() -> f64 {
    1e-8
}

impl Default for OptimizerSpec {
    /// AdamW at 0.001.
    fn default() -> Self {
        OptimizerSpec::Adamw { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, no_decay: false }
    }
}

impl OptimizerSpec {
    /// The learning rate before any schedule.
    pub fn lr(&self) -> f64 {
        match *self {
            OptimizerSpec::Sgd { lr, .. } | OptimizerSpec::Adamw { lr, .. } | OptimizerSpec::Rmsprop { lr, .. } => lr,
        }
    }

    /// Whether weight decay applies to a parameter of so many dimensions: with `no_decay`, not to one of a single dimension, which
    /// is a bias, or a norm's scale or shift.
    pub fn decays(&self, dimensions: usize) -> bool {
        let (OptimizerSpec::Sgd { no_decay, .. }
        | OptimizerSpec::Adamw { no_decay, .. }
        | OptimizerSpec::Rmsprop { no_decay, .. }) = *self;
        !no_decay || dimensions > 1
    }

    /// Names of the buffers kept for each parameter.
    pub(crate) fn buffers(&self) -> Vec<&'static str> {
        match *self {
            OptimizerSpec::Sgd { momentum: 0.0, .. } => vec![],
            OptimizerSpec::Sgd { .. } => vec!["momentum"],
            OptimizerSpec::Adamw { .. } => vec!["mean", "square"],
            OptimizerSpec::Rmsprop { momentum: 0.0, .. } => vec!["square"],
            OptimizerSpec::Rmsprop { .. } => vec!["square", "momentum"],
        }
    }

    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`Error::Input`] that names the setting and its range.
    pub fn validate(&self) -> Result<()> {
        let at_least_0 =
            |name: &str, v: f64| if v >= 0.0 && v.is_finite() { Ok(()) } else { bad(name, v, "at least 0") };
        let below_1 =
            |name: &str, v: f64| if (0.0..1.0).contains(&v) { Ok(()) } else { bad(name, v, "from 0 to below 1") };
        at_least_0("lr", self.lr())?;
        match *self {
            OptimizerSpec::Sgd { momentum, weight_decay, nesterov, .. } => {
                if nesterov && momentum == 0.0 {
                    return Err(Error::input("optimizer: nesterov = true needs a momentum above 0"));
                }
                at_least_0("weight_decay", weight_decay)?;
                below_1("momentum", momentum)
            }
            OptimizerSpec::Adamw { betas, eps, weight_decay, .. } => {
                below_1("betas[0]", betas[0])?;
                below_1("betas[1]", betas[1])?;
                at_least_0("eps", eps)?;
                at_least_0("weight_decay", weight_decay)
            }
            OptimizerSpec::Rmsprop { alpha, eps, momentum, weight_decay, .. } => {
                below_1("alpha", alpha)?;
                below_1("momentum", momentum)?;
                at_least_0("eps", eps)?;
                at_least_0("weight_decay", weight_decay)
            }
        }
    }
}

fn bad(name: &str, value: f64, range: &str) -> Result<()> {
    Err(Error::input(format!("optimizer: {name} = {value} should be {range}")))
}
