//! No number, however large, ends in a panic or an abort: every numeric key of a configuration and every numeric option of the
//! command line, with what is at the edge of its type.

use std::time::{Duration, Instant};

use crate::common::jobs::Run;
use crate::common::mpirun::text;
use crate::common::program::{PROGRAM, alone};
use sideways::config::Config;
use sideways::setup::{Purpose, Setup};

const WHOLE: [&str; 9] = [
    "0",
    "1",
    "-1",
    "65537",
    "4294967296",
    "4503599627370497",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
];
const REAL: [&str; 8] = ["0.0", "-1.0", "1e-300", "1e300", "1.7976931348623157e308", "nan", "inf", "1"];

/// The paths of all numbers in a table, with a value for each: whole numbers or floats.
fn numbers(table: &toml::Table, path: &str, found: &mut Vec<(String, bool)>) {
    for (key, value) in table {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            toml::Value::Integer(_) => found.push((path, true)),
            toml::Value::Float(_) => found.push((path, false)),
            toml::Value::Array(list) if list.iter().all(toml::Value::is_float) && !list.is_empty() => {
                found.push((path, false));
            }
            toml::Value::Table(table) => numbers(table, &path, found),
            _ => {}
        }
    }
}

/// Plans the run and reads its first frames' geometry, as every start of training does.
fn planned(config: &str, set: &[String]) -> Result<(), String> {
    let plan = || -> sideways::Result<()> {
        let config = Config::load(std::path::Path::new(config), set)?;
        config.validate()?;
        for purpose in [Purpose::Train, Purpose::Evaluate] {
            let setup = Setup::new(&config, 1, purpose)?;
            setup.total_batches()?;
            setup.warnings();
            for w in 0..setup.grid.workers().min(64) {
                sideways::setup::footprint::memory(&setup, w);
                sideways::setup::footprint::gpu_memory(&setup, w, 2);
            }
        }
        Setup::dry(&config, 1).map(drop)
    };
    plan().map_err(|error| {
        assert_eq!(error.exit_code(), 2, "{set:?}: {error}");
        error.to_string()
    })
}

#[test]
fn every_numeric_key_at_its_edges_is_taken_or_refused() {
    let run = Run::new(&[
        "train.batches=6",
        "data.mixup=0.2",
        "train.ema=0.9",
        "train.scale_lr=16",
        "data.crop=8",
        "data.crop_scale=[0.5, 1.0]",
    ]);
    let test = format!("data.test={}/train.h5", run.dir.path().display());
    let text = std::fs::read_to_string(&run.config).unwrap();
    let mut keys = Vec::new();
    numbers(&text.parse().unwrap(), "", &mut keys);
    // Those that defaults leave out, and other kinds' settings.
    let more = ["model.classes", "train.update_every", "train.lr_depth", "train.clip_norm", "train.epochs"];
    keys.extend(more.map(|key| (key.to_string(), true)));
    assert!(keys.len() > 35, "{keys:?}");
    let mut refused = 0;
    for (key, whole) in &keys {
        for value in if *whole { &WHOLE[..] } else { &REAL[..] } {
            let list = [
                ("data.mean", 3),
                ("data.std", 3),
                ("data.crop_scale", 2),
                ("data.crop_ratio", 2),
                ("train.optimizer.betas", 2),
            ];
            let value = match list.iter().find(|(list, _)| list == key) {
                Some((_, n)) => format!("[{}]", vec![*value; *n].join(", ")),
                None => value.to_string(),
            };
            let begun = Instant::now();
            refused += usize::from(planned(&run.config, &[test.clone(), format!("{key}={value}")]).is_err());
            assert!(begun.elapsed() < Duration::from_secs(10), "{key}={value} took {:?}", begun.elapsed());
        }
    }
    assert!(refused > keys.len(), "{refused} values of {} keys were refused", keys.len());
}

#[test]
fn every_number_of_a_layer_at_its_edges_is_taken_or_refused() {
    let run = Run::new(&["train.batches=6"]);
    let test = format!("data.test={}/train.h5", run.dir.path().display());
    let layers = [
        ("conv2d", "out = N, kernel = 3"),
        ("conv2d", "out = 4, kernel = N"),
        ("conv2d", "out = 4, kernel = 3, stride = N"),
        ("conv2d", "out = 4, kernel = 3, padding = N"),
        ("conv2d", "out = N, kernel = 3, groups = 3"),
        ("conv2d", "out = 3, kernel = 3, groups = N"),
        ("group-norm", "groups = N"),
        ("max-pool", "kernel = N"),
        ("max-pool", "kernel = 2, stride = N"),
        ("avg-pool", "kernel = 3, padding = N"),
        ("upsample", "factor = N"),
        ("residual", "out = N, groups = 1"),
        ("residual", "out = 4, stride = N, groups = 1, block = 'bottleneck'"),
        ("residual", "out = 4, groups = N"),
        ("linear", "out = N"),
    ];
    for (kind, rest) in layers {
        for n in &WHOLE[..8] {
            let layer = format!("{{ kind = '{kind}', {} }}", rest.replace('N', n));
            // Twice, so that large outputs meet a layer with weights.
            let list = format!(
                "model.layers=[{layer}, {{ kind = 'conv2d', out = 4, kernel = 1 }}, {{ kind = 'global-avg-pool' }}, {{ kind = 'linear', out = 4 }}]"
            );
            let sets =
                [test.clone(), list, "model.modules=1".into(), "model.skip={}".into(), "train.rule=sideways".into()];
            let _ = planned(&run.config, &sets);
        }
    }
    for n in &WHOLE[..8] {
        for skip in [
            format!("spans = [{n}]"),
            format!("edges = [[{n}, 3]]"),
            format!("edges = [[1, {n}]]"),
            format!("edges = [[1, 3]], delay = {n}"),
        ] {
            let _ = planned(&run.config, &[test.clone(), format!("model.skip={{ {skip} }}")]);
        }
        let _ = planned(&run.config, &[test.clone(), format!("model.cuts=[{n}]")]);
        let _ = planned(&run.config, &[test.clone(), format!("train.freeze=[{n}]")]);
    }
}

