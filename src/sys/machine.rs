//! This machine: its processors, memory and disks, and the program that runs on it.

use std::io::Read;
use std::path::{Path, PathBuf};

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

/// Keeps the calling thread to one of them. Where the system refuses it stays free to move.
pub fn keep_to(processor: usize) {
    // SAFETY: the set is plain bits, its size is given, and a number that it has no room for is left out.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if processor < libc::CPU_SETSIZE as usize {
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }
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

/// Bytes of memory still to be had, and the most there may ever be: the host's, or a control group's if that is less.
pub fn memory() -> (u64, u64) {
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

/// Bytes free for this user on the file system of `path`.
pub fn free_space(path: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: the path ends with a zero, the buffer is filled in on success.
    unsafe {
        let mut status: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut status) == 0).then(|| status.f_bavail as u64 * status.f_frsize as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let (available, limit) = memory();
        assert!(available > 0 && available <= limit && limit < 1 << 50, "{available} of {limit}");
    }
}
