//! Replicas on GPUs: gradients are averaged, on the host or from GPU to GPU, while the backward pass computes, and nothing waits for a
//! GPU in between.

use std::collections::HashMap;

use crate::common::cuda::{Place, counters, real};
use crate::common::mpirun::text;
use crate::common::runs::tensors;

const CUDA: &str = "run.device=cuda";
const STAGED: &str = "run.exchange=staged";
const PEER: &str = "run.exchange=peer";
/// Words of a bucket.
const BUCKET: usize = 1 << 18;
/// A module of which one layer alone has nine buckets of parameters, the one before it three, and a first one next to none.
const LARGE: [&str; 3] = [
    "model.layers=[{ kind = 'conv2d', out = 512, kernel = 2, stride = 2 }, { kind = 'relu' }, { kind = 'global-avg-pool' }, \
     { kind = 'linear', out = 1280 }, { kind = 'gelu' }, { kind = 'linear', out = 1600 }, { kind = 'gelu' }, \
     { kind = 'linear', out = 4 }]",
    "model.modules=1",
    "train.rule=sideways",
];

/// A line of the emulator's log.
#[derive(Debug, PartialEq)]
struct Line<'a> {
    what: &'a str,
    thread: u64,
    stream: u64,
    call: &'a str,
    bytes: usize,
}

fn line(text: &str) -> Line<'_> {
    let words: Vec<&str> = text.splitn(8, ' ').collect();
    let [what, "thread", thread, "stream", stream, "bytes", bytes, call] = words[..] else { panic!("{text}") };
    Line { what, thread: thread.parse().unwrap(), stream: stream.parse().unwrap(), call, bytes: bytes.parse().unwrap() }
}

/// Whatever carries them, with graphs or without, by whole clips or a few steps: the same bits.
#[test]
fn replicas_end_alike_wherever_they_are() {
    let gentle = "train.optimizer={ kind = 'sgd', lr = 0.01, momentum = 0.9 }";
    for sets in [
        &[LARGE[0], LARGE[1], LARGE[2], "data.frames=3", "data.batch=1", "train.batches=3"][..],
        &[
            LARGE[0],
            "model.modules=2",
            LARGE[2],
            "data.frames=4",
            "data.batch=1",
            "train.batches=3",
            "run.precision=bf16",
        ],
        &["model.skip={ spans = [2] }", "train.update_every=3"],
        &["model.skip={ spans = [2] }", "train.rule=1f1b", "train.stash=inputs"],
    ] {
        let place = Place::new(&[sets, &[CUDA, gentle, "train.replicas=2"]].concat());
        let threads = place.trained("threads", 0, &[], &[]);
        assert!(place.trained("launches", 0, &["run.graphs=false"], &[]) == threads, "{sets:?} without graphs");
        let late = [("SIDEWAYS_EMULATOR_COPY_DELAY_US", "300"), ("SIDEWAYS_EMULATOR_JITTER_US", "500")];
        assert!(place.trained("late", 0, &[], &late) == threads, "{sets:?} with slow copies");
        assert!(place.trained("ranks", 2, &[], &late) == threads, "{sets:?} on two ranks");
        // Two replicas make of two halves of the clips what one makes of other clips: something is averaged.
        assert!(place.trained("one", 0, &["train.replicas=1"], &[]) != threads, "{sets:?}: nothing is averaged");
    }
}

