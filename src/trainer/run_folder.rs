//! The run folder: all ranks must see it, and one run holds it.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use bytesize::ByteSize;

use super::preflight::Check;
use crate::comm::World;
use crate::metrics::attempt::FILE;
use crate::setup::Setup;
use crate::sys::files::{free_space, what};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// Does every rank see the run folder, and has it room for the checkpoints that it will hold? Rank 0 makes the folder.
/// Collective.
///
/// # Errors
/// [`crate::Error::Transport`] when MPI fails.
pub fn check(world: &World, setup: &Setup) -> Result<Check> {
    const WHAT: &str = "run folder";
    let dir = &setup.config.run.dir;
    let names = world.gather(format!(".probe-{}-{}", hostname(), std::process::id()).as_bytes())?;
    let probe = dir.join(String::from_utf8_lossy(&names[0]).as_ref());
    let written = match world.rank() {
        0 => std::fs::create_dir_all(dir).and_then(|()| std::fs::write(&probe, hostname())).map_err(|e| e.to_string()),
        _ => Ok(()),
    };
    let outcomes = world.gather(written.err().unwrap_or_default().as_bytes())?;
    let seen = outcomes[0].is_empty() && patiently(|| std::fs::File::open(&probe).is_ok());
    let blind = if seen { String::new() } else { hostname() };
    let all = world.gather(blind.as_bytes())?;
    let blind: Vec<String> = all
        .iter()
        .enumerate()
        .filter(|(_, host)| !host.is_empty())
        .map(|(rank, host)| format!("rank {rank} on {}", String::from_utf8_lossy(host)))
        .collect();
    if world.rank() == 0 {
        let _ = std::fs::remove_file(&probe);
    }
    if !outcomes[0].is_empty() {
        let why = String::from_utf8_lossy(&outcomes[0]).into_owned();
        return Ok(Check::failure(WHAT, format!("{}: {why}; choose a run.dir that can be written to", dir.display())));
    }
    if !blind.is_empty() {
        let names = blind[..blind.len().min(4)].join(", ");
        return Ok(Check::failure(
            WHAT,
            format!(
                "{} on {} is not seen by {} ranks ({names}): it must be on a file system that all hosts share",
                dir.display(),
                hostname(),
                blind.len()
            ),
        ));
    }
    // Beside those of run.keep the start's, the best one, and the one being written.
    let kept = setup.config.run.keep as u64 + 2 + u64::from(setup.config.train.validate_every > 0);
    let a_checkpoint: u64 = 4
        * setup.network.modules.iter().map(|m| m.params).sum::<u64>()
        * (1 + setup.config.train.optimizer.buffers().len() as u64 + u64::from(setup.config.train.ema.is_some()));
    let wanted = kept.saturating_mul(a_checkpoint);
    let free = free_space(dir).unwrap_or(u64::MAX);
    let found = format!("{}, seen by all ranks, {} free", dir.display(), ByteSize(free));
    Ok(match free < wanted {
        true => Check::warning(
            WHAT,
            format!(
                "{found}; {kept} checkpoints (run.keep, the start's, the best, the one being written) take {}",
                ByteSize(wanted)
            ),
        ),
        false => Check::fine(WHAT, found),
    })
}

/// Keeps other runs out of the run folder as long as the file returned lives: two would mix their metrics and overwrite each
/// other's checkpoints. Called on rank 0, before the newest checkpoint is looked for. A batch job that was requeued may find
/// the job before it still ending, or its lock not yet given back by the file server: it waits up to `patience`. (A file
/// system without locks lets all in.)
///
/// # Errors
/// [`Error::Input`] when the folder cannot be written or another run is at work in it.
pub fn hold(dir: &Path, patience: Duration) -> Result<File> {
    // To open a pipe would be to wait for its other end.
    for path in ["metrics.jsonl", FILE, "log.txt", ".lock"].map(|name| dir.join(name)) {
        if let Some(what) = std::fs::metadata(&path).ok().and_then(|meta| what(&meta)) {
            return Err(Error::input(format!("{}: {what}, not a file; choose another run.dir", path.display())));
        }
    }
    let path = dir.join(".lock");
    let mut file = File::options()
        .create(true)
        .read(true)
        .append(true)
        .open(&path)
        .map_err(|e| Error::input(format!("{}: {e}; choose a run.dir that can be written to", path.display())))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if start.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(250));
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                return Err(Error::input(format!(
                    "run.dir = {dir:?}: another run is at work there ({}): wait for its end (a file STOP in that folder asks \
                     for it), or choose another run.dir",
                    holder.trim_end()
                )));
            }
            Err(TryLockError::Error(e)) => {
                log::debug!("{}: no lock: {e}", path.display());
                break;
            }
            Ok(()) => break,
        }
    }
    let holder = format!("process {} on {}\n", std::process::id(), hostname());
    if let Err(e) = file.set_len(0).and_then(|()| file.write_all(holder.as_bytes())) {
        log::debug!("{}: {e}", path.display());
    }
    Ok(file)
}

/// Network file systems may show a new file some seconds late.
fn patiently(seen: impl Fn() -> bool) -> bool {
    (0..20).any(|_| {
        seen() || {
            std::thread::sleep(Duration::from_millis(250));
            false
        }
    })
}
