//! Rules as studies name them.

use serde::{Deserialize, Serialize};

use crate::config::{Config, Rule, Stash};
use crate::{Error, Result};

/// A rule as a study names it: `1f1b`, `skip-sideways+stash`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variant {
    /// How gradients are made.
    pub rule: Rule,
    /// What cotangents meet.
    pub stash: Stash,
}

impl Variant {
    /// Reads `RULE`, `RULE+stash` (its own activations, kept) or `RULE+stash-inputs`.
    ///
    /// # Errors
    /// [`Error::Input`] with the rules there are.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, suffix) = text.split_once('+').map_or((text, ""), |(name, suffix)| (name, suffix));
        let rule = toml::Value::String(name.into())
            .try_into::<Rule>()
            .map_err(|e| Error::input(format!("--rules {text}: {}", e.message())))?;
        let stash = match suffix {
            "" if text.contains('+') => Err(()),
            "" => Ok(Stash::None),
            "stash" | "stash-activations" => Ok(Stash::Activations),
            "stash-inputs" => Ok(Stash::Inputs),
            _ => Err(()),
        };
        let stash =
            stash.map_err(|()| Error::input(format!("--rules {text}: what follows + is stash or stash-inputs")))?;
        // The exact rules keep activations without being told.
        let stash = if rule.is_exact() && stash == Stash::Activations { Stash::None } else { stash };
        Ok(Variant { rule, stash })
    }

    /// The rule of a configuration.
    pub fn of(config: &Config) -> Self {
        Variant { rule: config.train.rule, stash: config.train.stash }
    }
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let suffix = match self.stash {
            Stash::None => "",
            Stash::Inputs => "+stash-inputs",
            Stash::Activations => "+stash",
        };
        write!(f, "{}{suffix}", self.rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_named_as_in_a_configuration() {
        for name in [
            "sideways",
            "skip-sideways",
            "skip-sideways+stash",
            "skip-sideways+stash-inputs",
            "1f1b+stash-inputs",
            "bp",
        ] {
            assert_eq!(Variant::parse(name).unwrap().to_string(), name);
        }
        for (name, words) in [("sidewise", "skip-sideways"), ("sideways+", "stash-inputs")] {
            let error = Variant::parse(name).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
        }
    }
}
