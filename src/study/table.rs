//! What a study has measured, as a row a point: speeds, what they are beside the prediction and the first point, and where the time
//! went.
//!
//! Where it went is said in POP's terms (the European centre for performance optimisation; Wagner et al.): with b the seconds that a
//! rank computes a tick, over the number of its modules that compute at once, and t the tick,
//! *load balance* = mean(b)/max(b), *communication efficiency* = max(b)/t: what the busiest rank does not wait; *computation
//! scaling* = the first point's seconds of computing a frame over this one's; *global efficiency* is the product of all three.

use serde::{Deserialize, Serialize};

use super::folder::Study;
use super::plan::Point;
use crate::plan::profile::median;
use crate::{Error, Result};

/// What `sideways bench train --json` says of a run, as far as a study needs it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Frames a second, all replicas together.
    pub frames_per_second: f64,
    /// Milliseconds of a tick.
    pub tick_ms: f64,
    /// Peak resident memory of the largest rank, in MiB.
    pub peak_mib_rank: f64,
    /// Milliseconds of computing a tick, by rank.
    pub rank_busy_ms: Vec<f64>,
    /// How many of its modules each rank computes at once.
    pub rank_slots: Vec<usize>,
    /// The nodes' names.
    pub hosts: Vec<String>,
    /// Rank 0's processor.
    pub processor: String,
    /// The MPI library.
    pub mpi: Option<String>,
    /// NVIDIA's driver.
    pub driver: Option<String>,
    /// Rank 0's GPU.
    pub gpu: Option<Gpu>,
    /// How messages get from GPU to GPU.
    pub exchange: Option<String>,
    /// Number format of messages.
    pub wire: String,
    /// xxh3-64 of the program's file.
    pub build: String,
}

/// A GPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
}

/// A point in the table; empty where nothing was measured. The names are the columns of `scaling.csv`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// The point's name.
    pub point: String,
    /// How far it is.
    pub status: String,
    /// What grows.
    pub axis: String,
    /// Nodes.
    pub nodes: usize,
    /// Ranks.
    pub ranks: usize,
    /// D
    pub modules: usize,
    /// R
    pub replicas: usize,
    /// How gradients are made.
    pub rule: String,
    /// B, clips a replica.
    pub batch: usize,
    /// T, frames a clip.
    pub frames: usize,
    /// B · R
    pub global_batch: usize,
    /// Frames a second: the median of the runs,
    pub frames_per_second: Option<f64>,
    /// the least,
    pub frames_per_second_min: Option<f64>,
    /// the most,
    pub frames_per_second_max: Option<f64>,
    /// and how many runs there are.
    pub runs: usize,
    /// Milliseconds of a tick, the median.
    pub tick_ms: Option<f64>,
    /// What was predicted for it: by layers' times as last measured before each of its runs; the middle.
    pub predicted_tick_ms: Option<f64>,
    /// Measured over predicted tick, the middle of its runs'.
    pub measured_over_predicted: Option<f64>,
    /// Milliseconds that the schedule takes where ranks compute as long as they did, and messages take what was predicted: the simulator
    /// without the machine's swings; the middle of its runs'.
    pub schedule_tick_ms: Option<f64>,
    /// Measured over that, the middle of its runs'.
    pub measured_over_schedule: Option<f64>,
    /// Frames a second over those of the same rule's first point,
    pub speed_up: Option<f64>,
    /// that over the ratio of ranks,
    pub efficiency: Option<f64>,
    /// and which point that is.
    pub first_point: Option<String>,
    /// POP: how evenly ranks are busy.
    pub load_balance: Option<f64>,
    /// POP: what the busiest rank does not wait.
    pub communication_efficiency: Option<f64>,
    /// POP: the first point's seconds of computing a frame over these.
    pub computation_scaling: Option<f64>,
    /// POP: their product.
    pub global_efficiency: Option<f64>,
    /// The share of fill in the schedule.
    pub fill: Option<f64>,
    /// Peak resident memory of the largest rank, in MiB.
    pub peak_mib_rank: Option<f64>,
    /// How messages get from GPU to GPU; `host` where they are in host memory.
    pub exchange: Option<String>,
    /// Number format of messages.
    pub wire: Option<String>,
    /// The Slurm jobs.
    pub job: Option<String>,
    /// The nodes' names.
    pub node_list: Option<String>,
    /// The checkout's commit.
    pub commit: Option<String>,
    /// The program's hash.
    pub build: Option<String>,
    /// The MPI library.
    pub mpi: Option<String>,
    /// NVIDIA's driver.
    pub driver: Option<String>,
    /// The processor, or GPU.
    pub processor: Option<String>,
    /// Why the point failed.
    pub reason: String,
}

