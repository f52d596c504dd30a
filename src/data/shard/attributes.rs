//! A shard's attributes and small lists, to and from HDF5, with errors that name the file and the item.

use std::path::Path;

use hdf5::H5Type;
use hdf5::types::VarLenUnicode;

use super::{Encoding, FORMAT, ShardHeader, VERSION, check};
use crate::{Error, Result};

/// HDF5's variable-length string for `s`.
pub(super) fn text(s: &str) -> hdf5::Result<VarLenUnicode> {
    s.parse().map_err(|e| hdf5::Error::from(format!("{s:?} cannot be stored as a string: {e:?}")))
}

/// The `String` of a stored string.
pub(super) fn utf8(path: &Path, what: &str, s: &VarLenUnicode) -> Result<String> {
    std::str::from_utf8(s.as_bytes())
        .map(str::to_string)
        .map_err(|_| Error::input(format!("{}: {what} holds text that is not UTF-8", path.display())))
}

/// Writes the root attributes.
pub(super) fn write(file: &hdf5::File, header: &ShardHeader) -> hdf5::Result<()> {
    let string = |name: &str, value: &str| -> hdf5::Result<()> {
        file.new_attr::<VarLenUnicode>().create(name)?.write_scalar(&text(value)?)
    };
    string("format", FORMAT)?;
    file.new_attr::<i64>().create("version")?.write_scalar(&VERSION)?;
    string("encoding", header.encoding.name())?;
    file.new_attr::<f64>().create("fps")?.write_scalar(&header.fps)?;
    file.new_attr::<i64>().create("height")?.write_scalar(&(header.height as i64))?;
    file.new_attr::<i64>().create("width")?.write_scalar(&(header.width as i64))?;
    string("dataset", &header.dataset)?;
    string("split", &header.split)?;
    let names = header.class_names.iter().map(|s| text(s)).collect::<hdf5::Result<Vec<_>>>()?;
    file.new_attr_builder().with_data(&names[..]).create("class_names")?;
    Ok(())
}

/// Reads and checks the root attributes.
pub(super) fn read(path: &Path, file: &hdf5::File) -> Result<ShardHeader> {
    let place = path.display();
    let missing = |name: &str, e: hdf5::Error| {
        Error::input(format!("{place}: root attribute `{name}` is missing or of the wrong type: {e}"))
    };
    fn scalar<T: H5Type>(file: &hdf5::File, name: &str) -> hdf5::Result<T> {
        file.attr(name)?.read_scalar()
    }
    let string = |name: &str| -> Result<String> {
        let value: VarLenUnicode = scalar(file, name).map_err(|e| missing(name, e))?;
        utf8(path, &format!("attribute `{name}`"), &value)
    };
    let size = |name: &str| -> Result<usize> {
        let value: i64 = scalar(file, name).map_err(|e| missing(name, e))?;
        usize::try_from(value).map_err(|_| Error::input(format!("{place}: attribute `{name}` is {value}")))
    };
    let format = string("format").map_err(|_| {
        Error::input(format!("{place}: an HDF5 file, but not a shard (root attribute `format` is not {FORMAT:?})"))
    })?;
    if format != FORMAT {
        return Err(Error::input(format!("{place}: not a shard: its format is {format:?}, not {FORMAT:?}")));
    }
    let version: i64 = scalar(file, "version").map_err(|e| missing("version", e))?;
    if version != VERSION {
        return Err(Error::input(format!(
            "{place}: shard version {version}; this program reads version {VERSION}: prepare the data anew"
        )));
    }
    let encoding = match string("encoding")?.as_str() {
        "raw" => Encoding::Raw,
        "jpeg" => Encoding::Jpeg,
        other => return Err(Error::input(format!("{place}: encoding {other:?} is neither \"raw\" nor \"jpeg\""))),
    };
    let names = file.attr("class_names").map_err(|e| missing("class_names", e))?;
    let names: Vec<VarLenUnicode> = names.read_raw().map_err(|e| missing("class_names", e))?;
    let header = ShardHeader {
        encoding,
        fps: scalar(file, "fps").map_err(|e| missing("fps", e))?,
        height: size("height")?,
        width: size("width")?,
        dataset: string("dataset")?,
        split: string("split")?,
        class_names: names.iter().map(|s| utf8(path, "attribute `class_names`", s)).collect::<Result<_>>()?,
    };
    check::header(path, &header)?;
    Ok(header)
}

/// Reads a one-dimensional dataset whole. Its length is compared with the file's `bytes` first, so that a damaged
/// header cannot ask for all memory.
pub(super) fn list<T: H5Type>(path: &Path, dataset: &hdf5::Dataset, name: &str, bytes: u64) -> Result<Vec<T>> {
    let shape = dataset.shape();
    // Even compressed with deflate, whose best is about 1000 to 1, the file would have to be this large.
    if shape.len() != 1 || shape[0] as u64 > bytes.saturating_mul(1024) {
        return Err(Error::input(format!(
            "{}: dataset /{name} has shape {shape:?}, not one dimension",
            path.display()
        )));
    }
    dataset.read_raw().map_err(|e| Error::input(format!("{}: dataset /{name} cannot be read: {e}", path.display())))
}
