//! The processors of this machine, and the program that runs on them.

use std::io::Read;

use xxhash_rust::xxh3::Xxh3;

/// xxh3-64 of the program's file, read in pieces: it is large, and memory peaks count. Of nothing if it cannot be read.
pub fn program_hash() -> u64 {
    let mut hash = Xxh3::new();
    let mut piece = vec![0; 1 << 16];
    if let Ok(mut file) = std::env::current_exe().and_then(std::fs::File::open) {
        while let Ok(n @ 1..) = file.read(&mut piece) {
            hash.update(&piece[..n]);
        }
    }
    hash.digest()
}

/// The processors this process may run on, by number.
pub fn own_processors() -> Vec<usize> {
    // SAFETY: the set is plain bits, and its size is given.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: reads a bit within the set.
    let own: Vec<usize> = (0..libc::CPU_SETSIZE as usize).filter(|&n| unsafe { libc::CPU_ISSET(n, &set) }).collect();
    // A machine with more processors than the set has room for answers with an error and an empty set.
    if own.is_empty() { (0..std::thread::available_parallelism().map_or(1, usize::from)).collect() } else { own }
}

/// How many modules of `threads` threads can compute at once on them.
pub fn at_once(threads: usize) -> usize {
    // A container's share may be smaller than its set.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores.min(own_processors().len()) / threads.max(1)).max(1)
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
