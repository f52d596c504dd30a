//! A shard's attributes and small lists, to and from HDF5, with errors that name the file and the item.

use std::ffi::CString;
use std::path::Path;

use hdf5::types::VarLenUnicode;

use super::{Encoding, FORMAT, ShardHeader, VERSION, check, names, values};
use crate::{Error, Result};

/// HDF5's variable-length string for `s`.
pub(super) fn text(s: &str) -> hdf5::Result<VarLenUnicode> {
    s.parse().map_err(|e| hdf5::Error::from(format!("{s:?} cannot be stored as a string: {e:?}")))
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

/// The root attributes that a shard has.
const NAMES: [&str; 9] = ["format", "version", "encoding", "fps", "height", "width", "dataset", "split", "class_names"];

/// The datasets that a shard of this encoding has.
fn datasets(encoding: Option<Encoding>) -> Vec<&'static str> {
    let frames: &[&str] = match encoding {
        Some(Encoding::Jpeg) => &["jpeg", "frame_offsets"],
        Some(Encoding::Raw) => &["frames"],
        None => &[],
    };
    [&["labels", "video_ids", "video_offsets", "video_checksums"], frames].concat()
}

/// Where the format is described.
const DESCRIBED: &str = "docs/data.md, \"The format of a shard\", has all that belongs to one";

/// Reads and checks the root attributes; refuses a file in which something is missing, with all that is.
pub(super) fn read(path: &Path, file: &hdf5::File, bytes: u64) -> Result<ShardHeader> {
    let place = path.display();
    let has = |name: &str| CString::new(name).is_ok_and(|name| names::has_attribute(file, &name));
    let inside = |name: &str| CString::new(name).ok().and_then(|name| names::is_inside(file, &name));
    let all = [Encoding::Raw, Encoding::Jpeg].map(|encoding| datasets(Some(encoding))).concat();
    if let Some(name) = all.iter().find(|name| inside(name) == Some(false)) {
        return Err(elsewhere(path, name));
    }
    if !has("format") && !datasets(None).into_iter().any(|name| inside(name).is_some()) {
        return Err(Error::input(format!(
            "{place}: an HDF5 file, but not a shard (no root attribute `format`); {DESCRIBED}"
        )));
    }
    let attr = |name: &str| -> Result<hdf5::Attribute> {
        let attr = file.attr(name).map_err(|e| Error::input(format!("{place}: root attribute `{name}`: {e}")))?;
        let element = attr.dtype().map_or(1, |dtype| dtype.size().max(1));
        // So that a damaged header cannot ask for all memory.
        match attr.size().checked_mul(element) {
            Some(size) if size as u64 <= bytes => Ok(attr),
            _ => Err(Error::input(format!("{place}: root attribute `{name}` is larger than the file: damaged?"))),
        }
    };
    let bad = |name: &str, why: String| Error::input(format!("{place}: root attribute `{name}` {why}"));
    let string = |name: &str| -> Result<String> {
        let attr = attr(name)?;
        values::strings(&attr).and_then(|list| values::one(&attr, list)).map_err(|why| bad(name, why))
    };
    let integer = |name: &str| -> Result<i64> {
        let attr = attr(name)?;
        values::numbers(&attr).and_then(|list| values::one(&attr, list)).map_err(|why| bad(name, why))
    };
    let size = |name: &str| -> Result<usize> {
        let value = integer(name)?;
        usize::try_from(value).map_err(|_| Error::input(format!("{place}: attribute `{name}` is {value}")))
    };
    if has("format") {
        let format = string("format")?;
        if format != FORMAT {
            return Err(Error::input(format!("{place}: not a shard: its format is {format:?}, not {FORMAT:?}")));
        }
    }
    if has("version") {
        let version = integer("version")?;
        if version != VERSION {
            return Err(Error::input(format!(
                "{place}: shard version {version}; this program reads version {VERSION}: prepare the data anew"
            )));
        }
    }
    let encoding = match has("encoding").then(|| string("encoding")).transpose()?.as_deref() {
        None => None,
        Some("raw") => Some(Encoding::Raw),
        Some("jpeg") => Some(Encoding::Jpeg),
        Some(other) => {
            return Err(Error::input(format!("{place}: encoding {other:?} is neither \"raw\" nor \"jpeg\"")));
        }
    };
    let attributes = NAMES.iter().filter(|name| !has(name)).map(|name| format!("root attribute `{name}`"));
    let lists = datasets(encoding).into_iter().filter(|name| inside(name).is_none());
    let missing: Vec<String> = attributes.chain(lists.map(|name| format!("dataset /{name}"))).collect();
    let (true, Some(encoding)) = (missing.is_empty(), encoding) else {
        let (is, list) = (if missing.len() == 1 { "is" } else { "are" }, missing.join(", "));
        return Err(Error::input(format!("{place}: {list} {is} missing from this shard; {DESCRIBED}")));
    };
    let header = ShardHeader {
        encoding,
        fps: values::real(&*attr("fps")?).map_err(|why| bad("fps", why))?,
        height: size("height")?,
        width: size("width")?,
        dataset: string("dataset")?,
        split: string("split")?,
        class_names: values::strings(&*attr("class_names")?).map_err(|why| bad("class_names", why))?,
    };
    check::header(path, &header)?;
    Ok(header)
}

