//! One workload over links, run on threads of one process and on MPI ranks, and what happens when things fail.
//!
//! An MPI test runs this very program under mpirun; its ranks run one of the functions marked `ignore`.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sideways::comm::all_reduce::{AllReduce, Group};
use sideways::comm::{Endpoints, Header, Kind, LinkSpec, Orders, Receiver, Sender, World, connect};
use sideways::{Error, Result};

#[path = "../common/mod.rs"]
mod common;
mod failures;
use common::mpirun::{LAUNCHER, mpirun, text};
use common::program::MINUTE;

/// A chain of workers with links down, back up and skips of some spans, each with one tick of delay.
#[derive(Clone, Copy)]
struct Workload {
    workers: usize,
    spans: &'static [usize],
    words: usize,
    depth: usize,
    ticks: u64,
    /// Release a message only after the next tick's messages are sent.
    hold: bool,
    /// Every other message is shorter than the link allows.
    shorter: bool,
    /// Links are of replicas' gradients, for which the ranks of a node share memory.
    gradients: bool,
}

impl Workload {
    fn links(&self) -> Vec<LinkSpec> {
        let mut links = Vec::new();
        for span in [1].iter().chain(self.spans) {
            for from in 0..self.workers.saturating_sub(*span) {
                let to = from + span;
                for (kind, from, to) in [(Kind::Activation, from, to), (Kind::Cotangent, to, from)] {
                    let kind = if self.gradients { Kind::Gradient } else { kind };
                    let id = links.len() as u32;
                    let name = format!("module {} -> {}", from + 1, to + 1);
                    links.push(LinkSpec { id, kind, from, to, words: self.words, depth: self.depth, name });
                }
            }
        }
        links
    }

    fn header(&self, link: &LinkSpec, tick: u64) -> Header {
        let words = if self.shorter && tick % 2 == 1 { 1 + self.words / 2 } else { self.words };
        link.header(tick / 5, (tick % 5) as u32, [words as u32, 1, 1, 1]).stamped(tick, Orders::empty())
    }

