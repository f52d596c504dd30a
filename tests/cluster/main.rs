//! The batch scripts on a real Slurm cluster of five hosts, made of network namespaces (slurm/testbed). Needs root and
//! Slurm's packages; skipped where they are missing, but in continuous integration. One test, since there is one testbed.

#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::mpirun::text;
use common::program::program;
use common::runs::{config, shard, tensors};
use common::skip_unless_ci;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The testbed, taken down when this goes.
struct Testbed;

impl Testbed {
    fn up() -> Option<Self> {
        // Four for the jobs, one to take the place of a dead one.
        let output = Self::call(&["up", "5"]);
        if output.status.success() {
            return Some(Testbed);
        }
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing = ["needs root", "is missing", "is up; take that one down", "Operation not permitted"];
        assert!(missing.iter().any(|m| why.contains(m)), "the testbed does not come up: {why}");
        skip_unless_ci(&format!("no Slurm testbed comes up: {}", why.trim()));
        None
    }

    fn call(args: &[&str]) -> Output {
        let script = Path::new(ROOT).join("slurm/testbed/testbed.sh");
        Command::new("timeout").arg("100").arg(script).args(args).current_dir(ROOT).output().unwrap()
    }

    /// Runs a command on the controller.
    fn run(&self, args: &[&str]) -> Output {
        Self::call(&[&["run"][..], args].concat())
    }

    /// Runs an srun on it, again if Open MPI crashes as it starts (slurm/ranks.sh tells of that).
    fn run_ranks(&self, args: &[&str]) -> Output {
        let mut output = self.run(args);
        for _ in 0..2 {
            if !text(&output).contains("Segmentation fault") {
                break;
            }
            output = self.run(args);
        }
        output
    }

    fn does(&self, args: &[&str]) {
        let output = Self::call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        Self::call(&["down"]);
    }
}

/// A run of eight modules, whose folder all hosts see.
struct Run {
    dir: tempfile::TempDir,
    config: String,
}

impl Run {
    fn new(clips: usize) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        shard(&dir.path().join("train.h5"), 24, 16, false);
        let conv = "{ kind = 'conv2d', out = 8, kernel = 3, padding = 1 }, { kind = 'relu' }, ";
        let layers =
            format!("model.layers=[{}{{ kind = 'global-avg-pool' }}, {{ kind = 'linear', out = 4 }}]", conv.repeat(7));
        let clips = format!("train.batches={clips}");
        let sets = [
            layers.as_str(),
            "model.modules=8",
            "model.skip={ spans = [2] }",
            "data.frames=16",
            "train.optimizer={ kind = 'sgd', lr = 0.001 }",
            "run.checkpoint_every=20",
            "run.timeout=15",
            &clips,
        ];
        let path = dir.path().join("config.toml");
        std::fs::write(&path, config(dir.path(), &sets).to_toml().unwrap()).unwrap();
        Run { config: path.display().to_string(), dir }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn clips_done(&self) -> usize {
        std::fs::read_to_string(self.folder().join("metrics.jsonl")).map_or(0, |text| text.lines().count())
    }

    /// Submits train.sbatch on four nodes with two ranks each; returns the job's number.
    fn submit(&self, testbed: &Testbed, more: &[&str]) -> String {
        let log = format!("--output={}/job.log", self.dir.path().display());
        let export = format!("--export=ALL,SIDEWAYS={},NODE_WAIT=40", program());
        let options = ["--parsable", "--nodes=4", "--ntasks-per-node=2", "--time=10", &log, &export];
        let job = [&["sbatch"][..], &options, more, &["slurm/train.sbatch", &self.config]].concat();
        let output = testbed.run(&job);
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("job.log")).unwrap_or_default()
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(90), "waited for {what}; the job's log: {}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_for_end(&self, testbed: &Testbed, job: &str) {
        self.wait_for("the job's end", || {
            let state =
                String::from_utf8_lossy(&testbed.run(&["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"]).stdout)
                    .trim()
                    .to_string();
            assert!(!["FAILED", "TIMEOUT", "CANCELLED"].contains(&state.as_str()), "{state}: {}", self.log());
            state == "COMPLETED"
        });
    }

    /// Compares the end with that of one process.
    fn assert_same_as_alone(&self, clips: u64) {
        let alone = self.dir.path().join("alone");
        let dir = format!("run.dir={}", alone.display());
        let stop = clips.to_string();
        let args = ["train", &self.config, "--set", &dir, "--stop-after", &stop];
        let output = Command::new(program()).args(args).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 75)), "{}", text(&output));
        assert!(tensors(&alone, clips) == tensors(&self.folder(), clips), "the job's parameters differ");
        let lines = std::fs::read_to_string(self.folder().join("metrics.jsonl")).unwrap();
        let batches = |l: &str| {
            let line = serde_json::from_str::<serde_json::Value>(l).unwrap();
            line.get("batches").or(line.get("clips")).unwrap().as_u64().unwrap()
        };
        assert!(lines.lines().map(batches).eq(1..=clips), "every batch once in the metrics");
    }
}

