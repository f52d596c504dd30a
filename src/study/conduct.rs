//! Goes through a study's points until all are through.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::folder::{Run, State, Status, Study};
use super::forecast::{self, Again, Machine, prepare};
use super::launch::{End, Launcher};
use super::plan::Point;
use crate::config::Config;
use crate::{Error, Result};

/// Layers are measured again between runs where all measuring will take at most this of their time.
const MEASURING: f64 = 0.04;

/// Which points a call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Those that are not through and have not failed.
    Unfinished,
    /// Those that failed, whatever of.
    Failed,
    /// The one with this number, from 0, unless it is done.
    One(usize),
}

/// How to go about it.
pub struct Conductor<'a> {
    /// What starts ranks.
    pub launcher: Launcher,
    /// What to predict for.
    pub machine: Machine,
    /// Raised when the study is to stop.
    pub stop: &'a AtomicBool,
    /// What is called before each run with how many are done, and of how many.
    pub progress: &'a dyn Fn(u64, u64),
}

/// What a call came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conducted {
    /// Whether it was stopped before the end.
    pub stopped: bool,
    /// Runs made.
    pub runs: usize,
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds of them that ranks ran.
    pub in_runs: f64,
    /// Seconds of them in which layers were measured and points planned.
    pub planning: f64,
}

