//! Files that are there whole or not at all, and the room for them.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::{Error, Result};

/// Writes a file under a temporary name that ends in `.partial`, syncs it and renames it. Several processes may do so at
/// once: the last one's file stays.
///
/// # Errors
/// [`Error::Io`] if the disk refuses; what was there before still is.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .suffix(".partial")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|e| Error::io(path, e))
}

/// Bytes free for this user on the file system of `path`.
pub fn free_space(path: &Path) -> Option<u64> {
    let status = nix::sys::statvfs::statvfs(path).ok()?;
    Some(status.blocks_available() as u64 * status.fragment_size() as u64)
}