#[test]
fn batch_jobs_finish_whatever_happens_and_with_the_same_bits() {
    let Some(testbed) = Testbed::up() else { return };
    wrong_starts_are_refused(&testbed);
    a_slow_network_changes_no_bit(&testbed);
    videos_are_prepared_on_all_nodes_and_across_a_requeue(&testbed);
    recipes_pretrain_and_fine_tune_from_videos(&testbed);
    signals_requeue_the_job(&testbed);
    a_crash_at_the_start_is_tried_again(&testbed);
    a_study_goes_on_across_a_requeue(&testbed);
    a_lost_node_is_replaced(&testbed, "kill-node");
    a_lost_node_is_replaced(&testbed, "cut-link");
}

/// A drill of some five minutes: a job whose time limit is a minute, over and over. `make drills` runs it.
#[test]
#[ignore = "takes five minutes: make drills"]
fn time_limits_requeue_five_times() {
    let Some(testbed) = Testbed::up() else { panic!("the testbed does not come up") };
    let run = Run::new(1_000_000);
    let job = run.submit(&testbed, &["--time=1", "--signal=USR1@20"]);
    for round in 1..=5 {
        run.wait_for("the restart", || run.log().contains(&format!("restart {round}")));
        eprintln!("time limit {round}: {} clips done", run.clips_done());
    }
    let before = run.clips_done();
    run.wait_for("some clips", || run.clips_done() > before + 30);
    std::fs::write(run.folder().join("STOP"), "").unwrap();
    run.wait_for_end(&testbed, &job);
    let clips = run.clips_done() as u64;
    run.assert_same_as_alone(clips);
    eprintln!("six runs, {clips} clips: the bits of one run");
}

fn wrong_starts_are_refused(testbed: &Testbed) {
    let run = Run::new(20);
    let command = |options: &[&str], command: &str| {
        testbed.run_ranks(&[&["srun"], options, &[program(), command, &run.config]].concat())
    };
    let srun = |options: &[&str]| command(options, "train");
    let singletons = srun(&["--mpi=none", "-n4"]);
    assert_eq!(singletons.status.code(), Some(2), "{}", text(&singletons));
    assert!(text(&singletons).contains("use `srun --mpi=pmix`"), "{}", text(&singletons));
    let doctor = command(&["--mpi=none", "-n4"], "doctor");
    assert_eq!(doctor.status.code(), Some(2), "{}", text(&doctor));
    assert!(text(&doctor).contains("WILL FAIL        launcher"), "{}", text(&doctor));
    let cyclic = command(&["--mpi=pmix", "-N4", "-n8", "--distribution=cyclic"], "doctor");
    assert!(cyclic.status.success() && text(&cyclic).contains("--distribution=block"), "{}", text(&cyclic));
    let many = srun(&["--mpi=pmix", "-N4", "-n9"]);
    assert_eq!(many.status.code(), Some(2), "{}", text(&many));
    assert!(text(&many).contains("at most 8 can be used"), "{}", text(&many));
}

fn a_slow_network_changes_no_bit(testbed: &Testbed) {
    let run = Run::new(20);
    testbed.does(&["shape", "10ms", "100mbit"]);
    let job = run.submit(testbed, &[]);
    run.wait_for_end(testbed, &job);
    testbed.does(&["shape", "off"]);
    run.assert_same_as_alone(20);
    assert!(run.log().contains("limited by "), "{}", run.log());
}

