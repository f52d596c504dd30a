//! The memory of this machine, and what this process takes of it.

use std::path::{Path, PathBuf};

/// The entry `key` of a file such as `/proc/meminfo`, which counts in KiB, in bytes.
fn entry(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(value.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The most resident memory this process has had, in bytes; 0 where the system does not say.
pub fn peak_memory() -> u64 {
    entry("/proc/self/status", "VmHWM").unwrap_or(0)
}

/// Bytes of memory still to be had, and the most there may ever be: the host's, or a control group's if that is less.
pub fn memory() -> (u64, u64) {
    let of_host = |key: &str| entry("/proc/meminfo", key).unwrap_or(u64::MAX);
    let mut memory = (of_host("MemAvailable"), of_host("MemTotal"));
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

    #[test]
    fn this_machine_has_memory() {
        let (available, limit) = memory();
        assert!(available > 0 && available <= limit && limit < 1 << 50, "{available} of {limit}");
        assert!((1..limit).contains(&peak_memory()));
    }
}
