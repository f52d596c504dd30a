//! `sideways plan --ticks`: the schedule as a picture, or as CSV.

use serde::Serialize;

use crate::method::schedule::Tick;
use crate::method::{Boundary, Edge, Keep, Rule, Stash};
use crate::setup::Setup;
use crate::{Error, Result};

/// The schedule as text: a row a module, a column a tick.
pub(super) fn picture(setup: &Setup, clips: u64) -> String {
    let (d, frames, schedule) = (setup.grid.modules, setup.schedule.frames(), &setup.schedule);
    let rule = setup.config.train.rule;
    let end = |i: usize| schedule.window(i).last().map_or(0, |tick| tick.at + 1);
    let ticks = (clips - 1) as usize * schedule.period() + (1..=d).map(end).max().unwrap_or(0);
    let stash = setup.config.train.stash;
    let explanation = match rule {
        Rule::Sideways | Rule::SkipSideways if stash != Stash::None => {
            "Each module works on one frame a tick. F3: forward only, on the clip's main-path frame 3; B1/F3: also backward, for\n\
             frame 1, whose cotangent is complete by then, at the activations of frame 1."
        }
        Rule::Sideways | Rule::SkipSideways => {
            "Each module works on one frame a tick. F3: forward only, on the clip's main-path frame 3; B3: also backward,\n\
             with the cotangent that has just arrived."
        }
        Rule::OneForwardOneBackward => {
            "F3: forward, on the clip's main-path frame 3; B1/F3: also backward, for frame 1, whose cotangent is complete by then, at\n\
             the activations of frame 1; B5: backward alone (in the last module F5 before it). A module waits where it has neither."
        }
        Rule::Gpipe | Rule::Bp => {
            "F3: forward, on the clip's main-path frame 3; B3: backward, at the activations kept of it, which ends the clip's\n\
             work on it. A module waits where it has neither."
        }
    };
    let with_stash = if stash == Stash::None { String::new() } else { format!(" with stash = \"{stash}\"") };
    let mut text = format!(
        "{explanation} Clips alternate between upper and lower case. `.`: idle.\n\
         {d} modules, rule {rule}{with_stash}, clips of T = {frames} frames, boundary {}.\n\n",
        if setup.config.train.boundary == Boundary::Flow { "flow" } else { "cut" }
    );
    let cells = (1..=d).flat_map(|i| schedule.window(i)).filter_map(|tick| cell(tick, 0));
    let width = cells.map(|cell| cell.len()).max().unwrap_or(0).max(1 + ticks.to_string().len());
    text += &format!("{:<10}", "tick");
    (0..ticks).for_each(|tick| text += &format!("{tick:>width$} "));
    text.push('\n');
    for i in 1..=d {
        text += &format!("{:<10}", format!("module {i}"));
        let mut row = vec![".".to_string(); ticks];
        for clip in 0..clips {
            for tick in schedule.window(i) {
                if let Some(cell) = cell(tick, clip) {
                    row[schedule.first_tick(clip) as usize + tick.at] = cell;
                }
            }
        }
        row.iter().for_each(|cell| text += &format!("{cell:>width$} "));
        text = text.trim_end().to_string() + "\n";
    }
    text.push('\n');
    for spec in &setup.network.edges {
        let e = spec.edge;
        text += &match e.lead() {
            0 => format!("{e}: step t reads module {}'s step t\n", e.from),
            lead => format!("{e}: step t reads module {}'s step t + {lead}, {lead} frame(s) newer\n", e.from),
        };
    }
    let bubble = schedule.bubble();
    if bubble > 0.0 && rule != Rule::Bp {
        text += &format!("bubble: (D - 1) / (T + D - 1) = {:.1} % of balanced work\n", 100.0 * bubble);
    }
    for i in 1..=d {
        let first = schedule.window(i).iter().find(|tick| tick.backward.is_some());
        let count = schedule.backwards(i).count();
        if rule.is_exact() {
            text += &format!("module {i}: {count} backward passes a clip; {} step(s) kept\n", schedule.kept_at_once(i));
        }
        if let (Some(first), false) = (first, rule.is_exact()) {
            let step = first.backward.as_ref().map_or(0, |backward| backward.step);
            let kept = schedule.kept(i);
            if stash != Stash::None {
                text += &format!(
                    "module {i}: backward passes for the first {count} steps of a clip, each {} tick(s) behind; {kept} step(s) kept\n",
                    kept - 1
                );
                continue;
            }
            text += &format!("module {i}: first cotangent at step {step}, {count} steps with backward work a clip\n");
        }
    }
    text
}

