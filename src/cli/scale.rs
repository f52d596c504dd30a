//! `sideways scale`: a scaling study, planned, run, tabulated and plotted.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use super::live::Live;
use super::logging;
use crate::cli::output::{json, shown, table};
use crate::config::Config;
use crate::plan::cluster::Cluster;
use crate::study::conduct::{Choice, Conducted, Conductor};
use crate::study::folder::{State, Study};
use crate::study::forecast::{Forecast, Machine, check, prepare};
use crate::study::launch::Launcher;
use crate::study::page::{COLUMNS, cells};
use crate::study::plan::{Axis, Plan, Point, Request, without_data};
use crate::study::publish::{place, publish};
use crate::study::submit;
use crate::study::variant::Variant;
use crate::sys::host::hostname;
use crate::{Error, Result};

/// Arguments of `sideways scale`.
#[derive(Args, Debug)]
pub struct ScaleArgs {
    /// The runs' configuration (TOML); its data is not read. Absent: the study in --out goes on.
    #[arg(requires = "nodes")]
    pub config: Option<PathBuf>,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// The node counts.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "config")]
    pub nodes: Vec<usize>,
    /// What grows with the nodes: modules of a pipeline at the same batch; replicas at a fixed global batch (strong); replicas at a
    /// fixed batch each (weak).
    #[arg(long, value_enum, default_value_t, requires = "config")]
    pub axis: Axis,
    /// The rules to compare, such as skip-sideways,skip-sideways+stash [default: the configuration's].
    #[arg(long, value_name = "RULE,...", value_delimiter = ',', requires = "config")]
    pub rules: Vec<String>,
    /// Ranks a node [default: 1 with --axis modules; else what gives every module of the first point a rank].
    #[arg(long, value_name = "N", requires = "config")]
    pub ranks_per_node: Option<usize>,
    /// Runs of every point, taken in turn with the other points'.
    #[arg(long, value_name = "N", default_value_t = 5, requires = "config")]
    pub repeat: usize,
    /// Batches that count in a run, after two or more of warm-up.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "config")]
    pub batches: u64,
    /// Seconds after which a run is given up as out of time.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, requires = "config")]
    pub limit: u64,
    /// The cluster as `plan --scale` takes it: predictions count what messages and the all-reduce need there [default: nothing].
    #[arg(long, value_name = "FILE", requires = "config")]
    pub cluster: Option<PathBuf>,
    /// Classes to tell apart [default: model.classes, or those of the data].
    #[arg(long, value_name = "K", requires = "config")]
    pub classes: Option<usize>,
    /// The study's folder. One that holds the same study goes on; with Slurm all nodes must see it.
    #[arg(long, value_name = "STUDY")]
    pub out: PathBuf,
    /// Run only these points of it.
    #[arg(long, value_enum)]
    pub only: Option<Only>,
    /// Print the points with what is predicted for them and what they will cost; nothing is written or submitted.
    #[arg(long)]
    pub dry_run: bool,
    /// Run nothing: gather what there is, and write table, plots and page.
    #[arg(long, conflicts_with_all = ["dry_run", "only"])]
    pub gather: bool,
    /// With Slurm: every point a job of its own, in arrays, instead of all in one. (Other nodes and other times add noise.)
    #[arg(long)]
    pub separate: bool,
    /// Run on this machine, though there is Slurm.
    #[arg(long, conflicts_with = "separate")]
    pub here: bool,
    /// With Slurm: an option for sbatch, such as --sbatch=--time=8:00:00 (may be repeated).
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub sbatch: Vec<String>,
    /// With Slurm: the batch script.
    #[arg(long, value_name = "FILE", default_value = "slurm/scale.sbatch")]
    pub script: PathBuf,
    /// Print the points, with what is predicted or was measured, as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Which points to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// Those that failed, ran out of time or out of memory.
    Failed,
}

/// Where the study runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Setting {
    /// In a Slurm job.
    Job,
    /// On a machine from which jobs can be submitted.
    Login,
    /// Without Slurm.
    Here,
}

impl Setting {
    fn find(here: bool) -> Self {
        if here {
            return Setting::Here;
        }
        if std::env::var_os("SLURM_JOB_ID").is_some() {
            return Setting::Job;
        }
        let mut ping = Command::new("scontrol");
        ping.arg("ping").stdin(Stdio::null()).stderr(Stdio::null());
        let up = ping.output().is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("UP"));
        if up { Setting::Login } else { Setting::Here }
    }

    fn machine(self, plan: &Plan) -> Machine {
        match self {
            Setting::Here => Machine::One,
            Setting::Job | Setting::Login => Machine::Nodes { ranks: plan.ranks_per_node },
        }
    }
}

