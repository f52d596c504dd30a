//! `sideways report`: runs as one page.

use std::path::PathBuf;

use clap::Args;

use crate::report::{Run, page};
use crate::sys::files::write_whole;
use crate::{Error, Result};

/// Arguments of `sideways report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Run folders: several are drawn over one another.
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
    /// The page.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub out: PathBuf,
}

/// Writes the page.
///
/// # Errors
/// [`Error::Input`] for a folder that holds no run; [`Error::Io`] if the page cannot be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let read = |dir: &PathBuf| {
        if dir.join("plan.json").is_file() && dir.join("points").is_dir() {
            return Err(Error::input(format!(
                "{}: a scaling study, which has a page of its own: {} (`sideways scale --gather --out {0}` makes it anew)",
                dir.display(),
                dir.join("index.html").display()
            )));
        }
        Run::read(dir)
    };
    let runs = args.runs.iter().map(read).collect::<Result<Vec<_>>>()?;
    for run in &runs {
        run.problems.iter().for_each(|problem| log::warn!("{}: {problem}", run.name));
    }
    write_whole(&args.out, page(&runs)?.as_bytes())?;
    outln!("{}", args.out.display());
    Ok(())
}
