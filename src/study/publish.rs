//! What a study leaves for people: `scaling.csv`, `speed` and `efficiency` as SVG and PNG, and `index.html`.

use super::folder::Study;
use super::page::{body, page, title};
use super::plot::charts;
use super::table::{Row, csv, rows};
use crate::Result;
use crate::sys::files::write_whole;

/// Gathers what there is, writes it into the study's folder, and returns the table.
///
/// # Errors
/// [`crate::Error::Input`] if a file of the study cannot be read; [`crate::Error::Io`] if the disk refuses.
pub fn publish(study: &Study) -> Result<Vec<Row>> {
    let (rows, dir) = (rows(study)?, study.dir());
    let charts = charts(&rows, &study.beyond()?);
    write_whole(&dir.join("scaling.csv"), &csv(&rows)?)?;
    for chart in &charts {
        write_whole(&dir.join(format!("{}.svg", chart.name)), chart.svg()?.as_bytes())?;
        write_whole(&dir.join(format!("{}.png", chart.name)), &chart.png()?)?;
    }
    write_whole(&dir.join("index.html"), page(study, &rows, &charts, &place(&rows))?.as_bytes())?;
    Ok(rows)
}

/// A study as a part of another page: its title, and its content as HTML.
///
/// # Errors
/// [`crate::Error::Input`] if a file of the study cannot be read.
pub fn section(study: &Study) -> Result<(String, String)> {
    let rows = rows(study)?;
    let charts = charts(&rows, &study.beyond()?);
    Ok((title(study), body(study, &rows, &charts, &place(&rows))?))
}

/// Where the rows were measured, in a sentence.
pub fn place(rows: &[Row]) -> String {
    match (rows.iter().any(|row| row.runs > 0), rows.iter().any(|row| row.job.is_some())) {
        (false, _) => "Nothing was measured yet.".into(),
        (true, true) => "Measured under Slurm.".into(),
        (true, false) => {
            "Measured without Slurm, on one machine: its nodes are groups of ranks that share its processors.".into()
        }
    }
}
