//! `sideways trace`: what a run recorded is what its schedule says and its metrics account for, on one clock; and where nobody asks
//! nothing is recorded.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sideways::method::schedule::Tick;
use sideways::metrics::Recording;
use sideways::metrics::recording::read_json;
use sideways::setup::{Purpose, Setup};

use crate::common::jobs::{Job, Run};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, alone, wait_for};
use crate::common::runs::{config, shard};
use crate::common::skip_unless_ci;

/// A trace, read back.
struct Trace {
    about: Value,
    events: Vec<Value>,
}

/// A slice or an end of an arrow: rank, thread, from, to in microseconds.
type Stretch = (u64, u64, f64, f64);

fn number(event: &Value, key: &str) -> u64 {
    event[key].as_u64().unwrap_or_else(|| panic!("no {key} in {event}"))
}

fn stretch(event: &Value) -> Stretch {
    let (ts, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap_or(0.0));
    (number(event, "pid"), number(event, "tid"), ts, ts + dur)
}

impl Trace {
    fn read(path: &Path) -> Self {
        let mut all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let Value::Array(events) = all["traceEvents"].take() else { panic!("no events: {all}") };
        Trace { about: all["otherData"].take(), events }
    }

    /// What `sideways trace RUN` writes.
    fn of(run: &Path, more: &[&str]) -> Self {
        let out = run.with_extension("trace.json");
        let args = [&["trace", run.to_str().unwrap(), "--out", out.to_str().unwrap()], more].concat();
        let output = alone(&args);
        assert!(output.status.success(), "{}", text(&output));
        Self::read(&out)
    }

    fn all(&self, ph: &str) -> impl Iterator<Item = &Value> {
        self.events.iter().filter(move |event| event["ph"] == ph)
    }

    /// Slices of what was done, named so.
    fn work(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.all("X").filter(move |event| event["cat"] == "work" && event["name"] == name)
    }

    /// Slices of what was done follow each other in every thread, each within one of its batch's. Their threads.
    #[track_caller]
    fn slices_do_not_overlap(&self) -> BTreeSet<(u64, u64)> {
        let mut threads: HashMap<(u64, u64), [Vec<Stretch>; 2]> = HashMap::new();
        for event in self.all("X") {
            let slice = stretch(event);
            threads.entry((slice.0, slice.1)).or_default()[usize::from(event["cat"] == "batch")].push(slice);
        }
        for (thread, [work, batches]) in &mut threads {
            for slices in [&mut *work, &mut *batches] {
                slices.sort_by(|a, b| a.2.total_cmp(&b.2));
                assert!(!slices.is_empty(), "{thread:?}");
                for pair in slices.windows(2) {
                    assert!(pair[0].3 < pair[1].2, "{thread:?}: {pair:?}");
                    assert!(pair[0].3 > pair[0].2, "{thread:?}: {pair:?}");
                }
            }
            for slice in work {
                assert!(batches.iter().any(|batch| batch.2 <= slice.2 && slice.3 <= batch.3), "{thread:?}: {slice:?}");
            }
        }
        threads.into_keys().collect()
    }

    /// Every arrow has two ends, begins in a slice and ends in one, later; it points to the slice behind that. Their number by name.
    #[track_caller]
    fn arrows(&self) -> HashMap<String, usize> {
        let slices: Vec<Stretch> = self.all("X").filter(|event| event["cat"] == "work").map(stretch).collect();
        let within = |end: &Value| {
            let (pid, tid, ts, _) = stretch(end);
            slices.iter().any(|slice| (slice.0, slice.1) == (pid, tid) && slice.2 <= ts && ts <= slice.3)
        };
        let begins: HashMap<u64, &Value> = self.all("s").map(|event| (number(event, "id"), event)).collect();
        let mut names = HashMap::new();
        for end in self.all("f") {
            let begin = begins[&number(end, "id")];
            assert!(begin["name"] == end["name"] && begin["tid"] != end["tid"], "{begin} {end}");
            assert!(stretch(begin).2 <= stretch(end).2 && end.get("bp").is_none(), "{begin} {end}");
            assert!(within(begin) && within(end), "{begin} {end}");
            *names.entry(end["name"].as_str().unwrap().to_string()).or_insert(0) += 1;
        }
        assert_eq!(self.all("s").count(), names.values().sum::<usize>());
        assert_eq!(begins.len(), self.all("s").count());
        names
    }

    /// Seconds of the slices of that name in module `module`, validations aside.
    fn seconds(&self, name: &str, module: u64) -> f64 {
        let of = self.work(name).filter(|slice| number(slice, "tid") == module);
        let of = of.filter(|slice| slice["args"].get("validation").is_none());
        of.map(|slice| slice["dur"].as_f64().unwrap() * 1e-6).sum()
    }
}

