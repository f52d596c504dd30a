//! The page.

use std::fmt::Write;

use super::beside::Beside;
use super::chart::{Chart, Line};
use super::limits::{Limit, history};
use super::network::drawing;
use super::run::{Batch, Run, Validation};
use crate::Result;
use crate::checkpoint::best::Metric;
use crate::metrics::PHASES;
use crate::plan::profile::median;
use crate::study::page::escaped;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222;background:#fff}\
    table{border-collapse:collapse;font-size:13px;margin:1em 0}td,th{padding:3px 8px;border-bottom:1px solid #bbb;text-align:right}\
    td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}.wide{overflow-x:auto}\
    .plots{display:flex;flex-wrap:wrap;gap:1em}.plots>div{flex:1 1 480px;break-inside:avoid}pre{background:#8882;padding:1em;overflow:auto}\
    .bar{display:flex;height:18px;width:100%;min-width:300px}.bar>i{display:block;height:100%}.key{font-size:13px;display:inline-block;margin-right:1em}\
    .key>i{display:inline-block;width:11px;height:11px;margin-right:4px}.problem,.missing{color:#b00}figure{margin:1em 0}caption{text-align:left;font-weight:bold}\
    @media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}svg,figure img{filter:invert(1) hue-rotate(180deg)}.problem,.missing{color:#f77}}\
    @media print{body{max-width:none;color:#000;background:#fff}.bar,.key{print-color-adjust:exact}}";

/// Phases in the order of a time account, each with its colour: work in blues, waits in reds.
const PHASE: [(&str, &str); PHASES] = [
    ("forward", "#1f77b4"),
    ("wait for activations", "#d62728"),
    ("backward", "#4a9bd9"),
    ("wait for cotangents", "#ff7f6b"),
    ("optimiser", "#0b3d66"),
    ("data", "#2ca02c"),
    ("send", "#bcbd22"),
    ("wait for a core", "#e377c2"),
    ("other", "#7f7f7f"),
    ("validation", "#9467bd"),
    ("all-reduce", "#ff9f1c"),
    ("checkpoint", "#17becf"),
];
/// Where work stands in it.
const WORK: [usize; 3] = [0, 2, 4];

/// One page of `runs`, `studies` (title and content as HTML) and what lies `beside` them.
///
/// # Errors
/// [`crate::Error::Run`] if a chart cannot be drawn.
pub fn page(runs: &[Run], studies: &[(String, String)], beside: &[Beside]) -> Result<String> {
    let names: Vec<&str> =
        runs.iter().map(|run| run.name.as_str()).chain(studies.iter().map(|(title, _)| title.as_str())).collect();
    let title = escaped(&names.join(", "));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    if !runs.is_empty() {
        overview(&mut page, runs)?;
    }
    for run in runs {
        let _ = writeln!(page, "<h2>{}: network</h2>", escaped(&run.name));
        match run.attempts.last().and_then(drawing) {
            Some(svg) => {
                let _ = writeln!(
                    page,
                    "<div class=\"wide\">{svg}</div><p>Memory as planned; on edges the bytes of a batch's activations; colours are \
                     hosts.</p>"
                );
            }
            None => page += "<p>Not on record (attempts.jsonl).</p>\n",
        }
        modules(&mut page, run)?;
        starts(&mut page, run);
    }
    for one in beside {
        page += &one.html()?;
    }
    for (title, body) in studies {
        if names.len() > 1 {
            let _ = writeln!(page, "<h2>{}</h2>", escaped(title));
        }
        page += body;
    }
    for run in runs {
        if let Some(config) = &run.config {
            let name = escaped(&run.name);
            let _ = writeln!(
                page,
                "<details><summary>Configuration of {name}</summary><pre>{}</pre></details>",
                escaped(config)
            );
        }
    }
    let _ = writeln!(page, "<p>sideways {}</p>\n</body></html>", env!("CARGO_PKG_VERSION"));
    Ok(page)
}

/// What the runs came to: the table, what is missing, and the charts that they share.
fn overview(page: &mut String, runs: &[Run]) -> Result<()> {
    summary(page, runs);
    for run in runs {
        for problem in &run.problems {
            let _ = writeln!(page, "<p class=\"problem\">{}: {}</p>", escaped(&run.name), escaped(problem));
        }
    }
    for run in runs {
        held_back(page, run);
    }
    *page += "<div class=\"plots\">\n";
    for chart in overlaid(runs) {
        if let Some(svg) = chart.svg()? {
            let _ = writeln!(page, "<div>{svg}</div>");
        }
    }
    *page += "</div>\n<p>A line is the mean of a stretch of batches, the band around it from its least to its most; dots are validations; \
              dashed: where a run was stopped and went on.</p>\n";
    Ok(())
}

/// What limited the run, and since when.
fn held_back(page: &mut String, run: &Run) {
    let batches: Vec<(u64, Option<Limit>)> = run.batches.iter().map(|batch| (batch.batches, batch.limit)).collect();
    let Some(history) = history(&batches) else { return };
    let shares: Vec<String> = history
        .shares
        .iter()
        .map(|(limit, share)| format!("{limit} ({:.0} % of the batches)", 100.0 * share))
        .collect();
    let since = match history.since > run.batches[0].batches {
        true => format!("; since batch {} most by {}", history.since, history.last),
        false => String::new(),
    };
    let _ = writeln!(page, "<p>{} was held back by {}{since}.</p>", escaped(&run.name), shares.join("; "));
}

/// A row a start: when, where, with what.
fn starts(page: &mut String, run: &Run) {
    if run.attempts.is_empty() {
        return;
    }
    *page += "<h3>Starts</h3>\n<div class=\"wide\"><table><tr><th>begun (UTC)</th><th>after batch</th><th>ranks</th><th>hosts</th>\
              <th>job</th><th>requeues</th><th>processor</th><th>driver</th><th>MPI</th><th>sideways</th></tr>\n";
    for attempt in &run.attempts {
        let mut hosts: Vec<&str> = attempt.hosts.iter().map(|(name, _)| name.as_str()).collect();
        hosts.dedup();
        let more = if hosts.len() > 4 { format!(" and {} more", hosts.len() - 4) } else { String::new() };
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let cells = [
            utc(attempt.begun),
            attempt.first.to_string(),
            attempt.ranks().to_string(),
            hosts[..hosts.len().min(4)].join(", ") + &more,
            or_none(&attempt.job),
            attempt.requeues.to_string(),
            attempt.processor.clone(),
            or_none(&attempt.driver),
            attempt.mpi.as_deref().and_then(|mpi| mpi.lines().next()).unwrap_or("-").to_string(),
            attempt.version.clone(),
        ];
        *page += "<tr>";
        cells.iter().for_each(|cell| *page += &format!("<td>{}</td>", escaped(cell)));
        *page += "</tr>\n";
    }
    *page += "</table></div>\n";
}

/// A row a run.
fn summary(page: &mut String, runs: &[Run]) {
    *page += "<div class=\"wide\"><table><tr><th>run</th><th>rule</th><th>batches</th><th>loss, last tenth</th><th>top-1, last tenth</th>\
              <th>best validation</th><th>frames/s, median</th><th>seconds</th><th>left out</th><th>damaged videos</th><th>resumed</th></tr>\n";
    for run in runs {
        let tenth = &run.batches[run.batches.len() - run.batches.len().div_ceil(10)..];
        let mean = |of: fn(&Batch) -> Option<f64>| {
            let values: Vec<f64> = tenth.iter().filter_map(of).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let mut speeds: Vec<f64> = run.batches.iter().filter_map(|batch| batch.frames_per_second).collect();
        let best = run.best.as_ref().map_or("-".into(), |best| match best.metric {
            Metric::Top1 => format!("top-1 {:.2} % after {}", 100.0 * best.value, best.batches),
            Metric::Mse => format!("MSE {:.6} after {}", best.value, best.batches),
        });
        // Each attempt counts from its own begin: its last line says how long it was.
        let ends = run.batches.windows(2).filter(|pair| pair[1].elapsed < pair[0].elapsed).map(|pair| pair[0].elapsed);
        let seconds = ends.sum::<f64>() + run.batches.last().map_or(0.0, |batch| batch.elapsed);
        let show = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        let cells = [
            run.name.clone(),
            run.rule.clone(),
            run.batches.last().map_or("-".into(), |batch| batch.batches.to_string()),
            show(mean(|batch| batch.loss), 4),
            mean(|batch| batch.top1).map_or("-".into(), |share| format!("{:.1} %", 100.0 * share)),
            best,
            show((!speeds.is_empty()).then(|| median(&mut speeds)), 0),
            format!("{seconds:.1}"),
            run.batches.iter().map(|batch| batch.skipped).sum::<u64>().to_string(),
            run.batches.iter().map(|batch| batch.videos_skipped).sum::<u64>().to_string(),
            run.resumed.len().to_string(),
        ];
        *page += "<tr>";
        cells.iter().for_each(|cell| *page += &format!("<td>{}</td>", escaped(cell)));
        *page += "</tr>\n";
    }
    *page += "</table></div>\n";
}

/// The charts that all runs share.
fn overlaid(runs: &[Run]) -> Vec<Chart> {
    let name = |run: &Run, what: &str| if runs.len() > 1 { format!("{}, {what}", run.name) } else { what.to_string() };
    let marks: Vec<f64> = match runs {
        [run] => run.resumed.iter().map(|&batch| batch as f64).collect(),
        _ => Vec::new(),
    };
    let chart =
        |title: &str, unit: &str, batch: fn(&Batch) -> Option<f64>, validation: fn(&Validation) -> Option<f64>| {
            let both = runs.iter().flat_map(|run| {
                let training = Line { name: name(run, "training"), points: run.series(batch), dots: false };
                let validated = Line { name: name(run, "validation"), points: run.validated(validation), dots: true };
                [training, validated]
            });
            let lines = both.filter(|line| !line.points.is_empty()).collect();
            Chart { title: title.into(), unit: unit.into(), lines, marks: marks.clone(), rises: unit == "%" }
        };
    let mut charts = vec![chart("Loss", "loss a step", |batch| batch.loss, |validation| validation.loss)];
    charts.push(chart(
        "Top-1 accuracy",
        "%",
        |batch| batch.top1.map(|share| 100.0 * share),
        |validation| validation.top1.map(|share| 100.0 * share),
    ));
    let mut frames = chart("Future frames", "MSE of pixels", |_| None, |validation| validation.mse);
    let copies = runs.iter().map(|run| Line {
        name: name(run, "copy of the newest frame"),
        points: run.validated(|validation| validation.copy_mse),
        dots: false,
    });
    frames.lines.extend(copies.filter(|line| !line.points.is_empty()));
    charts.push(frames);
    charts.push(chart("Speed", "frames/s", |batch| batch.frames_per_second, |_| None));
    for (title, unit, of) in [
        (
            "Left out: losses, cotangents and updates that were not finite",
            "so far",
            (|b| b.skipped) as fn(&Batch) -> u64,
        ),
        ("Damaged videos passed over", "so far", |b| b.videos_skipped),
    ] {
        let line = |run: &Run| {
            let mut sum = 0;
            let points = run.batches.iter().map(|batch| {
                sum += of(batch);
                (batch.batches as f64, sum as f64)
            });
            Line { name: name(run, "training"), points: points.collect(), dots: false }
        };
        let some = runs.iter().any(|run| run.batches.iter().any(|batch| of(batch) > 0));
        let lines = if some { runs.iter().map(line).collect() } else { Vec::new() };
        charts.push(Chart { title: title.into(), unit: unit.into(), lines, marks: marks.clone(), rises: true });
    }
    charts
}

/// `2026-05-04 12:34`, of seconds since 1970.
fn utc(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or("-".into(), |time| time.strftime("%Y-%m-%d %H:%M").to_string())
}

/// Gradients and time by module.
fn modules(page: &mut String, run: &Run) -> Result<()> {
    if run.modules.is_empty() {
        return Ok(());
    }
    let _ = writeln!(page, "<h2>{}: modules</h2>", escaped(&run.name));
    let norms = |i: usize| Line {
        name: format!("module {}", i + 1),
        points: run.series(|batch| batch.grad_norms.get(i).copied()),
        dots: false,
    };
    let gradients = Chart {
        title: "Norm of the gradient".into(),
        unit: "norm".into(),
        lines: (0..run.modules.len()).map(norms).collect(),
        ..Chart::default()
    };
    if let Some(svg) = gradients.svg()? {
        let _ = writeln!(page, "<div class=\"plots\"><div>{svg}</div></div>");
    }
    *page += "<p>";
    for (phase, colour) in PHASE {
        let _ = write!(page, "<span class=\"key\"><i style=\"background:{colour}\"></i>{phase}</span>");
    }
    *page +=
        "</p>\n<table><tr><th>module</th><th>rank</th><th>seconds</th><th>work</th><th>where its time went</th></tr>\n";
    let mut work = Vec::new();
    let mut longest = 0.0f64;
    for (n, module) in run.modules.iter().enumerate() {
        let all: f64 = module.seconds.iter().sum();
        let busy: f64 = WORK.iter().map(|&phase| module.seconds[phase]).sum();
        work.push(busy);
        longest = longest.max(all);
        let mut bar = String::new();
        for ((phase, colour), seconds) in PHASE.iter().zip(module.seconds) {
            let share = 100.0 * seconds / all.max(1e-9);
            if share >= 0.1 {
                let _ = write!(
                    bar,
                    "<i style=\"width:{share:.1}%;background:{colour}\" title=\"{phase}: {share:.1} %\"></i>"
                );
            }
        }
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{all:.1}</td><td>{:.1} %</td><td><div class=\"bar\">{bar}</div></td></tr>",
            n + 1,
            module.rank,
            100.0 * busy / all.max(1e-9)
        );
    }
    *page += "</table>\n";
    let most = work.iter().copied().fold(0.0, f64::max).max(1e-9);
    let _ = writeln!(
        page,
        "<p>Load balance {:.3} (mean over maximum of the modules' work), communication efficiency {:.3} (the busiest module's work over its \
         time; where modules share cores, waits for one are in it).</p>",
        work.iter().sum::<f64>() / work.len() as f64 / most,
        most / longest.max(1e-9)
    );
    Ok(())
}
