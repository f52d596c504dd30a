//! Standard output, which may refuse: a full disk, or a reader that has seen enough (`| head`).
//!
//! `println!` would panic. Here the command does its work all the same, and its end tells.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::OnceLock;

use clap::builder::RangedU64ValueParser;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::comm::launch::is_rank;
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

/// Prints a result as one JSON value, a line; all that a command given `--json` prints.
///
/// # Errors
/// [`Error::Run`] if it cannot be written as such.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::Run(format!("writing JSON: {e}")))?;
    outln!("{text}");
    Ok(())
}

/// A path as text, whatever its bytes are.
pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Columns of the terminal that standard output is, if it is one.
fn columns() -> Option<u16> {
    let terminal = console::Term::stdout();
    if is_rank() {
        return None;
    }
    terminal.size_checked().map(|(_, columns)| columns).filter(|&columns| terminal.is_term() && columns > 0)
}

/// Prints a table: the header and the rows are cells with tabs between them. Columns from `left` on are aligned to the right.
/// Where a terminal is too narrow for it, cells have several lines.
pub(crate) fn table(left: usize, header: &str, rows: impl IntoIterator<Item = String>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.split('\t'));
    for row in rows {
        table.add_row(row.split('\t'));
    }
    if let Some(columns) = columns() {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(columns);
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
