//! The schedule as literal tables, and that bounded queues never deadlock when modules run freely.

use std::collections::HashMap;

use sideways::Result;
use sideways::method::graph::{Edge, Graph};
use sideways::method::{Boundary, LossAt, Rule, Schedule};

fn graph(modules: usize, spans: &[usize], delay: usize) -> Graph {
    Graph::new(modules, &Graph::skips_of_spans(modules, spans, delay).unwrap()).unwrap()
}

fn training(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Result<Schedule> {
    Schedule::training(graph, frames, Rule::SkipSideways, boundary, loss)
}

/// A row a module, a word a step: F or B (also backward), then what arrives on each input edge (the sender's step, `-`
/// for a held one), then `/` and the receivers' steps whose cotangents arrive (`.` for none).
fn table(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Vec<String> {
    let schedule = training(graph, frames, boundary, loss).unwrap();
    let word = |o: &Option<usize>, none: &str| o.map_or(none.to_string(), |t| t.to_string());
    (1..=graph.modules())
        .map(|i| {
            let cells = schedule.window(i).iter().enumerate().map(|(step, tick)| {
                let forward = tick.forward.as_ref().unwrap();
                let arrives: Vec<String> = forward.receive.iter().map(|r| word(r, "-")).collect();
                let mut returns = vec![".".to_string(); graph.outputs(i).count()];
                for arrival in &tick.cotangents {
                    // Added to the step at hand: that is what makes it a pseudo-gradient.
                    assert_eq!(arrival.step, step);
                    returns[arrival.output] = arrival.sent_at.to_string();
                }
                assert!(forward.step == step && tick.backward.as_ref().is_none_or(|backward| backward.step == step));
                format!(
                    "{}{}/{}",
                    if tick.backward.is_some() { 'B' } else { 'F' },
                    arrives.join(","),
                    returns.join(",")
                )
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
    let of = |frames| training(&graph(6, &[2, 3], 1), frames, Boundary::Flow, LossAt::EveryStep);
    assert!(of(8).is_ok());
    let text = of(7).unwrap_err().to_string();
    assert!(text.contains("from 8 frames on"), "{text}");
    let text = training(&graph(3, &[], 1), 5, Boundary::Flow, LossAt::Ahead(5)).unwrap_err().to_string();
    assert!(text.contains("5 frames have no target"), "{text}");
}

/// The forward and the backward passes of module `i` by step under exact back-propagation, and when.
fn exact(graph: &Graph, i: usize) -> String {
    let schedule = Schedule::training(graph, 4, Rule::Bp, Boundary::Flow, LossAt::EveryStep).unwrap();
    let cells = schedule.window(i).iter().map(|tick| {
        let forward = tick.forward.as_ref().map_or(String::new(), |forward| format!("F{}", forward.step));
        let arrivals = tick.cotangents.iter().map(|a| format!("+{}.{}>{}", a.output, a.sent_at, a.step));
        let backward = tick.backward.as_ref().map_or(String::new(), |backward| format!("B{}", backward.step));
        format!("{}:{forward}{}{backward}", tick.at, arrivals.collect::<String>())
    });
    cells.collect::<Vec<_>>().join(" ")
}

/// All forward passes, then all backward ones in reverse; every cotangent goes to the step whose output was used.
#[test]
fn exact_back_propagation() {
    let chain = graph(3, &[], 1);
    assert_eq!(exact(&chain, 1), "0:F0 1:F1 2:F2 3:F3 8:+0.3>3B3 9:+0.2>2B2 10:+0.1>1B1 11:+0.0>0B0");
    assert_eq!(exact(&chain, 3), "2:F0 3:F1 4:F2 5:F3 6:B3 7:B2 8:B1 9:B0");
    // Module 3 reads module 1's next step through the skip, and its last one twice: both cotangents go to step 3. They come a
    // tick before the main path's for the same step, and the sum waits.
    assert_eq!(
        exact(&graph(3, &[2], 1), 1),
        "0:F0 1:F1 2:F2 3:F3 7:+1.3>3 8:+1.2>3+0.3>3B3 9:+1.1>2+0.2>2B2 10:+1.0>1+0.1>1B1 11:+0.0>0B0"
    );
}

/// What is sent is what is received, in the same order, on every edge and in both directions.
#[test]
fn every_message_sent_is_received() {
    let mut edges = 0;
    for d in 1..=6 {
        for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5]] {
            let spans: Vec<usize> = spans.iter().copied().filter(|&s| s < d).collect();
            for (delay, rule) in [(1, Rule::SkipSideways), (2, Rule::SkipSideways), (1, Rule::Bp), (2, Rule::Bp)] {
                for boundary in [Boundary::Flow, Boundary::Cut] {
                    let graph = graph(d, &spans, delay);
                    let schedule = Schedule::training(&graph, 14, rule, boundary, LossAt::EveryStep).unwrap();
                    for edge in graph.edges() {
                        let out = graph.outputs(edge.from).position(|e| e == edge).unwrap();
                        let inn = graph.inputs(edge.to).position(|e| e == edge).unwrap();
                        let sent = schedule.forwards(edge.from).filter(|f| f.send[out]).map(|f| f.step);
                        let got = schedule.forwards(edge.to).filter_map(|f| f.receive[inn]);
                        let sent: Vec<usize> = sent.collect();
                        assert_eq!(sent, got.collect::<Vec<_>>(), "{edge}");
                        assert!(!sent.is_empty(), "{edge}: nothing is sent");
                        let back = schedule.backwards(edge.to).filter(|b| b.send[inn]).map(|b| b.step);
                        let arrivals = schedule.window(edge.from).iter().flat_map(|tick| &tick.cotangents);
                        let used = arrivals.filter(|a| a.output == out).map(|a| a.sent_at);
                        let back: Vec<usize> = back.collect();
                        assert_eq!(back, used.collect::<Vec<_>>(), "{edge} cotangents");
                        assert!(!back.is_empty(), "{edge}: no cotangent is sent");
                        edges += 1;
                    }
                }
            }
        }
    }
    assert!(edges > 400, "{edges}");
}

/// A message takes a tick; a sum is complete before it is used, and used once.
#[test]
fn messages_take_a_tick_and_sums_are_complete() {
    for rule in [Rule::SkipSideways, Rule::Bp] {
        for boundary in [Boundary::Flow, Boundary::Cut] {
            let graph = graph(5, &[2, 3], 1);
            let schedule = Schedule::training(&graph, 12, rule, boundary, LossAt::EveryStep).unwrap();
            for i in 1..=5 {
                let mut done = Vec::new();
                for tick in schedule.window(i) {
                    for arrival in &tick.cotangents {
                        let edge = graph.outputs(i).nth(arrival.output).unwrap();
                        let made = schedule.window(edge.to).iter().find(|there| {
                            there.backward.as_ref().is_some_and(|backward| backward.step == arrival.sent_at)
                        });
                        assert_eq!(made.map(|there| there.at + 1), Some(tick.at), "module {i}, {arrival:?}");
                        assert!(!done.contains(&arrival.step), "module {i}: {arrival:?} comes too late");
                    }
                    done.extend(tick.backward.as_ref().map(|backward| backward.step));
                }
                let mut once = done.clone();
                once.sort();
                once.dedup();
                assert!(once.len() == done.len() && !done.is_empty());
            }
        }
    }
}

/// Freely running modules, every queue holding as many messages as the edge's delay: all clips finish.
#[test]
fn bounded_queues_never_deadlock() {
    for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5], &[5]] {
        for (delay, boundary) in [(1, Boundary::Flow), (2, Boundary::Flow), (1, Boundary::Cut)] {
            let graph = graph(6, spans, delay);
            let schedule = training(&graph, 14, boundary, LossAt::EveryStep).unwrap();
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
        for tick in schedule.window(i) {
            let inputs: Vec<&Edge> = graph.inputs(i).collect();
            let outputs: Vec<&Edge> = graph.outputs(i).collect();
            let mut add = |put, edges: &[&Edge], which: Vec<bool>, kind| {
                actions.extend(edges.iter().zip(which).filter(|(_, w)| *w).map(|(e, _)| (put, **e, kind)));
            };
            if let Some(forward) = &tick.forward {
                add(false, &inputs, forward.receive.iter().map(Option::is_some).collect(), "forward");
                add(true, &outputs, forward.send.clone(), "forward");
            }
            let arrives = |k| tick.cotangents.iter().any(|arrival| arrival.output == k);
            add(false, &outputs, (0..outputs.len()).map(arrives).collect(), "back");
            if let Some(backward) = &tick.backward {
                add(true, &inputs, backward.send.clone(), "back");
            }
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