    /// Runs the workers that belong to this rank, each on a thread, and checks every word that arrives.
    fn run(&self, world: &World, rank_of_worker: &[usize]) -> Result<()> {
        let links = self.links();
        let mut endpoints = connect(world, rank_of_worker, &links, MINUTE)?;
        let breaker = endpoints.breaker();
        std::thread::scope(|scope| {
            let mine = (0..self.workers).filter(|worker| rank_of_worker[*worker] == world.rank());
            let threads: Vec<_> = mine
                .map(|worker| {
                    let (senders, receivers) = ends(&mut endpoints, &links, worker);
                    let breaker = breaker.clone();
                    scope.spawn(move || {
                        self.work(senders, receivers).inspect_err(|error| breaker.trip(error.to_string()))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no worker panics"))
        })
    }

    fn work(&self, mut senders: Vec<(LinkSpec, Sender)>, mut receivers: Vec<(LinkSpec, Receiver)>) -> Result<()> {
        for tick in 0..=self.ticks {
            for (link, receiver) in receivers.iter_mut().filter(|_| tick > 0) {
                let expected = self.header(link, tick - 1);
                check(receiver.wait(&expected)?, link.id, tick - 1)?;
                if !self.hold {
                    receiver.release()?;
                }
            }
            for (link, sender) in senders.iter_mut().filter(|_| tick < self.ticks) {
                let header = self.header(link, tick);
                fill(&mut sender.host_slot()?[..header.words as usize], link.id, tick);
                sender.start(&header)?;
            }
            for (link, receiver) in receivers.iter_mut().filter(|_| tick > 0 && self.hold) {
                check(receiver.wait(&self.header(link, tick - 1))?, link.id, tick - 1)?;
                receiver.release()?;
            }
        }
        senders.iter_mut().try_for_each(|(_, sender)| sender.flush())
    }
}

type Ends = (Vec<(LinkSpec, Sender)>, Vec<(LinkSpec, Receiver)>);

fn ends(endpoints: &mut Endpoints, links: &[LinkSpec], worker: usize) -> Ends {
    let (out, inward) = (links.iter().filter(|l| l.from == worker), links.iter().filter(|l| l.to == worker));
    (
        out.map(|link| (link.clone(), endpoints.sender(link.id).expect("a sender"))).collect(),
        inward.map(|link| (link.clone(), endpoints.receiver(link.id).expect("a receiver"))).collect(),
    )
}

/// Words no other message has, none of them a NaN.
fn word(link: u32, tick: u64, place: usize) -> f32 {
    let mixed = (u64::from(link) << 40 ^ tick << 24 ^ place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    f32::from_bits((mixed >> 32) as u32 & 0x3fff_ffff)
}

fn fill(payload: &mut [f32], link: u32, tick: u64) {
    payload.iter_mut().enumerate().for_each(|(place, value)| *value = word(link, tick, place));
}

fn check(payload: &[f32], link: u32, tick: u64) -> Result<()> {
    match payload.iter().enumerate().find(|(place, value)| value.to_bits() != word(link, tick, *place).to_bits()) {
        Some((place, value)) => Err(Error::Run(format!("link {link} tick {tick}: word {place} is {value}"))),
        None => Ok(()),
    }
}

const CHAIN: Workload =
    Workload { workers: 2, spans: &[], words: 16, depth: 1, ticks: 40, hold: false, shorter: false, gradients: false };

/// From 64 bytes to 16 MiB, spans up to 5, queues of 1 to 8.
const WORKLOADS: [Workload; 8] = [
    CHAIN,
    Workload { workers: 6, spans: &[2, 3, 5], words: 1 << 10, ticks: 60, ..CHAIN },
    Workload { workers: 5, spans: &[2], words: 1 << 14, depth: 2, ticks: 30, hold: true, ..CHAIN },
    Workload { workers: 4, spans: &[3], words: 1 << 18, depth: 3, ticks: 12, hold: true, shorter: true, ..CHAIN },
    Workload { workers: 9, spans: &[4], words: 100, depth: 8, ticks: 50, shorter: true, ..CHAIN },
    Workload { workers: 3, spans: &[2], words: 1 << 22, depth: 1, ticks: 4, ..CHAIN },
    Workload { workers: 5, spans: &[2], words: 1001, depth: 2, ticks: 30, hold: true, gradients: true, ..CHAIN },
    Workload { workers: 4, spans: &[3], words: 1 << 18, ticks: 12, shorter: true, gradients: true, ..CHAIN },
];

#[test]
fn workload_on_threads() -> Result<()> {
    WORKLOADS.iter().try_for_each(|workload| workload.run(&World::Alone, &vec![0; workload.workers]))
}

/// Every workload with its workers in blocks, then dealt out in turn.
#[test]
#[ignore = "one rank of an MPI test"]
fn rank_workload() {
    rank(|world| {
        for workload in WORKLOADS {
            let blocks: Vec<usize> = (0..workload.workers).map(|w| w * world.size() / workload.workers).collect();
            let turns: Vec<usize> = (0..workload.workers).map(|w| w % world.size()).collect();
            workload.run(world, &blocks)?;
            workload.run(world, &turns)?;
        }
        Ok(())
    })
}

#[test]
fn workload_on_2_ranks() {
    passes(2, "rank_workload");
}

#[test]
fn workload_on_3_ranks() {
    passes(3, "rank_workload");
}

#[test]
fn workload_on_9_ranks() {
    passes(9, "rank_workload");
}

/// Sends as many messages as there are buffers before the receiver looks.
#[test]
#[ignore = "one rank of an MPI test"]
fn rank_deep_queue() {
    rank(|world| deep_queue(world, &[0, world.size() - 1]));
}

fn deep_queue(world: &World, rank_of_worker: &[usize]) -> Result<()> {
    const DEPTH: usize = 12;
    let words = 1 << 16;
    let name = "module 1 -> 2".to_string();
    let link = LinkSpec { id: 3, kind: Kind::Activation, from: 0, to: 1, words, depth: DEPTH, name };
    let mut endpoints = connect(world, rank_of_worker, std::slice::from_ref(&link), MINUTE)?;
    let shape = [words as u32, 1, 1, 1];
    if let Ok(mut sender) = endpoints.sender(3) {
        let mut payload = vec![0.0; words];
        for tick in 0..DEPTH as u64 {
            fill(&mut payload, 3, tick);
            sender.send(&link.header(tick, 0, shape), &payload)?;
        }
        sender.flush()?;
    }
    if let Ok(mut receiver) = endpoints.receiver(3) {
        std::thread::sleep(Duration::from_millis(50));
        for tick in 0..DEPTH as u64 {
            while !receiver.ready()? {
                std::thread::yield_now();
            }
            let (header, payload) = receiver.wait_any()?;
            assert_eq!(header.batch.number, tick);
            check(payload, header.link, header.batch.number)?;
            receiver.release()?;
        }
        assert!(!receiver.ready()?);
    }
    Ok(())
}

#[test]
fn deep_queue_on_threads() -> Result<()> {
    deep_queue(&World::Alone, &[0, 0])
}

#[test]
fn deep_queue_on_2_ranks() {
    passes(2, "rank_deep_queue");
}

/// One all-reduce of `words` values on the replicas that belong to this rank, by replica.
fn mean(world: &World, rank_of_worker: &[usize], words: usize) -> Result<Vec<(usize, Vec<f32>)>> {
    let replicas = rank_of_worker.len();
    let group = Group { first: 0, name: "module 1".into(), replicas, words, worker: &|r| r };
    let own: Vec<usize> = (0..replicas).filter(|&r| rank_of_worker[r] == world.rank()).collect();
    // Each rank lists its own links alone.
    let mut links: Vec<LinkSpec> = own.iter().flat_map(|&r| group.links(r)).collect();
    links.sort_by_key(|link| link.id);
    links.dedup();
    let mut ends = connect(world, rank_of_worker, &links, MINUTE)?;
    let parts: Vec<(usize, AllReduce)> =
        own.iter().map(|&r| Ok((r, AllReduce::new(&mut ends, &group, r)?))).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let work = |(r, mut part): (usize, AllReduce)| {
            scope.spawn(move || {
                let mut values: Vec<f32> = (0..words).map(|n| ((n * 3 + r * 11) as f32).sin()).collect();
                for batch in 0..3 {
                    part.mean(&mut values, batch, 0)?;
                }
                Ok((r, values))
            })
        };
        let threads: Vec<_> = parts.into_iter().map(work).collect();
        threads.into_iter().map(|thread| thread.join().expect("no replica panics")).collect()
    })
}

/// Replicas in one process, in blocks on ranks, and dealt out in turn, with messages of a word and of hundreds of KiB: the same bits.
#[test]
#[ignore = "one rank of an MPI test"]
fn rank_all_reduce() {
    rank(|world| {
        for (replicas, sizes) in
            [(2, &[3, 300_001][..]), (3, &[3]), (6, &[300_001]), (8, &[3, 300_001]), (9, &[5000]), (22, &[5000])]
        {
            for &words in sizes {
                let alone = mean(&World::Alone, &vec![0; replicas], words)?;
                let blocks: Vec<usize> = (0..replicas).map(|w| w * world.size() / replicas).collect();
                let turns: Vec<usize> = (0..replicas).map(|w| w % world.size()).collect();
                for placement in [blocks, turns] {
                    for (r, values) in mean(world, &placement, words)? {
                        let same = values.iter().zip(&alone[r].1).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "replica {r} of {replicas}, {words} values, {placement:?}");
                    }
                }
            }
        }
        Ok(())
    });
}

/// What a rank says that could not have memory together with others of its node.
const NOT_SHARED: &str = "gradients go through MPI within this node";

#[test]
fn all_reduce_on_3_ranks() {
    let said = passes(3, "rank_all_reduce");
    assert!(!said.contains(NOT_SHARED), "{said}");
}

/// The same by MPI's own messages, as between nodes: when told so, and, with a warning, where MPI has no memory that ranks share.
#[test]
fn all_reduce_through_messages() {
    let said = passes_with(3, "rank_all_reduce", &[("SIDEWAYS_SHARED", "off")]);
    assert!(!said.contains(NOT_SHARED), "{said}");
    // A setting of Open MPI's.
    if std::env::var_os(LAUNCHER).is_none() {
        let said = passes_with(3, "rank_all_reduce", &[("OMPI_MCA_osc", "^sm")]);
        assert!(said.contains(NOT_SHARED) && said.contains("MPI_Win_allocate_shared"), "{said}");
    }
}

#[test]
fn all_reduce_on_8_ranks() {
    passes(8, "rank_all_reduce");
}

// What happens when things fail.

/// A rank's life: join, work, conclude.
fn rank(work: impl FnOnce(&World) -> Result<()>) {
    env_logger::builder().filter_level(log::LevelFilter::Warn).init();
    let world = World::join().expect("the ranks find each other");
    let size = world.size();
    assert!(size > 1 && world.local_rank() < world.local_size());
    let result = work(&world);
    let code = world.conclude(result);
    // The process ends here, so the test harness does not say that it ran a test. One write, which no other rank's divides.
    std::io::stderr().write_all(format!("{CONCLUDED}{size}\n").as_bytes()).unwrap();
    std::process::exit(code);
}

/// What a rank says when it has done its work, with the number of ranks behind it.
const CONCLUDED: &str = "rank concluded, one of ";

fn job(n: usize, function: &str, env: &[(&str, &str)]) -> (std::process::Output, Duration) {
    let program: PathBuf = std::env::current_exe().unwrap();
    let start = Instant::now();
    let output = mpirun(n, &program, &["--exact", "--ignored", "--nocapture", function], env, MINUTE);
    (output, start.elapsed())
}

fn passes(n: usize, function: &str) -> String {
    passes_with(n, function, &[])
}

/// What was written. All ranks must have run the function to its end: the test harness calls it success if there is none of that name.
fn passes_with(n: usize, function: &str, env: &[(&str, &str)]) -> String {
    let (output, _) = job(n, function, env);
    let all = text(&output);
    assert!(output.status.success(), "{all}");
    assert_eq!(all.matches(&format!("{CONCLUDED}{n}\n")).count(), n, "not all of {n} ranks ran {function}: {all}");
    all
}

#[test]
fn a_function_that_is_not_there_does_not_pass() {
    let said =
        *std::panic::catch_unwind(|| passes(2, "rank_that_is_not_there")).unwrap_err().downcast::<String>().unwrap();
    assert!(said.contains("not all of 2 ranks ran") && said.contains("running 0 tests"), "{said}");
}

/// Runs a job that must end by itself, well before its ranks' timeouts, with this exit code and these words.
fn fails(n: usize, function: &str, code: i32, parts: &[&str]) -> String {
    let (output, took) = job(n, function, &[]);
    let all = text(&output);
    assert_eq!(output.status.code(), Some(code), "{all}");
    assert!(took < Duration::from_secs(20), "took {took:?}: {all}");
    parts.iter().for_each(|part| assert!(all.contains(part), "{part:?} is not in: {all}"));
    all
}
