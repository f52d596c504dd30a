//! Messages between modules on GPUs: whichever way they go, the results are the same; and what happens where a way does not
//! work, or a rank is lost.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::cuda::{Place, environment, program, real};
use crate::common::mpirun::{mpirun, text};
use crate::common::program::MINUTE;
use crate::common::runs::tensors;
use crate::common::skip_unless_ci;

const CUDA: &str = "run.device=cuda";
const SKIPS: &str = "model.skip={ spans = [2, 3] }";
const STAGED: &str = "run.exchange=staged";
const PEER: &str = "run.exchange=peer";
const AWARE: &str = "run.exchange=cuda-aware";
/// Says that MPI works on GPU memory: on the emulator's, which is ordinary memory, every library does.
const MPI: (&str, &str) = ("SIDEWAYS_MPI_CUDA", "1");
const HALF: &str = "run.wire=bf16";
/// Copies and kernels that take their time, each another.
const LATE: [(&str, &str); 3] =
    [("SIDEWAYS_EMULATOR_COPY_DELAY_US", "200"), ("SIDEWAYS_EMULATOR_JITTER_US", "400"), MPI];

/// The ways there are between ranks here.
fn ways() -> &'static [&'static str] {
    if real() { &[STAGED, PEER] } else { &[STAGED, PEER, AWARE] }
}

/// Skips with averaging, replicas, both wires, one process and several.
#[test]
fn every_exchange_gives_the_same_bits() {
    for (sets, ranks) in [
        (&[SKIPS][..], &[2, 5][..]),
        (&[SKIPS, HALF], &[5]),
        (&["train.replicas=2", "model.modules=2", "train.rule=sideways"], &[4]),
    ] {
        let place = Place::new(&[sets, &[CUDA, "train.batches=2"]].concat());
        let staged = place.trained("staged", 0, &[STAGED], &LATE);
        for exchange in [PEER, "run.exchange=auto"] {
            assert!(place.trained(exchange, 0, &[exchange], &LATE) == staged, "{sets:?} {exchange} in one process");
        }
        for &ranks in ranks {
            for exchange in ways() {
                let run = place.trained(&format!("{exchange}-{ranks}"), ranks, &[exchange], &LATE);
                assert!(run == staged, "{sets:?} {exchange} on {ranks} ranks");
            }
        }
    }
}

/// Two GPUs a node, messages beyond MPI's eager limit.
#[test]
fn large_messages_between_two_gpus() {
    let layers = "model.layers=[{ kind = 'conv2d', out = 512, kernel = 3, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'conv2d', out = 4, kernel = 3, stride = 2, padding = 1 }, { kind = 'relu' }, \
                  { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 }]";
    let place =
        Place::new(&[layers, "model.modules=2", "train.rule=sideways", "data.batch=8", "train.batches=1", CUDA]);
    let threads = place.trained("threads", 0, &[STAGED], &[]);
    let env = [("SIDEWAYS_EMULATOR_DEVICES", "2"), ("SIDEWAYS_EMULATOR_JITTER_US", "500"), MPI];
    for exchange in ways() {
        assert!(place.trained(exchange, 2, &[exchange], &env) == threads, "{exchange}");
    }
}

/// In evaluation nothing comes back that holds a sender up: it runs ahead of a receiver that is slow to read, as far as the
/// receiver's places go and no further.
#[test]
fn nothing_is_overwritten_before_a_slow_receiver_has_read_it() {
    let place = Place::new(&["data.batch=1", CUDA]);
    assert!(place.train("run", 0, &[], &[]).status.success());
    let run = place.at("run").display().to_string();
    let eval = |exchange: &str, ranks: usize| -> String {
        let args = format!("eval {run} --json --set {CUDA} --set {exchange} --set model.modules=5 2>/dev/null");
        let script = format!(
            "if [ $((OMPI_COMM_WORLD_RANK % 2)) = 1 ]; then export SIDEWAYS_EMULATOR_LAUNCH_DELAY_US=1000; fi; \
             exec {} {args}",
            program()
        );
        let env = environment(&[MPI]);
        let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let output = mpirun(ranks, Path::new("sh"), &["-c", &script], &env, MINUTE);
        assert!(output.status.success(), "{exchange}: {}", text(&output));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let said =
            ["loss", "top1", "clips"].map(|key| json[key].as_f64().unwrap_or_else(|| panic!("no {key}: {json}")));
        format!("{said:?}")
    };
    let staged = eval(STAGED, 2);
    for exchange in &ways()[1..] {
        assert_eq!(eval(exchange, 2), staged, "{exchange}");
        assert_eq!(eval(exchange, 5), staged, "{exchange}");
    }
}

