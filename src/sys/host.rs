//! This machine and the program that runs on it, by name.

use std::io::Read;
use std::sync::OnceLock;

use xxhash_rust::xxh3::Xxh3;

/// This machine's name, up to the first dot.
pub fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let short = name.to_string_lossy().split('.').next().unwrap_or_default().to_string();
    if short.is_empty() { "unknown host".into() } else { short }
}

/// xxh3-64 of the program's file, which is read once. Of nothing if it cannot be read.
pub fn program_hash() -> u64 {
    static HASH: OnceLock<u64> = OnceLock::new();
    *HASH.get_or_init(hashed)
}

/// In pieces: it is large, and memory peaks count.
fn hashed() -> u64 {
    let mut hash = Xxh3::new();
    let mut piece = vec![0; 1 << 16];
    if let Ok(mut file) = std::env::current_exe().and_then(std::fs::File::open) {
        while let Ok(n @ 1..) = file.read(&mut piece) {
            hash.update(&piece[..n]);
        }
    }
    hash.digest()
}

/// NVIDIA GPUs of this machine, whether the program can use them or not.
pub fn nvidia_gpus() -> usize {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    let gpu = |name: &String| {
        name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    std::fs::read_dir("/dev").map_or(0, |entries| entries.filter_map(name).filter(gpu).count())
}

/// The version of NVIDIA's kernel driver, where it is loaded.
pub fn nvidia_driver() -> Option<String> {
    let version = std::fs::read_to_string("/sys/module/nvidia/version").ok()?;
    Some(version.trim().to_string()).filter(|version| !version.is_empty())
}