/// From GPU to GPU the same bits as by way of the host, by levels of all kinds and a ring, several buckets, ranks and threads; and so
/// where some pairs are joined by the one and some by the other.
#[test]
fn replicas_average_from_gpu_to_gpu() {
    let late = [("SIDEWAYS_EMULATOR_COPY_DELAY_US", "300"), ("SIDEWAYS_EMULATOR_JITTER_US", "300")];
    let some = ["data.frames=3", "data.batch=1", "train.batches=2", CUDA];
    for (replicas, layers, ranks, env) in
        [(2, &LARGE[..], 2, &late[..]), (3, &LARGE, 0, &late), (8, &LARGE[1..], 2, &late), (11, &LARGE[1..], 2, &[])]
    {
        let place = Place::new(&[layers, &some, &[&format!("train.replicas={replicas}")]].concat());
        let staged = place.trained("staged", 0, &[STAGED], &[]);
        assert!(place.trained("peer", ranks, &[PEER], env) == staged, "{replicas} replicas");
    }
    if real() {
        eprintln!("not on a real GPU: the emulator is told what to refuse");
        return;
    }
    let place = Place::new(&[&LARGE[..], &some, &["train.replicas=4"]].concat());
    let staged = place.trained("staged", 0, &[STAGED], &[]);
    let by_mpi = place.trained("aware", 2, &["run.exchange=cuda-aware"], &[("SIDEWAYS_MPI_CUDA", "1")]);
    assert!(by_mpi == staged, "by an MPI library that takes GPU memory");
    // Slow copies: the two of a way by the host take longer in a test than the one from GPU to GPU.
    let apart = [
        ("SIDEWAYS_EMULATOR_PEER", "0"),
        ("SIDEWAYS_EMULATOR_DEVICES", "2"),
        ("SIDEWAYS_EMULATOR_COPY_DELAY_US", "3000"),
    ];
    let output = place.train("apart", 2, &[], &apart);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for (pair, way) in
        [("0 -> 1", "from GPU to GPU ("), ("2 -> 3", "from GPU to GPU ("), ("1 -> 2", "by way of host memory (")]
    {
        assert!(said.contains(&format!("gradients of module 1, replica {pair}: {way}")), "{pair}: {said}");
    }
    let last = sideways::checkpoint::newest_manifest(&place.at("apart").join("checkpoints")).unwrap().unwrap().batches;
    assert!(tensors(&place.at("apart"), last) == staged, "some pairs by the host, some not: {said}");
}

/// In the last backward pass of clips, copies of the last layers' gradients are asked for before the kernels of the first layers are,
/// and done before these are; the first of them are averaged and on their way back meanwhile; nothing waits for the GPU in between.
#[test]
fn gradients_are_averaged_while_the_backward_pass_computes() {
    if real() {
        eprintln!("not on a real GPU: the emulator keeps the log");
        return;
    }
    for graphs in ["run.graphs=true", "run.graphs=false"] {
        let sets = ["data.frames=2", "data.batch=1", "train.batches=3", "run.checkpoint_every=3", graphs, STAGED, CUDA];
        let place = Place::new(&[&LARGE[..], &sets].concat());
        let log = slow_log(&place);
        let lines: Vec<Line> = log.lines().map(line).collect();
        // The first layer, and that of the last one that is not whole: as many words as are in no whole bucket.
        let words = [3 * 4 * 512 + 512, 512 * 1280 + 1280, 1280 * 1600 + 1600, 1600 * 4 + 4];
        let all: usize = words.iter().sum();
        let whole = |from: usize| all.div_ceil(BUCKET) - from.div_ceil(BUCKET);
        let late = whole(words[0] + words[1]);
        assert!(late >= 8 && whole(words[0]) > late, "{late}");
        let (mut checked, mut hidden) = (0, 0);
        for thread in threads(&lines) {
            for update in updates(&lines, thread) {
                let Update { down, up, compute, first, last } = update;
                let section = &lines[first..last];
                let place = |what: &str, call: &str, stream: u64| -> Vec<usize> {
                    let is = |l: &Line| l.what == what && l.call == call && l.stream == stream;
                    section.iter().enumerate().filter(|(_, l)| is(l)).map(|(n, _)| n).collect()
                };
                let (asked, arrived) = (place("issued", DOWN, down), place("done", DOWN, down));
                let bytes = |n: &usize| section[*n].bytes;
                assert_eq!(asked.iter().map(bytes).sum::<usize>(), 4 * all, "not all gradients go to the host");
                let back = place("issued", UP, up);
                assert_eq!(back.iter().map(bytes).sum::<usize>(), 4 * all, "not all gradients come back");
                assert!(section.iter().all(|l| l.bytes <= 4 * BUCKET), "a copy is larger than a bucket");
                // What computes, of the compute stream: kernels, or graphs of them.
                let computes = |what: &str| -> Vec<usize> {
                    let is = |l: &Line| l.what == what && l.stream == compute && !l.call.starts_with("cuEvent");
                    section.iter().enumerate().filter(|(_, l)| is(l)).map(|(n, _)| n).collect()
                };
                let (launched, computed) = (computes("issued"), computes("done"));
                assert!(launched.iter().filter(|n| **n > asked[0]).count() >= 2, "the copies were asked for last");
                let end = *computed.last().unwrap();
                // On a busy machine the host may come late once.
                let before = |places: &[usize], enough: usize| places.iter().filter(|n| **n < end).count() >= enough;
                hidden += usize::from(before(&arrived, late) && before(&back, 1));
                let waits: Vec<&Line> = section.iter().filter(|l| l.what == "waits" && l.thread == thread).collect();
                assert!(waits.is_empty(), "{waits:?}");
                checked += 1;
            }
        }
        assert_eq!(checked, 2 * 3, "{graphs}");
        assert!(hidden >= 1, "{graphs}: nothing is averaged while the backward pass computes");
    }
}

