//! Memory that the ranks of a node share: MPI's shared windows, as far as they are used.

use std::ffi::{c_int, c_void};
use std::{mem, ptr};

use ::mpi::ffi;

use super::calls::{Comm, check};
use crate::Result;

/// Bytes of a page of memory.
pub(super) const PAGE: usize = 4096;

/// A part of each rank's own, which all ranks of the node read and write. Never freed: a run makes one or two, and MPI takes
/// them back when it ends.
pub(super) struct Window {
    /// Where each rank's part starts here, by its rank on the node: at a page's beginning.
    parts: Vec<*mut u8>,
}

// SAFETY: addresses that are valid in every thread until MPI ends; what they lead to is for the window's user to order.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// `bytes` of this rank's own (`MPI_Win_allocate_shared`), in pages that no other rank's part has a share of. Collective over
    /// `node`, the ranks of a node.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] if the library cannot; perhaps not on all ranks.
    pub(super) fn allocate(node: Comm, bytes: usize) -> Result<Window> {
        let (_, ranks) = node.rank_and_size()?;
        let mut parts = Vec::with_capacity(ranks);
        // SAFETY: handles and addresses are filled in by MPI, whose `baseptr` is the address of a pointer.
        unsafe {
            let (mut info, mut window) = (mem::zeroed(), mem::zeroed());
            check(ffi::MPI_Info_create(&mut info), "MPI_Info_create")?;
            check(ffi::MPI_Info_set(info, c"alloc_shared_noncontig".as_ptr(), c"true".as_ptr()), "MPI_Info_set")?;
            let mut own: *mut c_void = ptr::null_mut();
            // MPI promises no alignment. Where in a page a part starts is the same in all processes.
            let bytes = if bytes > 0 { (bytes + PAGE) as ffi::MPI_Aint } else { 0 };
            let allocated =
                ffi::MPI_Win_allocate_shared(bytes, 1, info, node.handle(), (&raw mut own).cast(), &mut window);
            check(ffi::MPI_Info_free(&mut info), "MPI_Info_free")?;
            check(allocated, "MPI_Win_allocate_shared")?;
            check(ffi::MPI_Win_set_errhandler(window, ffi::RSMPI_ERRORS_RETURN), "MPI_Win_set_errhandler")?;
            for rank in 0..ranks {
                let (mut size, mut unit, mut part): (ffi::MPI_Aint, c_int, *mut c_void) = (0, 0, ptr::null_mut());
                let into = (&raw mut part).cast();
                let code = ffi::MPI_Win_shared_query(window, rank as c_int, &mut size, &mut unit, into);
                check(code, "MPI_Win_shared_query")?;
                let part = part.cast::<u8>();
                parts.push(part.wrapping_add(part.align_offset(PAGE)));
            }
        }
        Ok(Window { parts })
    }

    /// Where the part of the node's rank `rank` starts.
    pub(super) fn part(&self, rank: usize) -> *mut u8 {
        self.parts[rank]
    }
}
