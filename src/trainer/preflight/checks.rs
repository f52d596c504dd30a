//! What is said about the places of a run's ranks.

use bytesize::ByteSize;

use super::{Check, Place};
use crate::config::DeviceChoice;
use crate::setup::Setup;
use crate::setup::footprint::memory;

/// Checks hosts, processors and memory of all ranks' places, at least one; `setup` says what is needed, where it is known.
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
            let found = format!("{} of it free on {host}; no host has less", ByteSize(available));
            if tightest.as_ref().is_none_or(|(least, _)| -(available as f64) > *least) {
                tightest = Some((-(available as f64), found));
            }
            continue;
        };
        let of_rank = |rank: usize| setup.grid.workers_of(rank).map(|w| memory(setup, w)).sum::<u64>() + PROGRAM;
        let needed: u64 = ranks.iter().map(|&rank| of_rank(rank)).sum();
        let found = format!("{} needed of {} free on {host}", ByteSize(needed), ByteSize(available));
        if needed > limit {
            return Check::failure(
                "memory",
                format!(
                    "{} needed on {host}, which has {}: more hosts, or smaller data.batch",
                    ByteSize(needed),
                    ByteSize(limit)
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
                    ByteSize(free),
                    ranks.len(),
                    ByteSize(wanted)
                ),
            );
        }
    }
    let least = places.iter().filter_map(|place| place.shared).min();
    Check::fine("/dev/shm", least.map_or("not there".into(), |free| format!("{} free at least", ByteSize(free))))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::preflight::Verdict;

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
}
