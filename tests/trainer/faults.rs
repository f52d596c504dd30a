//! What happens to a run that is asked to stop, killed, or cannot write: nothing is lost but work since the last checkpoint.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::jobs::{Job, Run};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, wait_for};
use crate::common::runs::tensors;
use crate::common::tmpfs::Tmpfs;
use sideways::checkpoint;

/// SIGTERM and SIGUSR1 to one process of all modules, and to exact back-propagation: a checkpoint, exit 75, the same bits.
#[test]
fn a_signal_stops_with_a_checkpoint() {
    for (signal, sets) in [
        (libc::SIGTERM, &[][..]),
        (libc::SIGUSR1, &["train.boundary=cut"]),
        (libc::SIGTERM, &["train.replicas=2", "train.update_every=5"]),
        (libc::SIGUSR1, &["train.rule=bp", "model.skip={}"]),
        (libc::SIGTERM, &["model.modules=1", "train.rule=sideways", "model.skip={}"]),
    ] {
        let run = Run::new(sets);
        let mut job = Job::alone(&run, &[]);
        wait_for("five clips", || run.lines_of_metrics().len() >= 5);
        job.signal(signal);
        assert_eq!(job.exit_code(), Some(75), "{sets:?}");
        let clips = run.newest();
        assert!(clips >= 5 && run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>(), "{sets:?}");
        run.assert_same_as_uninterrupted(clips);
    }
}

/// Whichever rank gets the signal, all stop after the same clip; metrics have every clip once over the restarts.
#[test]
fn any_rank_may_get_the_signal() {
    for (ranks, replicas, rule) in [(5, 1, "skip-sideways"), (3, 1, "gpipe"), (6, 2, "1f1b")] {
        let run = Run::new(&[&format!("train.replicas={replicas}"), &format!("train.rule={rule}")]);
        for victim in (0..ranks).step_by(2) {
            let before = run.lines_of_metrics().len();
            let metrics = run.folder().join("metrics.jsonl");
            // The rank waits for some clips, then signals itself.
            let script = format!(
                "if [ $OMPI_COMM_WORLD_RANK = {victim} ]; then \
                 (while [ $(cat {} 2>/dev/null | wc -l) -lt {} ]; do sleep 0.05; done; kill -USR1 $$) & fi; exec {PROGRAM} train {}",
                metrics.display(),
                before + 4,
                run.config
            );
            let output = mpirun(ranks, Path::new("sh"), &["-c", &script], &[], MINUTE);
            assert_eq!(output.status.code(), Some(75), "rank {victim} of {ranks}: {}", text(&output));
            assert!(text(&output).contains("stopped early by a signal"), "{}", text(&output));
        }
        let clips = run.newest();
        assert!(run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>());
        run.assert_same_as_uninterrupted(clips);
    }
}

/// In a clip that would go on for a minute; a second signal within a second of the first is the same request.
#[test]
fn a_second_signal_stops_at_once() {
    // Videos of 14 frames repeat their last one. A step takes some 0.1 ms, on whatever processor.
    let run = Run::new(&["data.frames=500000"]);
    let mut job = Job::alone(&run, &[]);
    wait_for("the start", || run.folder().join("checkpoints/step-00000000").exists());
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        job.signal(signal);
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(job.0.try_wait().unwrap().is_none(), "the echo of a signal has ended the run");
    std::thread::sleep(Duration::from_millis(700));
    let second = Instant::now();
    job.signal(libc::SIGTERM);
    assert_eq!(job.exit_code(), Some(128 + libc::SIGTERM));
    assert!(second.elapsed() < Duration::from_secs(5), "not at once: {:?}", second.elapsed());
    assert_eq!((run.newest(), run.lines_of_metrics()), (0, Vec::new()), "the clip was not interrupted");
}

/// A second run in the folder of one at work is refused with exit code 2 and touches nothing; when the first has ended, it goes on.
#[test]
fn one_run_at_a_time_in_a_folder() {
    let run = Run::new(&[]);
    let mut job = Job::alone(&run, &[]);
    wait_for("three clips", || run.lines_of_metrics().len() >= 3);
    let second = Command::new(PROGRAM).args(["train", &run.config]).output().unwrap();
    assert_eq!(second.status.code(), Some(2), "{}", text(&second));
    let holder = format!("another run is at work there (process {} on ", job.0.id());
    assert!(text(&second).contains(&holder), "{}", text(&second));
    job.signal(libc::SIGTERM);
    assert_eq!(job.exit_code(), Some(75));
    let clips = run.newest();
    assert!(run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>());
    let third = Command::new(PROGRAM).args(["train", &run.config, "--stop-after", "1"]).output().unwrap();
    assert_eq!(third.status.code(), Some(75), "{}", text(&third));
    assert_eq!(run.newest(), clips + 1);
}

