//! What the hosts of a run offer, and what of it will not do: checked when training starts, shown by `sideways doctor`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::footprint::{bytes, memory};
use super::setup::Setup;
use crate::config::DeviceChoice;
use crate::machine::{own_processors, program_hash};
use crate::transport::{World, hostname};
use crate::{Error, Result};

/// What one rank finds where it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Its host.
    pub host: String,
    /// The processors it may run on, by number.
    pub processors: Vec<usize>,
    /// Processors' worth of time that a container leaves it, which may be less.
    pub parallelism: usize,
    /// Bytes of memory that may still be taken there.
    pub available: u64,
    /// Bytes it may take at most, of the host or of the control group that it is in.
    pub limit: u64,
    /// Free bytes of `/dev/shm`, through which ranks of a host exchange messages; `None` without it.
    pub shared: Option<u64>,
    /// NVIDIA GPUs of the host.
    pub gpus: usize,
    /// Of these, how many the program can use; and if none, why.
    pub usable: usize,
    /// Why none can be used.
    pub unusable: String,
    /// xxh3-64 of the program's file.
    pub program: u64,
}

impl Place {
    /// Looks around.
    pub fn here() -> Self {
        let (available, limit) = memory_here();
        let (usable, unusable) = super::gpus::usable();
        Place {
            host: hostname(),
            processors: own_processors(),
            parallelism: std::thread::available_parallelism().map_or(1, usize::from),
            available,
            limit,
            shared: free_space(Path::new("/dev/shm")),
            gpus: std::fs::read_dir("/dev").map_or(0, |entries| {
                let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
                let gpu = |name: &String| {
                    name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
                };
                entries.filter_map(name).filter(gpu).count()
            }),
            usable,
            unusable,
            program: program_hash(),
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// Training works, but not as well as it could.
    Warning,
    /// Training would fail.
    Failure,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq)]
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

/// Every rank's place. Collective.
///
/// # Errors
/// [`Error::Transport`] when MPI fails.
pub fn places(world: &World) -> Result<Vec<Place>> {
    let mine = serde_json::to_vec(&Place::here()).map_err(|e| Error::Run(e.to_string()))?;
    let parse =
        |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(|e| Error::Transport(format!("a rank's place: {e}")));
    world.gather(&mine)?.into_iter().map(parse).collect()
}

/// Checks hosts, processors and memory; `setup` says what is needed, where it is known.
pub fn check(places: &[Place], setup: Option<&Setup>) -> Vec<Check> {
    let hosts = hosts(places);
    vec![
        program(places, &hosts),
        neighbours(places, &hosts),
        processors(places, &hosts, setup),
        memories(places, &hosts, setup),
        shared_memory(places, &hosts),
        gpus(places, &hosts, setup),
    ]
}

/// Hosts in the order of their first ranks, each with its ranks.
fn hosts(places: &[Place]) -> Vec<(&str, Vec<usize>)> {
    let mut hosts: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, place) in places.iter().enumerate() {
        match hosts.iter_mut().find(|(host, _)| *host == place.host) {
            Some((_, ranks)) => ranks.push(rank),
            None => hosts.push((&place.host, vec![rank])),
        }
    }
    hosts
}

fn program(places: &[Place], hosts: &[(&str, Vec<usize>)]) -> Check {
    let differ: Vec<&str> =
        hosts.iter().filter(|(_, ranks)| places[ranks[0]].program != places[0].program).map(|(h, _)| *h).collect();
    match differ.is_empty() {
        true => Check::fine("program", format!("sideways {}, the same on all ranks", env!("CARGO_PKG_VERSION"))),
        false => Check::failure(
            "program",
            format!(
                "another build of it runs on {} than on {}: use one file that all hosts see",
                differ.join(", "),
                hosts[0].0
            ),
        ),
    }
}