fn cell(tick: &Tick, clip: u64) -> Option<String> {
    let cell = match (&tick.forward, &tick.backward) {
        (Some(forward), Some(backward)) if forward.step != backward.step => {
            format!("B{}/F{}", backward.step, forward.step)
        }
        (_, Some(backward)) => format!("B{}", backward.step),
        (Some(forward), None) => format!("F{}", forward.step),
        (None, None) => return None,
    };
    Some(if clip.is_multiple_of(2) { cell } else { cell.to_ascii_lowercase() })
}

/// What a module does, as a line of CSV.
#[derive(Serialize)]
struct Action {
    clip: u64,
    /// From the run's first.
    tick: u64,
    module: usize,
    /// `F`: a forward pass; `L`: a loss; `C`: a cotangent that arrives; `B`: a backward pass.
    action: char,
    /// The module's step that it is about.
    step: usize,
    /// Whose messages come with it, and of which of their steps: `2:5`, several with spaces between.
    receives: String,
    /// Which modules are sent its outcome, with spaces between.
    sends: String,
    /// `F`: what is kept for the backward pass.
    keeps: &'static str,
}

/// The schedule of `clips` clips, a line an action: by clip, module, and in the order of its actions.
pub(super) fn csv(setup: &Setup, clips: u64) -> Result<String> {
    let failed = |e: String| Error::Run(format!("writing CSV: {e}"));
    let mut lines = csv::Writer::from_writer(Vec::new());
    for clip in 0..clips {
        for module in 1..=setup.grid.modules {
            for tick in setup.schedule.window(module) {
                let at = setup.schedule.first_tick(clip) + tick.at as u64;
                for action in actions(setup, module, tick) {
                    lines.serialize(Action { clip, tick: at, ..action }).map_err(|e| failed(e.to_string()))?;
                }
            }
        }
    }
    let bytes = lines.into_inner().map_err(|e| failed(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| failed(e.to_string()))
}

fn actions(setup: &Setup, module: usize, tick: &Tick) -> Vec<Action> {
    let graph = &setup.network.graph;
    let (inputs, outputs): (Vec<&Edge>, Vec<&Edge>) = (graph.inputs(module).collect(), graph.outputs(module).collect());
    let words = |words: Vec<String>| words.join(" ");
    let action = |action, step| Action {
        clip: 0,
        tick: 0,
        module,
        action,
        step,
        receives: String::new(),
        sends: String::new(),
        keeps: "",
    };
    let mut actions = Vec::new();
    if let Some(forward) = &tick.forward {
        let receives =
            inputs.iter().zip(&forward.receive).filter_map(|(e, step)| Some(format!("{}:{}", e.from, (*step)?)));
        let sends = outputs.iter().zip(&forward.send).filter(|(_, send)| **send).map(|(e, _)| e.to.to_string());
        let keeps = match forward.keep {
            Keep::Nothing => "nothing",
            Keep::Inputs => "inputs",
            Keep::Activations => "activations",
        };
        let (receives, sends) = (words(receives.collect()), words(sends.collect()));
        actions.push(Action { receives, sends, keeps, ..action('F', forward.step) });
        if forward.loss {
            actions.push(action('L', forward.step));
        }
    }
    for arrival in &tick.cotangents {
        let receives = format!("{}:{}", outputs[arrival.output].to, arrival.sent_at);
        actions.push(Action { receives, ..action('C', arrival.step) });
    }
    if let Some(backward) = &tick.backward {
        let sends = inputs.iter().zip(&backward.send).filter(|(_, send)| **send).map(|(e, _)| e.from.to_string());
        actions.push(Action { sends: words(sends.collect()), ..action('B', backward.step) });
    }
    actions
}