#[test]
fn files_in_the_run_folder_ask_for_a_checkpoint_and_an_end() {
    let run = Run::new(&[]);
    let mut job = Job::alone(&run, &[]);
    wait_for("five clips", || run.lines_of_metrics().len() >= 5);
    std::fs::write(run.folder().join("CHECKPOINT"), "").unwrap();
    wait_for("a checkpoint", || run.newest() > 0);
    let first = run.newest();
    assert!(!run.folder().join("CHECKPOINT").exists());
    wait_for("it to go on", || run.lines_of_metrics().len() as u64 > first);
    std::fs::write(run.folder().join("STOP"), "").unwrap();
    assert_eq!(job.exit_code(), Some(0));
    assert!(!run.folder().join("STOP").exists() && run.newest() > first);
    run.assert_same_as_uninterrupted(run.newest());
}

/// A random rank is killed at a random moment, also while checkpoints are written: the job ends within seconds with one
/// readable cause, resumes, and ends with the bits of a run that was never killed. FAULTS=n repeats it n times.
#[test]
fn a_killed_rank_costs_the_work_since_the_last_checkpoint() {
    let rounds: u64 = std::env::var("FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let run = Run::new(&["run.checkpoint_every=3", "run.keep=2"]);
    let (mut random, mut slowest) = (0x2545_f491_4f6c_dd1du64, 0.0);
    for round in 0..rounds {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (victim, delay) = ((random >> 33) % 4, 0.8 + ((random >> 40) % 100) as f64 / 100.0);
        let killed = run.dir.path().join("killed");
        let script = format!(
            "if [ $OMPI_COMM_WORLD_RANK = {victim} ]; then (until [ -e {}/checkpoints/step-00000000 ]; do sleep 0.05; done; \
             sleep {delay}; touch {}; kill -9 $$) & fi; exec {PROGRAM} train {}",
            run.folder().display(),
            killed.display(),
            run.config
        );
        let output = mpirun(4, Path::new("sh"), &["-c", &script], &[], MINUTE);
        let seconds = std::fs::metadata(&killed).unwrap().modified().unwrap().elapsed().unwrap().as_secs_f64();
        slowest = f64::max(slowest, seconds);
        assert!(!output.status.success() && seconds < 10.0, "round {round}: {seconds} s, {}", text(&output));
        let said = text(&output);
        assert!(said.contains("signal 9") || said.contains("error: rank"), "{said}");
        // There is always a checkpoint that loads.
        checkpoint::latest(&run.folder().join("checkpoints")).unwrap().unwrap();
    }
    eprintln!("{rounds} kills; from kill to the job's end at most {slowest:.1} s");
    let clips = run.newest() + 5;
    let more = (clips - run.newest()).to_string();
    let output = mpirun(4, Path::new(PROGRAM), &["train", &run.config, "--stop-after", &more], &[], MINUTE);
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert!(run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>());
    run.assert_same_as_uninterrupted(clips);
}

/// Killed while a checkpoint is being written, some milliseconds into it: there is always one that loads, and what was half
/// written is gone after the next start. FAULTS=n repeats it n times.
#[test]
fn a_kill_while_a_checkpoint_is_written_leaves_one_that_loads() {
    let rounds: u64 = std::env::var("FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    // Some megabytes a checkpoint, so that writing one takes a while.
    let layers = "model.layers=[{ kind = 'conv2d', out = 64, kernel = 3, stride = 4 }, { kind = 'relu' }, \
        { kind = 'conv2d', out = 512, kernel = 1 }, { kind = 'relu' }, { kind = 'conv2d', out = 512, kernel = 1 }, \
        { kind = 'relu' }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let run = Run::new(&["run.checkpoint_every=5", "run.keep=2", "model.modules=4", layers]);
    let checkpoints = run.folder().join("checkpoints");
    let unfinished = |dir: &Path| -> usize {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".step-")).count()
    };
    let (mut during, mut random) = (0, 0x9e37_79b9_7f4a_7c15u64);
    for round in 0..rounds {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (victim, after) = ((random >> 33) % 4, ((random >> 40) % 12) as f64 / 1000.0);
        // Waits for a checkpoint to be complete in this start, then for the next to begin.
        let script = format!(
            "if [ $OMPI_COMM_WORLD_RANK = {victim} ]; then (cd {0} 2>/dev/null || sleep 1; cd {0}; touch {1}/begun; \
             until [ -n \"$(find {0} -maxdepth 1 -newer {1}/begun -name 'step-*')\" ]; do sleep 0.05; done; \
             until ls -d {0}/.step-*.partial >/dev/null 2>&1; do :; done; sleep {after}; kill -9 $$) & fi; exec {PROGRAM} train {2}",
            checkpoints.display(),
            run.dir.path().display(),
            run.config
        );
        let output = mpirun(4, Path::new("sh"), &["-c", &script], &[], MINUTE);
        let said = text(&output);
        assert!(!output.status.success(), "round {round}: {said}");
        assert!(said.contains("signal 9") || said.contains("error: rank"), "round {round}: {said}");
        during += usize::from(unfinished(&checkpoints) > 0);
        checkpoint::latest(&checkpoints).unwrap().unwrap();
    }
    eprintln!("{during} of {rounds} kills left a checkpoint half written");
    assert!(during > 0, "no kill came while a checkpoint was written");
    let newest = run.newest();
    let output = mpirun(4, Path::new(PROGRAM), &["train", &run.config, "--stop-after", "5"], &[], MINUTE);
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert_eq!((run.newest(), unfinished(&checkpoints)), (newest + 5, 0));
    run.assert_same_as_uninterrupted(newest + 5);
}

