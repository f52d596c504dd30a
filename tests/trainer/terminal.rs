//! What commands write where: one JSON object with `--json`, nothing but results and errors with `--quiet`, no escape sequences
//! unless a terminal is there to understand them, and one line that lives on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM};
use crate::common::runs::{config, shard};

const FRAMES: &str = "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
    { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]";

/// Shards, and configurations by name.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 12, 14, false);
        std::fs::create_dir(dir.path().join("session")).unwrap();
        Place { dir }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn config(&self, name: &str, sets: &[&str]) -> String {
        let at = format!("run.dir={}", self.at(name));
        let path = self.at(&format!("{name}.toml"));
        std::fs::write(&path, config(self.dir.path(), &[&[at.as_str()], sets].concat()).to_toml().unwrap()).unwrap();
        path
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SIDEWAYS_CACHE", self.at("cache")).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.env("OMPI_MCA_orte_tmpdir_base", self.at("session")).env("OMPI_MCA_mpi_yield_when_idle", "1");
        command.env_remove("NO_COLOR").env_remove("RUST_LOG").env("TERM", "xterm-256color");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(PROGRAM).args(args).output().unwrap()
    }
}

/// The one JSON object that a command prints.
#[track_caller]
fn object(output: &Output) -> Value {
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(output)));
    assert!(said.is_object(), "{said}");
    said
}

