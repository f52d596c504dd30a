//! The schedule as literal tables, and that bounded queues never deadlock when modules run freely.

use std::collections::HashMap;

use sideways::method::graph::{Edge, Graph};
use sideways::method::schedule::{Boundary, LossAt, Schedule};

fn graph(modules: usize, spans: &[usize], delay: usize) -> Graph {
    Graph::new(modules, &Graph::skips_of_spans(modules, spans, delay).unwrap()).unwrap()
}

/// A row a module, a word a step: F or B (also backward), then what arrives on each input edge (the sender's step, `-`
/// for a held one), then `/` and the receivers' steps whose cotangents arrive (`.` for none).
fn table(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Vec<String> {
    let schedule = Schedule::new(graph, frames, boundary, loss, true).unwrap();
    let word = |o: &Option<usize>, none: &str| o.map_or(none.to_string(), |t| t.to_string());
    (1..=graph.modules())
        .map(|i| {
            let cells = schedule.steps(i).iter().map(|s| {
                let arrives: Vec<String> = s.receive.iter().map(|r| word(r, "-")).collect();
                let returns: Vec<String> = s.cotangent.iter().map(|c| word(c, ".")).collect();
                format!("{}{}/{}", if s.backward { 'B' } else { 'F' }, arrives.join(","), returns.join(","))
            });
            cells.collect::<Vec<_>>().join(" ")
        })
        .collect()
}

#[test]
fn a_chain_of_three() {
    let chain = graph(3, &[], 1);
    assert_eq!(
        table(&chain, 5, Boundary::Flow, LossAt::EveryStep),
        [
            // The main path's first cotangent comes at step 2 (D - i).
            "F/. F/. F/. F/. B/2",
            "F0/. F1/. B2/0 B3/1 B4/2",
            "B0/ B1/ B2/ B3/ B4/",
        ]
    );
    assert_eq!(
        table(&chain, 5, Boundary::Cut, LossAt::EveryStep),
        ["F/. F/. F/. F/. B/2", "F0/. F1/. B2/0 B3/1", "B0/ B1/ B2/"]
    );
}

/// The skip brings the step s - 1 later; past the clip's end its last is held. Its cotangent takes one tick.
#[test]
fn a_skip_brings_newer_frames() {
    assert_eq!(
        table(&graph(3, &[2], 1), 5, Boundary::Flow, LossAt::EveryStep),
        ["F/.,. F/.,. F/.,. B/.,0 B/2,1", "F0/. F1/. B2/0 B3/1 B4/2", "B0,1/ B1,2/ B2,3/ B3,4/ B4,-/",]
    );
    // Delayed by its span it is aligned with the main path.
    assert_eq!(table(&graph(3, &[2], 2), 5, Boundary::Flow, LossAt::EveryStep)[2], "B0,0/ B1,1/ B2,2/ B3,3/ B4,4/");
}

#[test]
fn future_frames_have_no_loss_past_the_clip() {
    assert_eq!(
        table(&graph(2, &[], 1), 5, Boundary::Flow, LossAt::Ahead(2)),
        ["F/. F/. B/0 B/1 B/2", "B0/ B1/ B2/ F3/ F4/"]
    );
}

#[test]
fn clips_too_short_are_refused() {
    let of = |frames| Schedule::new(&graph(6, &[2, 3], 1), frames, Boundary::Flow, LossAt::EveryStep, true);
    assert!(of(8).is_ok());
    let text = of(7).unwrap_err().to_string();
    assert!(text.contains("from 8 frames on"), "{text}");
    let text = Schedule::new(&graph(3, &[], 1), 5, Boundary::Flow, LossAt::Ahead(5), true).unwrap_err().to_string();
    assert!(text.contains("5 frames have no target"), "{text}");
}

/// What is sent is what is received, in the same order, on every edge and in both directions.
#[test]
fn every_message_sent_is_received() {
    let mut edges = 0;
    for d in 1..=6 {
        for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5]] {
            let spans: Vec<usize> = spans.iter().copied().filter(|&s| s < d).collect();
            for delay in [1, 2] {
                for boundary in [Boundary::Flow, Boundary::Cut] {
                    let graph = graph(d, &spans, delay);
                    let schedule = Schedule::new(&graph, 14, boundary, LossAt::EveryStep, true).unwrap();
                    for edge in graph.edges() {
                        let (from, to) = (schedule.steps(edge.from), schedule.steps(edge.to));
                        let out = graph.outputs(edge.from).position(|e| e == edge).unwrap();
                        let inn = graph.inputs(edge.to).position(|e| e == edge).unwrap();
                        let sent: Vec<usize> = (0..from.len()).filter(|&t| from[t].send[out]).collect();
                        let got: Vec<usize> = to.iter().filter_map(|s| s.receive[inn]).collect();
                        assert_eq!(sent, got, "{edge}");
                        assert!(!sent.is_empty(), "{edge}: nothing is sent");
                        let back: Vec<usize> = (0..to.len()).filter(|&t| to[t].wanted[inn]).collect();
                        let used: Vec<usize> = from.iter().filter_map(|s| s.cotangent[out]).collect();
                        assert_eq!(back, used, "{edge} cotangents");
                        assert!(!back.is_empty(), "{edge}: no cotangent is sent");
                        edges += 1;
                    }
                }
            }
        }
    }
    assert!(edges > 200, "{edges}");
}

