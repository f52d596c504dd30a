//! Plans as users meet them: an open cut in training, kept times, and the benchmarks that predictions are compared with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sideways::checkpoint::newest_manifest;

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
    kept.iter().for_each(|file| std::fs::write(file, "{").unwrap());
    let (text, log) = plan(&[]);
    assert!(text.contains("; measured now (") && log.contains("not a profile"), "{text}{log}");
    assert!(plan(&[]).0.contains("; measured 0 min ago ("));
    // JSON says the same.
    let json: serde_json::Value = serde_json::from_str(&plan(&["--json"]).0).unwrap();
    let cuts: Vec<String> = json["cuts"].as_array().unwrap().iter().map(|c| c.to_string()).collect();
    assert!(text.contains(&format!("model.cuts = [{}]", cuts.join(", "))), "{text}");
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
    let lines: Vec<serde_json::Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, threads) in lines.iter().zip(1u64..) {
        assert_eq!(line["threads"].as_u64(), Some(threads));
        assert_eq!(line["layers"].as_array().unwrap().len(), 11);
        // 8x8x3 to 4x4x4 by 3x3, two clips: two operations a multiply-add.
        assert_eq!(line["layers"][0]["forward"]["flops"].as_f64(), Some((2 * 2 * 4 * 4 * 4 * 27) as f64));
        assert_eq!(line["modules"].as_array().unwrap().len(), 5);
    }
}
