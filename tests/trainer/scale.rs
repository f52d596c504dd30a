//! Scaling studies on this machine: run, killed, gone on with; what fails is told, and run again.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::mpirun::{descendants, ended, text};
use crate::common::program::{PROGRAM, alone, wait_for};
use crate::common::runs::config;

/// A configuration without data, a folder for its study, and a cache of its own.
struct Place {
    dir: tempfile::TempDir,
    config: String,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sets = ["data.crop=8", "model.classes=4", "data.train=[]", "data.test=[]"];
        let mut config = config(dir.path(), &sets);
        config.model.modules = None;
        let path = dir.path().join("config.toml");
        std::fs::write(&path, config.to_toml().unwrap()).unwrap();
        std::fs::create_dir(dir.path().join("session")).unwrap();
        Place { config: path.display().to_string(), dir }
    }

    fn study(&self) -> PathBuf {
        self.dir.path().join("study")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg("100").arg(PROGRAM).args(["scale", "--here", "--out"]).arg(self.study()).args(args);
        command.env("SIDEWAYS_CACHE", self.dir.path().join("cache"));
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.env("OMPI_MCA_mpi_yield_when_idle", "1");
        command.env("OMPI_MCA_orte_tmpdir_base", self.dir.path().join("session"));
        command.stdin(Stdio::null());
        command
    }

    /// Puts a program called `mpirun` before the real one.
    fn with_mpirun(&self, args: &[&str], script: &str) -> Output {
        let bin = self.dir.path().join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        let path = bin.join("mpirun");
        std::fs::write(&path, format!("#!/bin/sh\n[ \"$1\" = --version ] && exit\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let before = std::env::var("PATH").unwrap();
        self.command(args).env("PATH", format!("{}:{before}", bin.display())).env("REAL", before).output().unwrap()
    }

    fn run_file(&self, point: &str, k: usize) -> PathBuf {
        self.study().join(format!("points/{point}/run-{k}.json"))
    }

    fn state(&self, point: &str) -> String {
        let path = self.study().join(format!("points/{point}/status.json"));
        let status: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        status["state"].as_str().unwrap().to_string()
    }

    /// `scaling.csv`, a map of columns a row.
    fn rows(&self) -> Vec<std::collections::HashMap<String, String>> {
        let mut reader = csv::Reader::from_path(self.study().join("scaling.csv")).unwrap();
        reader.deserialize().map(|row| row.unwrap()).collect()
    }
}

fn modified(path: &Path) -> std::time::SystemTime {
    path.metadata().unwrap().modified().unwrap()
}

/// Killed outright after its first run, a study takes its ranks along, and goes on where it was.
#[test]
fn a_study_goes_on_after_a_kill() {
    let place = Place::new();
    let options = ["--nodes", "1,2", "--repeat", "2", "--batches", "2"];
    let args = [&[place.config.as_str()][..], &options].concat();
    let dry = place.command(&[&args[..], &["--dry-run"]].concat()).output().unwrap();
    assert!(dry.status.success(), "{}", text(&dry));
    let said = String::from_utf8_lossy(&dry.stdout);
    assert!(said.contains("skip-sideways-n2") && said.contains("node-hours") && said.contains("one machine"), "{said}");
    assert!(!place.study().exists());

    let mut child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
    let first = place.run_file("skip-sideways-n1", 1);
    wait_for("the first run", || first.is_file());
    let mut processes = Vec::new();
    wait_for("the next run's ranks", || {
        processes = descendants(child.id());
        processes.len() > 2
    });
    let (study, ranks) = (processes[0], processes.split_off(1));
    // SAFETY: a signal to the child of a process that this test started.
    unsafe { libc::kill(study as i32, libc::SIGKILL) };
    child.wait().unwrap();
    wait_for("the end of its ranks", || ranks.iter().all(|&id| ended(id)));
    let made = modified(&first);

    // Another study has no place there.
    let other = place.command(&[place.config.as_str(), "--nodes", "1,3"]).output().unwrap();
    assert_eq!(other.status.code(), Some(2), "{}", text(&other));
    assert!(text(&other).contains("holds another study"), "{}", text(&other));

    let output = place.command(&[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(modified(&first), made, "a run was made again");
    let log = std::fs::read_to_string(place.study().join("log.txt")).unwrap();
    assert!(log.contains("this one machine"), "{log}");
    let rows = place.rows();
    let of = |column: &str| rows.iter().map(|row| row[column].as_str()).collect::<Vec<_>>();
    assert_eq!(of("point"), ["skip-sideways-n1", "skip-sideways-n2"]);
    assert_eq!((of("status"), of("runs")), (vec!["done"; 2], vec!["2"; 2]));
    assert_eq!((of("ranks"), of("modules"), of("fill")), (vec!["1", "2"], vec!["1", "2"], vec!["0.0"; 2]));
    for column in [
        "frames_per_second",
        "tick_ms",
        "predicted_tick_ms",
        "measured_over_predicted",
        "speed_up",
        "efficiency",
        "load_balance",
        "communication_efficiency",
        "computation_scaling",
        "global_efficiency",
        "peak_mib_rank",
    ] {
        let values = of(column).into_iter().map(|text| text.parse::<f64>().unwrap());
        assert!(values.clone().all(|x| x.is_finite() && x > 0.0), "{column}: {:?}", of(column));
    }
    // What is predicted past the last point: four modules can be cut from the network, eight cannot.
    let beyond = std::fs::read(place.study().join("beyond.json")).unwrap();
    let beyond: Vec<(serde_json::Value, serde_json::Value)> = serde_json::from_slice(&beyond).unwrap();
    let beyond = beyond.iter().map(|(point, forecast)| (point["name"].as_str().unwrap(), forecast["tick"].as_f64()));
    let (names, ticks): (Vec<_>, Vec<_>) = beyond.unzip();
    assert_eq!(names, ["skip-sideways-n4"]);
    // In the same units as before, from times that were taken in the same way: how busy the machine is does not count.
    let before: f64 = of("predicted_tick_ms")[1].parse().unwrap();
    assert!(ticks[0].is_some_and(|tick| (0.01..100.0).contains(&(1e3 * tick / before))), "{ticks:?} s, {before} ms");
    // Layers are measured again before a later round of runs.
    let run = |k: usize| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(place.run_file("skip-sideways-n2", k)).unwrap()).unwrap()
    };
    assert!(run(1)["predicted_tick"].is_null() && run(2)["predicted_tick"].as_f64().unwrap() > 0.0, "{}", run(2));
    // One rank's schedule is what it computes.
    let one: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place.run_file("skip-sideways-n1", 2)).unwrap()).unwrap();
    let (schedule, busy) =
        (one["schedule_tick"].as_f64().unwrap(), one["measured"]["rank_busy_ms"][0].as_f64().unwrap());
    assert!((1e3 * schedule / busy - 1.0).abs() < 1e-6 && !of("measured_over_schedule")[0].is_empty(), "{one}");
    assert!(of("mpi").iter().all(|mpi| mpi.contains("MPI")) && of("exchange") == ["host"; 2], "{rows:?}");
    let page = std::fs::read_to_string(place.study().join("index.html")).unwrap();
    assert!(page.matches("<svg").count() == 2 && !page.contains("<script") && !page.contains("href="), "{page}");
    // The same as a part of another page.
    let out = place.study().with_extension("html");
    let output = alone(&["report", place.study().to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output));
    let report = std::fs::read_to_string(out).unwrap();
    let (from, to) = (page.find("<p>Axis").unwrap(), page.find("</body>").unwrap());
    assert!(report.contains("<h1>Scaling study ") && report.contains(&page[from..to]), "{report}");
    for file in ["speed.svg", "speed.png", "efficiency.svg", "efficiency.png"] {
        assert!(place.study().join(file).metadata().unwrap().len() > 1000, "{file}");
    }
    // With nothing left to do it says what there is.
    let again = place.command(&args).output().unwrap();
    assert!(again.status.success() && modified(&first) == made, "{}", text(&again));
}

