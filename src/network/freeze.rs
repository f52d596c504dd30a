//! What of a network does not learn: `train.freeze`, resolved.

use std::collections::BTreeSet;

use glob::Pattern;

use super::Network;
use crate::config::Freeze;
use crate::{Error, Result};

/// Which parameters are frozen: they keep their values.
#[derive(Clone, Debug, Default)]
pub struct Frozen {
    names: BTreeSet<String>,
    /// By module, the elements that learn.
    learned: Vec<u64>,
}

impl Frozen {
    /// What `freeze` means for `network`: modules by number (with the adapters of their skips), layers and parameters by patterns.
    /// A pattern names a parameter, such as `layers.3.residual.conv1.weight`, or what its name begins with, up to a dot.
    ///
    /// # Errors
    /// [`Error::Input`] for a module that is not there, a pattern that is none or matches nothing, and where nothing would learn.
    pub fn new(freeze: &[Freeze], network: &Network) -> Result<Self> {
        let modules = network.graph.modules();
        let all: Vec<Vec<(String, u64)>> = (1..=modules).map(|i| network.learned(i)).collect();
        let mut names = BTreeSet::new();
        for entry in freeze {
            match entry {
                Freeze::Module(i) if (1..=modules).contains(i) => {
                    if all[i - 1].is_empty() {
                        return Err(Error::input(format!(
                            "train.freeze: module {i} has nothing that learns; remove it from the list"
                        )));
                    }
                    names.extend(all[i - 1].iter().map(|(name, _)| name.clone()));
                }
                Freeze::Module(i) => {
                    return Err(Error::input(format!(
                        "train.freeze: there is no module {i}; the network is cut into modules 1 to {modules}"
                    )));
                }
                Freeze::Layers(pattern) => {
                    let all = || all.iter().flatten().map(|(name, _)| name.as_str());
                    let matched = matching(pattern, all())?;
                    if matched.is_empty() {
                        return Err(Error::input(format!(
                            "train.freeze: {pattern:?} matches no layer or parameter that learns; the nearest are {}",
                            nearest(pattern, all())
                        )));
                    }
                    names.extend(matched);
                }
            }
        }
        let learned: Vec<u64> = all
            .iter()
            .map(|of| of.iter().filter(|(name, _)| !names.contains(name)).map(|(_, elements)| elements).sum())
            .collect();
        if !names.is_empty() && learned.iter().all(|&elements| elements == 0) {
            return Err(Error::input(format!(
                "train.freeze = {freeze:?} leaves nothing to learn: every parameter of the network is frozen"
            )));
        }
        Ok(Frozen { names, learned })
    }

    /// The frozen parameters, in alphabetical order.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// Elements that learn in module `i`.
    pub fn learned(&self, i: usize) -> u64 {
        self.learned[i - 1]
    }

    /// The lowest module with something to learn: those below need no backward pass.
    pub fn lowest(&self) -> usize {
        self.learned.iter().position(|&elements| elements > 0).map_or(1, |k| k + 1)
    }
}

/// Those of `names` that `pattern` matches, whole or up to one of their dots.
fn matching<'a>(pattern: &str, names: impl Iterator<Item = &'a str>) -> Result<Vec<String>> {
    let compiled = Pattern::new(pattern).map_err(|e| {
        Error::input(format!("train.freeze: {pattern:?} is no pattern of layer names, such as \"layers.0.*\": {e}"))
    })?;
    let ends = |name: &str| name.match_indices('.').map(|(dot, _)| dot).chain([name.len()]).collect::<Vec<_>>();
    let matches = |name: &&str| ends(name).into_iter().any(|end| compiled.matches(&name[..end]));
    Ok(names.filter(matches).map(String::from).collect())
}

/// The three of `names` that are most like `pattern`.
fn nearest<'a>(pattern: &str, names: impl Iterator<Item = &'a str>) -> String {
    let plain = pattern.replace(['*', '?', '[', ']'], "");
    let mut names: Vec<&str> = names.collect();
    names.sort_by(|a, b| strsim::jaro_winkler(&plain, b).total_cmp(&strsim::jaro_winkler(&plain, a)));
    names.truncate(3);
    names.join(", ")
}
