//! The allocator's habits.

/// Asks glibc to keep freed memory for reuse instead of handing it back to the kernel. Every tick frees and allocates the
/// same tensors; without this each comes back as fresh pages to be faulted in and zeroed, which costs cheap layers three
/// quarters of their time. Call it once, as a program starts; elsewhere than on glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets numbers inside the allocator, under its own lock. The first is the most it accepts.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 20);
    }
}