/// From GPU to GPU too the last layers' gradients are added up while the backward pass computes the first ones', and what of that is
/// done at all has no wait of the worker's in between.
#[test]
fn gradients_are_added_up_while_the_backward_pass_computes() {
    if real() {
        eprintln!("not on a real GPU: the emulator keeps the log");
        return;
    }
    let sets =
        ["data.frames=1", "data.batch=1", "train.batches=3", "run.checkpoint_every=3", "run.graphs=false", PEER, CUDA];
    let place = Place::new(&[&LARGE[..], &sets].concat());
    let log = slow_log(&place);
    let lines: Vec<Line> = log.lines().map(line).collect();
    let (mut workers, mut beside) = (0, 0);
    for thread in threads(&lines) {
        let Some(adding) = stream_of(&lines, thread, true) else { continue };
        let computing = stream_of(&lines, thread, false).unwrap();
        let at = |what: &str, stream: u64| -> Vec<usize> {
            let is = |l: &Line| l.what == what && l.stream == stream && l.call.starts_with("kernel ");
            lines.iter().enumerate().filter(|(_, l)| is(l)).map(|(n, _)| n).collect()
        };
        workers += 1;
        let (asked, done) = (at("issued", adding), at("done", adding));
        let (launched, computed) = (at("issued", computing), at("done", computing));
        // A kernel a bucket, of the module's parameters (see `LARGE`).
        let buckets = 2_719_300_usize.div_ceil(BUCKET);
        assert_eq!(asked.len(), 3 * buckets, "three updates");
        for update in 0..3 {
            let (first, last) = (asked[update * buckets], asked[(update + 1) * buckets - 1]);
            // Of the kernels launched before, the last is one of the backward pass.
            let before = launched.iter().filter(|n| **n < first).count();
            beside += usize::from(computed[before - 1] > done[update * buckets]);
            let waits: Vec<&Line> =
                lines[first..last].iter().filter(|l| l.what == "waits" && l.thread == thread).collect();
            assert!(waits.is_empty(), "{waits:?}");
        }
    }
    assert_eq!(workers, 2);
    // On a busy machine the host may come late once.
    assert!(beside >= 1, "nothing is added up while the backward pass computes");
}

/// The emulator's log of a training of two replicas in one process, on a GPU on which every launch takes long.
fn slow_log(place: &Place) -> String {
    let log = place.at("log");
    let env = [("SIDEWAYS_EMULATOR_LOG", log.to_str().unwrap()), ("SIDEWAYS_EMULATOR_LAUNCH_DELAY_US", "40000")];
    let output = place.train("run", 0, &["train.replicas=2"], &env);
    assert!(output.status.success(), "{}", text(&output));
    std::fs::read_to_string(log).unwrap()
}

const ADDS: &str = "kernel sum_in_order";

/// The stream into which `thread` launches the kernel that adds gradients up, or else those that compute.
fn stream_of(lines: &[Line], thread: u64, adds: bool) -> Option<u64> {
    let is = |l: &&Line| l.thread == thread && l.what == "issued" && l.call.starts_with("kernel ");
    lines.iter().filter(is).find(|l| (l.call == ADDS) == adds).map(|l| l.stream)
}

const DOWN: &str = "cuMemcpyDtoHAsync";
const UP: &str = "cuMemcpyHtoDAsync";

fn threads(lines: &[Line]) -> Vec<u64> {
    let mut threads: Vec<u64> = lines.iter().filter(|l| l.what == "issued").map(|l| l.thread).collect();
    threads.sort_unstable();
    threads.dedup();
    threads
}

