//! What is not training: evaluation, prediction, fidelity of gradients. Each computes on the GPU, says so, and finds what the CPU
//! does.

use serde_json::Value;

use crate::common::cuda::{Place, real};
use crate::common::mpirun::text;

const CUDA: &str = "run.device=cuda";
const CPU: &str = "run.device=cpu";
const AUTO: &str = "run.device=auto";
const SKIPS: &str = "model.skip={ spans = [2, 3] }";
const GENTLE: &str = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9 }";
const FUTURE: [&str; 4] = [
    "model.task=future-frames",
    "model.layers=[{ kind = 'conv2d', out = 6, kernel = 3, padding = 1 }, { kind = 'relu' }, \
     { kind = 'conv2d', out = 6, kernel = 3, padding = 1 }, { kind = 'relu' }, { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]",
    "model.modules=3",
    "train.rule=sideways",
];

/// What a command says as JSON on the CPU, and on the GPU, where it must have computed: it says so, and the emulator has launched its
/// passes.
fn on_both(place: &Place, args: &[&str]) -> (Value, Value) {
    let set = |device| [args, &["--json", "--set", device]].concat();
    let (cpu, log, counts) = place.counted(&set(CPU));
    assert!(!log.contains("computes on GPU") && counts.is_empty(), "{counts:?} {log}");
    let (gpu, log, counts) = place.counted(&set(CUDA));
    assert!(log.contains("module 1 computes on GPU 0"), "{log}");
    assert!(real() || counts["convolution"] > 0 && counts["graph_launch"] > 100, "{counts:?}");
    // Left open, it is the GPU.
    let (auto, log) = place.json(&set(AUTO), &[]);
    assert!(auto == gpu && log.contains("module 1 computes on GPU 0"), "{auto} {gpu} {log}");
    (cpu, gpu)
}

/// Numbers at `key` that are the same to `tolerance` of the CPU's, but were summed in another order.
fn assert_near(cpu: &Value, gpu: &Value, key: &str, tolerance: f64) {
    let (a, b) = (cpu[key].as_f64().unwrap(), gpu[key].as_f64().unwrap());
    assert!((a - b).abs() <= tolerance * a.abs(), "{key}: {a} on the CPU, {b} on the GPU");
}

fn trained(sets: &[&str]) -> (Place, String) {
    let place = Place::new(&[sets, &[GENTLE, CUDA]].concat());
    place.trained("run", 0, &[], &[]);
    let run = place.at("run").display().to_string();
    (place, run)
}

/// Scores of every video, in one view or several, of the parameters or of their moving average.
#[test]
fn evaluation_agrees() {
    let (place, run) = trained(&["data.batch=5", SKIPS, "train.ema=0.9", "data.crop=6"]);
    for views in [&[][..], &["--views", "2x1"], &["--views", "2x1", "--raw"]] {
        let (cpu, gpu) = on_both(&place, &[&["eval", run.as_str()], views].concat());
        assert_eq!((gpu["clips"].as_u64(), gpu["videos"].as_u64()), (cpu["clips"].as_u64(), Some(12)), "{gpu}");
        for key in ["top1", "top5"] {
            assert!(cpu[key].is_number() && cpu[key] == gpu[key], "{key}: {cpu} {gpu}");
        }
        assert_near(&cpu, &gpu, "loss", 1e-4);
        let scores = |device: &str| -> Vec<f64> {
            let file = place.at("scores.csv");
            let args = ["eval", &run, "--scores", file.to_str().unwrap(), "--set", device];
            let output = place.run(0, &[&args[..], views].concat(), &[]);
            assert!(output.status.success(), "{}", text(&output));
            let text = std::fs::read_to_string(file).unwrap();
            let rows = text.lines().skip(1).map(|line| line.split(',').skip(3));
            rows.flat_map(|row| row.map(|word| word.parse::<f64>().unwrap())).collect()
        };
        let (cpu, gpu) = (scores(CPU), scores(CUDA));
        assert_eq!((cpu.len(), gpu.len()), (12 * 4, 12 * 4));
        assert!(cpu.iter().zip(&gpu).all(|(a, b)| (a - b).abs() < 1e-4) && cpu != gpu, "{cpu:?} {gpu:?}");
    }
}

