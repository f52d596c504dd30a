//! Benchmarks and plans on a GPU, or on the emulator (tests/cuda-emulator): they run, add up, and say clearly what cannot be.

use std::path::Path;
use std::process::{Command, Output};

use crate::common::cuda::{environment, program, real};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::MINUTE;
use serde_json::Value;

fn run(ranks: usize, args: &[&str], more: &[(&str, &str)]) -> Output {
    let env = environment(&[more, &[("SIDEWAYS_CACHE", "off")]].concat());
    if ranks == 0 {
        return Command::new(program()).args(args).envs(env).output().unwrap();
    }
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    mpirun(ranks, Path::new(program()), args, &env, MINUTE)
}

fn succeeds(ranks: usize, args: &[&str]) -> String {
    let output = run(ranks, args, &[]);
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&succeeds(0, args)).unwrap()
}

/// A small network in three modules.
fn configuration() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let toml = "[data]\ncrop = 12\nframes = 6\nbatch = 2\n[model]\nclasses = 4\nmodules = 3\nlayers = [\
        { kind = 'conv2d', out = 8, kernel = 3, padding = 1 }, { kind = 'group-norm', groups = 4 }, { kind = 'relu' }, \
        { kind = 'residual', out = 8, groups = 4 }, { kind = 'max-pool', kernel = 2 }, { kind = 'conv2d', out = 8, kernel = 3 }, \
        { kind = 'relu' }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]\n[run]\ndevice = 'cuda'\n";
    std::fs::write(&path, toml).unwrap();
    (dir, path.display().to_string())
}

/// All numbers of an array of JSON at `key` of its elements.
fn numbers(rows: &Value, key: &str) -> Vec<f64> {
    rows.as_array().unwrap().iter().map(|row| row[key].as_f64().unwrap()).collect()
}

/// Every layer has its times, launched and as a graph, and every module its tick and its memory, near what was predicted.
#[test]
fn layers_and_ticks() {
    let (_dir, config) = configuration();
    for precision in ["f32", "bf16"] {
        let set = format!("run.precision={precision}");
        let found = json(&["bench", "layers", &config, "--json", "--set", &set]);
        assert_eq!(found["gpu"]["precision"], precision);
        for peak in ["memory", "f32", "tf32", "bf16", "to_device", "to_host"] {
            assert!(found["peaks"][peak].as_f64().unwrap() > 0.0, "{peak}: {found}");
        }
        for table in ["launches", "graphs"] {
            let rows = found[table].as_array().unwrap();
            // 9 layers and the two convolutions of the residual block.
            assert_eq!(rows.len(), 11);
            assert!(rows.iter().all(|row| row["forward"]["seconds"].as_f64().unwrap() > 0.0), "{found}");
        }
        assert_eq!(found["ticks"].as_array().unwrap().len(), 3);
        for key in ["launches", "graphs", "allocated", "predicted"] {
            assert_eq!(numbers(&found["ticks"], key).len(), 3, "{key}: {found}");
        }
        for ((launches, graphs), (allocated, predicted)) in numbers(&found["ticks"], "launches")
            .into_iter()
            .zip(numbers(&found["ticks"], "graphs"))
            .zip(numbers(&found["ticks"], "allocated").into_iter().zip(numbers(&found["ticks"], "predicted")))
        {
            assert!(launches > 0.0 && graphs > 0.0);
            eprintln!("{allocated} bytes allocated, {predicted} predicted");
            assert!(
                allocated > 0.3 * predicted && allocated < 2.0 * predicted,
                "{allocated} bytes allocated, {predicted} predicted"
            );
        }
    }
}

/// A plan is made of times on the GPU, with the GPU's memory; without a GPU it says so.
#[test]
fn plans() {
    let (_dir, config) = configuration();
    let set = ["--set", "run.precision=bf16"];
    let plan = json(&[&["plan", config.as_str(), "--json"], &set[..]].concat());
    assert_eq!((&plan["gpu"]["precision"], &plan["busy"]), (&"bf16".into(), &1.into()));
    assert!(plan["gpu"]["name"].as_str().is_some_and(|name| !name.is_empty()));
    let forward = numbers(&plan["modules"], "forward_seconds");
    assert!(forward.len() == 3 && forward.iter().all(|&seconds| seconds > 0.0), "{forward:?}");
    let float = json(&["plan", &config, "--json"]);
    let memory = |plan: &Value| numbers(&plan["modules"], "memory_bytes").iter().sum::<f64>();
    assert!(memory(&plan) < memory(&float), "bfloat16 takes as much memory as float32");
    // Where nothing says where to cut, the times do.
    let open = std::fs::read_to_string(&config).unwrap().replace("modules = 3\n", "");
    std::fs::write(&config, open).unwrap();
    let open = json(&["plan", &config, "--json", "--ranks", "2"]);
    assert_eq!((&open["origin"], open["modules"].as_array().unwrap().len()), (&"measured".into(), 2));
    if !real() {
        let none = run(0, &["plan", &config], &[("SIDEWAYS_EMULATOR_DEVICES", "0")]);
        assert_eq!(none.status.code(), Some(2), "{}", text(&none));
        assert!(text(&none).contains("has no GPU"), "{}", text(&none));
    }
}