fn path(at: &Path) -> &str {
    at.to_str().unwrap()
}

/// A configuration of four modules on shards in `dir`, as a file.
fn prepared(dir: &Path, sets: &[&str]) -> (sideways::config::Config, PathBuf) {
    shard(&dir.join("train.h5"), 12, 14, false);
    let config = config(dir, &[&["model.modules=4", "model.skip={ spans = [2] }"], sets].concat());
    let path = dir.join("config.toml");
    std::fs::write(&path, config.to_toml().unwrap()).unwrap();
    (config, path)
}

/// Four ranks, with stash (forward and backward passes of a tick are of different steps), a validation and a checkpoint among the
/// batches recorded.
#[test]
fn four_ranks_are_recorded_as_their_schedule_says() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["train.stash=activations", "train.batches=5", "run.trace=2..4"];
    let sets = [&sets[..], &["train.validate_every=3", "run.checkpoint_every=4"]].concat();
    let (config, file) = prepared(dir.path(), &sets);
    let output = mpirun(4, Path::new(PROGRAM), &["train", path(&file)], &[], MINUTE);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("batches 2..4 are recorded in"), "{}", text(&output));
    let run = dir.path().join("run");
    let trace = Trace::of(&run, &[]);
    let threads = trace.slices_do_not_overlap();
    assert_eq!(threads, (0..4).map(|rank| (rank, rank + 1)).collect());

    // Names of ranks and modules.
    let named = |what: &str, name: &str| trace.all("M").any(|m| m["name"] == what && m["args"]["name"] == name);
    assert!(named("thread_name", "module 3") && !named("thread_name", "module 5"));
    let host = trace.about["clocks"][2]["host"].as_str().unwrap();
    assert!(named("process_name", &format!("rank 2 {host}")));
    // All of one machine read one clock.
    let clocks = trace.about["clocks"].as_array().unwrap();
    assert!(clocks.len() == 4 && clocks.iter().all(|clock| clock["uncertainty_us"] == 0.0), "{}", trace.about);
    assert_eq!(trace.about["problems"], serde_json::json!([]));

    // Every step's passes, each at its tick, and no others.
    let setup = Setup::new(&config, 4, Purpose::Train).unwrap();
    let validation = setup.validation.clone().unwrap();
    let validated = validation.ticks_before_batch(3);
    let mut expected = HashMap::new();
    for (batch, validated) in [(2, 0), (3, validated)] {
        for module in 1..=4 {
            for tick in setup.schedule.window(module) {
                let at = setup.schedule.first_tick(batch) + validated + tick.at as u64;
                let mut pass = |name, step| expected.insert((name, module as u64, batch, step as u64), at);
                tick.forward.iter().for_each(|forward| assert!(pass("forward", forward.step).is_none()));
                tick.backward.iter().for_each(|backward| assert!(pass("backward", backward.step).is_none()));
            }
        }
    }
    let mut found = HashMap::new();
    let key = |name, slice: &Value| {
        let args = &slice["args"];
        (name, number(slice, "tid"), number(args, "batch"), number(args, "step"))
    };
    let in_training = |slice: &Value| slice["args"].get("validation").is_none();
    for name in ["forward", "backward"] {
        for slice in trace.work(name).filter(|slice| in_training(slice)) {
            found.insert(key(name, slice), number(&slice["args"], "tick"));
        }
    }
    // What is added up behind a batch is entered as backward work of its last tick.
    for (key, tick) in &expected {
        assert_eq!(found.get(key), Some(tick), "{key:?}");
    }
    let forwards = |of: &HashMap<_, u64>| of.keys().filter(|key: &&(&str, u64, u64, u64)| key.0 == "forward").count();
    assert_eq!(forwards(&found), forwards(&expected));

    // Six clips in batches of two are validated on, behind batch 2 (three are done): forward passes alone.
    let validations = |n| format!("validation after 3, batch {n}");
    let steps: usize = (1..=4).map(|i| validation.schedule.steps(i)).sum();
    assert_eq!(trace.work("forward").filter(|slice| !in_training(slice)).count(), 6 * steps);
    // Module 4 has losses there.
    assert!(trace.work("backward").all(|slice| in_training(slice) || number(slice, "tid") == 4));
    for n in 0..6 {
        assert_eq!(trace.all("X").filter(|event| event["name"] == validations(n)[..]).count(), 4, "{n}");
    }
    assert!(!trace.all("X").any(|event| event["name"] == validations(6)[..]));
    // Each module updates behind each batch, and is written with the validation and after four batches.
    for (name, times) in [("update", 2), ("checkpoint", 2)] {
        for module in 1..=4 {
            let count = trace.work(name).filter(|slice| number(slice, "tid") == module).count();
            assert!(count >= times, "{name} in module {module}: {count}");
        }
    }

    // An arrow a message that the schedule sends, and one of labels a batch.
    let arrows = trace.arrows();
    let sends = |forward: &dyn Fn(&Tick) -> &[bool], schedule: &sideways::method::Schedule| -> usize {
        let ticks = (1..=4).flat_map(|i| schedule.window(i));
        ticks.map(|tick| forward(tick).iter().filter(|send| **send).count()).sum()
    };
    fn activations(tick: &Tick) -> &[bool] {
        tick.forward.as_ref().map_or(&[], |forward| &forward.send)
    }
    fn cotangents(tick: &Tick) -> &[bool] {
        tick.backward.as_ref().map_or(&[], |backward| &backward.send)
    }
    let of_activations = 2 * sends(&activations, &setup.schedule) + 6 * sends(&activations, &validation.schedule);
    assert_eq!(arrows["activation"], of_activations);
    assert_eq!(arrows["cotangent"], 2 * sends(&cotangents, &setup.schedule));
    assert_eq!((arrows["labels"], arrows.len()), (2 + 6, 3), "{arrows:?}");

    // The same seconds as in the metrics, which come from the same stopwatch. (Their lines count batches from 1.)
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for module in 1..=4usize {
        let of_lines =
            lines.iter().filter(|line| line.get("kind").is_none() && [3, 4].contains(&number(line, "batches")));
        let accounted = |name: &str| -> f64 {
            of_lines.clone().map(|line| line["workers"][module - 1]["time"][name].as_f64().unwrap()).sum()
        };
        for (name, phase) in [("optimizer", "update"), ("wait_cotangents", "wait for cotangents")] {
            let (accounted, traced) = (accounted(name), trace.seconds(phase, module as u64));
            assert!((accounted - traced).abs() < 1e-4 + 1e-3 * accounted, "{name}: {accounted} s, {traced} s");
        }
    }
}

