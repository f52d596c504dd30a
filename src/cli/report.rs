//! `sideways report`: runs as one page.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::report::{Beside, Run, page};
use crate::study::folder::Study;
use crate::study::publish::section;
use crate::sys::files::write_whole;

/// Arguments of `sideways report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Run folders, several of which are drawn over one another; folders of scaling studies.
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// What else belongs into it: tables of `eval --scores FILE.csv` or `eval --confusion FILE`, what `fidelity --json` printed,
    /// pictures of `predict` (may be repeated).
    #[arg(long = "with", value_name = "FILE")]
    pub beside: Vec<PathBuf>,
    /// The page.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub out: PathBuf,
}

/// Writes the page.
///
/// # Errors
/// [`crate::Error::Input`] for a folder that holds no run, or a file that is none of those that go with one; [`crate::Error::Io`] if the
/// page cannot be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let (mut runs, mut studies) = (Vec::new(), Vec::new());
    for dir in &args.runs {
        if dir.join("plan.json").is_file() && dir.join("points").is_dir() {
            studies.push(section(&Study::open(dir)?)?);
        } else {
            runs.push(Run::read(dir)?);
        }
    }
    let beside = args.beside.iter().map(|path| Beside::read(path)).collect::<Result<Vec<_>>>()?;
    for run in &runs {
        run.problems.iter().for_each(|problem| log::warn!("{}: {problem}", run.name));
    }
    write_whole(&args.out, page(&runs, &studies, &beside)?.as_bytes())?;
    outln!("{}", args.out.display());
    Ok(())
}
