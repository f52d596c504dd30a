//! A study's folder: `plan.json`, `config.toml`, and for each point `points/NAME` with `status.json`, `log.txt`, `config.toml` and
//! `forecast.json` once it is prepared, and a `run-K.json` for every run that came to its end.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::forecast::Forecast;
use super::plan::{Plan, Point};
use super::table::Measured;
use crate::sys::files::{self, write_whole};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// How far a point is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Runs are still to be made.
    #[default]
    Pending,
    /// A run of it is at work, or was when the study was killed.
    Running,
    /// All runs are made.
    Done,
    /// A run failed.
    Failed,
    /// A run took longer than it may.
    OutOfTime,
    /// A run took more memory than there is.
    OutOfMemory,
}

impl State {
    /// Whether the point ended without all its runs.
    pub fn is_failure(self) -> bool {
        matches!(self, State::Failed | State::OutOfTime | State::OutOfMemory)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Pending => "pending",
            State::Running => "running",
            State::Done => "done",
            State::Failed => "failed",
            State::OutOfTime => "out of time",
            State::OutOfMemory => "out of memory",
        })
    }
}

/// A point's status, as in `status.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// How far it is.
    pub state: State,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The machine that conducts it.
    pub host: String,
    /// The Slurm job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// When this was written, in seconds since 1970.
    pub at: u64,
}

impl Status {
    /// This state from now on.
    pub fn now(state: State, reason: impl Into<String>) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Status { state, reason: reason.into(), host: hostname(), job: std::env::var("SLURM_JOB_ID").ok(), at }
    }
}

/// What is known of the machines that a study runs on, beside what each run says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What was measured.
    pub measured: Measured,
    /// The Slurm job.
    pub job: Option<String>,
    /// The checkout that the program lies in, as `git describe` has it.
    pub commit: Option<String>,
    /// Seconds from the start of the ranks to their end.
    pub seconds: f64,
    /// Seconds a tick that layers' times say which were last measured again between rounds of runs; `None`: they had not been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_tick: Option<f64>,
    /// Seconds a tick that the schedule takes where ranks compute as long as in this run; `None` where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule_tick: Option<f64>,
}

/// A study on the disk.
#[derive(Debug)]
pub struct Study {
    dir: PathBuf,
    /// Its plan.
    pub plan: Plan,
}

