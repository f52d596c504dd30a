//! Reading some rows of a dataset of bytes, with little besides the copy.
//!
//! The library's own reading of a slice looks up types, makes a property list and copies a selection each time: some 8 µs,
//! as long as copying 100 kB takes. Here all of that is made once.

use std::ops::Range;

use hdf5::sync::sync;
use hdf5::{Dataspace, h5check};
use hdf5_sys::h5d::H5Dread;
use hdf5_sys::h5p::H5P_DEFAULT;
use hdf5_sys::h5s::{H5S_SELECT_SET, H5Sclose, H5Screate_simple, H5Sselect_hyperslab};

/// A dataset of bytes, open for reading.
pub(super) struct Rows {
    dataset: hdf5::Dataset,
    /// The file's side of a read; which rows are selected in it changes under HDF5's lock.
    space: Dataspace,
    shape: Vec<u64>,
}

impl Rows {
    /// Prepares to read `dataset`.
    ///
    /// # Errors
    /// Where its elements are no bytes, or HDF5 refuses.
    pub(super) fn new(dataset: hdf5::Dataset) -> hdf5::Result<Self> {
        if !dataset.dtype()?.is::<u8>() {
            return Err(format!("its elements are {:?}, not unsigned bytes", dataset.dtype()?.to_descriptor()?).into());
        }
        let space = dataset.space()?;
        let shape = space.shape().iter().map(|&n| n as u64).collect();
        Ok(Self { dataset, space, shape })
    }

    /// The dataset's shape.
    pub(super) fn shape(&self) -> Vec<usize> {
        self.shape.iter().map(|&n| n as usize).collect()
    }

    /// How many rows there are.
    pub(super) fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(0)
    }

    /// The bytes of rows `rows` (whole slices of the first dimension), one after the other.
    ///
    /// # Errors
    /// Where rows lie outside the dataset, or the file can no longer be read there.
    pub(super) fn read(&self, rows: Range<u64>) -> hdf5::Result<Vec<u8>> {
        if rows.start > rows.end || rows.end > self.rows() {
            return Err(format!("there are {} rows, not {}..{}", self.rows(), rows.start, rows.end).into());
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut start = vec![0; self.shape.len()];
        start[0] = rows.start;
        let mut count = self.shape.clone();
        count[0] = rows.end - rows.start;
        let bytes: u64 = count.iter().product();
        // HDF5 leaves out what was never written, as where a file is damaged.
        let mut out = vec![0_u8; bytes as usize];
        let dimensions = count.len() as i32;
        sync(|| {
            let (start, count, none) = (start.as_ptr(), count.as_ptr(), std::ptr::null());
            // SAFETY: HDF5's lock is held; start and count have as many entries as the space has dimensions; `out` holds
            // all selected elements, of which each is a byte.
            unsafe {
                h5check(H5Sselect_hyperslab(self.space.id(), H5S_SELECT_SET, start, none, count, none))?;
                // As many dimensions as in the file: between other shapes HDF5 copies element by element.
                let memory = h5check(H5Screate_simple(dimensions, count, none))?;
                let byte = *hdf5::globals::H5T_NATIVE_UINT8;
                let to = out.as_mut_ptr().cast();
                let read = h5check(H5Dread(self.dataset.id(), byte, memory, self.space.id(), H5P_DEFAULT, to));
                H5Sclose(memory);
                read?;
            }
            Ok(out)
        })
    }
}
