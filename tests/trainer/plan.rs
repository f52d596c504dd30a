//! Plans as users meet them: an open cut in training, kept times, and the benchmarks that predictions are compared with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sideways::checkpoint::newest_manifest;
use sideways::method::schedule::{Arrival, Backward, Forward, Tick};
use sideways::method::{Graph, Keep};
use sideways::setup::Setup;

use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM};
use crate::common::runs::{config, shard, tensors};

/// A folder with a shard, a configuration that leaves the cut open, and a cache of its own.
struct Place {
    dir: tempfile::TempDir,
    config: String,
    cache: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 12, 14, false);
        let mut config = config(dir.path(), &["data.crop=8"]);
        config.model.modules = None;
        let path = dir.path().join("config.toml");
        std::fs::write(&path, config.to_toml().unwrap()).unwrap();
        Place { config: path.display().to_string(), cache: dir.path().join("cache"), dir }
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(PROGRAM).args(args).env("SIDEWAYS_CACHE", &self.cache).output().unwrap()
    }

    fn ranks(&self, n: usize, args: &[&str]) -> Output {
        mpirun(n, Path::new(PROGRAM), args, &[("SIDEWAYS_CACHE", self.cache.to_str().unwrap())], MINUTE)
    }
}

/// Left open, the cut is planned once for all ranks; a run goes on with it on any number of ranks, and comes to the same bits as
/// one that was told that cut.
#[test]
fn training_plans_an_open_cut_and_keeps_it() {
    let place = Place::new();
    let (run, told) = (place.dir.path().join("run"), place.dir.path().join("told"));
    let (at, at_told) = (format!("run.dir={}", run.display()), format!("run.dir={}", told.display()));
    let args = ["train", place.config.as_str(), "--set", at.as_str()];
    let first = place.ranks(3, &[&args[..], &["--stop-after", "2"]].concat());
    assert_eq!(first.status.code(), Some(75), "{}", text(&first));
    assert!(text(&first).contains("by the layers' times, measured now"), "{}", text(&first));
    let cuts = newest_manifest(&run.join("checkpoints")).unwrap().unwrap().cuts;
    assert_eq!(cuts.len(), 2);
    let second = place.ranks(2, &[&args[..], &["--stop-after", "1"]].concat());
    assert_eq!(second.status.code(), Some(75), "{}", text(&second));
    let last = place.run(&args);
    assert!(last.status.success(), "{}", text(&last));
    assert_eq!(newest_manifest(&run.join("checkpoints")).unwrap().unwrap().cuts, cuts);
    let cuts = format!("model.cuts={cuts:?}");
    let whole = place.run(&["train", &place.config, "--set", &at_told, "--set", &cuts]);
    assert!(whole.status.success(), "{}", text(&whole));
    assert!(tensors(&run, 4) == tensors(&told, 4));
    // More ranks than the kept cut has modules.
    let more = place.ranks(4, &[&args[..], &["--set", "train.batches=9"]].concat());
    assert_eq!(more.status.code(), Some(2), "{}", text(&more));
    assert!(text(&more).contains("at most 3 can be used"), "{}", text(&more));
    // What is there is another network's: said so, whatever the cut.
    let other = place.run(&[&args[..], &["--set", "model.layers=[{ kind = 'linear', out = 4 }]"]].concat());
    assert_eq!(other.status.code(), Some(2), "{}", text(&other));
    assert!(text(&other).contains("holds another run"), "{}", text(&other));
}