impl Study {
    /// Opens the study in `dir`.
    ///
    /// # Errors
    /// [`Error::Input`] if there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("plan.json");
        match read(&path)? {
            Some(plan) => Ok(Study { dir: dir.to_path_buf(), plan }),
            None => Err(Error::input(format!(
                "{}: no study there yet: give a configuration and --nodes to plan one",
                dir.display()
            ))),
        }
    }

    /// Writes `plan` into `dir`, or goes on with the study there if it has the same plan.
    ///
    /// # Errors
    /// [`Error::Input`] if another study is there; [`Error::Io`] if the folder cannot be written.
    pub fn create(dir: &Path, plan: Plan) -> Result<Self> {
        let path = dir.join("plan.json");
        if let Some(before) = read::<Plan>(&path)? {
            return match before == plan {
                true => Ok(Study { dir: dir.to_path_buf(), plan }),
                false => Err(Error::input(format!(
                    "{} holds another study ({}): choose another --out, or give --out alone to go on with that one",
                    dir.display(),
                    difference(&before, &plan)
                ))),
            };
        }
        let study = Study { dir: dir.to_path_buf(), plan };
        for point in &study.plan.points {
            let folder = study.folder(point);
            std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
            study.set_status(point, &Status::now(State::Pending, ""))?;
        }
        write_whole(&dir.join("config.toml"), study.plan.config.as_bytes())?;
        write(&path, &study.plan)?;
        Ok(study)
    }

    /// The study's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A point's folder.
    pub fn folder(&self, point: &Point) -> PathBuf {
        self.dir.join("points").join(&point.name)
    }

    /// A point's status; pending where none is written.
    ///
    /// # Errors
    /// [`Error::Input`] if it cannot be read.
    pub fn status(&self, point: &Point) -> Result<Status> {
        Ok(read(&self.folder(point).join("status.json"))?.unwrap_or_default())
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn set_status(&self, point: &Point, status: &Status) -> Result<()> {
        write(&self.folder(point).join("status.json"), status)
    }

    /// Where run `k` of a point is written.
    fn run_file(&self, point: &Point, k: usize) -> PathBuf {
        self.folder(point).join(format!("run-{k}.json"))
    }

    /// Whether run `k` (from 1) of a point has been made.
    pub fn has_run(&self, point: &Point, k: usize) -> bool {
        self.run_file(point, k).is_file()
    }

    /// Keeps what run `k` of a point measured.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn keep_run(&self, point: &Point, k: usize, run: &Run) -> Result<()> {
        write(&self.run_file(point, k), run)
    }

    /// The runs of a point that have been made.
    ///
    /// # Errors
    /// [`Error::Input`] if one cannot be read.
    pub fn runs(&self, point: &Point) -> Result<Vec<Run>> {
        let all = (1..=self.plan.request.repeat).filter(|&k| self.has_run(point, k));
        all.filter_map(|k| read(&self.run_file(point, k)).transpose()).collect()
    }

    /// What is predicted of a point, if it is prepared.
    ///
    /// # Errors
    /// [`Error::Input`] if it cannot be read.
    pub fn forecast(&self, point: &Point) -> Result<Option<Forecast>> {
        read(&self.folder(point).join("forecast.json"))
    }

    /// Writes a point's configuration with its cut, and what is predicted of it.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn prepare(&self, point: &Point, config: &str, forecast: &Forecast) -> Result<()> {
        write(&self.folder(point).join("forecast.json"), forecast)?;
        write_whole(&self.config_file(point), config.as_bytes())
    }

    /// A point's configuration, once it is prepared.
    pub fn config_file(&self, point: &Point) -> PathBuf {
        self.folder(point).join("config.toml")
    }

    /// What is predicted past the last point, if that has been looked at.
    ///
    /// # Errors
    /// [`Error::Input`] if it cannot be read.
    pub fn beyond(&self) -> Result<Vec<(Point, Forecast)>> {
        Ok(read(&self.dir.join("beyond.json"))?.unwrap_or_default())
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn set_beyond(&self, beyond: &[(Point, Forecast)]) -> Result<()> {
        write(&self.dir.join("beyond.json"), &beyond)
    }

    /// Keeps others from conducting the same points as long as what is returned lives: all of them, or `one` alone.
    ///
    /// # Errors
    /// [`Error::Input`] when another is at work there.
    pub fn hold(&self, one: Option<&Point>) -> Result<Vec<File>> {
        let busy = |path: &Path| {
            Error::input(format!(
                "{}: this study is being conducted already: wait for its end, or stop it (SIGTERM)",
                path.display()
            ))
        };
        let lock = |folder: &Path, shared: bool| -> Result<File> {
            let path = folder.join(".lock");
            let file = File::options().create(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
            match if shared { file.try_lock_shared() } else { file.try_lock() } {
                Err(TryLockError::WouldBlock) => Err(busy(folder)),
                // A file system without locks lets all in.
                Err(TryLockError::Error(_)) | Ok(()) => Ok(file),
            }
        };
        match one {
            None => Ok(vec![lock(&self.dir, false)?]),
            Some(point) => Ok(vec![lock(&self.dir, true)?, lock(&self.folder(point), false)?]),
        }
    }
}

/// What tells two plans apart, for an error.
fn difference(before: &Plan, now: &Plan) -> String {
    let (a, b) = (&before.request, &now.request);
    if before.config != now.config {
        return "of another configuration".into();
    }
    if a.nodes != b.nodes || a.axis != b.axis {
        return format!("--axis {} --nodes {:?}, not {} {:?}", a.axis, a.nodes, b.axis, b.nodes);
    }
    let rules = |r: &super::plan::Request| r.rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    if a.rules != b.rules {
        return format!("--rules {}, not {}", rules(a), rules(b));
    }
    "with other options".into()
}

/// Reads JSON; `None` where there is no file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match files::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            Error::input(format!("{}: {e}; remove the file, and what it held is made anew", path.display()))
        }),
    }
}

/// Writes JSON, whole or not at all.
fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    write_whole(path, &serde_json::to_vec_pretty(value).map_err(|e| Error::io(path, e.into()))?)
}
