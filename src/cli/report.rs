//! `sideways report`: runs as one page, or for TensorBoard.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;

use super::output::{json, shown};
use crate::report::{Beside, Run, event_file, page};
use crate::study::folder::Study;
use crate::study::publish::section;
use crate::sys::files::write_whole;
use crate::{Error, Result};

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
    /// The page [default: report.html; none with --tensorboard].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write an event file for TensorBoard of each run into a folder of its name in DIR.
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// Print what was written as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Writes page and event files.
///
/// # Errors
/// [`Error::Input`] for a folder that holds no run, or a file that is none of those that go with one; [`Error::Io`] if page or event
/// files cannot be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let (mut runs, mut folders, mut studies) = (Vec::new(), Vec::new(), Vec::new());
    for dir in &args.runs {
        if dir.join("plan.json").is_file() && dir.join("points").is_dir() {
            studies.push(section(&Study::open(dir)?)?);
        } else {
            runs.push(Run::read(dir)?);
            folders.push(dir.as_path());
        }
    }
    let beside = args.beside.iter().map(|path| Beside::read(path)).collect::<Result<Vec<_>>>()?;
    for run in &runs {
        run.problems.iter().for_each(|problem| log::warn!("{}: {problem}", run.name));
    }
    let mut written = Vec::new();
    if let Some(dir) = &args.tensorboard {
        if let Some(study) = args.runs.iter().find(|dir| !folders.contains(&dir.as_path())) {
            let study = study.display();
            return Err(Error::input(format!(
                "--tensorboard: {study} is a scaling study, which has no curves: leave it out"
            )));
        }
        written = event_files(&runs, &folders, dir)?;
    }
    let out = args.out.clone().or_else(|| args.tensorboard.is_none().then(|| PathBuf::from("report.html")));
    if let Some(out) = &out {
        write_whole(out, page(&runs, &studies, &beside)?.as_bytes())?;
    }
    if args.json {
        let (page, files) = (out.as_deref().map(shown), written.iter().map(|path| shown(path)).collect::<Vec<_>>());
        return json(&serde_json::json!({ "page": page, "event_files": files }));
    }
    written.iter().chain(&out).for_each(|path| outln!("{}", path.display()));
    Ok(())
}

/// Writes an event file of each run, which lie in `folders`, below `dir`.
fn event_files(runs: &[Run], folders: &[&Path], dir: &Path) -> Result<Vec<PathBuf>> {
    let mut names = BTreeSet::new();
    if let Some(twice) = runs.iter().find(|run| !names.insert(&run.name)) {
        return Err(Error::input(format!(
            "--tensorboard: two runs are called {}, and would have one folder: give them one at a time, each with a DIR",
            twice.name
        )));
    }
    runs.iter().zip(folders).map(|(run, folder)| event_file(folder, &run.name, dir)).collect()
}