/// Times are measured once, and again under other conditions or where the file is no good.
#[test]
fn times_are_kept_with_their_conditions() {
    let place = Place::new();
    let plan = |more: &[&str]| {
        let output = place.run(&[&["plan", place.config.as_str(), "--ranks", "2"], more].concat());
        assert!(output.status.success(), "{}", text(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let files = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&place.cache).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<PathBuf> = entries.collect();
        files.sort();
        files
    };
    let (first, _) = plan(&[]);
    assert!(first.contains("; measured now ("), "{first}");
    // The blocks' times, and the modules'.
    let kept = files();
    assert_eq!(kept.len(), 2);
    let (again, _) = plan(&[]);
    assert!(again.contains("; measured 0 min ago ("), "{again}");
    // But for that, the same plan to the letter.
    let line = |text: &str| text.lines().filter(|l| !l.starts_with("times:")).map(String::from).collect::<Vec<_>>();
    assert_eq!(line(&first), line(&again));
    // Measured anew, the blocks' times take the old ones' place; the best cut may be another one, with times of its own.
    assert!(plan(&["--fresh"]).0.contains("; measured now ("));
    let fresh = files();
    assert!(kept.iter().all(|file| fresh.contains(file)) && fresh.len() <= 3, "{kept:?} {fresh:?}");
    // Another batch is another profile.
    assert!(plan(&["--set", "data.batch=3"]).0.contains("; measured now ("));
    let kept = files();
    assert_eq!(kept.len(), fresh.len() + 2);
    // Those of another build are not taken, damaged ones neither; both are measured anew.
    for file in &kept {
        let stale = std::fs::read_to_string(file).unwrap().replace("\"build\": \"", "\"build\": \"0");
        std::fs::write(file, stale).unwrap();
    }
    assert!(plan(&[]).0.contains("; measured now ("));
    // Measured once more, the best cut may have been another one, with times of its own.
    files().iter().for_each(|file| std::fs::write(file, "{").unwrap());
    let (text, log) = plan(&[]);
    assert!(text.contains("; measured now (") && log.contains("not a profile"), "{text}{log}");
    assert!(plan(&[]).0.contains("; measured 0 min ago ("));
    // JSON says the same.
    let json: serde_json::Value = serde_json::from_str(&plan(&["--json"]).0).unwrap();
    let cuts: Vec<String> = json["cuts"].as_array().unwrap().iter().map(|c| c.to_string()).collect();
    assert!(text.contains(&format!("model.cuts = [{}]", cuts.join(", "))), "{text}");
}

/// `plan --scale` plays times that `plan --json` has printed on more ranks than there are.
#[test]
fn a_plan_is_extrapolated() {
    let place = Place::new();
    let output = place.run(&["plan", &place.config, "--ranks", "2", "--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let (times, cuts) = (place.dir.path().join("times.json"), format!("model.cuts={}", json["cuts"]));
    std::fs::write(&times, &output.stdout).unwrap();
    let given = ["plan", &place.config, "--set", &cuts, "--times", times.to_str().unwrap()];
    let scaled = |more: &[&str]| place.run(&[&given[..], more].concat());
    let output = scaled(&["--scale", "1..4096", "--rules", "skip-sideways+stash,1f1b,gpipe", "--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let points = json["points"].as_array().unwrap();
    let number = |point: &serde_json::Value, key: &str| point[key].as_f64().unwrap();
    for (rule, points) in ["skip-sideways+stash", "1f1b", "gpipe"].into_iter().zip(points.chunks(12)) {
        for (k, point) in points.iter().enumerate() {
            assert_eq!((point["rule"].as_str(), number(point, "ranks")), (Some(rule), (2 << k) as f64), "{point}");
            let rate = number(point, "replicas") * number(point, "batch") / number(point, "tick_seconds");
            assert!((number(point, "frames_per_second") / rate - 1.0).abs() < 1e-9, "{point}");
            assert!((number(point, "efficiency") * (1 << k) as f64 / number(point, "speedup") - 1.0).abs() < 1e-9);
            assert!((0.0..1.0 + 1e-9).contains(&number(point, "efficiency")), "{point}");
        }
    }
    assert_eq!(points.len(), 36);
    let table = scaled(&["--scale", "2..8", "--axis", "strong", "--set", "data.batch=2"]);
    // The batch of the second point is another than was measured.
    assert_eq!(table.status.code(), Some(2), "{}", text(&table));
    assert!(text(&table).contains("--times") && text(&table).contains("--axis weak"), "{}", text(&table));
    let table = place.run(&["plan", &place.config, "--scale", "1..3", "--axis", "modules"]);
    assert!(table.status.success(), "{}", text(&table));
    assert!(text(&table).contains("A simulation, not a measurement. Times: measured here."), "{}", text(&table));
    for wrong in ["0..4", "4", "8..4"] {
        assert_eq!(place.run(&["plan", &place.config, "--scale", wrong]).status.code(), Some(2), "{wrong}");
    }
}

/// The benchmarks that users compare with predictions run without data, and leave nothing behind.
#[test]
fn training_and_layers_are_measured_without_data() {
    let place = Place::new();
    let temporary = place.dir.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let env = [("SIDEWAYS_CACHE", place.cache.to_str().unwrap()), ("TMPDIR", temporary.to_str().unwrap())];
    let args = ["bench", "train", place.config.as_str(), "--set", "data.train=[]", "--classes", "4", "--json"];
    let output = mpirun(2, Path::new(PROGRAM), &args, &env, MINUTE);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["modules"].as_u64(), json["ranks"].as_u64()), (Some(2), Some(2)));
    for key in ["frames_per_second", "tick_ms", "peak_mib", "predicted_tick_ms", "backward_share"] {
        assert!(json[key].as_f64().is_some_and(|x| x > 0.0 && x.is_finite()), "{key} in {json}");
    }
    let frames = 2.0 / json["tick_ms"].as_f64().unwrap() * 1e3;
    assert!((json["frames_per_second"].as_f64().unwrap() / frames - 1.0).abs() < 1e-6, "{json}");
    let left: Vec<_> = std::fs::read_dir(&temporary).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("sideways")), "{left:?}");
    assert!(!place.dir.path().join("run").exists());

    let output = place.run(&["bench", "layers", &place.config, "--threads", "1,2", "--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = json["by_threads"].as_array().unwrap();
    assert_eq!(lines.len(), 2);
    for (line, threads) in lines.iter().zip(1u64..) {
        assert_eq!(line["threads"].as_u64(), Some(threads));
        assert_eq!(line["layers"].as_array().unwrap().len(), 11);
        // 8x8x3 to 4x4x4 by 3x3, two clips: two operations a multiply-add.
        assert_eq!(line["layers"][0]["forward"]["flops"].as_f64(), Some((2 * 2 * 4 * 4 * 4 * 27) as f64));
        assert_eq!(line["modules"].as_array().unwrap().len(), 5);
    }
}

/// Modules that wait for a set time go through the run's own schedules, and the simulator through the same.
#[test]
fn waits_are_simulated_as_they_are_made() {
    let place = Place::new();
    let overlap = |more: &[&str]| {
        let args = ["bench", "overlap", "--workers", "3", "--compute-ms", "2", "--ticks", "8", "--bytes", "1KiB"];
        place.run(&[&args[..], more].concat())
    };
    let simulated = |more: &[&str]| -> f64 {
        let output = overlap(more);
        assert!(output.status.success(), "{}", text(&output));
        let said = text(&output);
        let line = said.lines().find_map(|line| line.strip_prefix("simulated: ")).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains("measured over simulated "), "{line}");
        line.split(' ').next().unwrap().parse().unwrap()
    };
    // Two passes a tick; three at 12 of module 2's 14 steps where inputs are kept and the forward pass comes again; by 1f1b
    // (8 + 2) / 8 of two. No pass is shorter than asked for.
    let rules: [(&[&str], f64); 4] = [
        (&[], 4.0),
        (&["--rule", "skip-sideways", "--spans", "2", "--stash", "activations"], 4.0),
        (&["--rule", "skip-sideways", "--stash", "inputs"], 2.0 + 4.0 * 12.0 / 14.0),
        (&["--rule", "1f1b"], 5.0),
    ];
    for (rule, passes) in rules {
        let tick = simulated(rule);
        assert!(tick >= passes - 1e-9 && tick < 3.0 * passes, "{rule:?}: {tick}");
    }
    let output = overlap(&["--spans", "2"]);
    assert!(output.status.code() == Some(2) && text(&output).contains("has no skips"), "{}", text(&output));
}

/// A line of `plan --ticks --csv`.
#[derive(Debug, serde::Deserialize)]
struct Action {
    clip: usize,
    tick: usize,
    module: usize,
    action: char,
    step: usize,
    receives: String,
    sends: String,
    keeps: String,
}

/// The schedule's windows out of its CSV, by clip and module.
fn read_back(graph: &Graph, text: &str, clips: usize) -> Vec<Vec<Vec<Tick>>> {
    let mut windows = vec![vec![Vec::<Tick>::new(); graph.modules()]; clips];
    for action in csv::Reader::from_reader(text.as_bytes()).deserialize::<Action>() {
        let action = action.unwrap();
        let window = &mut windows[action.clip][action.module - 1];
        if window.last().is_none_or(|tick| tick.at != action.tick) {
            window.push(Tick { at: action.tick, ..Tick::default() });
        }
        let tick = window.last_mut().unwrap();
        let step_of = |module: usize| {
            let mut steps = action.receives.split_whitespace().map(|word| word.split_once(':').unwrap());
            steps.find(|(of, _)| *of == module.to_string()).map(|(_, step)| step.parse::<usize>().unwrap())
        };
        let sends_to = |module: usize| action.sends.split_whitespace().any(|word| word == module.to_string());
        match action.action {
            'F' => {
                tick.forward = Some(Forward {
                    step: action.step,
                    receive: graph.inputs(action.module).map(|e| step_of(e.from)).collect(),
                    send: graph.outputs(action.module).map(|e| sends_to(e.to)).collect(),
                    loss: false,
                    keep: match action.keeps.as_str() {
                        "nothing" => Keep::Nothing,
                        "inputs" => Keep::Inputs,
                        "activations" => Keep::Activations,
                        other => panic!("{other}"),
                    },
                });
            }
            'L' => tick.forward.as_mut().unwrap().loss = true,
            'C' => {
                let found = graph.outputs(action.module).enumerate().find_map(|(k, e)| Some((k, step_of(e.to)?)));
                let (output, sent_at) = found.unwrap();
                tick.cotangents.push(Arrival { output, sent_at, step: action.step, first: false });
            }
            'B' => {
                let send = graph.inputs(action.module).map(|e| sends_to(e.from)).collect();
                tick.backward = Some(Backward { step: action.step, send });
            }
            other => panic!("{other}"),
        }
    }
    windows
}

/// `plan --ticks --csv` says all of a schedule.
#[test]
fn a_schedule_is_read_back_from_csv() {
    let dir = tempfile::tempdir().unwrap();
    for (sets, clips) in [
        (&["train.rule=1f1b", "model.skip={ spans = [2, 3] }"][..], 3),
        (&["train.rule=gpipe", "model.skip={ spans = [2], edges = [[1, 5]], delay = 2 }", "train.stash=inputs"], 2),
        (&["train.rule=bp", "train.boundary=cut", "model.skip={ spans = [4] }"], 1),
        (&["train.stash=activations", "model.skip={ spans = [3], delay = 'aligned' }"], 2),
        (&["train.rule=sideways"], 2),
    ] {
        let config = config(dir.path(), &[sets, &["data.crop=8", "model.classes=4"]].concat());
        let path = dir.path().join("schedule.toml");
        std::fs::write(&path, config.to_toml().unwrap()).unwrap();
        let args = ["plan", path.to_str().unwrap(), "--ticks", "--csv", "--clips", &clips.to_string()];
        let output = Command::new(PROGRAM).args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let setup = Setup::dry(&config, 1).unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let windows = read_back(&setup.network.graph, &said, clips);
        for (clip, windows) in windows.iter().enumerate() {
            for (i, window) in (1..=5).zip(windows) {
                let mut expected = setup.schedule.window(i).to_vec();
                for tick in &mut expected {
                    tick.at += clip * setup.schedule.period();
                    tick.cotangents.iter_mut().for_each(|arrival| arrival.first = false);
                }
                assert!(*window == expected, "{sets:?}, clip {clip}, module {i}: {window:?}");
            }
        }
    }
    let output = Command::new(PROGRAM).args(["plan", "x.toml", "--csv"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}
