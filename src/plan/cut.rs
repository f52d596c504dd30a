//! Cutting a network whose configuration leaves it open, alike on every rank.

use super::predict::{Parts, best_cuts, conditions};
use super::profile::{Conditions, Profile};
use crate::checkpoint;
use crate::comm::World;
use crate::config::Config;
use crate::network::blocks::Blocks;
use crate::setup::Setup;
use crate::setup::neighbours::Neighbours;
use crate::sys::cpus::at_once;
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
    let Ok(before) = Config::of_manifest(&manifest.config, "manifest", &[]) else { return Ok(false) };
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
    let blocks = world.first_error(Blocks::new(&setup.network.layers, setup.network.input))?;
    let profile = times_together(world, &setup, Parts::Blocks(&blocks), false)?;
    let mine = profile.map_or(Ok(Vec::new()), |profile| measured_cuts(&setup, &blocks, &profile));
    let all = world.gather(bytemuck::cast_slice(&world.first_error(mine)?))?;
    let cuts: Vec<usize> = bytemuck::pod_collect_to_vec(&all[0]);
    let arrived = cuts.len();
    let setup = world.first_error(setup.recut(cuts))?;
    if setup.grid.modules != arrived + 1 {
        return Err(Error::Run("rank 0's cuts did not arrive whole".into()));
    }
    Ok(setup)
}

fn measured_cuts(setup: &Setup, blocks: &Blocks, profile: &Profile) -> Result<Vec<usize>> {
    let (cuts, found) = best_cuts(setup, blocks, profile)?;
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

/// Times of `parts` with `modules` of them at work on this machine: from the cache, else measured with as many as this process
/// may run at once.
///
/// # Errors
/// As [`Profile::get`].
pub fn times_of(setup: &Setup, parts: Parts, modules: usize, fresh: bool) -> Result<Profile> {
    Profile::get(conditions_of(setup, parts, modules)?, fresh)
}

/// What those times depend on.
///
/// # Errors
/// [`crate::Error::Input`] where a part's shapes do not fit.
pub fn conditions_of(setup: &Setup, parts: Parts, modules: usize) -> Result<Conditions> {
    conditions(setup, modules.clamp(1, at_once(setup.config.run.threads)), parts)
}

/// Times of `parts` as all ranks of rank 0's node together find them, on rank 0: from its cache, else measured by all of them
/// at the same time where each has processors of its own, as they will work, and otherwise by rank 0 alone. Collective.
///
/// # Errors
/// Rank 0's error on every rank.
pub fn times_together(world: &World, setup: &Setup, parts: Parts, fresh: bool) -> Result<Option<Profile>> {
    let node = Neighbours::of(world)?;
    let apart = node.apart;
    let a_rank = setup.grid.workers().div_ceil(world.size());
    let copies = (if apart { a_rank } else { a_rank * node.ranks }).clamp(1, at_once(setup.config.run.threads));
    let busy = if apart { copies * node.ranks } else { copies };
    let wanted = world.first_error(conditions(setup, busy, parts))?;
    // On a GPU a module is timed with the GPU to itself.
    let apart = apart && wanted.gpu.is_none();
    let copies = if wanted.gpu.is_some() { 1 } else { copies };
    let chief = world.rank() == 0;
    let known = if chief && !fresh { Profile::cached(&wanted) } else { None };
    let measures = world.gather(&[u8::from(known.is_none())])?[0] == [1];
    if !measures {
        return Ok(known);
    }
    let measured = match (chief, apart && node.chief) {
        (true, _) => Profile::measure(wanted, copies).map(Some),
        // To keep rank 0 company: what these find is not used.
        (false, true) => Profile::measure(wanted, copies).map(|_| None),
        (false, false) => Ok(None),
    };
    world.first_error(measured)
}