fn videos_are_prepared_on_all_nodes_and_across_a_requeue(testbed: &Testbed) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::create_dir_all(path("videos/class")).unwrap();
    std::fs::create_dir(path("bin")).unwrap();
    // Slow, so that the job can be met half way.
    let script = "#!/bin/sh\n[ \"$1\" = -version ] || sleep 0.3\nPATH=${PATH#*:} exec ffmpeg \"$@\"\n";
    std::fs::write(path("bin/ffmpeg"), script).unwrap();
    std::fs::set_permissions(path("bin/ffmpeg"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let film =
        ["-f", "lavfi", "-i", "testsrc=size=32x24:rate=10", "-t", "1", &path("videos/class/0.mkv")].map(String::from);
    let made = Command::new("ffmpeg").args(["-nostdin", "-loglevel", "error"]).args(film).status().unwrap();
    assert!(made.success());
    for i in 1..24 {
        std::fs::copy(path("videos/class/0.mkv"), path(&format!("videos/class/{i}.mkv"))).unwrap();
    }
    let arguments = |out: &str| -> Vec<String> {
        let (videos, out) = (path("videos"), path(out));
        ["--videos", &videos, "--out", &out, "--per-shard", "4", "--short-side", "24"].map(String::from).to_vec()
    };
    let log = path("job.log");
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let wait_for = |what: &str, condition: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(90), "waited for {what}; the job's log: {}", said());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let export = format!("--export=ALL,SIDEWAYS={},PATH={}:{}", program(), path("bin"), std::env::var("PATH").unwrap());
    let options = ["--parsable", "--nodes=2", "--cpus-per-task=1", "--time=10", &format!("--output={log}"), &export];
    let job = [&["sbatch"][..], &options, &["slurm/prepare.sbatch", "--overwrite"]].concat();
    let arguments_of_job = arguments("job");
    let output = testbed.run(&[job, arguments_of_job.iter().map(String::as_str).collect()].concat());
    assert!(output.status.success(), "{}", text(&output));
    let job = String::from_utf8_lossy(&output.stdout).trim().to_string();
    let shards = |out: &str| -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(path(out)).into_iter().flatten().map(|e| e.unwrap().path());
        let mut shards: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "h5")).collect();
        shards.sort();
        let name = |p: &Path| p.file_name().unwrap().to_string_lossy().into_owned();
        shards.iter().map(|p| (name(p), std::fs::read(p).unwrap())).collect()
    };
    wait_for("a shard", &|| !shards("job").is_empty());
    let output = testbed.run(&["scancel", "--batch", "--signal=USR1", &job]);
    assert!(output.status.success(), "{}", text(&output));
    wait_for("the end", &|| said().contains("exit code"));
    assert!(
        said().contains("restart 1") && said().contains("made earlier") && said().contains("on 2 ranks"),
        "{}",
        said()
    );
    let output = Command::new(program()).args(["data", "prepare"]).args(arguments("alone")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(shards("job").len() == 6 && shards("job") == shards("alone"), "{}", said());
}

/// The datasets' guides, walked with made-up videos: shards of Kinetics-600's form, a recipe on them, UCF101's, a recipe that starts
/// from the first one's best checkpoint, and its score.
fn recipes_pretrain_and_fine_tune_from_videos(_up: &Testbed) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let walk = dir.path().join("walk");
    let script = Path::new(ROOT).join("slurm/testbed/kinetics.sh");
    let mut command = Command::new("timeout");
    command.arg("500").arg(script).arg(&walk).env("SIDEWAYS", program()).env("BATCHES", "4");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stdout);
    let count = |line: &str| said.lines().filter(|said| said.trim_start().starts_with(line)).count();
    // The traps, each where it belongs: three damaged files, one too short; a copy without times and an unfinished one.
    for line in ["train: 1849 videos listed", "missing        1800", "broken            3", "too short         1"] {
        assert!(count(line) > 0, "{line}: {said}");
    }
    assert!(
        said.contains("_tid-0003.mp4") && said.contains(".mp4.part") && said.contains("no video of 596 classes"),
        "{said}"
    );
    // Twice in pretraining and twice in fine-tuning; then the score of the test list's twelve videos.
    assert_eq!(count("validation after "), 4, "{said}");
    assert!(count("videos 12  loss ") == 1 && said.contains("10x3 views"), "{said}");
    let log = std::fs::read_to_string(walk.join("job-4.log")).unwrap();
    assert!(log.contains("from runs/kinetics600-vgg8/checkpoints/step-"), "{log}");
}

