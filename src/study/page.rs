//! A study as one page that needs nothing else: plots, table, what is missing and why, and where it was measured.

use super::folder::Study;
use super::plot::Chart;
use super::table::Row;
use crate::Result;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}\
    table{border-collapse:collapse;font-size:13px;margin:1em 0}td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}\
    td:first-child,th:first-child{text-align:left}.missing{color:#a00}svg{max-width:100%;height:auto}\
    .plots{display:flex;flex-wrap:wrap;gap:1em}.plots>div{flex:1 1 480px}pre{background:#f6f6f6;padding:1em;overflow:auto}\
    .wide{overflow-x:auto}";

/// The page. `note` says where the study ran.
///
/// # Errors
/// [`crate::Error::Run`] if a plot cannot be drawn.
pub fn page(study: &Study, rows: &[Row], charts: &[Chart], note: &str) -> Result<String> {
    let title = escaped(&title(study));
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n{}</body></html>\n",
        body(study, rows, charts, note)?
    ))
}

/// What the study is called.
pub fn title(study: &Study) -> String {
    format!("Scaling study {}", study.dir().file_name().unwrap_or_default().to_string_lossy())
}

/// The page's content, for another page.
///
/// # Errors
/// As of [`page`].
pub fn body(study: &Study, rows: &[Row], charts: &[Chart], note: &str) -> Result<String> {
    let request = &study.plan.request;
    let mut page = format!(
        "<p>Axis: {}. {} run(s) a point of {} batches that count; medians, with the least and the most as bars. {}</p>\n",
        request.axis,
        request.repeat,
        request.batches,
        escaped(note)
    );
    page += "<div class=\"plots\">";
    for chart in charts {
        page += &format!("<div>{}</div>", chart.svg()?);
    }
    page += "</div>\n<div class=\"wide\"><table><tr>";
    for column in COLUMNS {
        page += &format!("<th>{column}</th>");
    }
    page += "</tr>\n";
    for row in rows {
        let cells = cells(row);
        let class = if row.runs == 0 { " class=\"missing\"" } else { "" };
        page += &format!("<tr{class}>");
        cells.iter().for_each(|cell| page += &format!("<td>{}</td>", escaped(cell)));
        page += "</tr>\n";
    }
    page += "</table></div>\n";
    page += "<p>Ratio: measured over predicted tick. Schedule: measured tick over the simulated one in which ranks compute as long as they \
             did in the run. Speed-up and efficiency are to the same rule's first point. Load balance: mean over maximum of the ranks' computing; \
             communication: what the busiest rank does not wait; computation: the first point's seconds of computing a frame over these; \
             global: the product. Fill: the share of the schedule in which even the busiest rank waits. The prediction knows neither \
             the links' latency nor the all-reduce. All columns are in <code>scaling.csv</code>.</p>\n";
    let missing: Vec<&Row> = rows.iter().filter(|row| row.runs < request.repeat).collect();
    if !missing.is_empty() {
        page += "<h2>Missing</h2><ul>\n";
        for row in missing {
            let why = if row.reason.is_empty() { String::new() } else { format!(": {}", row.reason) };
            let item = format!("{}: {} of {} runs, {}{why}", row.point, row.runs, request.repeat, row.status);
            page += &format!("<li>{}</li>\n", escaped(&item));
        }
        page += "</ul>\n";
    }
    page += "<h2>Where</h2><ul>\n";
    let of = |what: &str, get: fn(&Row) -> &Option<String>| {
        let mut all: Vec<&str> = rows.iter().filter_map(|row| get(row).as_deref()).collect();
        all.sort_unstable();
        all.dedup();
        let text = if all.is_empty() { "-".to_string() } else { all.join("; ") };
        format!("<li>{what}: {}</li>\n", escaped(&text))
    };
    page += &of("processor", |row| &row.processor);
    page += &of("nodes", |row| &row.node_list);
    page += &of("jobs", |row| &row.job);
    page += &of("MPI", |row| &row.mpi);
    page += &of("driver", |row| &row.driver);
    page += &of("commit", |row| &row.commit);
    page += &of("program (xxh3)", |row| &row.build);
    page += &format!(
        "</ul>\n<details><summary>Configuration</summary><pre>{}</pre></details>\n",
        escaped(&study.plan.config)
    );
    Ok(page)
}

/// The columns that people read; `scaling.csv` has all.
pub const COLUMNS: [&str; 21] = [
    "point",
    "ranks",
    "D",
    "R",
    "B",
    "frames/s",
    "min",
    "max",
    "n",
    "tick ms",
    "predicted",
    "ratio",
    "schedule",
    "speed-up",
    "efficiency",
    "balance",
    "communication",
    "computation",
    "global",
    "fill",
    "MiB/rank",
];

/// A row in these columns. What is missing is said in the place of the speed.
pub fn cells(row: &Row) -> [String; 21] {
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    let missing = format!("missing ({})", row.status);
    [
        row.point.clone(),
        row.ranks.to_string(),
        row.modules.to_string(),
        row.replicas.to_string(),
        row.batch.to_string(),
        row.frames_per_second.map_or(missing, |speed| format!("{speed:.1}")),
        number(row.frames_per_second_min, 1),
        number(row.frames_per_second_max, 1),
        row.runs.to_string(),
        number(row.tick_ms, 3),
        number(row.predicted_tick_ms, 3),
        number(row.measured_over_predicted, 3),
        number(row.measured_over_schedule, 3),
        number(row.speed_up, 2),
        number(row.efficiency, 3),
        number(row.load_balance, 3),
        number(row.communication_efficiency, 3),
        number(row.computation_scaling, 3),
        number(row.global_efficiency, 3),
        number(row.fill, 3),
        number(row.peak_mib_rank, 0),
    ]
}

/// Text as HTML.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