/// Messages between neighbouring ranks should stay on a host where they can.
fn neighbours(places: &[Place], hosts: &[(&str, Vec<usize>)]) -> Check {
    let list: Vec<String> = hosts.iter().take(8).map(|(host, ranks)| format!("{host}: {}", ranges(ranks))).collect();
    let more = if hosts.len() > 8 { ", …" } else { "" };
    let found = format!("ranks by host: {}{more}", list.join("; "));
    let crossings = places.windows(2).filter(|pair| pair[0].host != pair[1].host).count();
    match crossings >= hosts.len() {
        true => Check::warning(
            "placement",
            format!(
                "{found}; {crossings} of {} pairs of neighbouring ranks are on different hosts where {} would do: srun \
                 --distribution=block, or mpirun --map-by slot",
                places.len() - 1,
                hosts.len() - 1
            ),
        ),
        false => Check::fine("placement", found),
    }
}

/// `0-3, 8`
fn ranges(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let show = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(show).collect::<Vec<_>>().join(", ")
}

/// Does every thread that computes have a processor?
fn processors(places: &[Place], hosts: &[(&str, Vec<usize>)], setup: Option<&Setup>) -> Check {
    let threads = setup.map_or(1, |s| s.config.run.threads.max(1));
    // A rank's modules take turns, so it needs no more than its threads.
    for (rank, place) in places.iter().enumerate() {
        let own = place.processors.len().min(place.parallelism);
        if own < threads {
            return Check::warning(
                "processors",
                format!(
                    "rank {rank} on {} may use {own} of them, run.threads = {threads}: ask for more (sbatch \
                     --cpus-per-task={threads}, mpirun --map-by slot:PE={threads}), or lower run.threads",
                    place.host
                ),
            );
        }
    }
    let mut fewest: Option<(usize, usize, &str)> = None;
    for (host, ranks) in hosts {
        let mut together: Vec<usize> = ranks.iter().flat_map(|&rank| places[rank].processors.clone()).collect();
        together.sort_unstable();
        together.dedup();
        let cores =
            together.len().min(ranks.iter().map(|&rank| places[rank].parallelism).max().unwrap_or(1).max(ranks.len()));
        let wanted = ranks.len() * threads;
        if together.len() < wanted {
            return Check::warning(
                "processors",
                format!(
                    "{wanted} threads ({} ranks x run.threads = {threads}) share {} of them on {host}: fewer ranks or \
                     threads a host, or more processors a task",
                    ranks.len(),
                    together.len()
                ),
            );
        }
        if fewest.is_none_or(|(least, ..)| cores < least) {
            fewest = Some((cores, wanted, host));
        }
    }
    let (cores, wanted, host) = fewest.unwrap_or((1, 1, "this host"));
    Check::fine("processors", format!("{cores} for {wanted} thread(s) that compute on {host}; no host has fewer"))
}

/// Program, libraries and MPI, beside what a module needs: some 80 MiB were seen.
const PROGRAM: u64 = 96 << 20;

fn memories(places: &[Place], hosts: &[(&str, Vec<usize>)], setup: Option<&Setup>) -> Check {
    let mut tightest: Option<(f64, String)> = None;
    for (host, ranks) in hosts {
        let (available, limit) = ranks.iter().map(|&r| (places[r].available, places[r].limit)).min().unwrap_or((0, 0));
        let Some(setup) = setup else {
            let found = format!("{} of it free on {host}; no host has less", bytes(available));
            if tightest.as_ref().is_none_or(|(least, _)| -(available as f64) > *least) {
                tightest = Some((-(available as f64), found));
            }
            continue;
        };
        let of_rank = |rank: usize| {
            let workers = (0..setup.grid.workers()).filter(|&w| setup.grid.rank_of(w) == rank);
            workers.map(|w| memory(setup, w)).sum::<u64>() + PROGRAM
        };
        let needed: u64 = ranks.iter().map(|&rank| of_rank(rank)).sum();
        let found = format!("{} needed of {} free on {host}", bytes(needed), bytes(available));
        if needed > limit {
            return Check::failure(
                "memory",
                format!(
                    "{} needed on {host}, which has {}: more hosts, or smaller data.batch",
                    bytes(needed),
                    bytes(limit)
                ),
            );
        }
        if needed > available {
            return Check::warning("memory", format!("{found}: it may run out"));
        }
        let share = needed as f64 / available.max(1) as f64;
        if tightest.as_ref().is_none_or(|(most, _)| share > *most) {
            tightest = Some((share, format!("{found}; no host is tighter")));
        }
    }
    Check::fine("memory", tightest.map_or(String::new(), |(_, found)| found))
}

