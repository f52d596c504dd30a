//! Files that are there whole or not at all, files that users name, and the room for them.

use std::fs::{File, Metadata, Permissions};
use std::io::{BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::{Error, Result};

/// Writes a file under a temporary name that ends in `.partial`, syncs it and renames it. Several processes may do so at
/// once: the last one's file stays.
///
/// # Errors
/// [`Error::Io`] if the disk refuses; what was there before still is.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_by(path, |file| file.write_all(bytes))
}

/// The same for what is made while it is written.
///
/// # Errors
/// As [`write_whole`], and what `write` returns.
pub fn write_whole_by(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let whole = || -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .suffix(".partial")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        let file = file.into_inner()?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    whole().map_err(|e| Error::io(path, e))
}

/// Makes writes beyond the limit on files' sizes (`ulimit -f`) fail with an error, instead of SIGXFSZ ending the program. Programs that
/// this one starts inherit that.
pub fn refuse_writes_beyond_limit() {
    // SAFETY: no handler is installed. It fails for signals that cannot be ignored alone, which this is not.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}

/// Has the system begin to bring what was written to a file to disk, and hardly waits for it: a sync at its end has little left to do.
pub fn begin_sync(file: &File) {
    // SAFETY: the descriptor is open as long as `file` is borrowed. A failure is the sync's to tell.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// All bytes of a file that a user named. What is no file would be waited for without an end (a named pipe that nobody writes to)
/// or has none (a device): it is refused. Pipes that a shell made, `<(…)` and `/dev/stdin`, are read.
///
/// # Errors
/// What the operating system says; that it is no file.
pub fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let (mut file, mut bytes) = (open(path)?, Vec::new());
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Such a file, to be read piece by piece.
///
/// # Errors
/// As [`read`].
pub fn open(path: &Path) -> std::io::Result<File> {
    let shell = ["/dev/fd/", "/dev/stdin", "/proc/self/fd/"].iter().any(|of_shell| {
        // Not `Path::starts_with`, which compares whole names.
        path.to_str().is_some_and(|path| path.starts_with(of_shell))
    });
    match what(&std::fs::metadata(path)?) {
        None => File::open(path),
        Some("a named pipe") if shell => File::open(path),
        Some(what) => Err(std::io::Error::other(format!("{what}, not a file"))),
    }
}

/// The same as text.
///
/// # Errors
/// As [`read`]; [`std::io::ErrorKind::InvalidData`] where it is not UTF-8.
pub fn read_text(path: &Path) -> std::io::Result<String> {
    String::from_utf8(read(path)?).map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e))
}

/// What it is, unless it is a file.
pub fn what(meta: &Metadata) -> Option<&'static str> {
    let kind = meta.file_type();
    match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a folder"),
        () if kind.is_fifo() => Some("a named pipe"),
        () if kind.is_socket() => Some("a socket"),
        () => Some("a device"),
    }
}

/// Bytes free for this user on the file system of `path`.
pub fn free_space(path: &Path) -> Option<u64> {
    let status = nix::sys::statvfs::statvfs(path).ok()?;
    Some(status.blocks_available() as u64 * status.fragment_size() as u64)
}
