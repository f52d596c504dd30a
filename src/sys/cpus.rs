//! The processors of this machine, and the time that this process has had on them.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

/// The calling thread, to the scheduler.
const THIS: Pid = Pid::from_raw(0);

/// The processors this process may run on, by number.
pub fn own_processors() -> Vec<usize> {
    let set = sched_getaffinity(THIS).unwrap_or_default();
    let own: Vec<usize> = (0..CpuSet::count()).filter(|&n| set.is_set(n) == Ok(true)).collect();
    // A machine with more processors than the set has room for answers with an error.
    if own.is_empty() { (0..parallelism()).collect() } else { own }
}

/// Processors' worth of time that this process may use: a container's share may be smaller than its set.
pub fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Keeps the calling thread, and those it starts, to some of them. Where the system refuses it stays free to move.
pub fn keep_to(processors: &[usize]) {
    let mut set = CpuSet::new();
    let all = processors.iter().try_for_each(|&processor| set.set(processor));
    let _ = all.and_then(|()| sched_setaffinity(THIS, &set));
}

/// How many modules of `threads` threads can compute at once on them.
pub fn at_once(threads: usize) -> usize {
    (parallelism() / threads.max(1)).max(1)
}

/// The processor's name, with what tells models apart that are called the same.
pub fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let line = info.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == key))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let rest = ["cpu family", "model", "stepping"].map(|key| field(key).unwrap_or_default()).join("/");
    format!("{} ({}, {rest})", field("model name").unwrap_or_else(|| "unknown".into()), std::env::consts::ARCH)
}

/// Processor time of all of this process's threads so far, and of its children that have ended, in seconds.
pub fn processor_seconds() -> f64 {
    let usages = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN].into_iter().flat_map(getrusage);
    let times = usages.flat_map(|usage| [usage.user_time(), usage.system_time()]);
    times.map(|time| time.num_microseconds() as f64 * 1e-6).sum()
}