/// No room for a checkpoint: the run ends with an error that says so, the last good checkpoint is kept and resumes; or the
/// run goes on, if asked to, and writes again when there is room.
#[test]
fn a_full_disk_loses_no_checkpoint() {
    let run = Run::new(&["run.checkpoint_every=5"]);
    let Some(disk) = Tmpfs::mount(&run.folder().join("checkpoints"), "1m") else { return };
    let train = |more: &[&str]| Command::new(PROGRAM).args(["train", &run.config]).args(more).output().unwrap();
    assert_eq!(train(&["--stop-after", "10"]).status.code(), Some(75));
    let filler = disk.fill();
    let output = train(&["--stop-after", "10"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("No space left on device") && text(&output).contains("step-"), "{}", text(&output));
    assert_eq!(run.newest(), 10);

    let go_on = "run.on_checkpoint_error=continue";
    let mut job = Job::alone(&run, &["--set", go_on]);
    wait_for("clips without checkpoints", || run.lines_of_metrics().last().is_some_and(|&clips| clips > 30));
    assert_eq!(run.newest(), 10);
    std::fs::remove_file(filler).unwrap();
    wait_for("a checkpoint", || run.newest() > 10);
    job.signal(libc::SIGTERM);
    assert_eq!(job.exit_code(), Some(75));
    run.assert_same_as_uninterrupted(run.newest());

    disk.fill();
    let output = train(&["--set", go_on, "--stop-after", "10"]);
    assert_eq!(output.status.code(), Some(1), "the last checkpoint must be written: {}", text(&output));
    assert!(text(&output).contains("the run's last checkpoint, of "), "{}", text(&output));
}

/// The same disk for the whole run folder: metrics wait for room as checkpoints do, and none is lost.
#[test]
fn a_full_disk_loses_no_metrics_where_the_run_is_to_go_on() {
    let run = Run::new(&["run.checkpoint_every=5", "run.keep=1"]);
    let Some(disk) = Tmpfs::mount(&run.folder(), "2m") else { return };
    let mut job = Job::alone(&run, &["--set", "run.on_checkpoint_error=continue"]);
    wait_for("seven clips", || run.lines_of_metrics().len() >= 7);
    let filler = disk.fill();
    let full = *run.lines_of_metrics().last().unwrap();
    // A checkpoint's folder can still be made; a line is some hundred bytes, so most of these have no room.
    let under_way = || {
        let names = std::fs::read_dir(run.folder().join("checkpoints")).unwrap();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter_map(|n| n.strip_prefix(".step-")?.strip_suffix(".partial")?.parse().ok()).max().unwrap_or(0u64)
    };
    wait_for("clips without room", || under_way() > full + 20 || job.0.try_wait().unwrap().is_some());
    assert!(job.0.try_wait().unwrap().is_none(), "the run has ended");
    std::fs::remove_file(filler).unwrap();
    wait_for("a checkpoint", || run.newest() > full + 20);
    job.signal(libc::SIGTERM);
    assert_eq!(job.exit_code(), Some(75));
    let clips = run.newest();
    assert!(run.lines_of_metrics() == (1..=clips).collect::<Vec<_>>());
    assert_eq!(under_way(), 0, "failed checkpoints still take room");
    run.assert_same_as_uninterrupted(clips);
}

/// A full disk behind `>`, and a reader that has seen enough (`| head`).
#[test]
fn standard_output_may_refuse() {
    let run = Run::new(&[]);
    let print =
        |to: Stdio| Command::new(PROGRAM).args(["train", &run.config, "--print-config"]).stdout(to).output().unwrap();
    let full = print(std::fs::File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(full.status.code(), Some(1), "{}", text(&full));
    assert!(text(&full).contains("error: standard output: No space left on device"), "{}", text(&full));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let closed = print(writer.into());
    assert!(closed.status.success() && closed.stderr.is_empty(), "{}", text(&closed));
}

/// What a crash of the machine may leave in `metrics.jsonl` is taken out; the run goes on.
#[test]
fn a_damaged_end_of_the_metrics_keeps_no_run_from_going_on() {
    let run = Run::new(&[]);
    let train = || Command::new(PROGRAM).args(["train", &run.config, "--stop-after", "2"]).output().unwrap();
    assert_eq!(train().status.code(), Some(75));
    let path = run.folder().join("metrics.jsonl");
    let damaged = [&std::fs::read(&path).unwrap()[..], b"\xff\xfe\n\0\0\0\n{\"clips\":3,\"lo"].concat();
    std::fs::write(&path, damaged).unwrap();
    let output = train();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert_eq!(run.lines_of_metrics(), [1, 2, 3, 4]);
    assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 4);
}

/// Values that are not finite end the run where they appear, or are left out and counted.
#[test]
fn values_that_are_not_finite_are_caught_and_counted() {
    let run = Run::new(&["train.batches=6", "train.optimizer={ kind = 'sgd', lr = 1e30 }"]);
    let train = |more: &[&str]| Command::new(PROGRAM).args(["train", &run.config]).args(more).output().unwrap();
    let output = train(&[]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    let error = said.lines().find(|l| l.contains("error:")).unwrap_or_else(|| panic!("{said}"));
    for part in ["module ", "batch ", "step ", "tick "] {
        assert!(error.contains(part) && (error.contains("not finite") || error.contains("the loss is")), "{error}");
    }
    let output = train(&["--set", "run.on_nonfinite=skip"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("were left out because they were not finite"), "{}", text(&output));
    let metrics = std::fs::read_to_string(run.folder().join("metrics.jsonl")).unwrap();
    let skipped: u64 = metrics
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["skipped"].as_u64().unwrap())
        .sum();
    assert!(skipped > 0, "{metrics}");
    // What is not finite never gets into the parameters.
    assert!(tensors(&run.folder(), 6).values().flatten().all(|v| v.is_finite()));
}

/// A slow rank is named in the report at the end.
#[test]
fn a_straggler_is_named() {
    // Much work a module and few small messages, which wait for nobody: a slow rank's time is its work's, also where each
    // message costs a turn of other processes.
    let conv = |out: usize| format!("{{ kind = 'conv2d', out = {out}, kernel = 3, padding = 1 }}, {{ kind = 'relu' }}");
    let module = format!("{}, {}, {}", conv(96), conv(96), conv(4));
    let layers = format!(
        "model.layers=[{module}, {module}, {module}, {{ kind = 'global-avg-pool' }}, {{ kind = 'linear', out = 4 }}]"
    );
    let cuts = ["model.modules=3", "model.cuts=[6, 12]"];
    let open = "model.skip={}";
    let run = Run::new(&["data.batch=24", open, "train.rule=sideways", &layers, cuts[0], cuts[1]]);
    // Rank 1, whose module is no larger than rank 2's, is stopped four fifths of the time.
    let script = format!(
        "if [ $OMPI_COMM_WORLD_RANK = 1 ]; then p=$$; (while kill -0 $p 2>/dev/null; do kill -STOP $p; sleep 0.08; \
         kill -CONT $p; sleep 0.02; done) & fi; exec {PROGRAM} train {} --stop-after 10",
        run.config
    );
    let output = mpirun(3, Path::new("sh"), &["-c", &script], &[], MINUTE);
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert!(text(&output).contains("limited by module 2, replica 0 on rank 1"), "{}", text(&output));
}

/// A run folder's file that is a pipe would be waited for without an end.
#[test]
fn pipes_in_a_run_folder_are_refused() {
    for name in [".lock", "metrics.jsonl", "attempts.jsonl", "log.txt"] {
        let run = Run::new(&["train.batches=1"]);
        std::fs::create_dir_all(run.folder()).unwrap();
        nix::unistd::mkfifo(&run.folder().join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let output = Command::new("timeout").args(["20", PROGRAM, "train", &run.config]).output().unwrap();
        let said = text(&output);
        assert!(output.status.code() == Some(2) && said.contains(&format!("{name}: a named pipe")), "{name}: {said}");
    }
}