/// As users meet it: the program's own end, with its message.
#[test]
fn large_numbers_end_with_a_message_and_the_code_for_bad_input() {
    let run = Run::new(&["train.batches=6"]);
    let most = i64::MAX.to_string();
    let keys = [
        "data.batch",
        "data.stride",
        "data.frames",
        "data.prefetch",
        "data.decode_threads",
        "train.epochs",
        "run.threads",
        "run.timeout",
    ];
    for key in keys {
        let output = alone(&["train", &run.config, "--set", &format!("{key}={most}")]);
        let said = text(&output);
        assert!(output.status.code() == Some(2) && said.contains(key) && said.contains("at most"), "{key}: {said}");
    }
    let seed = alone(&["train", &run.config, "--set", "train.seed=9223372036854775808"]);
    let said = text(&seed);
    assert!(seed.status.code() == Some(2) && said.contains("a whole number is") && !said.contains("string"), "{said}");
    assert!(alone(&["train", &run.config, "--set", &format!("train.seed={most}"), "--dry-run"]).status.success());
    let text_of = std::fs::read_to_string(&run.config).unwrap().replace("seed = 1\n", "seed = 9223372036854775808\n");
    std::fs::write(&run.config, text_of).unwrap();
    let said = text(&alone(&["train", &run.config, "--dry-run"]));
    assert!(said.contains("seed = 9223372036854775808") && !said.contains("string"), "{said}");
}

/// Every option that takes a number, at the edges of its type.
#[test]
fn options_at_their_edges_end_with_a_message() {
    let run = Run::new(&["train.batches=2", "model.skip={}", "run.checkpoint_every=2"]);
    assert!(alone(&["train", &run.config]).status.success());
    let (shard, folder) = (run.dir.path().join("train.h5").display().to_string(), run.folder().display().to_string());
    let out = run.dir.path().join("out").display().to_string();
    let png = run.dir.path().join("sheet.png").display().to_string();
    let data = ["--data", &shard];
    let prepare = ["data", "prepare", "--videos", &out, "--out", &out];
    let synth = ["data", "synth", "--out", &out, "--test-videos", "1"];
    let inspect = ["data", "inspect", &shard, "--sheet", &png];
    let eval = [&["eval", &folder][..], &data].concat();
    let made_up = ["--set", "data.crop=8", "--set", "model.classes=4"];
    let plan = [&["plan", &run.config, "--rate", "1e12"][..], &made_up].concat();
    let study = |more: &'static [&'static str]| {
        [&["scale", &run.config, "--dry-run", "--out", &out][..], &made_up, more].concat()
    };
    let (over_nodes, on_one) = (study(&["--rules", "1f1b"]), study(&["--nodes", "1"]));
    let options: [(&[&str], &[&str]); 11] = [
        (&plan, &["--ranks", "--cores", "--videos", "--rate", "--ticks --clips", "--scale 1..N", "--scale N..16"]),
        (&over_nodes, &["--nodes", "--axis weak --nodes"]),
        (
            &on_one,
            &["--ranks-per-node", "--axis weak --ranks-per-node", "--repeat", "--batches", "--limit", "--classes"],
        ),
        (&["train", &run.config, "--dry-run"], &["--ranks", "--stop-after"]),
        (&eval, &["--views Nx1", "--views Nx3"]),
        (&inspect, &["--rows", "--columns"]),
        (
            &prepare,
            &[
                "--jobs",
                "--short-side",
                "--width",
                "--fps",
                "--max-seconds",
                "--min-frames",
                "--time-limit",
                "--per-shard",
                "--seed",
                "--quality",
                "--aspect N:1",
                "--aspect 1:N",
                "--test-fraction",
            ],
        ),
        (
            &synth,
            &[
                "--videos",
                "--frames",
                "--size",
                "--speed",
                "--shapes",
                "--radius",
                "--texture",
                "--camera",
                "--noise",
                "--per-shard",
                "--seed",
            ],
        ),
        (&["bench", "overlap"], &["--workers", "--ticks", "--bytes", "--compute-ms"]),
        (&["bench", "data", &shard], &["--crop", "--frames", "--batch", "--prefetch", "--threads", "--seconds"]),
        (&["fidelity", &run.config, "--batches", "1"], &["--strides"]),
    ];
    for (command, options) in options {
        for option in options {
            for n in ["9223372036854775807", "18446744073709551615", "99999999999999999999999", "1e300", "nan", "-1"] {
                let (before, option) =
                    option.rsplit_once(" --").map_or(("", *option), |(a, _)| (a, &option[a.len() + 1..]));
                let (name, value) = option.split_once(' ').unwrap_or((option, "N"));
                let argument = format!("{name}={}", value.replace('N', n));
                let mut limited = std::process::Command::new("timeout");
                let output = limited
                    .args(["20", PROGRAM])
                    .args(command)
                    .args(before.split_whitespace())
                    .arg(&argument)
                    .output()
                    .unwrap();
                let said = text(&output);
                assert!(matches!(output.status.code(), Some(0 | 2)), "{command:?} {argument}: {said}");
                assert!(!said.contains("panicked"), "{command:?} {argument}: {said}");
            }
        }
    }
}
