//! The exact rules: `1f1b` and `gpipe` give what `bp` does, and leave nothing behind.

use std::collections::HashMap;

use crate::common::runs::{UNEVEN, assert_close, config, shard, tensors, train};
use sideways::backend::slots::{Slot, SlotMut};
use sideways::backend::stage::{CpuStage, Stage};
use sideways::config::Config;
use sideways::data::FrameStream;
use sideways::method::Edge;
use sideways::nn::head::Labels;
use sideways::nn::layers::Pass;
use sideways::setup::{Purpose, Setup};

const RULES: [&str; 3] = ["bp", "gpipe", "1f1b"];

/// Parameters after four batches, by rule, are those of `bp`: to the bit under `gpipe`, which is the same order of work, to rounding
/// under `1f1b`; whatever joins the modules. The forward pass once more gives the bits of activations that were kept.
#[test]
fn pipelines_are_back_propagation() {
    let future = [
        "model.task=future-frames",
        "model.layers=[{ kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'relu' }, \
         { kind = 'conv2d', out = 4, kernel = 3, padding = 1 }, { kind = 'gelu' }, { kind = 'conv2d', out = 3, kernel = 3, padding = 1 }]",
        "model.modules=3",
        "model.skip={ spans = [2] }",
    ];
    for (case, sets) in [
        &[][..],
        &["model.skip={ spans = [2, 3] }"],
        &["model.skip={ spans = [2], edges = [[1, 5]], fuse = 'concat' }"],
        &["model.skip={ spans = [3], delay = 2 }", "train.boundary=cut"],
        &["model.skip={ spans = [2], delay = 'aligned', fuse = 'concat' }"],
        &["model.skip={ spans = [2, 3] }", "train.boundary=cut"],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2, 3] }"],
        &[UNEVEN[0], UNEVEN[1], "model.skip={ spans = [2], edges = [[1, 4]], fuse = 'concat' }"],
        // Shorter than the way back.
        &["model.skip={ spans = [2, 4] }", "data.frames=3"],
        &["model.skip={ spans = [2] }", "train.replicas=2", "data.batch=1"],
        &["model.skip={ spans = [2, 3] }", "train.freeze=[1, 2, 4]", "data.mixup=0.5", "train.ema=0.9"],
        &future,
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        shard(&dir.path().join("train.h5"), 8, 14, false);
        let run = |rule: &str, stash: &str| {
            let keys = [format!("train.rule={rule}"), format!("train.stash={stash}")];
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            let run = format!("run.dir={}/{rule}-{stash}", dir.path().display());
            let config = config(dir.path(), &[sets, &keys, &[run.as_str()]].concat());
            train(&config, None);
            tensors(&config.run.dir, 4)
        };
        let [bp, gpipe, alternating] = RULES.map(|rule| run(rule, "none"));
        assert!(gpipe == bp, "gpipe, case {case}");
        assert_close(&alternating, &bp, 1e-5, &format!("1f1b, case {case}"));
        assert!(run("gpipe", "inputs") == gpipe && run("1f1b", "inputs") == alternating, "case {case}");
        // The test could not fail if pseudo-gradients were the same.
        assert!(case == 8 || run("skip-sideways", "none") != bp, "case {case}");
    }
}

/// Dropout and batch norm see the same key and statistics by every rule: after one batch running statistics are the same bits.
#[test]
fn dropout_and_batch_norm_do_not_depend_on_the_rule() {
    const LAYERS: &str = "model.layers=[
        { kind = 'conv2d', out = 4, kernel = 3, padding = 1, bias = false }, { kind = 'batch-norm' }, { kind = 'relu' },
        { kind = 'dropout', rate = 0.3 }, { kind = 'conv2d', out = 4, kernel = 3, padding = 1, bias = false },
        { kind = 'batch-norm' },
        { kind = 'dropout', rate = 0.3 }, { kind = 'global-avg-pool' }, { kind = 'linear', out = 4 },
    ]";
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    let layers = LAYERS.replace('\n', " ");
    let after = |rule: &str, batches: u64| {
        let (run, rule) = (format!("run.dir={}", dir.path().join(rule).display()), format!("train.rule={rule}"));
        let skip = "model.skip={ spans = [2], fuse = 'concat' }";
        let config = config(dir.path(), &[&run, &rule, &layers, "model.modules=3", skip]);
        if !config.run.dir.exists() {
            train(&config, None);
        }
        tensors(&config.run.dir, batches)
    };
    let bp = [after("bp", 1), after("bp", 4)];
    for rule in ["gpipe", "1f1b"] {
        let first = after(rule, 1);
        let statistics: Vec<&String> = first.keys().filter(|name| name.contains("running_")).collect();
        assert_eq!(statistics.len(), 4);
        assert!(statistics.into_iter().all(|name| first[name] == bp[0][name]), "{rule}");
        assert_close(&first, &bp[0], 1e-5, rule);
        // Statistics of two clips make rounding errors grow.
        assert_close(&after(rule, 4), &bp[1], 1e-3, rule);
    }
}

/// What travels: an activation or a cotangent along an edge, of a step of its sender.
type Mail = HashMap<(Edge, bool, usize), (usize, Vec<f32>)>;