/// bfloat16 in messages: the loss is that of 32-bit floats to a per cent, and not its bits; where activations are bfloat16,
/// nothing is lost.
#[test]
fn messages_in_bfloat16() {
    let place = Place::new(&[SKIPS, CUDA]);
    let loss = |name: &str, sets: &[&str]| -> f64 {
        let output = place.train(name, 0, sets, &[]);
        assert!(output.status.success(), "{}", text(&output));
        let line = text(&output).lines().find(|l| l.contains("last quarter: loss")).unwrap().to_string();
        line.split("loss ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap()
    };
    let (float, half) = (loss("f32", &[]), loss("bf16", &[HALF]));
    assert!((float - half).abs() < 0.01 * float, "{float} {half}");
    assert!(tensors(&place.at("f32"), 4) != tensors(&place.at("bf16"), 4), "nothing was rounded");
    let precision = "run.precision=bf16";
    let (wide, narrow) = (["run.wire=f32", precision], ["run.wire=auto", precision]);
    assert!(
        place.trained("wide", 0, &wide, &[]) == place.trained("narrow", 0, &narrow, &[]),
        "values changed on the way"
    );
}

/// Where GPUs have no access to one another: by way of host memory, or a clear error.
#[test]
fn without_peer_access() {
    if real() {
        eprintln!("not on a real GPU: the emulator is told what to refuse and counts");
        return;
    }
    let place = Place::new(&[SKIPS, CUDA, "train.batches=1"]);
    let env = [("SIDEWAYS_EMULATOR_PEER", "0"), ("SIDEWAYS_EMULATOR_DEVICES", "2")];
    let auto = place.train("auto", 2, &[], &env);
    let said = text(&auto);
    assert!(auto.status.success(), "{said}");
    assert!(
        said.contains("module 3 -> 4 (main): by way of host memory (rank 0 cannot write into rank 1's GPU memory"),
        "{said}"
    );
    assert!(said.lines().any(|l| l.contains("module 1 -> 2 (main): ") && l.contains("us from GPU to GPU")), "{said}");
    let named = place.train("peer", 2, &[PEER], &env);
    let said = text(&named);
    assert_eq!(named.status.code(), Some(2), "{said}");
    assert!(said.contains("run.exchange = \"peer\" does not work on module ") && said.contains("\"auto\""), "{said}");
    assert!(place.train("alone", 0, &[PEER], &env).status.success());
    let by_mpi = text(&place.train("aware", 2, &[AWARE], &[MPI]));
    assert!(
        by_mpi.contains("module 3 -> 4 (main): by MPI, from GPU to GPU") && by_mpi.contains("exit status: 0"),
        "{by_mpi}"
    );
    let without = place.train("mpi", 2, &[AWARE], &[("SIDEWAYS_MPI_CUDA", "0")]);
    assert_eq!(without.status.code(), Some(2), "{}", text(&without));
    assert!(text(&without).contains("does not say that it works on GPU memory"), "{}", text(&without));
}

/// Between hosts `auto` asks an MPI library that says it works on GPU memory, and takes the faster way; the bits are the same.
/// Each rank gets a host name of its own here, where that may be done.
#[test]
fn auto_lets_mpi_move_values_between_hosts() {
    let may = Command::new("unshare").args(["-u", "hostname", "elsewhere"]).output();
    if real() {
        eprintln!("not on a real GPU: its MPI is asked elsewhere");
        return;
    }
    if !may.is_ok_and(|output| output.status.success()) {
        skip_unless_ci("ranks cannot be given host names of their own (unshare -u)");
        return;
    }
    let place = Place::new(&[SKIPS, CUDA]);
    let threads = place.trained("threads", 0, &[STAGED], &[]);
    let train = |name: &str, env: &[(&str, &str)]| -> String {
        let run = place.at(name);
        let script = format!(
            "exec unshare -u sh -c 'hostname host$OMPI_COMM_WORLD_RANK; exec {} train {} --set run.dir={}'",
            program(),
            place.config,
            run.display()
        );
        let env = environment(env);
        let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let output = mpirun(3, Path::new("sh"), &["-c", &script], &env, MINUTE);
        assert!(output.status.success(), "{}", text(&output));
        assert!(tensors(&run, 4) == threads, "{name}");
        text(&output)
    };
    let by_mpi = train("mpi", &[MPI]);
    assert!(by_mpi.contains("us from GPU to GPU and "), "no test was made: {by_mpi}");
    let staged = train("staged", &[("SIDEWAYS_MPI_CUDA", "0")]);
    assert!(staged.contains("are on different nodes") && !staged.contains("by MPI, from GPU"), "{staged}");
}

/// A rank that is killed in the middle of it ends the job within seconds.
#[test]
fn a_killed_rank_ends_the_job() {
    for &exchange in ways() {
        let place = Place::new(&[SKIPS, CUDA, "train.batches=100000", exchange]);
        let (metrics, killed) = (place.dir.path().join("run/metrics.jsonl"), place.at("killed"));
        let script = format!(
            "if [ $OMPI_COMM_WORLD_RANK = 1 ]; then (until [ $(cat {} 2>/dev/null | wc -l) -ge 2 ]; do sleep 0.05; done; \
             touch {}; kill -9 $$) & fi; exec {} train {}",
            metrics.display(),
            killed.display(),
            program(),
            place.config
        );
        let env = environment(&[MPI]);
        let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let start = Instant::now();
        let output = mpirun(3, Path::new("sh"), &["-c", &script], &env, MINUTE);
        let seconds = std::fs::metadata(&killed).map(|f| f.modified().unwrap().elapsed().unwrap());
        let seconds = seconds.unwrap_or_else(|_| panic!("{:?}: {}", start.elapsed(), text(&output)));
        assert!(!output.status.success() && seconds < Duration::from_secs(10), "{seconds:?}: {}", text(&output));
    }
}

/// Once under way, a clip allocates nothing, opens nothing and waits for no stream, however long it is; and nothing is copied
/// to host memory for neighbours.
#[test]
fn a_steady_tick_between_peers_stays_on_the_gpu() {
    if real() {
        eprintln!("not on a real GPU: the emulator is told what to refuse and counts");
        return;
    }
    let place = Place::new(&[SKIPS, PEER, "run.checkpoint_every=100", "train.boundary=cut", CUDA]);
    let counts = |clips: usize, frames: usize| -> HashMap<String, u64> {
        let name = format!("{clips}-{frames}");
        let file = place.at(&name).with_extension("counts");
        let (clips, frames) = (format!("train.batches={clips}"), format!("data.frames={frames}"));
        let env = [("SIDEWAYS_EMULATOR_COUNTERS", file.to_str().unwrap())];
        let output = place.train(&name, 0, &[&clips, &frames], &env);
        assert!(output.status.success(), "{}", text(&output));
        let text = std::fs::read_to_string(&file).unwrap();
        let words = text.lines().filter_map(|line| line.split_once(' '));
        words.map(|(name, value)| (name.to_string(), value.parse().unwrap())).collect()
    };
    let (short, few, many) = (counts(4, 14), counts(8, 8), counts(8, 14));
    assert_eq!(short["alloc"], many["alloc"], "allocations grow with clips");
    assert_eq!(few["alloc"], many["alloc"], "memory grows with frames");
    assert_eq!(few["sync"], many["sync"], "ticks wait for the GPU");
    assert_eq!(few["copy_dtoh"], many["copy_dtoh"], "values of messages go by way of the host");
}
