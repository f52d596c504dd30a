//! The schedule as literal tables, and that bounded queues never deadlock when modules run freely.

use std::collections::HashMap;

use sideways::Result;
use sideways::method::graph::{Edge, Graph};
use sideways::method::{Boundary, Keep, LossAt, Rule, Schedule, Stash};

fn graph(modules: usize, spans: &[usize], delay: usize) -> Graph {
    Graph::new(modules, &Graph::skips_of_spans(modules, spans, delay).unwrap()).unwrap()
}

fn training(graph: &Graph, frames: usize, boundary: Boundary, loss: LossAt) -> Result<Schedule> {
    Schedule::training(graph, frames, Rule::SkipSideways, Stash::None, boundary, loss)
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

fn by(rule: Rule, graph: &Graph, frames: usize, loss: LossAt) -> Schedule {
    Schedule::training(graph, frames, rule, Stash::None, Boundary::Flow, loss).unwrap()
}

/// When module `i` does which forward and backward passes, and what comes (output.the receiver's step>the own step).
fn ticks(schedule: &Schedule, i: usize) -> String {
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
fn all_forward_all_backward() {
    let chain = graph(3, &[], 1);
    let of = |graph: &Graph, i| ticks(&by(Rule::Gpipe, graph, 4, LossAt::EveryStep), i);
    assert_eq!(of(&chain, 1), "0:F0 1:F1 2:F2 3:F3 8:+0.3>3B3 9:+0.2>2B2 10:+0.1>1B1 11:+0.0>0B0");
    assert_eq!(of(&chain, 2), "1:F0 2:F1 3:F2 4:F3 7:+0.3>3B3 8:+0.2>2B2 9:+0.1>1B1 10:+0.0>0B0");
    assert_eq!(of(&chain, 3), "2:F0 3:F1 4:F2 5:F3 6:B3 7:B2 8:B1 9:B0");
    // Module 3 reads module 1's next step through the skip, and its last one twice: both cotangents go to step 3. They come a
    // tick before the main path's for the same step, and the sum waits.
    assert_eq!(
        of(&graph(3, &[2], 1), 1),
        "0:F0 1:F1 2:F2 3:F3 7:+1.3>3 8:+1.2>3+0.3>3B3 9:+1.1>2+0.2>2B2 10:+1.0>1+0.1>1B1 11:+0.0>0B0"
    );
    let schedule = by(Rule::Gpipe, &chain, 4, LossAt::EveryStep);
    assert_eq!((schedule.period(), schedule.mean_over()), (2 * (4 + 2), Some(4)));
    assert_eq!(
        [1, 2, 3].map(|i| (schedule.kept(i), schedule.kept_at_once(i), schedule.sums(i))),
        [
            (4, 4, 1),
            (4, 4, 1),
            // A loss's gradient is made in the forward pass, and waits.
            (4, 4, 4)
        ]
    );
    assert_eq!(schedule, by(Rule::Bp, &chain, 4, LossAt::EveryStep));
}

/// As with stash, and the last 2 (D - i) cotangents are waited for; clips shorter than the way back wait between.
#[test]
fn one_forward_one_backward() {
    let chain = graph(3, &[], 1);
    let of = |graph: &Graph, frames, i| ticks(&by(Rule::OneForwardOneBackward, graph, frames, LossAt::EveryStep), i);
    assert_eq!(of(&chain, 5, 1), "0:F0 1:F1 2:F2 3:F3 4:F4+0.0>0B0 5:+0.1>1B1 6:+0.2>2B2 7:+0.3>3B3 8:+0.4>4B4");
    assert_eq!(of(&chain, 5, 2), "1:F0 2:F1 3:F2+0.0>0B0 4:F3+0.1>1B1 5:F4+0.2>2B2 6:+0.3>3B3 7:+0.4>4B4");
    assert_eq!(of(&chain, 5, 3), "2:F0B0 3:F1B1 4:F2B2 5:F3B3 6:F4B4");
    assert_eq!(of(&chain, 2, 1), "0:F0 1:F1 4:+0.0>0B0 5:+0.1>1B1");
    // The skip's cotangents, the held step's among them, are 2 s - d - 1 = 2 and s - 1 = 1 ticks early.
    assert_eq!(
        of(&graph(3, &[2], 1), 4, 1),
        "0:F0 1:F1 2:F2 3:F3+1.0>1 4:+1.1>2+0.0>0B0 5:+1.2>3+0.1>1B1 6:+1.3>3+0.2>2B2 7:+0.3>3B3"
    );
    // Without a loss above them the last steps of module 3 have no backward pass, and those below have none.
    let future = by(Rule::OneForwardOneBackward, &chain, 5, LossAt::Ahead(2));
    assert_eq!(ticks(&future, 3), "2:F0B0 3:F1B1 4:F2B2 5:F3 6:F4");
    assert_eq!(ticks(&future, 1), "0:F0 1:F1 2:F2 3:F3 4:F4+0.0>0B0 5:+0.1>1B1 6:+0.2>2B2");
    let schedule = by(Rule::OneForwardOneBackward, &chain, 9, LossAt::EveryStep);
    assert_eq!((schedule.period(), schedule.mean_over(), future.mean_over()), (9 + 4, Some(9), Some(3)));
    assert_eq!([1, 2, 3].map(|i| (schedule.kept(i), schedule.kept_at_once(i))), [(5, 5), (3, 3), (1, 1)]);
}

/// Every step has its backward pass if a loss is above it, whatever the rule, clips of one frame too.
#[test]
fn exact_rules_leave_nothing_out() {
    for (spans, delay) in [(&[][..], 1), (&[2, 3], 1), (&[2, 5], 2)] {
        let graph = graph(6, spans, delay);
        for frames in 1..=19 {
            for rule in [Rule::OneForwardOneBackward, Rule::Gpipe] {
                let schedule = by(rule, &graph, frames, LossAt::EveryStep);
                for i in 1..=6 {
                    let mut steps: Vec<usize> = schedule.backwards(i).map(|backward| backward.step).collect();
                    steps.sort();
                    assert_eq!(steps, (0..frames).collect::<Vec<_>>(), "{rule}, T = {frames}, module {i}");
                    let first = schedule.forwards(i).next().unwrap();
                    assert!(first.receive.iter().all(Option::is_some), "{rule}, T = {frames}, module {i}");
                }
                assert!(runs_through(&graph, &schedule, 3, 0), "{rule}, T = {frames}, {spans:?} {delay}");
            }
        }
    }
}

/// The ticks of module `i` with `stash`: forward pass, arrivals (output, the receiver's step, the own step), backward pass.
fn stashed(graph: &Graph, frames: usize, i: usize) -> String {
    let schedule = stash(graph, frames);
    let cells = schedule.window(i).iter().map(|tick| {
        let forward = tick.forward.as_ref().unwrap();
        let arrivals = tick.cotangents.iter().map(|a| format!("+{}.{}>{}", a.output, a.sent_at, a.step));
        let sends = |send: &[bool]| send.iter().map(|&s| if s { '^' } else { '-' }).collect::<String>();
        let backward = tick.backward.as_ref().map(|b| format!("B{}{}", b.step, sends(&b.send)));
        format!("F{}{}{}", forward.step, arrivals.collect::<String>(), backward.unwrap_or_default())
    });
    cells.collect::<Vec<_>>().join(" ")
}

fn stash(graph: &Graph, frames: usize) -> Schedule {
    let (rule, kept) = (Rule::SkipSideways, Stash::Activations);
    Schedule::training(graph, frames, rule, kept, Boundary::Flow, LossAt::EveryStep).unwrap()
}

/// Each cotangent meets the step it belongs to, 2 (D - i) steps later; what would come after the window is not sent.
#[test]
fn stash_waits_for_the_cotangent() {
    let chain = graph(3, &[], 1);
    assert_eq!(stashed(&chain, 6, 1), "F0 F1 F2 F3 F4+0.0>0B0 F5+0.1>1B1");
    assert_eq!(stashed(&chain, 6, 2), "F0 F1 F2+0.0>0B0^ F3+0.1>1B1^ F4+0.2>2B2- F5+0.3>3B3-");
    assert_eq!(stashed(&chain, 6, 3), "F0B0^ F1B1^ F2B2^ F3B3^ F4B4- F5B5-");
    // The skip's cotangent, of module 3's step v for the own step v + 1, is 2 s - d - 1 = 2 ticks early.
    assert_eq!(stashed(&graph(3, &[2], 1), 6, 1), "F0 F1 F2 F3+1.0>1 F4+0.0>0B0 F5+0.1>1B1");
    // Aligned, of span 2 and delay 2: one tick early.
    assert_eq!(stashed(&graph(3, &[2], 2), 6, 1), "F0 F1 F2 F3+1.0>0 F4+1.1>1+0.0>0B0 F5+0.1>1B1");
    let schedule = stash(&graph(3, &[2], 1), 20);
    assert_eq!([1, 2, 3].map(|i| schedule.kept(i)), [5, 3, 1]);
    assert_eq!([1, 2, 3].map(|i| schedule.sums(i)), [3, 1, 1]);
    assert_eq!([1, 2, 3].map(|i| schedule.kept_at_once(i)), [5, 3, 1]);
    let short = stash(&chain, 6);
    assert_eq!([1, 2, 3].map(|i| (short.kept(i), short.kept_at_once(i))), [(5, 2), (3, 3), (1, 1)]);
    assert_eq!([1, 2, 3].map(|i| training(&chain, 9, Boundary::Flow, LossAt::EveryStep).unwrap().kept(i)), [1, 1, 1]);
}

/// What is kept is used, and nothing is kept that is not.
#[test]
fn what_is_kept_is_used() {
    for (spans, ahead) in [(&[][..], None), (&[2], None), (&[2, 3], Some(3)), (&[5], Some(2))] {
        let graph = graph(6, spans, 1);
        let loss = ahead.map_or(LossAt::EveryStep, LossAt::Ahead);
        let kinds = [Stash::None, Stash::Inputs, Stash::Activations];
        for (rule, kept) in [Rule::SkipSideways, Rule::OneForwardOneBackward, Rule::Gpipe]
            .into_iter()
            .flat_map(|rule| kinds.map(|kept| (rule, kept)))
        {
            let schedule = Schedule::training(&graph, 15, rule, kept, Boundary::Flow, loss).unwrap();
            for i in 1..=6 {
                let mut used: Vec<usize> = schedule.backwards(i).map(|b| b.step).collect();
                used.sort();
                let keeps: Vec<usize> =
                    schedule.forwards(i).filter(|f| f.keep != Keep::Nothing).map(|f| f.step).collect();
                assert!(keeps == used && !used.is_empty(), "module {i}: {keeps:?} {used:?}");
                let again = schedule.forwards(i).filter(|f| f.keep == Keep::Inputs).count();
                assert_eq!(again > 0, kept == Stash::Inputs && (i < 6 || rule == Rule::Gpipe), "module {i}");
                assert_eq!(schedule.recomputes(i), again > 0);
            }
        }
    }
}

/// With `stash` a clip of 2 D - 1 frames trains module 1, whatever the skips; one frame less is refused, and so is what does not
/// go with it.
#[test]
fn stash_is_refused_where_it_cannot_be() {
    let graph = graph(4, &[2, 3], 1);
    let of =
        |frames, rule, boundary| Schedule::training(&graph, frames, rule, Stash::Inputs, boundary, LossAt::EveryStep);
    assert_eq!(of(7, Rule::SkipSideways, Boundary::Flow).unwrap().backwards(1).count(), 1);
    for (frames, rule, boundary, what) in [
        (6, Rule::SkipSideways, Boundary::Flow, "from 7 frames on"),
        (9, Rule::SkipSideways, Boundary::Cut, "train.boundary"),
    ] {
        let text = of(frames, rule, boundary).unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    }
}

/// The rules with delays and boundaries.
const RULES: [(usize, Rule, Stash, Boundary); 14] = [
    (1, Rule::SkipSideways, Stash::None, Boundary::Flow),
    (2, Rule::SkipSideways, Stash::None, Boundary::Flow),
    (1, Rule::SkipSideways, Stash::None, Boundary::Cut),
    (2, Rule::SkipSideways, Stash::None, Boundary::Cut),
    (1, Rule::SkipSideways, Stash::Activations, Boundary::Flow),
    (2, Rule::SkipSideways, Stash::Inputs, Boundary::Flow),
    (1, Rule::OneForwardOneBackward, Stash::None, Boundary::Flow),
    (2, Rule::OneForwardOneBackward, Stash::Inputs, Boundary::Flow),
    (1, Rule::OneForwardOneBackward, Stash::None, Boundary::Cut),
    (2, Rule::OneForwardOneBackward, Stash::None, Boundary::Cut),
    (1, Rule::Gpipe, Stash::None, Boundary::Flow),
    (2, Rule::Gpipe, Stash::Inputs, Boundary::Flow),
    (1, Rule::Gpipe, Stash::None, Boundary::Cut),
    (2, Rule::Gpipe, Stash::None, Boundary::Cut),
];

/// What is sent is what is received, in the same order, on every edge and in both directions.
#[test]
fn every_message_sent_is_received() {
    let mut edges = 0;
    for d in 1..=6 {
        for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5]] {
            let spans: Vec<usize> = spans.iter().copied().filter(|&s| s < d).collect();
            for (delay, rule, stash, boundary) in RULES {
                let graph = graph(d, &spans, delay);
                let schedule = Schedule::training(&graph, 16, rule, stash, boundary, LossAt::EveryStep).unwrap();
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
    assert!(edges > 400, "{edges}");
}

/// A message takes a tick; a sum is complete before it is used, and used once.
#[test]
fn messages_take_a_tick_and_sums_are_complete() {
    for (delay, rule, stash, boundary) in RULES {
        let graph = graph(5, &[2, 3], delay);
        let schedule = Schedule::training(&graph, 12, rule, stash, boundary, LossAt::EveryStep).unwrap();
        for i in 1..=5 {
            let mut done = Vec::new();
            for tick in schedule.window(i) {
                for arrival in &tick.cotangents {
                    let edge = graph.outputs(i).nth(arrival.output).unwrap();
                    let made = schedule
                        .window(edge.to)
                        .iter()
                        .find(|there| there.backward.as_ref().is_some_and(|backward| backward.step == arrival.sent_at));
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

/// Freely running modules, every queue holding as many messages as the edge's delay: all clips finish.
#[test]
fn bounded_queues_never_deadlock() {
    for spans in [&[][..], &[2], &[3], &[2, 3], &[2, 5], &[5]] {
        for (delay, rule, stash, boundary) in RULES {
            let (graph, loss) = (graph(6, spans, delay), LossAt::EveryStep);
            for lowest in [1, 3] {
                let schedule = Schedule::training_from(&graph, 14, rule, stash, boundary, loss, lowest).unwrap();
                assert!(runs_through(&graph, &schedule, 3, 0), "{rule} {spans:?} {delay} {boundary:?} {lowest}");
                // With one place less they do.
                assert!(!runs_through(&graph, &schedule, 3, 1), "{rule} {spans:?} {delay} {boundary:?} {lowest}");
            }
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
