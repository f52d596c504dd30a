//! The folder that all ranks must see.

use std::time::Duration;

use super::Check;
use crate::Result;
use crate::engine::footprint::bytes;
use crate::engine::setup::Setup;
use crate::machine::free_space;
use crate::transport::{World, hostname};

/// Does every rank see the run folder, and has it room for the checkpoints that it will hold? Rank 0 makes the folder.
/// Collective.
///
/// # Errors
/// [`crate::Error::Transport`] when MPI fails.
pub fn check_run_folder(world: &World, setup: &Setup) -> Result<Check> {
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
    let kept = setup.config.run.keep as u64 + 1;
    let a_checkpoint: u64 = 4
        * setup.network.modules.iter().map(|m| m.params).sum::<u64>()
        * (1 + setup.config.train.optimizer.buffers().len() as u64);
    let free = free_space(dir).unwrap_or(u64::MAX);
    let found = format!("{}, seen by all ranks, {} free", dir.display(), bytes(free));
    Ok(match free < kept * a_checkpoint {
        true => Check::warning(
            WHAT,
            format!(
                "{found}; {kept} checkpoints (run.keep and the one being written) take {}",
                bytes(kept * a_checkpoint)
            ),
        ),
        false => Check::fine(WHAT, found),
    })
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