/// Training on made-up frames says on what, and how fast.
#[test]
fn training_on_made_up_frames() {
    let (_dir, config) = configuration();
    let found = json(&["bench", "train", &config, "--json", "--batches", "1", "--set", "model.skip={ spans = [2] }"]);
    assert!(found["frames_per_second"].as_f64().unwrap() > 0.0 && found["gpu"]["name"].is_string(), "{found}");
    assert!(found["predicted_tick_ms"].as_f64().unwrap() > 0.0);
    assert!(succeeds(2, &["bench", "train", &config, "--batches", "1"]).contains("modules on "));
}

/// With replicas it says what of averaging gradients is not hidden.
#[test]
fn training_of_replicas() {
    let (_dir, config) = configuration();
    let args = ["bench", "train", &config, "--batches", "1", "--no-prediction", "--set", "train.replicas=2"];
    let found = json(&[&args[..], &["--json"]].concat());
    let exposed: Vec<f64> = found["all_reduce_ms"].as_array().unwrap().iter().map(|ms| ms.as_f64().unwrap()).collect();
    // A module whose messages all come while it computes has none.
    let tick = found["tick_ms"].as_f64().unwrap();
    assert!(exposed.len() == 6 && exposed.iter().all(|&ms| (0.0..tick).contains(&ms)), "{found}");
    assert!(exposed.iter().any(|&ms| ms > 0.0), "{found}");
    assert!(succeeds(2, &args).contains("averaging gradients, not hidden: "));
}

/// Device arrays over links between threads and ranks; modules that wait on the GPU take as long as they wait.
#[test]
fn links_and_overlap() {
    for ranks in [0, 2] {
        // The emulator's memory is every MPI library's.
        let claim: &[(&str, &str)] = if real() { &[] } else { &[("SIDEWAYS_MPI_CUDA", "1")] };
        let args = ["bench", "link", "--device", "cuda", "--from", "64KiB", "--to", "64KiB", "--repeat", "1"];
        let output = run(ranks, &args, claim);
        assert!(output.status.success(), "{}", text(&output));
        let link = String::from_utf8(output.stdout).unwrap();
        let rows: Vec<&str> = link.lines().filter(|line| line.contains("KiB |")).collect();
        assert_eq!(rows.len(), 1, "{link}");
        for row in rows {
            // Times staged, into the receiver's memory, and by MPI, which carries nothing within a process.
            let first = |part: &str| part.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
            let ways: Vec<Option<f64>> = row.split('|').skip(2).map(first).collect();
            assert!(ways[0] > Some(0.0) && (ways[1] > Some(0.0) || real()), "{link}");
            assert!(ranks == 2 || ways[2].is_none(), "{link}");
            assert!(ranks == 0 || ways[2] > Some(0.0) || real(), "{link}");
        }
        let workers: &[&str] = if ranks == 0 { &["--workers", "2"] } else { &[] };
        let args = ["bench", "overlap", "--device", "cuda", "--compute-ms", "5", "--ticks", "10", "--bytes", "64KiB"];
        let overlap = succeeds(ranks, &[&args[..], workers].concat());
        let rows: Vec<Vec<f64>> = overlap
            .lines()
            .filter(|line| line.starts_with("worker "))
            .map(|line| line.split_whitespace().skip(2).filter_map(|word| word.parse().ok()).collect())
            .collect();
        assert_eq!(rows.len(), 2, "{overlap}");
        // Two waits of 5 ms a tick, and no tick of the last module, which has both at every step, is shorter than them.
        assert!(rows.iter().all(|row| row[1] >= 10.0) && rows[1][0] > 9.9, "{overlap}");
    }
    let ways = [
        &["--stash", "activations"][..],
        &["--rule", "skip-sideways", "--spans", "2", "--stash", "activations"],
        &["--rule", "1f1b", "--spans", "2"],
    ];
    for way in ways {
        let args = [
            "bench",
            "overlap",
            "--device",
            "cuda",
            "--compute-ms",
            "5",
            "--ticks",
            "10",
            "--bytes",
            "16KiB",
            "--json",
        ];
        let found: Value = serde_json::from_str(&succeeds(0, &[&args[..], &["--workers", "3"], way].concat())).unwrap();
        let ticks = numbers(&found["workers"], "tick_ms");
        assert!(
            ticks.len() == 3 && ticks.iter().all(|&ms| ms > 9.9) && found["simulated_tick_ms"].as_f64() > Some(9.9),
            "{found}"
        );
    }
    let inputs = run(0, &["bench", "overlap", "--device", "cuda", "--stash", "inputs", "--workers", "2"], &[]);
    assert!(inputs.status.code() == Some(2) && text(&inputs).contains("--stash inputs"), "{}", text(&inputs));
    let busy = run(0, &["bench", "overlap", "--device", "cuda", "--busy", "--workers", "2"], &[]);
    assert_eq!(busy.status.code(), Some(2), "{}", text(&busy));
    assert!(text(&busy).contains("--busy"), "{}", text(&busy));
}