/// What a run says of where the time went.
struct Shares {
    load_balance: f64,
    communication: f64,
    /// Seconds of computing a frame, all ranks together.
    a_frame: f64,
}

impl Shares {
    fn of(run: &Measured, global_batch: usize) -> Self {
        let slot = |rank: usize| run.rank_slots.get(rank).copied().unwrap_or(1).max(1) as f64;
        let busy: Vec<f64> = run.rank_busy_ms.iter().enumerate().map(|(rank, ms)| ms / slot(rank)).collect();
        let most = busy.iter().copied().fold(0.0, f64::max);
        let mean = busy.iter().sum::<f64>() / busy.len().max(1) as f64;
        Shares {
            load_balance: ratio(mean, most),
            communication: ratio(most, run.tick_ms),
            a_frame: 1e-3 * run.rank_busy_ms.iter().sum::<f64>() / global_batch.max(1) as f64,
        }
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The middle of what `of` finds in all of `items`.
fn middle<T>(items: &[T], of: impl Fn(&T) -> f64) -> Option<f64> {
    let mut values: Vec<f64> = items.iter().map(of).collect();
    (!values.is_empty()).then(|| median(&mut values))
}

/// The different texts, in order, with blanks between.
fn listed(texts: impl Iterator<Item = String>) -> Option<String> {
    let mut all: Vec<String> = Vec::new();
    for text in texts {
        if !all.contains(&text) {
            all.push(text);
        }
    }
    (!all.is_empty()).then(|| all.join(" "))
}

/// All points, in the plan's order.
///
/// # Errors
/// [`Error::Input`] if a file of the study cannot be read.
pub fn rows(study: &Study) -> Result<Vec<Row>> {
    let config = crate::config::Config::parse(&study.plan.config, "plan", &[])?;
    let rows =
        study.plan.points.iter().map(|point| row(study, point, config.data.frames)).collect::<Result<Vec<_>>>()?;
    let a_frame: Vec<Option<f64>> = rows.iter().map(|(_, a_frame)| *a_frame).collect();
    let mut rows: Vec<Row> = rows.into_iter().map(|(row, _)| row).collect();
    for n in 0..rows.len() {
        // The first of the same rule that was measured.
        let first = (0..rows.len()).find(|&k| rows[k].rule == rows[n].rule && rows[k].frames_per_second.is_some());
        let (Some(first), Some(speed)) = (first, rows[n].frames_per_second) else { continue };
        let speed_up = ratio(speed, rows[first].frames_per_second.unwrap_or(0.0));
        let ranks = rows[n].ranks as f64 / rows[first].ranks as f64;
        let scaling = ratio(a_frame[first].unwrap_or(0.0), a_frame[n].unwrap_or(0.0));
        let name = rows[first].point.clone();
        let row = &mut rows[n];
        (row.speed_up, row.efficiency, row.first_point) = (Some(speed_up), Some(speed_up / ranks), Some(name));
        row.computation_scaling = Some(scaling);
        let balance = row.load_balance.unwrap_or(0.0) * row.communication_efficiency.unwrap_or(0.0);
        row.global_efficiency = Some(balance * scaling);
    }
    Ok(rows)
}

fn row(study: &Study, point: &Point, frames: usize) -> Result<(Row, Option<f64>)> {
    let (status, forecast, runs) = (study.status(point)?, study.forecast(point)?, study.runs(point)?);
    let all: Vec<&Measured> = runs.iter().map(|run| &run.measured).collect();
    let shares: Vec<Shares> = all.iter().map(|run| Shares::of(run, point.global_batch())).collect();
    let speed = |run: &&Measured| run.frames_per_second;
    let tick_ms = middle(&all, |run| run.tick_ms);
    let planned = forecast.as_ref().map(|forecast| 1e3 * forecast.tick);
    // Run by run: what a machine's speed does from one to the next is then in both.
    let predictions: Vec<Option<f64>> =
        runs.iter().map(|run| run.predicted_tick.map(|s| 1e3 * s).or(planned)).collect();
    let known: Vec<f64> = predictions.iter().flatten().copied().collect();
    let ratios = || all.iter().zip(&predictions).filter_map(|(run, predicted)| Some(ratio(run.tick_ms, (*predicted)?)));
    let schedules: Vec<(f64, f64)> =
        runs.iter().filter_map(|run| Some((run.measured.tick_ms, 1e3 * run.schedule_tick?))).collect();
    let last = all.last();
    let row = Row {
        point: point.name.clone(),
        status: status.state.to_string(),
        axis: study.plan.request.axis.to_string(),
        nodes: point.nodes,
        ranks: point.ranks,
        modules: point.modules,
        replicas: point.replicas,
        rule: point.variant.to_string(),
        batch: point.batch,
        frames,
        global_batch: point.global_batch(),
        frames_per_second: middle(&all, speed),
        frames_per_second_min: all.iter().map(speed).min_by(f64::total_cmp),
        frames_per_second_max: all.iter().map(speed).max_by(f64::total_cmp),
        runs: all.len(),
        tick_ms,
        predicted_tick_ms: middle(&known, |&ms| ms).or(planned),
        measured_over_predicted: middle(&ratios().collect::<Vec<_>>(), |&ratio| ratio),
        schedule_tick_ms: middle(&schedules, |&(_, schedule)| schedule),
        measured_over_schedule: middle(&schedules, |&(measured, schedule)| ratio(measured, schedule)),
        speed_up: None,
        efficiency: None,
        first_point: None,
        load_balance: middle(&shares, |s| s.load_balance),
        communication_efficiency: middle(&shares, |s| s.communication),
        computation_scaling: None,
        global_efficiency: None,
        fill: forecast.map(|forecast| forecast.fill),
        peak_mib_rank: all.iter().map(|run| run.peak_mib_rank).max_by(f64::total_cmp),
        exchange: last.map(|run| run.exchange.clone().unwrap_or_else(|| "host".into())),
        wire: last.map(|run| run.wire.clone()),
        job: listed(runs.iter().filter_map(|run| run.job.clone())),
        node_list: listed(all.iter().flat_map(|run| run.hosts.clone())),
        commit: listed(runs.iter().filter_map(|run| run.commit.clone())),
        build: listed(all.iter().map(|run| run.build.clone())),
        mpi: last.and_then(|run| run.mpi.clone()),
        driver: last.and_then(|run| run.driver.clone()),
        processor: last.map(|run| run.gpu.as_ref().map_or(run.processor.clone(), |gpu| gpu.name.clone())),
        reason: status.reason,
    };
    Ok((row, middle(&shares, |s| s.a_frame)))
}

/// The table as CSV, a column a field.
///
/// # Errors
/// [`Error::Run`] if it cannot be written as such.
pub fn csv(rows: &[Row]) -> Result<Vec<u8>> {
    let failed = |e: String| Error::Run(format!("writing the table: {e}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.iter().try_for_each(|row| writer.serialize(row)).map_err(|e| failed(e.to_string()))?;
    writer.into_inner().map_err(|e| failed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::study::folder::State;
    use crate::study::folder::{Run, Status};
    use crate::study::forecast::Forecast;
    use crate::study::plan::{Axis, Plan, Request};
    use crate::study::variant::Variant;

    fn run(speed: f64, tick_ms: f64, busy: &[f64]) -> Run {
        let measured = Measured {
            frames_per_second: speed,
            tick_ms,
            peak_mib_rank: 10.0,
            rank_busy_ms: busy.to_vec(),
            rank_slots: vec![1; busy.len()],
            hosts: vec!["n0".into(), "n1".into()],
            wire: "f32".into(),
            ..Measured::default()
        };
        Run { measured, job: Some("7".into()), commit: None, seconds: 1.0, predicted_tick: None, schedule_tick: None }
    }

    /// Two points of one rule and one that ran out of memory: every figure by hand.
    #[test]
    fn rows_say_what_was_measured_and_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let config = "[data]\nframes = 10\nbatch = 4\ncrop = 16\n[model]\npreset = 'motion-small'\nclasses = 4\n";
        let config = Config::parse(config, "test", &[]).unwrap();
        let request = Request {
            axis: Axis::Modules,
            nodes: vec![1, 2, 4],
            ranks_per_node: None,
            rules: vec![Variant::parse("skip-sideways").unwrap()],
            repeat: 3,
            batches: 3,
            limit: 60,
            cluster: None,
        };
        let study = Study::create(dir.path(), Plan::new(&config, &request).unwrap()).unwrap();
        let [first, second, third] = &study.plan.points[..] else { panic!("three points") };
        // Four frames a tick.
        for (k, (speed, tick)) in [(400.0, 10.0), (200.0, 20.0), (320.0, 12.5)].into_iter().enumerate() {
            study.keep_run(first, k + 1, &run(speed, tick, &[8.0])).unwrap();
        }
        study.set_status(first, &Status::now(State::Done, "")).unwrap();
        study.keep_run(second, 2, &run(500.0, 8.0, &[6.0, 3.0])).unwrap();
        // Before this one layers had become twice as slow.
        let late = Run { predicted_tick: Some(0.02), schedule_tick: Some(0.0064), ..run(500.0, 8.0, &[6.0, 3.0]) };
        study.keep_run(second, 3, &late).unwrap();
        let forecast = Forecast {
            tick: 0.01,
            frames_per_second: 400.0,
            memory: 1,
            fill: 0.25,
            seconds: 9.0,
            processor: "p".into(),
        };
        study.prepare(second, "", &forecast).unwrap();
        study.set_status(third, &Status::now(State::OutOfMemory, "too large")).unwrap();
        let rows = rows(&study).unwrap();
        let row = &rows[0];
        assert_eq!(
            (row.frames_per_second, row.frames_per_second_min, row.frames_per_second_max),
            (Some(320.0), Some(200.0), Some(400.0))
        );
        assert_eq!((row.runs, row.tick_ms, row.speed_up, row.efficiency), (3, Some(12.5), Some(1.0), Some(1.0)));
        let row = &rows[1];
        assert_eq!(
            (row.status.as_str(), row.runs, row.tick_ms, row.predicted_tick_ms),
            ("pending", 2, Some(8.0), Some(15.0))
        );
        let ratio = row.measured_over_predicted.unwrap();
        assert!((ratio - 0.6).abs() < 1e-12, "{ratio}, not the middle of 0.8 and 0.4");
        assert_eq!((row.schedule_tick_ms, row.measured_over_schedule), (Some(6.4), Some(1.25)));
        assert_eq!((row.speed_up, row.efficiency), (Some(500.0 / 320.0), Some(500.0 / 640.0)));
        assert_eq!((row.load_balance, row.communication_efficiency), (Some(0.75), Some(0.75)));
        let scaling = row.computation_scaling.unwrap();
        assert!((scaling - 8.0 / 9.0).abs() < 1e-12, "{scaling}");
        assert!((row.global_efficiency.unwrap() - 0.5).abs() < 1e-12);
        assert_eq!((row.fill, row.node_list.as_deref(), row.job.as_deref()), (Some(0.25), Some("n0 n1"), Some("7")));
        let row = &rows[2];
        assert_eq!(
            (row.status.as_str(), row.reason.as_str(), row.frames_per_second),
            ("out of memory", "too large", None)
        );
        let text = String::from_utf8(csv(&rows).unwrap()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("point,status,axis,nodes,ranks,modules,replicas,rule,batch,frames,global_batch,"),
            "{text}"
        );
        assert_eq!(lines.len(), 4);
        assert!(
            lines[3].starts_with("skip-sideways-n4,out of memory,modules,4,4,4,1,skip-sideways,4,10,4,,,,0,"),
            "{text}"
        );
    }
}