impl Conductor<'_> {
    /// Makes the runs that are missing: first run of every point, then the second of every point, so that what changes with time
    /// meets all of them alike. A point whose run fails is left, and the others go on.
    ///
    /// # Errors
    /// [`Error::Input`] when another process conducts this study; [`Error::Io`] if the disk refuses.
    pub fn conduct(&self, study: &Study, choice: Choice) -> Result<Conducted> {
        let begun = Instant::now();
        let points = &study.plan.points;
        let one = match choice {
            Choice::One(n) => Some(
                points.get(n).ok_or_else(|| Error::input(format!("there is no point {n}: {} are", points.len())))?,
            ),
            _ => None,
        };
        let _held = study.hold(one)?;
        let mut chosen = Vec::new();
        for point in points {
            let state = study.status(point)?.state;
            let wanted = match choice {
                Choice::Unfinished => !state.is_failure() && state != State::Done,
                Choice::Failed => state.is_failure(),
                Choice::One(_) => one == Some(point) && state != State::Done,
            };
            if wanted {
                // A failure is one until the point runs again.
                if state == State::Running {
                    study.set_status(point, &Status::now(State::Pending, ""))?;
                }
                chosen.push(point);
            }
        }
        let mut sum = Conducted::default();
        let mut failed = self.prepare(study, &chosen)?;
        sum.planning = begun.elapsed().as_secs_f64();
        // What measuring took the last time, it will take again.
        let mut last = sum.planning;
        let repeat = study.plan.request.repeat;
        let missing = |point: &&Point| (1..=repeat).filter(|&k| !study.has_run(point, k)).count();
        let all: usize = chosen.iter().map(&missing).sum();
        let mut predicted = HashMap::new();
        'all: for k in 1..=repeat {
            let round =
                || chosen.iter().filter(|point| !study.has_run(point, k) && !failed.contains(&point.name)).copied();
            if k > 1 && sum.planning + last <= MEASURING * sum.in_runs && round().next().is_some() {
                let measuring = Instant::now();
                predicted = self.predict_again(study, round());
                last = measuring.elapsed().as_secs_f64();
                sum.planning += last;
            }
            for point in &chosen {
                if self.stop.load(Ordering::Relaxed) {
                    break 'all;
                }
                if study.has_run(point, k) || failed.contains(&point.name) {
                    continue;
                }
                (self.progress)(sum.runs as u64, all as u64);
                let (seconds, end) =
                    self.run(study, point, k, (sum.runs + 1, all), predicted.get(&point.name).copied())?;
                sum.in_runs += seconds;
                sum.runs += 1;
                match end {
                    None => {
                        sum.stopped = true;
                        break 'all;
                    }
                    Some(state) if state.is_failure() => failed.push(point.name.clone()),
                    Some(_) => {}
                }
            }
        }
        for point in &chosen {
            if missing(point) == 0 && study.status(point)?.state != State::Done {
                study.set_status(point, &Status::now(State::Done, ""))?;
            }
        }
        sum.stopped |= self.stop.load(Ordering::Relaxed);
        sum.seconds = begun.elapsed().as_secs_f64();
        Ok(sum)
    }

    /// Plans the points that are not planned yet; the names of those that cannot be, which have failed.
    fn prepare(&self, study: &Study, chosen: &[&Point]) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        for point in chosen {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(failed);
            }
            if study.config_file(point).is_file() && study.forecast(point)?.is_some() {
                continue;
            }
            match prepare(&study.plan, point, self.machine) {
                Ok((config, forecast)) => study.prepare(point, &config.to_toml()?, &forecast)?,
                Err(e) => {
                    log::error!("{e}");
                    study.set_status(point, &Status::now(State::Failed, e.to_string()))?;
                    failed.push(point.name.clone());
                }
            }
        }
        if study.beyond()?.is_empty() && !chosen.is_empty() {
            study.set_beyond(&forecast::beyond(&study.plan, study.plan.beyond()?, self.machine))?;
        }
        Ok(failed)
    }

    /// Seconds a tick of each of the points by layers' times measured now, by name. Without those of points for which it fails, whose
    /// runs will say why.
    fn predict_again<'a>(&self, study: &Study, points: impl Iterator<Item = &'a Point>) -> HashMap<String, f64> {
        let mut again = Again::default();
        let predict = |point: &Point| {
            let config = Config::load(&study.config_file(point), &[]);
            let tick = config.and_then(|config| again.tick(&study.plan, point, &config, self.machine));
            let tick = tick.inspect_err(|e| log::debug!("{}: layers were not measured again: {e}", point.name)).ok()?;
            Some((point.name.clone(), tick))
        };
        points.take_while(|_| !self.stop.load(Ordering::Relaxed)).filter_map(predict).collect()
    }

    /// Seconds a tick of the schedule with ranks that compute so many milliseconds of it, if that can be told.
    fn schedule_alone(&self, study: &Study, point: &Point, busy: &[f64]) -> Option<f64> {
        let config = Config::load(&study.config_file(point), &[]);
        let tick = config.and_then(|c| forecast::schedule_alone(&study.plan, point, &c, self.machine, busy));
        tick.inspect_err(|e| log::debug!("{}: its schedule was not simulated: {e}", point.name)).ok()?
    }

    /// Makes run `k` of a point, the `place`-th of all; the seconds that it took, and the point's state: `None` where it was ended
    /// because the study is to stop.
    fn run(
        &self,
        study: &Study,
        point: &Point,
        k: usize,
        place: (usize, usize),
        predicted_tick: Option<f64>,
    ) -> Result<(f64, Option<State>)> {
        let before = study.status(point)?;
        study.set_status(point, &Status::now(State::Running, ""))?;
        let request = &study.plan.request;
        let (config, batches) = (study.config_file(point).display().to_string(), request.batches.to_string());
        let arguments = ["bench", "train", &config, "--batches", &batches, "--no-prediction", "--json"];
        let limit = Duration::from_secs(request.limit);
        let begun = Instant::now();
        let log = study.folder(point).join("log.txt");
        let end = self.launcher.run(point, &arguments, limit, &log, self.stop)?;
        let seconds = begun.elapsed().as_secs_f64();
        let what = format!("[{}/{}] {}, run {k} of {}", place.0, place.1, point.name, request.repeat);
        let status = match end {
            End::Done(measured) => {
                log::info!("{what}: {:.1} frames/s ({seconds:.0} s)", measured.frames_per_second);
                let job = std::env::var("SLURM_JOB_ID").ok().filter(|_| self.launcher == Launcher::Srun);
                let schedule_tick = self.schedule_alone(study, point, &measured.rank_busy_ms);
                let run = Run { measured: *measured, job, commit: commit(), seconds, predicted_tick, schedule_tick };
                study.keep_run(point, k, &run)?;
                let through = (1..=request.repeat).all(|k| study.has_run(point, k));
                // What failed before counts as failed until it is through, so that `--only failed` finds it again.
                match (through, before.state.is_failure()) {
                    (true, _) => Status::now(State::Done, ""),
                    (false, true) => Status::now(before.state, before.reason.clone()),
                    (false, false) => Status::now(State::Pending, ""),
                }
            }
            End::Failed(state, reason) => {
                log::error!("{what}: {state}: {reason} (see {})", log.display());
                Status::now(state, reason)
            }
            End::Stopped => {
                study.set_status(point, &before)?;
                return Ok((seconds, None));
            }
        };
        study.set_status(point, &status)?;
        Ok((seconds, Some(status.state)))
    }
}

/// The commit of the checkout that the program lies in.
fn commit() -> Option<String> {
    static ASKED: OnceLock<Option<String>> = OnceLock::new();
    ASKED.get_or_init(described).clone()
}

fn described() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let mut git = std::process::Command::new("git");
    git.arg("-C").arg(program.parent()?).args(["describe", "--always", "--dirty"]);
    let output = git.stdin(std::process::Stdio::null()).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}