/// Two of four ranks read a clock that is 5000 s ahead, and are drawn where they belong.
#[test]
fn clocks_of_ranks_are_compared() {
    let ahead = |command: &str| format!("exec unshare --time --monotonic 5000 {command}");
    let clock = |command: &str| Command::new("sh").args(["-c", command]).output().map(|output| output.stdout);
    let (own, other) = ("readlink /proc/self/ns/time", ahead("readlink /proc/self/ns/time"));
    if !clock(own).is_ok_and(|own| clock(&other).is_ok_and(|other| !other.is_empty() && other != own)) {
        skip_unless_ci("ranks cannot be given clocks of their own (unshare --time)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, file) = prepared(dir.path(), &["run.trace=1..3"]);
    let train = format!("{PROGRAM} train {}", file.display());
    let script = format!("case $OMPI_COMM_WORLD_RANK in [12]) {};; *) exec {train};; esac", ahead(&train));
    let output = mpirun(4, Path::new("sh"), &["-c", &script], &[], MINUTE);
    assert!(output.status.success(), "{}", text(&output));
    let run = dir.path().join("run");
    let trace = Trace::of(&run, &[]);
    trace.slices_do_not_overlap();
    let arrows = trace.arrows();
    assert!(arrows["activation"] > 50 && arrows["cotangent"] > 20, "{arrows:?}");
    let clocks = trace.about["clocks"].as_array().unwrap();
    for (rank, clock) in clocks.iter().enumerate() {
        let of = |key: &str| clock[key].as_f64().unwrap();
        let (truth, uncertainty) = (if [1, 2].contains(&rank) { -5e9 } else { 0.0 }, of("uncertainty_us"));
        assert!((uncertainty == 0.0) == (truth == 0.0), "{clock}");
        for offset in [of("offset_us"), of("offset_at_end_us")] {
            assert!((offset - truth).abs() <= uncertainty, "{clock}");
        }
    }
    // In the parts themselves no message was there before it left, by more than clocks may be off.
    let folder = run.join("trace/batches-00000001-00000003");
    let parts: Vec<Recording> = (1..=4).map(|i| read_json(&Recording::file(&folder, i, 0)).unwrap()).collect();
    let mut left = HashMap::new();
    let moment = |part: &Recording, at: u64| at as i64 + part.clock.offset;
    for part in &parts {
        for message in part.messages.iter().filter(|message| message.sent) {
            left.insert(
                (message.link, message.batch, message.step),
                (moment(part, message.at), part.clock.uncertainty),
            );
        }
    }
    let mut count = 0;
    for part in &parts {
        for message in part.messages.iter().filter(|message| !message.sent) {
            let (left, uncertainty) = left[&(message.link, message.batch, message.step)];
            let there = moment(part, message.at);
            // Drift between launch and end: these clocks are one.
            assert!(there - left >= -((uncertainty + part.clock.uncertainty) as i64), "{message:?} left at {left}");
            assert!(there - left < 60_000_000_000, "{message:?} left at {left}");
            count += 1;
        }
    }
    assert_eq!(count, arrows.values().sum::<usize>());
}

/// Nobody asks: there is no folder. A file TRACE asks, while the run goes on: the next three batches, of all modules, and nothing else.
#[test]
fn a_file_asks_for_the_next_batches() {
    let run = Run::new(&["model.modules=4"]);
    let mut job = Job::alone(&run, &[]);
    wait_for("batches", || run.lines_of_metrics().len() > 3);
    let folder = run.folder().join("trace");
    assert!(!folder.exists());
    let output = alone(&["trace", path(&run.folder())]);
    assert!(output.status.code() == Some(2) && text(&output).contains("nothing is recorded"), "{}", text(&output));

    std::fs::write(run.folder().join("TRACE"), "").unwrap();
    let parts = || std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let whole = || parts().any(|recording| (1..=4).all(|i| Recording::file(&recording, i, 0).exists()));
    wait_for("a recording", whole);
    assert!(!run.folder().join("TRACE").exists());
    // It is there while the run goes on.
    let trace = Trace::of(&run.folder(), &[]);
    let name = parts().next().unwrap().file_name().unwrap().to_str().unwrap().to_string();
    let first: u64 = name["batches-".len()..][..8].parse().unwrap();
    assert_eq!(name, format!("batches-{first:08}-{:08}", first + 3));
    assert_eq!(trace.slices_do_not_overlap(), (1..=4).map(|module| (0, module)).collect());
    let batches: BTreeSet<u64> = trace.work("forward").map(|slice| number(&slice["args"], "batch")).collect();
    assert_eq!(batches, (first..first + 3).collect());
    assert!(trace.arrows()["cotangent"] > 10);

    // Asked again, there are two, and one can be chosen.
    std::fs::write(run.folder().join("TRACE"), "").unwrap();
    wait_for("another recording", || parts().count() == 2 && parts().all(|at| Recording::file(&at, 4, 0).exists()));
    let range = format!("{first}..{}", first + 3);
    let again = Trace::of(&run.folder(), &["--batches", &range]);
    assert_eq!(again.events.len(), trace.events.len());
    let output = alone(&["trace", path(&run.folder()), "--batches", "0..1"]);
    assert!(output.status.code() == Some(2) && text(&output).contains(&range), "{}", text(&output));
    std::fs::write(run.folder().join("STOP"), "").unwrap();
    assert_eq!(job.exit_code(), Some(0));
    // No checkpoint was written for it: the start's and the last one's.
    let checkpoints = std::fs::read_dir(run.folder().join("checkpoints")).unwrap().flatten();
    assert_eq!(checkpoints.filter(|entry| entry.file_name().to_string_lossy().starts_with("step-")).count(), 2);
}

/// Of a configuration some batches are trained on made-up frames: two replicas of two modules on three ranks, which average gradients.
#[test]
fn a_configuration_is_tried() {
    let dir = tempfile::tempdir().unwrap();
    let (_, file) = prepared(dir.path(), &["model.modules=2", "model.skip={}", "train.replicas=2", "data.crop=8"]);
    std::fs::remove_file(dir.path().join("train.h5")).unwrap();
    let out = dir.path().join("trace.json");
    let args = ["trace", path(&file), "--classes", "4", "--out", path(&out)];
    let output = mpirun(3, Path::new(PROGRAM), &args, &[], MINUTE);
    assert!(output.status.success(), "{}", text(&output));
    let trace = Trace::read(&out);
    // Modules 1 and 2 of replica 0 on ranks 0 and 0, of replica 1 on ranks 1 and 2.
    assert_eq!(trace.slices_do_not_overlap(), [(0, 1), (0, 2), (1, 3), (2, 4)].into());
    let batches: BTreeSet<u64> = trace.work("all-reduce").map(|slice| number(&slice["args"], "batch")).collect();
    assert_eq!(batches, [2, 3, 4].into());
    let arrows = trace.arrows();
    assert_eq!(arrows["gradient"], 3 * 2 * 4, "{arrows:?}");
    assert!(!dir.path().join("run").exists());

    for (args, says) in [
        (&["trace", "nowhere"][..], "neither a run folder nor a configuration"),
        (&["trace", path(dir.path()), "--set", "train.seed=2"], "are for a configuration"),
        (&["trace", path(&file), "--batches", "3..2"], "are no batches"),
        (&["trace", path(&file), "--set", "data.crop=0"], "data.crop"),
    ] {
        let output = alone(args);
        assert!(output.status.code() == Some(2) && text(&output).contains(says), "{}", text(&output));
    }
}