/// Ranks of a host exchange messages through files there; full, Open MPI dies of SIGBUS.
fn shared_memory(places: &[Place], hosts: &[(&str, Vec<usize>)]) -> Check {
    const WANTED: u64 = 8 << 20;
    for (host, ranks) in hosts.iter().filter(|(_, ranks)| ranks.len() > 1) {
        let free = places[ranks[0]].shared.unwrap_or(0);
        let wanted = WANTED * ranks.len() as u64;
        if free < wanted {
            return Check::warning(
                "/dev/shm",
                format!(
                    "{} free on {host}, {} ranks there want about {}: make it larger (docker run --shm-size), or remove \
                     what dead jobs left",
                    bytes(free),
                    ranks.len(),
                    bytes(wanted)
                ),
            );
        }
    }
    let least = places.iter().filter_map(|place| place.shared).min();
    Check::fine("/dev/shm", least.map_or("not there".into(), |free| format!("{} free at least", bytes(free))))
}

fn gpus(places: &[Place], hosts: &[(&str, Vec<usize>)], setup: Option<&Setup>) -> Check {
    const WHAT: &str = "GPUs";
    let choice = setup.map_or(DeviceChoice::Auto, |setup| setup.config.run.device);
    let without = hosts.iter().find(|(_, ranks)| places[ranks[0]].usable == 0);
    let crowded = hosts.iter().find(|(_, ranks)| places[ranks[0]].usable < ranks.len());
    match (choice, without, crowded) {
        (DeviceChoice::Cuda, Some((host, ranks)), _) => {
            let why = &places[ranks[0]].unusable;
            Check::failure(WHAT, format!("run.device = \"cuda\", and {host} has none to use: {why}"))
        }
        (DeviceChoice::Auto | DeviceChoice::Cpu, Some((host, ranks)), _) => match &places[ranks[0]] {
            place if place.gpus == 0 => Check::fine(WHAT, "none: modules compute on the CPU"),
            place => Check::warning(
                WHAT,
                format!("{} on {host} stay idle, modules compute on the CPU: {}", place.gpus, place.unusable),
            ),
        },
        (DeviceChoice::Cpu, None, _) => Check::warning(WHAT, "they stay idle: run.device = \"cpu\""),
        (_, None, Some((host, ranks))) => {
            let (n, usable) = (ranks.len(), places[ranks[0]].usable);
            Check::warning(WHAT, format!("{n} ranks share {usable} on {host}, and wait for one another"))
        }
        (_, None, None) => {
            let each: Vec<String> =
                hosts.iter().map(|(host, ranks)| format!("{host}: {}", places[ranks[0]].usable)).collect();
            Check::fine(WHAT, format!("one a rank; by host: {}", each.join(", ")))
        }
    }
}

/// Does every rank see the run folder, and has it room for the checkpoints that it will hold? Rank 0 makes the folder.
/// Collective.
///
/// # Errors
/// [`Error::Transport`] when MPI fails.
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

/// All checks that training makes at its start: warnings are logged, by rank 0. Collective.
///
/// # Errors
/// [`Error::Input`], on every rank, for what would make it fail.
pub fn require(world: &World, setup: &Setup) -> Result<()> {
    let mut checks = check(&places(world)?, Some(setup));
    checks.push(check_run_folder(world, setup)?);
    let failures: Vec<String> =
        checks.iter().filter(|c| c.verdict == Verdict::Failure).map(|c| format!("{}: {}", c.what, c.found)).collect();
    let outcome = match failures.is_empty() {
        true => Ok(()),
        false => Err(Error::input(failures.join("\n"))),
    };
    world.first_error(outcome)?;
    if world.rank() == 0 {
        for check in checks.iter().filter(|c| c.verdict == Verdict::Warning) {
            log::warn!("{}: {}", check.what, check.found);
        }
    }
    Ok(())
}