/// Freely running modules, every queue holding as many messages as the edge's delay: all clips finish.
#[test]
fn bounded_queues_never_deadlock() {
    for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5], &[5]] {
        for (delay, boundary) in [(1, Boundary::Flow), (2, Boundary::Flow), (1, Boundary::Cut)] {
            let graph = graph(6, spans, delay);
            let schedule = Schedule::new(&graph, 14, boundary, LossAt::EveryStep, true).unwrap();
            assert!(runs_through(&graph, &schedule, 3, 0), "{spans:?} {delay} {boundary:?}");
            // With one place less they do.
            assert!(!runs_through(&graph, &schedule, 3, 1), "{spans:?} {delay} {boundary:?}");
        }
    }
}

/// What a module does next: take from or put into a queue, named by edge and direction.
type Action = (bool, Edge, &'static str);

fn program(graph: &Graph, schedule: &Schedule, i: usize, clips: usize) -> Vec<Action> {
    let mut actions = Vec::new();
    for _ in 0..clips {
        for step in schedule.steps(i) {
            let inputs: Vec<&Edge> = graph.inputs(i).collect();
            let outputs: Vec<&Edge> = graph.outputs(i).collect();
            let mut add = |put, edges: &[&Edge], which: Vec<bool>, kind| {
                actions.extend(edges.iter().zip(which).filter(|(_, w)| *w).map(|(e, _)| (put, **e, kind)));
            };
            add(false, &inputs, step.receive.iter().map(Option::is_some).collect(), "forward");
            add(true, &outputs, step.send.clone(), "forward");
            add(false, &outputs, step.cotangent.iter().map(Option::is_some).collect(), "back");
            add(true, &inputs, step.wanted.clone(), "back");
        }
    }
    actions
}

/// Whether all modules come to their end with queues of as many places as the edge's delay, but `fewer`.
fn runs_through(graph: &Graph, schedule: &Schedule, clips: usize, fewer: usize) -> bool {
    let mut programs: Vec<_> =
        (1..=graph.modules()).map(|i| program(graph, schedule, i, clips).into_iter().peekable()).collect();
    assert!(programs.iter_mut().all(|p| p.peek().is_some()), "a module does nothing");
    let mut queues: HashMap<(Edge, &str), usize> = HashMap::new();
    loop {
        let mut moved = false;
        for program in &mut programs {
            while let Some(&(put, edge, kind)) = program.peek() {
                let queue = queues.entry((edge, kind)).or_default();
                let room = if kind == "forward" { edge.delay } else { 1 } - fewer;
                match put {
                    true if *queue < room => *queue += 1,
                    false if *queue > 0 => *queue -= 1,
                    _ => break,
                }
                program.next();
                moved = true;
            }
        }
        if programs.iter_mut().all(|p| p.peek().is_none()) {
            return true;
        }
        if !moved {
            return false;
        }
    }
}