/// Errors of future frames, and the pictures.
#[test]
fn prediction_agrees() {
    let (place, run) = trained(&FUTURE);
    let out = ["cpu", "gpu"].map(|name| place.at(name).display().to_string());
    let (cpu, gpu) = on_both(&place, &["predict", &run, "--clips", "2", "--out", &out[1]]);
    for key in ["mse", "psnr"] {
        assert_near(&cpu, &gpu, key, 1e-4);
    }
    assert_eq!(cpu["copy_mse"], gpu["copy_mse"]);
    place.json(&["predict", &run, "--clips", "2", "--out", &out[0], "--json", "--set", CPU], &[]);
    for name in ["clip-0000.png", "clip-0001.png"] {
        let [cpu, gpu] = out.each_ref().map(|folder| picture(&std::path::Path::new(folder).join(name)));
        assert!(!cpu.is_empty() && cpu.len() == gpu.len(), "{name}");
        // A pixel may be rounded the other way.
        assert!(cpu.iter().zip(&gpu).all(|(a, b)| a.abs_diff(*b) <= 1), "{name}");
    }
}

fn picture(path: &std::path::Path) -> Vec<u8> {
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut bytes).unwrap();
    bytes
}

/// Gradients by every rule beside the exact ones, of a configuration and of a checkpoint.
#[test]
fn fidelity_agrees() {
    let (place, run) = trained(&[SKIPS]);
    let config = place.config.clone();
    for (of, rules, count) in [(config.as_str(), "sideways,stash", 2), (run.as_str(), "skip-sideways", 1)] {
        let (cpu, gpu) = on_both(&place, &["fidelity", of, "--batches", "1", "--rules", rules]);
        assert_eq!(cpu["device"], "the CPU");
        assert!(gpu["device"].as_str().unwrap().starts_with("GPU 0 ("), "{gpu}");
        let (cpu, gpu) = (cpu["rows"].as_array().unwrap(), gpu["rows"].as_array().unwrap());
        assert_eq!((cpu.len(), gpu.len()), (5 * count, 5 * count));
        for (a, b) in cpu.iter().zip(gpu) {
            assert!(a["rule"] == b["rule"] && a["module"] == b["module"], "{a} {b}");
            for key in ["cosine", "norm_ratio"] {
                assert_near(&a[key], &b[key], "mean", 1e-3);
            }
            let error = |row: &Value| row["relative_error"]["mean"].as_f64().unwrap();
            assert!((error(a) - error(b)).abs() < 1e-3, "{a} {b}");
        }
        assert!(cpu != gpu, "{of}: it did not compute on the GPU");
    }
    let output = place.run(0, &["fidelity", &config, "--batches", "1"], &[]);
    assert!(text(&output).contains("on GPU 0 (") && text(&output).contains("in 32-bit floats"), "{}", text(&output));
    // Modules are made for every pass, and named once.
    let said = text(&output);
    let named: Vec<&str> = said.lines().filter(|line| line.contains(" computes on GPU ")).collect();
    let different: std::collections::HashSet<&&str> = named.iter().collect();
    assert!(named.len() >= 5 && named.len() == different.len(), "{said}");
}

/// Whoever leaves the choice open is told where it fell on the CPU though there are GPUs, and else on what modules compute.
#[test]
fn nothing_falls_back_in_silence() {
    if real() {
        eprintln!("not on a real GPU: the emulator shows some ranks none");
        return;
    }
    let place = Place::new(&["train.batches=1"]);
    let none = place.train("none", 0, &[AUTO], &[("SIDEWAYS_EMULATOR_DEVICES", "0")]);
    assert!(none.status.success() && text(&none).contains("modules compute on the CPU: "), "{}", text(&none));
    let seen = place.train("seen", 0, &[AUTO], &[]);
    assert!(seen.status.success() && !text(&seen).contains("compute on the CPU"), "{}", text(&seen));
    // Rank 1 sees none, so that rank 0's stays idle.
    let program = crate::common::cuda::program();
    let run = format!("run.dir={}", place.at("some").display());
    let script = format!(
        "if [ \"$OMPI_COMM_WORLD_RANK\" = 1 ]; then export SIDEWAYS_EMULATOR_DEVICES=0; fi; exec '{program}' train '{}' --set '{run}'",
        place.config
    );
    let env = crate::common::cuda::environment(&[]);
    let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let minute = crate::common::program::MINUTE;
    let some = crate::common::mpirun::mpirun(2, std::path::Path::new("sh"), &["-c", &script], &env, minute);
    let said = text(&some);
    assert!(some.status.success() && said.contains("GPUs stay idle") && said.contains("rank 1 on "), "{said}");
    assert!(said.contains("modules compute on the CPU: ") && !said.contains("computes on GPU"), "{said}");
}
