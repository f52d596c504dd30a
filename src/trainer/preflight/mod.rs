//! What the hosts of a run offer, and what of it will not do: checked when training starts, shown by `sideways doctor`.
//!
//! `place` is what each rank finds where it runs, `checks` what is said about that.

mod checks;
mod place;

use serde::Serialize;

use crate::comm::World;
use crate::setup::Setup;
use crate::{Error, Result};

pub use checks::check;
pub use place::{Place, places};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// Training works, but not as well as it could.
    Warning,
    /// Training would fail.
    Failure,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What.
    pub what: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found and, unless all is well, what to do about it.
    pub found: String,
}

impl Check {
    /// A check that ended well.
    pub fn fine(what: &'static str, found: impl Into<String>) -> Self {
        Check { what, verdict: Verdict::Fine, found: found.into() }
    }

    /// A check whose result is to be improved.
    pub fn warning(what: &'static str, found: impl Into<String>) -> Self {
        Check { what, verdict: Verdict::Warning, found: found.into() }
    }

    /// A check that says training would fail.
    pub fn failure(what: &'static str, found: impl Into<String>) -> Self {
        Check { what, verdict: Verdict::Failure, found: found.into() }
    }
}

/// All checks that training makes at its start: warnings are logged, by rank 0. Collective.
///
/// # Errors
/// [`Error::Input`], on every rank, for what would make it fail.
pub fn require(world: &World, setup: &Setup) -> Result<()> {
    let places = places(world)?;
    let mut checks = if world.rank() == 0 { check(&places, Some(setup)) } else { Vec::new() };
    checks.push(super::run_folder::check(world, setup)?);
    let failures: Vec<String> =
        checks.iter().filter(|c| c.verdict == Verdict::Failure).map(|c| format!("{}: {}", c.what, c.found)).collect();
    let outcome = match failures.is_empty() {
        true => Ok(()),
        false => Err(Error::input(failures.join("\n"))),
    };
    world.as_first(outcome)?;
    if world.rank() == 0 {
        for check in checks.iter().filter(|c| c.verdict == Verdict::Warning) {
            log::warn!("{}: {}", check.what, check.found);
        }
    }
    Ok(())
}