/// Every command that has a result: with `--json` and `--quiet` an object with these fields, nothing else anywhere.
#[test]
fn results_are_one_json_object_and_nothing_else_is_said() {
    let place = Place::new();
    let run = place.config("run", &["train.validate_every=2", "data.crop=8"]);
    let frames =
        place.config("frames", &[FRAMES, "model.task=future-frames", "model.modules=2", "train.rule=sideways"]);
    let study = place.config("study", &["data.crop=8", "model.classes=4", "model.modules=1", "train.rule=sideways"]);
    let shards = place.at("train.h5");
    let folder = |name: &str| place.at(name);
    let (made, out, board, html) = (folder("made"), folder("pictures"), folder("board"), folder("page.html"));
    let (trace, exported) = (folder("trace.json"), folder("exported"));
    let (run_dir, frames_dir, scaled) = (folder("run"), folder("frames"), folder("scaled"));
    let measured = "--no-prediction";
    let (set_run, set_frames) = ("--set=train.batches=3", "--set=train.batches=2");
    let commands: &[(&[&str], &str)] = &[
        (
            &[
                "data",
                "synth",
                "--out",
                &made,
                "--videos",
                "8",
                "--test-videos",
                "8",
                "--size",
                "16",
                "--frames",
                "4",
                "--radius",
                "3",
            ],
            "out shards videos train_videos test_videos frames height width encoding classes seconds",
        ),
        (
            &["data", "inspect", &shards],
            "sound shards videos frames shortest_frames longest_frames height width classes repeated_ids \
            ids_in_two_splits missing_shards damage sheet sheet_rows",
        ),
        (&["train", &run, "--dry-run"], "modules replicas ranks cuts frame frames batch notes warnings shares"),
        (&["train", &run, "--print-config"], "data model train run"),
        (
            &["train", &run, set_run],
            "run_dir batches total_batches attempt_batches attempt_seconds frames_per_second loss top1 \
            validation best skipped videos_skipped stopped limited_by",
        ),
        (
            &["train", &run, set_run],
            "run_dir batches total_batches attempt_batches attempt_seconds frames_per_second loss top1 \
            validation best skipped videos_skipped stopped limited_by",
        ),
        (&["train", &frames, set_frames], "run_dir batches loss validation"),
        (&["eval", &run_dir], "clips loss protocol videos top1 top5 mean_class_accuracy"),
        (&["eval", &frames_dir], "clips loss protocol mse psnr copy_mse"),
        (&["predict", &frames_dir, "--out", &out], "checkpoint batches clips mse psnr copy_mse copy_psnr pictures out"),
        (&["fidelity", &run, "--batches", "1"], "checkpoint device frames batch rows"),
        (
            &["plan", &run],
            "cuts origin ranks replicas modules tick_seconds frames_per_second efficiency bubble warnings profile",
        ),
        (&["plan", &run, "--scale", "5..10", "--rate", "1e12"], "simulated cluster points"),
        (
            &[
                "scale",
                &study,
                "--nodes",
                "1",
                "--repeat",
                "1",
                "--batches",
                "1",
                "--out",
                &scaled,
                "--here",
                "--dry-run",
            ],
            "predicted axis repeat points seconds nodes node_hours_in_one_job node_hours_separate",
        ),
        (
            &["scale", &study, "--nodes", "1", "--repeat", "1", "--batches", "1", "--out", &scaled, "--here"],
            "study measured points",
        ),
        (&["scale", "--out", &scaled, "--gather"], "study measured points"),
        (&["export", &run_dir, "--torch", "--out", &exported], "checkpoint batches weights program"),
        (&["report", &run_dir, "--out", &html, "--tensorboard", &board], "page event_files"),
        (
            &["trace", &study, "--out", &trace],
            "trace batches modules slices messages seconds clock_uncertainty_seconds",
        ),
        (&["doctor", &run], "ok checks"),
        (&["bench", "link", "--from", "1KiB", "--to", "1KiB", "--repeat", "1"], "ranks host best_of_batches payloads"),
        (
            &["bench", "overlap", "--workers", "2", "--compute-ms", "1", "--ticks", "4", "--bytes", "1KiB"],
            "ranks host rule stash message_bytes frames compute_ms bubble workers tick_ms simulated_tick_ms",
        ),
        (&["bench", "layers", &run], "cpu kernels batch by_threads"),
        (
            &["bench", "data", &shards, "--crop", "8", "--seconds", "0.01", "--threads", "1"],
            "encoding height width crop stages",
        ),
        (&["bench", "train", &study, "--batches", "1", measured], "frames_per_second tick_ms peak_mib module_ms"),
    ];
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/terminal.md");
    let page = std::fs::read_to_string(documents).unwrap();
    for (args, fields) in commands {
        let output = place.run(&[&["--quiet"], *args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        let said = object(&output);
        for field in fields.split_whitespace() {
            assert!(said.get(field).is_some(), "{args:?}: no {field} in {said}");
            assert!(
                page.contains(&format!("`{field}`")) || args.contains(&"--print-config"),
                "{field} is not documented"
            );
        }
        assert_eq!(output.stdout.iter().filter(|&&byte| byte == b'\n').count(), 1, "{args:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    }
    // The log file has what was not said.
    let log = std::fs::read_to_string(place.dir.path().join("run/log.txt")).unwrap();
    for part in ["checkpoint ", "validation after 2 batches", "batch 3/3  loss ", "done: 3 batches", "nothing to do"] {
        assert!(log.contains(part), "{part}: {log}");
    }
    assert!(!log.contains('\x1b'), "{log}");

    // What they say without either is no JSON, on a pipe has no escapes, and is said by rank 0 alone.
    for args in [&["eval", &run_dir][..], &["doctor", &run], &["data", "inspect", &shards], &["train", &run]] {
        let output = place.run(args);
        assert!(output.status.success(), "{}", text(&output));
        assert!(serde_json::from_slice::<Value>(&output.stdout).is_err(), "{}", text(&output));
        assert!(!text(&output).contains('\x1b') && !text(&output).contains('\r'), "{}", text(&output));
    }
    let args = ["eval", run_dir.as_str(), "--json", "--quiet"];
    assert_eq!(object(&mpirun(2, Path::new(PROGRAM), &args, &[], MINUTE))["clips"], 12);
}

/// What a run came to is what its metrics say, whether it was stopped, is through, or fails.
#[test]
fn a_trainings_summary_says_what_its_metrics_say() {
    let place = Place::new();
    let run = place.config("run", &["train.validate_every=2"]);
    let train = |more: &[&str]| place.run(&[&["train", &run, "--json", "-q"], more].concat());
    let stopped = train(&["--stop-after", "3"]);
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    let said = object(&stopped);
    assert_eq!((&said["batches"], &said["total_batches"], &said["stopped"]), (&3.into(), &4.into(), &true.into()));
    assert_eq!((&said["validation"]["batches"], &said["best"]["batches"]), (&2.into(), &2.into()), "{said}");
    let said = object(&train(&[]));
    assert_eq!((&said["batches"], &said["attempt_batches"], &said["stopped"]), (&4.into(), &1.into(), &false.into()));
    let lines = std::fs::read_to_string(place.dir.path().join("run/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.iter().rfind(|line| line.get("kind").is_none()).unwrap();
    assert!((said["loss"].as_f64().unwrap() - last["loss"].as_f64().unwrap()).abs() < 1e-6, "{said} {last}");
    // An error is said in words, and is no result.
    let output = train(&["--set", "data.train=nowhere.h5"]);
    assert!(output.status.code() == Some(2) && output.stdout.is_empty(), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: data.train: "), "{}", text(&output));
    // So is what inspection finds to be wrong, which is a result as well.
    std::fs::write(place.at("broken.h5"), "no shard").unwrap();
    let output = place.run(&["data", "inspect", &place.at("broken.h5"), "--json", "-q"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let said = object(&output);
    assert!(said["sound"] == false && said["damage"].as_array().unwrap().len() == 1, "{said}");
    let output = place.run(&["doctor", &run, "--set", "data.train=nowhere.h5", "--json", "-q"]);
    assert_eq!((output.status.code(), &object(&output)["ok"]), (Some(2), &false.into()), "{}", text(&output));
}

/// What a terminal of any width shows of bytes that have no escape sequences: its lines, without what blanks have wiped out.
fn screen(bytes: &[u8]) -> Vec<String> {
    let (mut lines, mut column) = (vec![Vec::new()], 0);
    for c in String::from_utf8_lossy(bytes).chars() {
        let line = lines.last_mut().unwrap();
        match c {
            '\r' => column = 0,
            '\n' => lines.push(Vec::new()),
            c => {
                line.resize(line.len().max(column + 1), ' ');
                line[column] = c;
                column += 1;
            }
        }
    }
    lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_string()).collect()
}

/// Runs the program on a terminal of its own, so many columns wide.
fn on_terminal(place: &Place, columns: usize, args: &str, env: &[(&str, &str)]) -> Vec<u8> {
    let line = format!("stty cols {columns} rows 24; exec {PROGRAM} {args}");
    let mut command = place.command("script");
    let output = command.args(["-qec", &line, "/dev/null"]).envs(env.iter().copied()).output();
    let output = output.expect("script starts (util-linux, bsdutils)");
    assert!(output.status.success(), "{}", text(&output));
    output.stdout
}

#[test]
fn a_line_lives_on_a_terminal_and_leaves_others_whole() {
    let place = Place::new();
    let run = place.config("run", &["train.batches=60", "train.validate_every=20", "run.checkpoint_every=15"]);
    let shown = on_terminal(&place, 130, &format!("train {run}"), &[("NO_COLOR", "1")]);
    let said = String::from_utf8_lossy(&shown).into_owned();
    assert!(!said.contains('\x1b'), "{said:?}");
    // It lived: batches, loss, validation, speed, what is left to the end and to the next checkpoint.
    let drawn: Vec<&str> = said.split(['\r', '\n']).filter(|part| part.contains("/60 batches  ")).collect();
    assert!(drawn.len() > 1, "{said:?}");
    for part in ["loss ", "top-1 ", " frames/s", "ETA ", "checkpoint "] {
        assert!(drawn.iter().any(|line| line.contains(part)), "{part}: {drawn:#?}");
    }
    assert!(drawn.iter().all(|line| line.chars().count() < 130), "{drawn:#?}");
    assert!(drawn.iter().any(|line| line.contains("validation ")), "{drawn:#?}");
    // It is gone, and every line of the log stands there whole, but for those in its place.
    let (lines, log) = (screen(&shown), std::fs::read_to_string(place.dir.path().join("run/log.txt")).unwrap());
    assert!(lines.iter().all(|line| !line.contains("/60 batches")), "{lines:#?}");
    let logged: Vec<&str> = log.lines().map(str::trim_end).filter(|line| !line.starts_with("batch ")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).filter(|line| !line.is_empty()).collect();
    assert!(logged.len() > 10 && log.contains("batch 60/60  loss "), "{log}");
    assert_eq!(lines, logged);

    // Colour where it may be; none on the log, nor where it is not wanted; and nothing at all if quiet.
    let colour = on_terminal(&place, 130, &format!("train {run} --set train.clip_norm=1 --set train.batches=61"), &[]);
    let said = String::from_utf8_lossy(&colour).into_owned();
    assert!(said.contains("\x1b[33mwarn: \x1b[0m"), "{said:?}");
    let doctor = |env: &[(&str, &str)]| {
        String::from_utf8_lossy(&on_terminal(&place, 130, &format!("doctor {run}"), env)).into_owned()
    };
    assert!(doctor(&[]).contains("\x1b[32mok") && !doctor(&[("NO_COLOR", "1")]).contains('\x1b'));
    let quiet = on_terminal(&place, 130, &format!("train {run} --quiet --set train.batches=62"), &[]);
    assert_eq!(String::from_utf8_lossy(&quiet), "");

    // A table keeps to the terminal, however narrow, and loses nothing.
    let narrow = on_terminal(&place, 70, &format!("train {run} --dry-run"), &[]);
    let wide = on_terminal(&place, 300, &format!("train {run} --dry-run"), &[]);
    let table = |shown: &[u8]| -> Vec<String> {
        let lines = screen(shown).into_iter().skip_while(|line| !line.starts_with("rank"));
        lines.take_while(|line| !line.starts_with("memory: ")).collect()
    };
    assert!(table(&narrow).iter().all(|line| line.chars().count() <= 70), "{:#?}", table(&narrow));
    assert_eq!(table(&wide).len(), 6, "{:#?}", table(&wide));
    let letters = |shown: &[u8]| {
        let mut all: Vec<char> = table(shown).concat().chars().filter(|c| !c.is_whitespace()).collect();
        all.sort_unstable();
        all
    };
    assert_eq!(letters(&narrow), letters(&wide));
}

/// Other commands have the line too.
#[test]
fn other_commands_live_too() {
    let place = Place::new();
    let made = place.at("made");
    let synth = format!("data synth --out {made} --videos 400 --test-videos 8 --size 32 --frames 16");
    let run = place.config("run", &["data.crop=8"]);
    let commands: [(String, &str); 4] = [
        (synth, "/408 videos"),
        (format!("data inspect {made}"), "iB ("),
        (format!("fidelity {run} --batches 8"), "/24 batches"),
        (format!("eval {}", PathBuf::from(place.at("run")).display()), "/6 batches  loss "),
    ];
    on_terminal(&place, 100, &format!("train {run}"), &[]);
    for (command, part) in commands {
        let shown = on_terminal(&place, 100, &command, &[("NO_COLOR", "1")]);
        let said = String::from_utf8_lossy(&shown);
        assert!(said.contains(part) && !said.contains('\x1b'), "{command}: {said:?}");
        assert!(screen(&shown).iter().all(|line| !line.contains("ETA")), "{command}: {:#?}", screen(&shown));
    }
}