/// Runs it.
///
/// # Errors
/// [`Error::Input`] for whatever cannot be measured; [`Error::Run`] if points failed; [`Error::Stopped`] if it was stopped early.
pub fn run(args: &ScaleArgs) -> Result<()> {
    let setting = Setting::find(args.here);
    let plan = args.config.as_ref().map(|path| planned(args, path)).transpose()?;
    if let (Some(plan), true) = (&plan, args.dry_run) {
        return dry_run(plan, setting, args);
    }
    let study = match plan {
        Some(plan) => Study::create(&args.out, plan)?,
        None => Study::open(&args.out)?,
    };
    if args.dry_run {
        return dry_run(&study.plan, setting, args);
    }
    if args.gather {
        return show(&study, args.json).map(|_| ());
    }
    match setting {
        Setting::Login => send(&study, args),
        Setting::Job | Setting::Here => conduct(&study, args, setting),
    }
}

fn planned(args: &ScaleArgs, path: &Path) -> Result<Plan> {
    let config = without_data(&Config::load(path, &args.set)?, args.classes)?;
    let request = Request {
        axis: args.axis,
        nodes: args.nodes.clone(),
        ranks_per_node: args.ranks_per_node,
        rules: args.rules.iter().map(|rule| Variant::parse(rule)).collect::<Result<_>>()?,
        repeat: args.repeat,
        batches: args.batches,
        limit: args.limit,
        cluster: args.cluster.as_deref().map(Cluster::load).transpose()?,
    };
    let plan = Plan::new(&config, &request)?;
    plan.points.iter().try_for_each(|point| check(&plan, point))?;
    Ok(plan)
}

/// What will run, what it will reach and what it will cost.
fn dry_run(plan: &Plan, setting: Setting, args: &ScaleArgs) -> Result<()> {
    let (machine, repeat) = (setting.machine(plan), plan.request.repeat as f64);
    let all = plan.points.iter().map(|point| Ok((point, prepare(plan, point, machine)?.1)));
    let all = all.collect::<Result<Vec<(&Point, Forecast)>>>()?;
    let hours = |nodes: usize, forecast: &Forecast| repeat * forecast.seconds * nodes as f64 / 3600.0;
    let largest = plan.largest();
    let apart: f64 = all.iter().map(|(point, forecast)| hours(point.nodes, forecast)).sum();
    let together: f64 = all.iter().map(|(_, forecast)| hours(largest, forecast)).sum();
    let seconds: f64 = all.iter().map(|(_, forecast)| repeat * forecast.seconds).sum();
    if args.json {
        let point = |(p, f): &(&Point, Forecast)| {
            serde_json::json!({
                "point": p.name, "rule": p.variant.to_string(), "nodes": p.nodes, "ranks": p.ranks, "modules": p.modules,
                "replicas": p.replicas, "batch": p.batch, "global_batch": p.global_batch(),
                "tick_ms": 1e3 * f.tick, "frames_per_second": f.frames_per_second, "fill": f.fill,
                "memory_bytes_rank": f.memory, "seconds_run": f.seconds, "node_hours": hours(p.nodes, f),
            })
        };
        let points: Vec<serde_json::Value> = all.iter().map(point).collect();
        return json(&serde_json::json!({
            "predicted": true, "axis": plan.request.axis.to_string(), "repeat": plan.request.repeat, "points": points,
            "seconds": seconds, "nodes": largest, "node_hours_in_one_job": together, "node_hours_separate": apart,
        }));
    }
    let header = "point\tnodes\tranks\tmodules\treplicas\tB\tglobal batch\ttick ms\tframes/s\tfill\tmemory/rank\tseconds/run\tnode-hours";
    let row = |(p, f): &(&Point, Forecast)| {
        format!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{:.3}\t{:.1}\t{:.3}\t{}\t{:.0}\t{:.3}",
            p.name,
            p.nodes,
            p.ranks,
            p.modules,
            p.replicas,
            p.batch,
            p.global_batch(),
            1e3 * f.tick,
            f.frames_per_second,
            f.fill,
            ByteSize(f.memory),
            f.seconds,
            hours(p.nodes, f)
        )
    };
    table(1, header, all.iter().map(row));
    outln!(
        "{} points x {repeat} runs, predicted by layers' times on {} and 5 s for every start; without the links' latency and the \
         all-reduce. Memory: without the program itself.",
        all.len(),
        all.first().map_or("nothing", |(_, forecast)| forecast.processor.as_str())
    );
    match setting {
        Setting::Here => outln!("no Slurm: all would run on this one machine ({}), in some {seconds:.0} s", hostname()),
        _ if args.separate => outln!("as jobs of their own: {apart:.2} node-hours"),
        _ => outln!(
            "in one job on {largest} nodes: {together:.2} node-hours, {seconds:.0} s ({apart:.2} node-hours with --separate)"
        ),
    }
    Ok(())
}