/// One update of a worker: its streams, and where in the log it begins, with the first gradients that are asked for, and ends, with the
/// last that are sent back.
struct Update {
    down: u64,
    up: u64,
    compute: u64,
    first: usize,
    last: usize,
}

/// The updates of the worker on `thread`, by the largest copies there are.
fn updates(lines: &[Line], thread: u64) -> Vec<Update> {
    let issued =
        |l: &Line, call: &str| l.what == "issued" && l.thread == thread && l.call == call && l.bytes == 4 * BUCKET;
    // Snapshots download whole arrays, none of which is as large as a bucket to the word.
    let Some(down) = lines.iter().find(|l| issued(l, DOWN)).map(|l| l.stream) else { return Vec::new() };
    let up = lines.iter().find(|l| issued(l, UP)).unwrap().stream;
    let of = |stream: u64, call: &'static str| {
        move |l: &Line| l.what == "issued" && l.thread == thread && l.stream == stream && l.call == call
    };
    let (is_down, is_up) = (of(down, DOWN), of(up, UP));
    // What computes, graphs or kernels: the stream with the most of it.
    let mut counts: HashMap<u64, usize> = HashMap::new();
    for l in lines.iter().filter(|l| l.what == "issued" && l.thread == thread && !l.call.starts_with("cuEvent")) {
        *counts.entry(l.stream).or_default() += 1;
    }
    let compute = *counts.iter().max_by_key(|(_, count)| **count).unwrap().0;
    assert!(down != up && down != compute && up != compute, "{down} {up} {compute}");
    let (mut updates, mut first, mut last) = (Vec::new(), None, None);
    let mut end = |first: &mut Option<usize>, last: &mut Option<usize>| {
        if let (Some(first), Some(last)) = (first.take(), last.take()) {
            updates.push(Update { down, up, compute, first, last });
        }
    };
    for (n, l) in lines.iter().enumerate() {
        if is_down(l) {
            if last.is_some() {
                end(&mut first, &mut last);
            }
            first.get_or_insert(n);
        } else if is_up(l) {
            last = Some(n + 1);
        }
    }
    end(&mut first, &mut last);
    updates
}

/// However many batches and buckets, an update waits for the GPU no more often than one replica's does, and allocates nothing.
#[test]
fn averaging_waits_for_nothing_and_allocates_nothing() {
    if real() {
        eprintln!("not on a real GPU: the emulator counts");
        return;
    }
    for exchange in [STAGED, PEER] {
        waits_for_nothing(exchange);
    }
}

fn waits_for_nothing(exchange: &str) {
    let sets = ["data.frames=3", "data.batch=1", "run.checkpoint_every=100", CUDA, exchange];
    let place = Place::new(&[&LARGE[..], &sets].concat());
    let counts = |name: &str, replicas: usize, batches: usize| -> HashMap<String, u64> {
        let file = place.at(name).with_extension("counts");
        let env = [("SIDEWAYS_EMULATOR_COUNTERS", file.to_str().unwrap())];
        let (replicas, batches) = (format!("train.replicas={replicas}"), format!("train.batches={batches}"));
        let output = place.train(name, 0, &[&replicas, &batches], &env);
        assert!(output.status.success(), "{}", text(&output));
        counters(&file)
    };
    // By replicas, from three batches to six.
    let [one, two] =
        [1, 2].map(|replicas| [3, 6].map(|batches| counts(&format!("{replicas}x{batches}"), replicas, batches)));
    let more = |[few, many]: &[HashMap<String, u64>; 2], what: &str| {
        let of = |counts: &HashMap<String, u64>| counts.get(what).copied().unwrap_or(0);
        of(many) - of(few)
    };
    for what in ["alloc", "host_alloc", "host_register", "event_create", "graph_instantiate"] {
        assert_eq!(more(&two, what), 0, "{exchange}: {what} grows with batches");
    }
    for what in ["sync", "blocking_copy", "event_sync"] {
        assert_eq!(more(&two, what), 2 * more(&one, what), "{exchange}: replicas wait for the GPU: {what}");
    }
    let averaged = |what: &str| more(&two, what) > 2 * more(&one, what);
    assert_eq!([averaged("copy_dtoh"), averaged("copy_dtod")], [exchange == STAGED, exchange == PEER], "{exchange}");
}
