//! Cutting a network whose configuration leaves it open, alike on every rank.

use super::blocks::Blocks;
use super::predict::{best_cuts, block_parts, conditions};
use super::profile::{Part, Profile};
use crate::checkpoint;
use crate::config::Config;
use crate::engine::setup::Setup;
use crate::transport::World;
use crate::{Error, Result};

/// Takes the cut of the run's newest checkpoint where `config` leaves it open: where skips go depends on it, so a run keeps
/// it. Returns whether there was one.
///
/// # Errors
/// [`Error::Io`] if the run folder cannot be read.
pub fn resume_cut(config: &mut Config) -> Result<bool> {
    if !config.cut_is_open() {
        return Ok(false);
    }
    let Some(manifest) = checkpoint::newest_manifest(&config.run.dir.join("checkpoints"))? else { return Ok(false) };
    let Ok(before) = Config::parse(&manifest.config, "manifest", &[]) else { return Ok(false) };
    // A checkpoint of another network is refused later, with the reason.
    if (&before.model.preset, &before.model.layers) != (&config.model.preset, &config.model.layers) {
        return Ok(false);
    }
    config.model.cuts = Some(manifest.cuts);
    Ok(true)
}

/// Cuts a network that is left open by times measured on rank 0, as many modules as `setup` has. Collective.
///
/// # Errors
/// Rank 0's error on every rank.
pub fn cut(setup: Setup, world: &World) -> Result<Setup> {
    if !setup.config.cut_is_open() || setup.grid.modules == 1 {
        return Ok(setup);
    }
    let mine = if world.rank() == 0 { measured_cuts(&setup, world.local_size()) } else { Ok(Vec::new()) };
    let bytes: Vec<u8> = world.first_error(mine)?.iter().flat_map(|&cut| (cut as u64).to_le_bytes()).collect();
    let all = world.gather(&bytes)?;
    let number = |eight: &[u8]| eight.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte));
    let setup = world.first_error(setup.recut(all[0].chunks_exact(8).map(number).collect()))?;
    if setup.grid.modules != all[0].len() / 8 + 1 {
        return Err(Error::Run("rank 0's cuts did not arrive whole".into()));
    }
    Ok(setup)
}

fn measured_cuts(setup: &Setup, ranks: usize) -> Result<Vec<usize>> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let profile = times_of(setup, block_parts(setup, &blocks), ranks, false)?;
    let (cuts, found) = best_cuts(setup, &blocks, &profile)?;
    let times = match (&profile.file, profile.cached) {
        (Some(file), true) => format!("as measured before ({})", file.display()),
        _ => "measured now".into(),
    };
    log::info!(
        "cut before layers {cuts:?} by the layers' times, {times}; the costliest module takes {:.2} ms a tick, the mean {:.2}",
        1e3 * found.largest,
        1e3 * found.total / setup.grid.modules as f64
    );
    if !found.exact {
        log::warn!("there were too many ways to cut for a complete search: a better one may exist; see model.cuts");
    }
    Ok(cuts)
}

/// Times of `parts` with as many modules at work as `ranks` on this machine will have: from the cache, else measured with as
/// many as this process may run.
///
/// # Errors
/// As [`Profile::get`].
pub fn times_of(setup: &Setup, parts: Vec<Part>, ranks: usize, fresh: bool) -> Result<Profile> {
    let threads = setup.config.run.threads;
    let at_once = |cores: usize| ranks.min(cores / threads).max(1);
    let wanted = conditions(setup, at_once(machine_cores())).with(parts);
    let own = std::thread::available_parallelism().map_or(1, usize::from);
    let possible = at_once(own);
    if possible < wanted.busy {
        if let (Some(found), false) = (Profile::cached(&wanted), fresh) {
            return Ok(found);
        }
        return Profile::get(crate::plan::profile::Conditions { busy: possible, ..wanted }, fresh);
    }
    Profile::get(wanted, fresh)
}

/// Cores of this machine, whether this process may use them or not.
fn machine_cores() -> usize {
    // SAFETY: a plain query.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(n).unwrap_or(1).max(1)
}
