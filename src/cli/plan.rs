//! `sideways plan`: how a network is cut, and the schedule as a picture.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::config::Config;
use crate::engine::setup::Setup;
use crate::schedule::{Boundary, StepPlan};

/// Arguments of `sideways plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The run's configuration (TOML).
    pub config: PathBuf,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Ranks to plan for, where model.modules and model.cuts are not set.
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Draw who does what at which tick.
    #[arg(long)]
    pub ticks: bool,
    /// With --ticks: how many clips to draw.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "ticks")]
    pub clips: u64,
}

/// Runs it.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub fn run(args: &PlanArgs) -> Result<()> {
    let config = Config::load(&args.config, &args.set)?;
    let modules = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).or(args.ranks);
    let setup = Setup::dry(&config, args.ranks.or(modules).unwrap_or(1).min(modules.unwrap_or(1)))?;
    if args.ticks {
        print!("{}", picture(&setup, args.clips));
        return Ok(());
    }
    for (i, module) in setup.network.modules.iter().enumerate() {
        println!(
            "module {}: {:?} -> {:?}, {} parameters, {:.1} MFLOP a sample",
            i + 1,
            module.main,
            module.output,
            module.params,
            module.flops as f64 / 1e6
        );
        for skip in &module.skips {
            println!("    skip from module {}, {:?} as sent", skip.from, skip.shape);
        }
        for n in module.layers.clone() {
            println!(
                "    layer {n}: {}",
                toml::to_string(&setup.network.layers[n]).unwrap_or_default().replace('\n', "  ")
            );
        }
    }
    Ok(())
}

/// The schedule as text: a row a module, a column a tick.
pub fn picture(setup: &Setup, clips: u64) -> String {
    let (d, frames) = (setup.grid.modules, setup.schedule.frames());
    let ticks = clips as usize * frames + d - 1;
    let mut text = format!(
        "Each module works on one frame a tick. F3: forward only, on the clip's main-path frame 3; B3: also backward,\n\
         with the cotangent that has just arrived. Clips alternate between upper and lower case. `.`: idle.\n\
         {d} modules, clips of T = {frames} frames, boundary {}.\n\n",
        if setup.config.train.boundary == Boundary::Flow { "flow" } else { "cut" }
    );
    let width = 1 + frames.saturating_sub(1).to_string().len().max(ticks.to_string().len());
    text += &format!("{:<10}", "tick");
    (0..ticks).for_each(|tick| text += &format!("{tick:>width$} "));
    text.push('\n');
    for i in 1..=d {
        text += &format!("{:<10}", format!("module {i}"));
        let mut row = vec![".".to_string(); ticks];
        for clip in 0..clips {
            for (t, step) in setup.schedule.steps(i).iter().enumerate() {
                row[setup.schedule.tick(clip, i, t) as usize] = cell(step, t, clip);
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
    for i in 1..=d {
        let first = setup.schedule.steps(i).iter().position(|s| s.backward);
        let count = setup.schedule.steps(i).iter().filter(|s| s.backward).count();
        if let Some(first) = first {
            text += &format!("module {i}: first cotangent at step {first}, {count} steps with backward work a clip\n");
        }
    }
    text
}

fn cell(step: &StepPlan, t: usize, clip: u64) -> String {
    let letter = match (step.backward, clip % 2) {
        (true, 0) => 'B',
        (true, _) => 'b',
        (false, 0) => 'F',
        (false, _) => 'f',
    };
    format!("{letter}{t}")
}
