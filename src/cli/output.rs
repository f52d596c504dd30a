//! Standard output, which may refuse: a full disk, or a reader that has seen enough (`| head`).
//!
//! `println!` would panic. Here the command does its work all the same, and its end tells.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::sync::OnceLock;

use clap::builder::RangedU64ValueParser;
use comfy_table::{CellAlignment, Table, presets};

use crate::{Error, Result};

/// Why nothing more is written.
static REFUSED: OnceLock<std::io::Error> = OnceLock::new();

/// `println!`, of which [`finish`] tells whether it could.
macro_rules! outln {
    ($($text:tt)*) => { $crate::cli::output::line(format_args!($($text)*)) };
}

/// Writes `text` and the end of a line.
pub(crate) fn line(text: Arguments) {
    let write = || writeln!(std::io::stdout().lock(), "{text}");
    if REFUSED.get().is_none() {
        keep(write());
    }
}

/// Prints a table: the header and the rows are cells with tabs between them. Columns from `left` on are aligned to the right.
pub(crate) fn table(left: usize, header: &str, rows: impl IntoIterator<Item = String>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.split('\t'));
    for row in rows {
        table.add_row(row.split('\t'));
    }
    for (n, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        column.set_cell_alignment(if n < left { CellAlignment::Left } else { CellAlignment::Right });
    }
    outln!("{}", table.trim_fmt());
}

/// Reads a whole number of an option, `least` to `most`.
pub(crate) fn whole(least: u64, most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=most)
}

fn keep(result: std::io::Result<()>) {
    if let Err(e) = result {
        // Another thread may have been first: either reason will do.
        let _ = REFUSED.set(e);
    }
}

/// Whether all that was written came through, or nobody wanted to read more.
///
/// # Errors
/// [`Error::Io`] with the first reason why not.
pub(crate) fn finish() -> Result<()> {
    keep(std::io::stdout().lock().flush());
    match REFUSED.get() {
        Some(e) if e.kind() != ErrorKind::BrokenPipe => {
            let same = e.raw_os_error().map_or_else(|| e.kind().into(), std::io::Error::from_raw_os_error);
            Err(Error::io("standard output", same))
        }
        _ => Ok(()),
    }
}
