//! Numbers and strings of a shard, in whatever type of HDF5's another program has stored them: never cut, never wrapped.
//!
//! HDF5 itself converts without a word: -1 to an unsigned 0, 0.7 to 0; and it does not convert strings of fixed length, as MATLAB, R
//! and numpy write them, to others.

use hdf5::sync::sync;
use hdf5::types::{TypeDescriptor, VarLenAscii, VarLenUnicode};
use hdf5::{Container, h5check};
use hdf5_sys::h5a::H5Aread;
use hdf5_sys::h5d::H5Dread;
use hdf5_sys::h5i::{H5I_type_t, H5Iget_type};
use hdf5_sys::h5p::H5P_DEFAULT;
use hdf5_sys::h5s::H5S_ALL;

/// Why a value cannot be read; the caller says where it is.
type Read<T> = std::result::Result<T, String>;

/// What is stored, in words.
pub(super) fn kind(at: &Container) -> String {
    use TypeDescriptor as D;
    match at.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(D::Integer(size)) => format!("int{}", 8 * size as usize),
        Ok(D::Unsigned(size)) => format!("uint{}", 8 * size as usize),
        Ok(D::Float(size)) => format!("float{}", 8 * size as usize),
        Ok(D::FixedAscii(_) | D::FixedUnicode(_) | D::VarLenAscii | D::VarLenUnicode) => "strings".into(),
        Ok(D::Boolean) => "booleans".into(),
        Ok(other) => format!("{other:?}").chars().take(80).collect(),
        Err(e) => e.to_string(),
    }
}

fn refused(e: hdf5::Error) -> String {
    e.to_string()
}

/// Whole numbers, each exactly as stored.
pub(super) fn integers(at: &Container) -> Read<Vec<i128>> {
    use TypeDescriptor as D;
    Ok(match at.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(D::Integer(_)) => at.read_raw::<i64>().map_err(refused)?.into_iter().map(i128::from).collect(),
        Ok(D::Unsigned(_) | D::Boolean) => at.read_raw::<u64>().map_err(refused)?.into_iter().map(i128::from).collect(),
        Ok(D::Float(_)) => {
            let whole = |(k, value): (usize, f64)| match value.fract() == 0.0 && value.abs() <= MAX_EXACT {
                true => Ok(value as i128),
                false => Err(format!("entry {k} is {value}, a float: whole numbers are expected; store integers")),
            };
            at.read_raw::<f64>().map_err(refused)?.into_iter().enumerate().map(whole).collect::<Read<_>>()?
        }
        _ => return Err(format!("holds {}, not whole numbers", kind(at))),
    })
}

/// Up to here a 64-bit float holds every whole number.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// The same in a smaller type.
pub(super) fn numbers<T: TryFrom<i128>>(at: &Container) -> Read<Vec<T>> {
    let number = |(k, value): (usize, i128)| {
        let kind = std::any::type_name::<T>();
        T::try_from(value).map_err(|_| format!("entry {k} is {value}, which is no {kind}"))
    };
    integers(at)?.into_iter().enumerate().map(number).collect()
}

/// 64 bits each, whether they are stored as signed or as unsigned numbers.
pub(super) fn words(at: &Container) -> Read<Vec<u64>> {
    match at.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(TypeDescriptor::Float(_)) => Err("holds floats, which have no room for 64 bits: store uint64".into()),
        _ => Ok(integers(at)?.into_iter().map(|value| value as u64).collect()),
    }
}

/// A number.
pub(super) fn real(at: &Container) -> Read<f64> {
    use TypeDescriptor as D;
    match at.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(D::Integer(_) | D::Unsigned(_) | D::Float(_)) => one(at, at.read_raw::<f64>().map_err(refused)?),
        _ => Err(format!("holds {}, not a number", kind(at))),
    }
}

/// The one entry of a list of one: of a scalar, or as some programs store scalars.
pub(super) fn one<T>(at: &Container, list: Vec<T>) -> Read<T> {
    let [one] =
        <[T; 1]>::try_from(list).map_err(|list| format!("has {} entries {:?}, not one", list.len(), at.shape()))?;
    Ok(one)
}

/// Strings, of variable or fixed length, in UTF-8 or ASCII.
pub(super) fn strings(at: &Container) -> Read<Vec<String>> {
    use TypeDescriptor as D;
    let text = |(k, bytes): (usize, &[u8])| {
        std::str::from_utf8(bytes).map(str::to_string).map_err(|_| format!("entry {k} holds text that is not UTF-8"))
    };
    match at.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(D::VarLenUnicode) => {
            let list = at.read_raw::<VarLenUnicode>().map_err(refused)?;
            list.iter().map(|s| s.as_bytes()).enumerate().map(text).collect()
        }
        Ok(D::VarLenAscii) => {
            let list = at.read_raw::<VarLenAscii>().map_err(refused)?;
            list.iter().map(|s| s.as_bytes()).enumerate().map(text).collect()
        }
        Ok(D::FixedAscii(size) | D::FixedUnicode(size)) if size > 0 => {
            let bytes = fixed(at, size).map_err(refused)?;
            bytes.chunks_exact(size).map(unpadded).enumerate().map(text).collect()
        }
        _ => Err(format!("holds {}, not strings", kind(at))),
    }
}

/// Where a dataset's strings of variable length are kept in the file, as they are: from which byte on, and how many.
pub(super) fn pieces(at: &hdf5::Dataset) -> Vec<(u64, usize)> {
    use TypeDescriptor as D;
    if !matches!(at.dtype().and_then(|dtype| dtype.to_descriptor()), Ok(D::VarLenUnicode | D::VarLenAscii)) {
        return Vec::new();
    }
    match (at.offset(), at.chunk()) {
        (Some(offset), _) => vec![(offset, at.size())],
        // What went through a filter is not there as it is.
        (None, Some(chunk)) if at.filters().is_empty() => {
            let chunks = (0..at.num_chunks().unwrap_or(0)).filter_map(|k| at.chunk_info(k));
            chunks.map(|info| (info.addr, chunk.iter().product())).collect()
        }
        _ => Vec::new(),
    }
}

/// Without the zeros or, as Fortran's and MATLAB's have, spaces that fill the length.
fn unpadded(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes[..end].trim_ascii_end()
}

/// The bytes of strings of `size` bytes each.
fn fixed(at: &Container, size: usize) -> hdf5::Result<Vec<u8>> {
    let (dtype, entries) = (at.dtype()?, at.size());
    let length = entries.checked_mul(size).ok_or("too many strings")?;
    let mut out = vec![0u8; length];
    sync(|| {
        let to = out.as_mut_ptr().cast();
        // SAFETY: HDF5's lock is held; in memory and in the file the elements have one type, of `size` bytes, and `out` has room for all.
        unsafe {
            match H5Iget_type(at.id()) {
                H5I_type_t::H5I_ATTR => h5check(H5Aread(at.id(), dtype.id(), to)),
                _ => h5check(H5Dread(at.id(), dtype.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, to)),
            }
        }
    })?;
    Ok(out)
}
