//! The configurations in `datasets/`: each can be planned on the ranks that its guide names, and trains.

use std::path::{Path, PathBuf};

use crate::common::mpirun::text;
use crate::common::program::alone;

/// Every recipe, by kind.
fn recipes(kind: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets");
    let folders = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let files = folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
    let is_one = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with(kind) && name.ends_with(".toml")
    };
    let mut found: Vec<PathBuf> = files.filter(is_one).collect();
    found.sort();
    found
}

/// The ranks of the `sbatch` line that a folder's guide gives for `recipe`.
fn ranks_of(recipe: &Path) -> usize {
    let guide = std::fs::read_to_string(recipe.with_file_name("README.md")).unwrap();
    let name = format!("/{}", recipe.file_name().unwrap().to_string_lossy());
    let line = guide.lines().find(|line| line.contains("sbatch ") && line.contains(&name));
    let line = line.unwrap_or_else(|| panic!("{name}: no sbatch line in its README.md"));
    let number = |key: &str| -> usize {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(key));
        value.unwrap_or_else(|| panic!("{key} in {line}")).parse().unwrap()
    };
    assert_eq!(number("--gpus-per-node="), number("--ntasks-per-node="), "{line}");
    number("--nodes=") * number("--ntasks-per-node=")
}

/// Plans `recipe` as it stands, with stash and by the paper's rule; the cut's predicted efficiency is at least `least`.
fn plans(recipe: &Path, least: f64) {
    let (path, ranks) = (recipe.to_str().unwrap(), ranks_of(recipe).to_string());
    for stash in ["activations", "none"] {
        let stash = format!("train.stash={stash}");
        let output = alone(&["train", path, "--dry-run", "--ranks", &ranks, "--set", &stash]);
        assert!(output.status.success(), "{path}: {}", text(&output));
        let output = alone(&["plan", path, "--ranks", &ranks, "--rate", "100e12", "--json", "--set", &stash]);
        let plan: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
        let efficiency = plan["efficiency"].as_f64().unwrap();
        assert!(efficiency >= least, "{path}: {efficiency}");
        assert_eq!(plan["modules"].as_array().unwrap().len().to_string(), ranks, "{path}: a module a rank");
    }
}

/// Trains two batches of small made-up clips, and returns the run's folder.
fn trains(recipe: &Path, place: &Path, more: &[&str]) -> PathBuf {
    let name = recipe.file_stem().unwrap().to_string_lossy();
    let data = place.join("data");
    if !data.exists() {
        let made = [
            "--videos",
            "12",
            "--test-videos",
            "4",
            "--frames",
            "24",
            "--size",
            "40",
            "--shapes",
            "2",
            "--radius",
            "5",
        ];
        let output = alone(&[&["data", "synth", "--out", data.to_str().unwrap()], &made[..]].concat());
        assert!(output.status.success(), "{}", text(&output));
    }
    let run = place.join(format!("{name}-{}", more.len()));
    let sets = [
        format!("data.train={}/train-*.h5", data.display()),
        format!("data.test={}/test-*.h5", data.display()),
        format!("run.dir={}", run.display()),
        "run.device=cpu".into(),
        "run.precision=f32".into(),
        "data.crop=32".into(),
        "data.batch=2".into(),
        // Long enough for a gradient to reach the first of the modules.
        format!("data.frames={}", (2 * ranks_of(recipe)).max(18)),
        "data.decode_threads=1".into(),
        "train.batches=2".into(),
        "train.validate_every=2".into(),
    ];
    let sets = sets.iter().map(String::as_str).chain(more.iter().copied()).flat_map(|set| ["--set", set]);
    let output = alone(&["train", recipe.to_str().unwrap()].into_iter().chain(sets).collect::<Vec<_>>());
    assert!(output.status.success(), "{name}: {}", text(&output));
    assert!(text(&output).contains("validation after 2 batches"), "{name}: {}", text(&output));
    run
}

/// Pretraining, and then fine-tuning from where it ended, on other classes.
#[test]
fn recipes_of_recognition_plan_and_train() {
    let dir = tempfile::tempdir().unwrap();
    let (first, then) = (recipes("pretrain-"), recipes("finetune-"));
    assert!(first.len() >= 3 && then.len() >= 4, "{first:?} {then:?}");
    for recipe in first {
        // VGG-8's layers are few and unlike.
        plans(&recipe, if recipe.ends_with("pretrain-vgg8.toml") { 0.79 } else { 0.84 });
        let run = trains(&recipe, dir.path(), &["model.classes=8"]);
        let name = recipe.file_name().unwrap().to_string_lossy().replace("pretrain", "finetune");
        for recipe in then.iter().filter(|path| path.file_name().unwrap().to_string_lossy() == name) {
            plans(recipe, 0.79);
            let init = format!("train.init={}", run.join("best").display());
            let place = dir.path().join(recipe.parent().unwrap().file_name().unwrap());
            std::fs::create_dir_all(&place).unwrap();
            trains(recipe, &place, &["model.classes=8", &init]);
        }
    }
}

#[test]
fn recipes_of_future_frames_plan_and_train() {
    let dir = tempfile::tempdir().unwrap();
    let all = recipes("future-");
    assert!(!all.is_empty());
    for recipe in all {
        plans(&recipe, 0.7);
        trains(&recipe, dir.path(), &[]);
    }
}