/// Bytes free for this user on the file system of `path`.
fn free_space(path: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: the path ends with a zero, the buffer is filled in on success.
    unsafe {
        let mut status: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut status) == 0).then(|| status.f_bavail as u64 * status.f_frsize as u64)
    }
}

/// Bytes of memory still to be had, and the most there may ever be: the host's, or a control group's if that is less.
fn memory_here() -> (u64, u64) {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |key: &str| -> Option<u64> {
        let line = info.lines().find(|line| line.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
    };
    let mut memory = (field("MemAvailable:").unwrap_or(u64::MAX), field("MemTotal:").unwrap_or(u64::MAX));
    let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, limit, used) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            let dir = Path::new(root).join(group);
            let Some(most) = number(dir.join(limit)) else { continue };
            let left = most.saturating_sub(number(dir.join(used)).unwrap_or(0));
            memory = (memory.0.min(left), memory.1.min(most));
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(host: &str, processors: &[usize]) -> Place {
        let shared = Some(1 << 30);
        let (processors, parallelism) = (processors.to_vec(), processors.len());
        Place {
            host: host.into(),
            processors,
            parallelism,
            available: 1 << 30,
            limit: 2 << 30,
            shared,
            ..Place::default()
        }
    }

    fn found<'a>(checks: &'a [Check], what: &str) -> &'a Check {
        checks.iter().find(|check| check.what == what).unwrap()
    }

    #[test]
    fn ranks_in_blocks_are_fine() {
        let places = [place("a", &[0]), place("a", &[1]), place("b", &[0]), place("b", &[1])];
        let checks = check(&places, None);
        assert!(checks.iter().all(|check| check.verdict == Verdict::Fine), "{checks:?}");
        assert_eq!(found(&checks, "placement").found, "ranks by host: a: 0-1; b: 2-3");
    }

    #[test]
    fn what_will_not_do_is_found() {
        let mut places = [place("a", &[0]), place("b", &[0]), place("a", &[0]), place("b", &[1])];
        let checks = check(&places, None);
        let placement = found(&checks, "placement");
        assert_eq!(placement.verdict, Verdict::Warning);
        assert!(
            placement.found.contains("3 of 3 pairs") && placement.found.contains("where 1 would do"),
            "{placement:?}"
        );
        let processors = found(&checks, "processors");
        assert!(
            processors.found.starts_with("2 threads") && processors.found.contains("share 1 of them on a"),
            "{processors:?}"
        );
        places[1].program = 7;
        let checks = check(&places, None);
        let program = found(&checks, "program");
        assert!(program.verdict == Verdict::Failure && program.found.contains("runs on b than on a"), "{program:?}");
        places[0].shared = Some(1 << 20);
        assert_eq!(found(&check(&places, None), "/dev/shm").verdict, Verdict::Warning);
    }

    #[test]
    fn gpus_are_counted_by_host() {
        let host = |name: &str, usable| Place { usable, gpus: 4, unusable: "why".into(), ..place(name, &[0]) };
        let gpus = |places: &[Place]| super::gpus(places, &hosts(places), None);
        assert_eq!(gpus(&[host("a", 2), host("a", 2), host("b", 1)]).verdict, Verdict::Fine);
        let shared = gpus(&[host("a", 1), host("a", 1), host("b", 1)]);
        assert!(shared.verdict == Verdict::Warning && shared.found.contains("2 ranks share 1 on a"), "{shared:?}");
        let idle = gpus(&[host("a", 1), host("b", 0)]);
        assert!(idle.verdict == Verdict::Warning && idle.found.contains("4 on b stay idle"), "{idle:?}");
    }

    #[test]
    fn this_host_has_memory() {
        let (available, limit) = memory_here();
        assert!(available > 0 && available <= limit && limit < 1 << 50, "{available} of {limit}");
    }
}