fn signals_requeue_the_job(testbed: &Testbed) {
    let run = Run::new(500);
    let job = run.submit(testbed, &[]);
    for round in 1..=2 {
        let before = run.clips_done();
        run.wait_for("some clips", || run.clips_done() > before + 30);
        let output = testbed.run(&["scancel", "--signal=USR1", &job]);
        assert!(output.status.success(), "{}", text(&output));
        run.wait_for("the restart", || run.log().contains(&format!("restart {round}")));
    }
    run.wait_for_end(testbed, &job);
    run.assert_same_as_alone(500);
}

/// Ranks that always crash as they start are started three times, and the job ends.
fn a_crash_at_the_start_is_tried_again(testbed: &Testbed) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (log, program) = (dir.path().join("job.log"), dir.path().join("crash"));
    std::fs::write(&program, "#!/bin/sh\nkill -SEGV $$\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = format!("--output={}", log.display());
    let export = format!("--export=ALL,SIDEWAYS={},NODE_WAIT=1", program.display());
    let options = ["--wait", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", &output, &export];
    let submitted = testbed.run(&[&["sbatch"][..], &options, &["slurm/train.sbatch", "config"]].concat());
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(submitted.status.code(), Some(139), "{} {said}", text(&submitted));
    assert!(said.contains("attempt 3 of 3") && !said.contains("restart 1"), "{said}");
}

/// A scaling study, submitted as a user does: one job on the largest number of nodes, stopped in the middle, gone on with.
fn a_study_goes_on_across_a_requeue(testbed: &Testbed) {
    let run = Run::new(1);
    let study = run.dir.path().join("study");
    let out = study.display().to_string();
    let export = format!("--sbatch=--export=ALL,SIDEWAYS={},SIDEWAYS_CACHE={out}-cache", program());
    let options = ["--nodes", "1,2,4", "--ranks-per-node", "2", "--repeat", "2", "--batches", "4", "--classes", "4"];
    let data = ["--set", "data.crop=8", "--set", "data.train=[]"];
    let scale = [&[program(), "scale", &run.config, "--out", &out][..], &options, &data].concat();
    let output = testbed.run(&[&scale[..], &["--dry-run"]].concat());
    assert!(output.status.success() && text(&output).contains("in one job on 4 nodes"), "{}", text(&output));
    let output = testbed.run(&[&scale[..], &[&export]].concat());
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let job = said.strip_prefix("job ").and_then(|rest| rest.split(':').next()).expect("a job's number").to_string();
    let log = || std::fs::read_to_string(study.join(format!("sideways-scale-{job}.log"))).unwrap_or_default();
    let wait_for = |what: &str, condition: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(90), "waited for {what}; the job's log: {}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for("a run", &|| study.join("points/skip-sideways-n1/run-1.json").is_file());
    let output = testbed.run(&["scancel", "--batch", "--signal=USR1", &job]);
    assert!(output.status.success(), "{}", text(&output));
    wait_for("the end", &|| log().contains("exit code 0"));
    assert!(log().contains("exit code 75") && log().contains("restart 1"), "{}", log());
    let mut table = csv::Reader::from_path(study.join("scaling.csv")).unwrap();
    let rows: Vec<std::collections::HashMap<String, String>> = table.deserialize().map(|row| row.unwrap()).collect();
    let of = |column: &str| rows.iter().map(|row| row[column].clone()).collect::<Vec<_>>();
    assert_eq!(
        (of("nodes"), of("ranks")),
        (vec!["1", "2", "4"].into_iter().map(String::from).collect(), vec!["2".into(), "4".into(), "8".into()])
    );
    assert!(of("status") == ["done"; 3] && of("runs") == ["2"; 3], "{rows:?}");
    assert!(of("job").iter().all(|jobs| *jobs == job), "{rows:?}");
    let hosts: Vec<usize> = of("node_list").iter().map(|list| list.split(' ').count()).collect();
    assert_eq!(hosts, [1, 2, 4]);
}

/// The host dies, or lives but is not reached: the job fails within its time-out, and goes on elsewhere.
fn a_lost_node_is_replaced(testbed: &Testbed, fault: &str) {
    let run = Run::new(500);
    let job = run.submit(testbed, &[]);
    run.wait_for("some clips", || run.clips_done() > 60);
    testbed.does(&[fault, "2"]);
    run.wait_for("the restart", || run.log().contains("restart 1"));
    run.wait_for_end(testbed, &job);
    run.assert_same_as_alone(500);
    testbed.does(&["heal", "2"]);
    run.wait_for("the host's return", || {
        let idle = testbed.run(&["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]);
        String::from_utf8_lossy(&idle.stdout).lines().count() == 5
    });
}
