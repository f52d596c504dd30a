//! Where training goes on: from the newest checkpoint in the run folder, or from its start.

use std::collections::BTreeSet;

use super::recorder::validations;
use crate::backend::stage::Fit;
use crate::checkpoint::best::Best;
use crate::checkpoint::{self, Checkpoint};
use crate::comm::World;
use crate::config::{Config, LrDepth};
use crate::metrics::recording::FOLDER;
use crate::pipeline::{Origin, RunRange, Traced};
use crate::setup::Setup;
use crate::torch::Import;
use crate::{Error, Result};

/// Training resumes from the newest checkpoint in the run folder, else starts (from `train.init` if set).
/// A validation that is due there and of which `metrics.jsonl` has no line comes first. Ends after `stop_after` batches, if given, and
/// at once where the best checkpoint is what `train.until` asks for. Rank 0 verifies the checkpoints and chooses for all. Collective.
///
/// # Errors
/// [`Error::Input`] if the run folder's checkpoints are of another network, or `train.init` cannot be read.
pub fn range(setup: &Setup, world: &World, stop_after: Option<u64>) -> Result<RunRange> {
    let newest = world.first_error(newest_of_all(setup, world))?;
    let chief = world.rank() == 0;
    let range = world.first_error(from_newest(setup, newest, stop_after, chief))?;
    let due = setup.validation.as_ref().is_some_and(|validation| validation.is_due(range.first, range.total));
    // Rank 0's files decide.
    let lacks = chief && due && !validations(&setup.config.run.dir).contains(&range.first);
    let best = if chief { Best::read(&setup.checkpoints()) } else { None };
    let reached = best.filter(|best| best.batches <= range.first).zip(setup.config.train.until);
    let reached = reached.is_some_and(|(best, until)| best.reaches(until));
    let decided = world.gather(&[u8::from(lacks), u8::from(reached)])?.swap_remove(0);
    let end = if decided[1] == 1 { range.first } else { range.end };
    Ok(RunRange { validates_first: decided[0] == 1 && decided[1] == 0, end, ..range })
}

fn from_newest(setup: &Setup, newest: Option<Checkpoint>, stop_after: Option<u64>, chief: bool) -> Result<RunRange> {
    let total = setup.total_batches()?;
    let (first, from) = match (newest, &setup.config.train.init) {
        (Some(newest), _) => {
            check_same_run(setup, &newest)?;
            (newest.manifest().batches, Some(Origin::Checkpoint(newest, Fit::Exact)))
        }
        (None, Some(init)) if init.is_file() => {
            let import = Import::new(init, &setup.network)?;
            if chief {
                tell(&import);
            }
            (0, Some(Origin::Import(import)))
        }
        (None, Some(init)) => {
            let init = Checkpoint::open(init)?;
            let (theirs, ours) = (&init.manifest().class_names, &setup.class_names);
            // A head of another size starts anew.
            if theirs != ours && theirs.len() == ours.len() {
                log::warn!(
                    "train.init: {} was trained on other classes, as many: the last layer goes on with weights of those",
                    init.path().display()
                );
            }
            (0, Some(Origin::Checkpoint(init, Fit::NewHead)))
        }
        (None, None) => (0, None),
    };
    let end = stop_after.map_or(total, |n| total.min(first.saturating_add(n)));
    let run = &setup.config.run;
    let trace =
        Some(Traced { folder: run.dir.join(FOLDER), batches: run.trace.map(|batches| batches.first..batches.end) });
    Ok(RunRange { first, end: end.max(first), total, from, record: true, validates_first: false, trace })
}

/// Says what is taken of a file of weights, and what not.
fn tell(import: &Import) {
    for said in import.told() {
        let path = import.path().display();
        match import.is_whole() {
            true => log::info!("train.init: {path}: {said}"),
            false => log::warn!("train.init: {path}: {said}"),
        }
    }
}

/// The run folder's newest checkpoint that is whole, as rank 0 finds it.
fn newest_of_all(setup: &Setup, world: &World) -> Result<Option<Checkpoint>> {
    let dir = setup.checkpoints();
    let found = if world.rank() == 0 { checkpoint::latest(&dir) } else { Ok(None) };
    let found = world.first_error(found)?;
    let batches = found.as_ref().map(|newest| newest.manifest().batches);
    let all = world.gather(&batches.map_or(Vec::new(), |batches| batches.to_le_bytes().to_vec()))?;
    match (found, <[u8; 8]>::try_from(all[0].as_slice())) {
        (None, Ok(batches)) => Checkpoint::trusted(&checkpoint::folder_of(&dir, u64::from_le_bytes(batches))).map(Some),
        (found, _) => Ok(found),
    }
}

/// A run folder belongs to one network; other differences are allowed, with a warning.
fn check_same_run(setup: &Setup, checkpoint: &Checkpoint) -> Result<()> {
    let path = checkpoint.path().display();
    let before = Config::of_manifest(&checkpoint.manifest().config, &path.to_string(), &[])?;
    let now = &setup.config;
    let network = |c: &Config| (c.model.preset.clone(), c.model.layers.clone(), c.model.task, c.train.rule);
    if network(&before) != network(now) || checkpoint.manifest().class_names != setup.class_names {
        return Err(Error::input(format!(
            "run.dir = {:?} holds another run (its {path} has another network, task, rule or other classes): choose \
             another run.dir, or remove the folder to start anew",
            now.run.dir
        )));
    }
    let data = setup.dataset.as_ref().map(|data| data.digest());
    if checkpoint.manifest().data.as_ref().is_some_and(|before| data.as_ref() != Some(before)) {
        log::warn!(
            "{path} was written on other data than data.train has now: the run goes on, with other clips than it would \
             have had"
        );
    }
    let changed = changed(&before, now)?;
    if !changed.is_empty() {
        log::warn!(
            "{path} was written under other settings, the run goes on with the present ones: {}",
            changed.join("; ")
        );
    }
    Ok(())
}

/// What differs in `[data]`, `[train]` and `model.skip`, a key an entry.
fn changed(before: &Config, now: &Config) -> Result<Vec<String>> {
    let read = |config: &Config| -> Result<toml::Table> {
        config.to_toml()?.parse().map_err(|e| Error::Run(format!("reading a configuration again: {e}")))
    };
    // What "auto" means is what counts.
    let plain = |config: &Config| {
        let mut config = config.clone();
        config.train.lr_depth = LrDepth::By(config.lr_depth());
        config
    };
    let (before, now) = (read(&plain(before))?, read(&plain(now))?);
    let mut changed = Vec::new();
    for section in ["data", "model", "train"] {
        let [before, now] = [&before, &now].map(|all| all.get(section).and_then(toml::Value::as_table));
        let keys: BTreeSet<&String> = before.into_iter().chain(now).flat_map(toml::Table::keys).collect();
        for key in keys.into_iter().filter(|key| section != "model" || *key == "skip") {
            let [old, new] = [before, now].map(|table| table.and_then(|table| table.get(key)));
            if old != new {
                let [old, new] = [old, new].map(|v| v.map_or("not set".into(), toml::Value::to_string));
                changed.push(format!("{section}.{key} was {old}, is {new}"));
            }
        }
    }
    Ok(changed)
}
