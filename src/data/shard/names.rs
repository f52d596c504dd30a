//! Whether attributes and datasets are there, asked name by name: the library's lists of names read more of a damaged file than it may
//! hold.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use hdf5::sync::sync;
use hdf5_sys::h5a::H5Aexists;
use hdf5_sys::h5l::{H5L_info1_t, H5L_type_t, H5Lexists, H5Lget_info1};
use hdf5_sys::h5p::H5P_DEFAULT;

/// Whether the root has this attribute.
pub(super) fn has_attribute(file: &hdf5::File, name: &CStr) -> bool {
    // SAFETY: HDF5's lock is held, and the name ends with a zero.
    sync(|| unsafe { H5Aexists(file.id(), name.as_ptr()) > 0 })
}

/// Whether something of this name is there; and if so, whether it is a part of this file.
pub(super) fn is_inside(file: &hdf5::File, name: &CStr) -> Option<bool> {
    let mut info = MaybeUninit::<H5L_info1_t>::zeroed();
    // SAFETY: HDF5's lock is held, the name ends with a zero, and `info` has room for what is written; its kind is read as the number
    // that it is, whatever the file says.
    let kind = sync(|| unsafe {
        let there = H5Lexists(file.id(), name.as_ptr(), H5P_DEFAULT) > 0;
        let told = there && H5Lget_info1(file.id(), name.as_ptr(), info.as_mut_ptr(), H5P_DEFAULT) >= 0;
        told.then(|| (&raw const (*info.as_ptr()).type_).cast::<i32>().read())
    });
    kind.map(|kind| kind == H5L_type_t::H5L_TYPE_HARD as i32 || kind == H5L_type_t::H5L_TYPE_SOFT as i32)
}
