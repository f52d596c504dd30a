//! A small disk, to fill.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::skip_unless_ci;

/// A small file system of its own at a path, for as long as this lives.
pub struct Tmpfs(pub PathBuf);

impl Tmpfs {
    /// `None` where the rights are missing, which it says (and which fails in continuous integration).
    #[track_caller]
    pub fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        let mount = mount.expect("mount starts (apt-get install mount)");
        if !mount.status.success() {
            let why = String::from_utf8_lossy(&mount.stderr);
            skip_unless_ci(&format!("a small tmpfs cannot be mounted: {}", why.trim()));
            return None;
        }
        Some(Tmpfs(at.to_path_buf()))
    }

    /// Gives it another size.
    pub fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }

    /// Uses up all there is: what a large write leaves, smaller ones take.
    pub fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for piece in [1 << 20, 1 << 16, 1 << 12] {
            while std::io::Write::write(&mut file, &vec![0; piece]).is_ok_and(|written| written > 0) {}
        }
        path
    }

    /// Bytes not in use.
    pub fn free(&self) -> u64 {
        let path = std::ffi::CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: a zeroed statvfs is a valid one; the path ends in a zero byte.
        unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            assert_eq!(libc::statvfs(path.as_ptr(), &mut stat), 0);
            stat.f_bfree * stat.f_frsize
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