/// Submits the study.
fn send(study: &Study, args: &ScaleArgs) -> Result<()> {
    if !args.script.is_file() {
        return Err(Error::input(format!(
            "{} is not there: submit from the checkout, or give --script",
            args.script.display()
        )));
    }
    let mut points = Vec::new();
    for (n, point) in study.plan.points.iter().enumerate() {
        let state = study.status(point)?.state;
        let wanted = if args.only.is_some() { state.is_failure() } else { !state.is_failure() && state != State::Done };
        points.extend(wanted.then_some(n));
    }
    if points.is_empty() {
        log::info!("no point is left to run");
        return show(study, args.json).map(|_| ());
    }
    let arguments: Vec<String> = match (args.separate, args.only) {
        (true, _) => vec!["--separate".into()],
        (false, Some(Only::Failed)) => vec!["--only".into(), "failed".into()],
        (false, None) => Vec::new(),
    };
    let threads = Config::parse(&study.plan.config, "plan", &[])?.run.threads;
    let commands = submit::commands(study, &args.script, threads, args.separate, &points, &args.sbatch, &arguments);
    let mut jobs = Vec::new();
    for words in commands {
        let line = words.join(" ");
        let output = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).output();
        let output = output.map_err(|e| Error::io("sbatch", e))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(Error::input(format!("{line}: {}", why.trim())));
        }
        jobs.push((String::from_utf8_lossy(&output.stdout).trim().to_string(), line));
    }
    if args.json {
        let jobs: Vec<_> =
            jobs.iter().map(|(job, command)| serde_json::json!({ "job": job, "command": command })).collect();
        let all = study.plan.points.len();
        return json(
            &serde_json::json!({ "study": shown(study.dir()), "jobs": jobs, "points_to_run": points.len(), "points": all }),
        );
    }
    jobs.iter().for_each(|(job, command)| outln!("job {job}: {command}"));
    let out = study.dir().display();
    outln!(
        "{} of {} points to run; `sideways scale --out {out} --gather` shows what there is",
        points.len(),
        study.plan.points.len()
    );
    Ok(())
}

/// Runs the points that are to run, here or in this job, and shows the table.
fn conduct(study: &Study, args: &ScaleArgs, setting: Setting) -> Result<()> {
    logging::also_to(&study.dir().join("log.txt"))?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        signal_hook::flag::register(signal, stop.clone())
            .map_err(|e| Error::Run(format!("listening for signals: {e}")))?;
    }
    let launcher = match setting {
        Setting::Here => {
            log::info!(
                "no Slurm: all ranks run on this one machine ({}), and nodes are groups of ranks that share its processors",
                hostname()
            );
            Launcher::Mpirun
        }
        _ => Launcher::Srun,
    };
    let task = std::env::var("SLURM_ARRAY_TASK_ID").ok().and_then(|task| task.parse::<usize>().ok());
    let choice = match (args.separate.then_some(task).flatten(), args.only) {
        (Some(point), _) => Choice::One(point),
        (None, Some(Only::Failed)) => Choice::Failed,
        (None, None) => Choice::Unfinished,
    };
    let live = Live::counting(0, "runs");
    let progress = |done, all| live.at(done, all);
    let conductor = Conductor { launcher, machine: setting.machine(&study.plan), stop: &stop, progress: &progress };
    let made = conductor.conduct(study, choice)?;
    drop(live);
    tell(&made);
    let states = show(study, args.json)?;
    // A task of an array answers for its own point.
    let states = match choice {
        Choice::One(n) => states.get(n..=n).unwrap_or_default().to_vec(),
        _ => states,
    };
    let (left, failed) = (
        states.iter().filter(|state| **state != State::Done).count(),
        states.iter().filter(|state| state.is_failure()).count(),
    );
    match (made.stopped, failed) {
        (true, _) => Err(Error::Stopped(format!("stopped with {left} points left; the same command goes on"))),
        (false, 0) => {
            if left > 0 {
                log::warn!("{left} points are not done: the command without --only goes on with them");
            }
            Ok(())
        }
        (false, n) => Err(Error::Run(format!("{n} points failed; `--only failed` runs these again"))),
    }
}

fn tell(made: &Conducted) {
    if made.runs > 0 {
        let beside = made.seconds - made.in_runs;
        log::info!(
            "{} runs in {:.1} s; {:.1} s beside them ({:.1} %), of these {:.1} s of measuring layers and planning",
            made.runs,
            made.seconds,
            beside,
            100.0 * beside / made.in_runs.max(1e-9),
            made.planning
        );
    }
}

/// Writes table, plots and page, and prints the table; the points' states.
fn show(study: &Study, as_json: bool) -> Result<Vec<State>> {
    let rows = publish(study)?;
    let states = || study.plan.points.iter().map(|point| Ok(study.status(point)?.state)).collect();
    if as_json {
        json(&serde_json::json!({ "study": shown(study.dir()), "measured": place(&rows), "points": rows }))?;
        return states();
    }
    table(1, &COLUMNS.join("\t"), rows.iter().map(|row| cells(row).join("\t")));
    outln!("{}", place(&rows));
    for row in rows.iter().filter(|row| !row.reason.is_empty()) {
        outln!("{}: {}: {}", row.point, row.status, row.reason);
    }
    outln!("{0}/index.html, {0}/scaling.csv", study.dir().display());
    states()
}