/// Predictions count what messages take on the cluster that is given.
#[test]
fn messages_take_what_the_cluster_says() {
    let place = Place::new();
    let file = place.dir.path().join("cluster.toml");
    let slow = "{ latency = 0.1, bandwidth = 1e9 }";
    let cluster = |ranks: usize| {
        let text =
            format!("ranks_per_node = {ranks}\nnodes_per_switch = 4\ncore = {slow}\nnode = {slow}\nswitch = {slow}\n");
        std::fs::write(&file, text).unwrap();
    };
    let planned = |more: &[&str]| {
        let args = [&[place.config.as_str(), "--nodes", "2", "--dry-run", "--json"], more].concat();
        place.command(&args).output().unwrap()
    };
    let tick = |more: &[&str]| {
        let output = planned(more);
        assert!(output.status.success(), "{}", text(&output));
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        value["points"][0]["tick_ms"].as_f64().unwrap()
    };
    cluster(1);
    let with = ["--cluster", file.to_str().unwrap()];
    let (free, slow) = (tick(&[]), tick(&with));
    // Buffers let several messages be under way.
    assert!(free < 20.0 && (40.0..400.0).contains(&slow), "{free} and {slow} ms");
    cluster(3);
    let refused = planned(&with);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(text(&refused).contains("3 ranks a node, and the study 1"), "{}", text(&refused));
}