/// Follows one batch tick by tick, all modules in lock-step: a message made at one tick is there `delay` ticks later, a cotangent
/// one. Returns the most that each module ever held, and the stages at the batch's end.
fn follow(config: &Config) -> (Vec<usize>, Vec<CpuStage>) {
    let setup = Setup::new(config, 1, Purpose::Train).unwrap();
    let (graph, schedule, d) = (&setup.network.graph, &setup.schedule, setup.grid.modules);
    let mut stream = FrameStream::open(setup.dataset.clone().unwrap(), setup.stream(0, 0, 1)).unwrap();
    let labels = Labels { own: stream.begin(0).unwrap().labels, mixed: None };
    let mut stages: Vec<CpuStage> = (1..=d).map(|i| CpuStage::new(setup.stage_spec(i)).unwrap()).collect();
    stages.iter_mut().enumerate().for_each(|(n, stage)| stage.begin((n + 1 == d).then_some(&labels), true).unwrap());
    let pass = Pass { training: true, key: 0, again: false };
    let words = |e: &Edge| {
        let spec = setup.network.edges.iter().find(|spec| spec.edge == *e).unwrap();
        config.data.batch * spec.shape.iter().product::<usize>()
    };
    let (mut mail, mut most) = (Mail::new(), vec![0; d]);
    for now in 0..schedule.period() + d {
        for i in 1..=d {
            let Some(tick) = schedule.window(i).iter().find(|tick| tick.at == now) else { continue };
            let stage = &mut stages[i - 1];
            let (inputs, outputs): (Vec<Edge>, Vec<Edge>) =
                (graph.inputs(i).copied().collect(), graph.outputs(i).copied().collect());
            if let Some(forward) = &tick.forward {
                if i == 1 {
                    stage.set_input(0, stream.frame(forward.step).unwrap(), None).unwrap();
                }
                for (k, step) in forward.receive.iter().enumerate().filter_map(|(k, step)| Some((k, (*step)?))) {
                    let (made, values) = mail.remove(&(inputs[k], true, step)).unwrap();
                    assert_eq!(made + inputs[k].delay, now, "{}", inputs[k]);
                    stage.receive(k, Slot::Host(&values)).unwrap();
                }
                stage.forward(forward.step, &pass, forward.keep, &forward.send).unwrap();
                for (k, e) in outputs.iter().enumerate().filter(|(k, _)| forward.send[*k]) {
                    let mut values = vec![0.0; words(e)];
                    stage.send(k, SlotMut::Host(&mut values)).unwrap();
                    assert!(mail.insert((*e, true, forward.step), (now, values)).is_none());
                }
                if forward.loss {
                    stage.loss(forward.step, None).unwrap();
                }
            }
            for arrival in &tick.cotangents {
                let (made, values) = mail.remove(&(outputs[arrival.output], false, arrival.sent_at)).unwrap();
                assert_eq!(made + 1, now);
                stage.add_cotangent(arrival.output, arrival.step, Slot::Host(&values)).unwrap();
            }
            most[i - 1] = most[i - 1].max(stage.held());
            if let Some(backward) = &tick.backward {
                stage.backward(backward.step, &pass, &backward.send).unwrap();
                for (k, e) in inputs.iter().enumerate().filter(|(k, _)| backward.send[*k]) {
                    let mut values = vec![0.0; words(e)];
                    stage.send_cotangent(k, SlotMut::Host(&mut values)).unwrap();
                    assert!(mail.insert((*e, false, backward.step), (now, values)).is_none());
                }
            }
            stage.end_tick();
        }
    }
    assert!(mail.is_empty(), "messages are left: {:?}", mail.keys());
    stages.iter_mut().for_each(|stage| drop(stage.end().unwrap()));
    (most, stages)
}

/// Nothing is left in memory after a batch: no message, no step's activations or inputs, no sum of cotangents. Within it a module
/// keeps as many steps as the schedule says.
#[test]
fn nothing_is_left_after_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 4, 14, false);
    for (skip, boundary) in [
        ("{}", "flow"),
        ("{ spans = [2, 3] }", "flow"),
        ("{ spans = [2], edges = [[1, 5]], fuse = 'concat' }", "cut"),
        ("{ spans = [2, 4], delay = 2 }", "flow"),
    ] {
        for (rule, stash) in RULES.into_iter().flat_map(|rule| ["none", "inputs"].map(|stash| (rule, stash))) {
            let sets = [
                format!("model.skip={skip}"),
                format!("train.boundary={boundary}"),
                format!("train.rule={rule}"),
                format!("train.stash={stash}"),
            ];
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            let config = config(dir.path(), &sets);
            let (most, stages) = follow(&config);
            let held: Vec<usize> = stages.iter().map(CpuStage::held).collect();
            assert_eq!(held, [0; 5], "{sets:?}");
            let schedule = Setup::new(&config, 1, Purpose::Train).unwrap().schedule;
            for (i, most) in (1..=5).zip(most) {
                let registers = stages[i - 1].spec().skips.len() + stages[i - 1].spec().outputs.len() + 2;
                let kept = schedule.kept_at_once(i);
                assert!(most >= kept && most <= kept + schedule.sums(i) + registers, "{sets:?}: module {i}: {most}");
            }
            assert!(stages.into_iter().all(|mut stage| stage.gradients().unwrap().iter().any(|g| *g != 0.0)));
        }
    }
}