/// What lies in another file is not checked with this one, and that may be no file at all.
fn elsewhere(path: &Path, name: &str) -> Error {
    Error::input(format!(
        "{}: dataset /{name} lies in another file: a shard holds all that belongs to it",
        path.display()
    ))
}

/// A dataset, which must be readable here.
pub(super) fn dataset(path: &Path, file: &hdf5::File, name: &str) -> Result<hdf5::Dataset> {
    let dataset = file
        .dataset(name)
        .map_err(|e| Error::input(format!("{}: dataset /{name} is missing or unreadable: {e}", path.display())))?;
    let virtual_layout = dataset.layout() == hdf5::dataset::Layout::Virtual;
    if virtual_layout || dataset.dcpl().is_ok_and(|plist| !plist.external().is_empty()) {
        return Err(elsewhere(path, name));
    }
    if let Some(filter) = dataset.filters().into_iter().find(|filter| !filter.is_available()) {
        let id = filter.id();
        let known =
            FILTERS.iter().find(|(number, _)| *number == id).map_or("unknown to this program", |(_, name)| name);
        return Err(Error::input(format!(
            "{}: dataset /{name} is stored through the HDF5 filter {id} ({known}), which is not installed here: write it without \
             filters (h5repack -f NONE), or install the filter's plugin and point HDF5_PLUGIN_PATH to it",
            path.display()
        )));
    }
    Ok(dataset)
}

/// Registered filters that files often come with.
const FILTERS: [(i32, &str); 10] = [
    (1, "deflate"),
    (4, "szip"),
    (32000, "LZF"),
    (32001, "Blosc"),
    (32004, "LZ4"),
    (32008, "bitshuffle"),
    (32013, "ZFP"),
    (32015, "Zstandard"),
    (32023, "FCIDECOMP"),
    (32026, "Blosc2"),
];

/// Reads a one-dimensional dataset whole, with `how`. Its length is compared with the file's `bytes` first, so that a damaged
/// header cannot ask for all memory.
pub(super) fn list<T>(
    path: &Path,
    dataset: &hdf5::Dataset,
    name: &str,
    bytes: u64,
    how: impl Fn(&hdf5::Container) -> std::result::Result<Vec<T>, String>,
) -> Result<Vec<T>> {
    let shape = dataset.shape();
    let element = dataset.dtype().map_or(1, |dtype| dtype.size().max(1)) as u64;
    // Even compressed with deflate, whose best is about 1000 to 1, the file would have to be this large.
    let most = if dataset.filters().is_empty() { bytes } else { bytes.saturating_mul(1024) };
    if shape.len() != 1 || (shape[0] as u64).checked_mul(element).is_none_or(|size| size > most) {
        return Err(Error::input(format!(
            "{}: dataset /{name} has shape {shape:?}, not one dimension of what the file has room for",
            path.display()
        )));
    }
    how(dataset).map_err(|why| Error::input(format!("{}: dataset /{name} {why}", path.display())))
}