/// One point is short of memory: the others are measured, it is missing, and is run again when that is asked for.
#[test]
fn what_fails_is_missing_until_it_is_run_again() {
    let place = Place::new();
    let options = ["--nodes", "1,2", "--repeat", "1", "--batches", "1", "--rules", "skip-sideways,bp"];
    let args = [&[place.config.as_str()][..], &options].concat();
    let real = "PATH=$REAL exec mpirun \"$@\"";
    let short = format!(
        "case \"$*\" in *bp-n1*) echo 'memory allocation of 8000000000 bytes failed' >&2; exit 134;; esac\n{real}"
    );
    let output = place.with_mpirun(&args, &short);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("missing (out of memory)"), "{}", text(&output));
    assert_eq!((place.state("bp-n1").as_str(), place.state("skip-sideways-n2").as_str()), ("out-of-memory", "done"));
    let rows = place.rows();
    let row = rows.iter().find(|row| row["point"] == "bp-n1").unwrap();
    assert!(row["frames_per_second"].is_empty() && row["reason"].contains("8000000000"), "{row:?}");
    let page = std::fs::read_to_string(place.study().join("index.html")).unwrap();
    assert!(page.contains("bp-n1: 0 of 1 runs, out of memory"), "{page}");
    let made = modified(&place.run_file("skip-sideways-n2", 1));
    // The study goes on without it,
    let output = place.with_mpirun(&[], "exit 1");
    assert_eq!((output.status.code(), place.state("bp-n1").as_str()), (Some(1), "out-of-memory"), "{}", text(&output));
    // unless it is asked for.
    let output = place.with_mpirun(&["--only", "failed"], real);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!((place.state("bp-n1").as_str(), place.rows()[2]["status"].as_str()), ("done", "done"));
    assert_eq!(modified(&place.run_file("skip-sideways-n2", 1)), made);
}

/// A run that takes too long is ended; a signal ends the study, which says that it can go on.
#[test]
fn runs_are_ended_in_time() {
    let place = Place::new();
    let args = [place.config.as_str(), "--nodes", "1", "--repeat", "2", "--limit", "5"];
    let pid = place.dir.path().join("pid");
    let output = place.with_mpirun(&args, &format!("echo $$ > {}; exec sleep 100", pid.display()));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("missing (out of time)"), "{}", text(&output));
    assert_eq!(place.state("skip-sideways-n1"), "out-of-time");
    assert!(ended(std::fs::read_to_string(pid).unwrap().trim().parse().unwrap()));
    let stopped = place.with_mpirun(&["--only", "failed"], "kill -USR1 $PPID; exec sleep 100");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    // It is still one that failed, for the next try.
    assert_eq!(place.state("skip-sideways-n1"), "out-of-time");
}
