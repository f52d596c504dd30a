//! A study's jobs, for Slurm: the command lines of `sbatch`.

use std::path::Path;

use super::folder::Study;

/// The command lines that submit `study`: one job on as many nodes as its largest point takes, in which points run one after
/// another; or, `separate`, for each node count an array with a task a point. `points` are the numbers of those to run; `options` go to
/// `sbatch`, `arguments` to the script behind the study's folder.
pub fn commands(
    study: &Study,
    script: &Path,
    threads: usize,
    separate: bool,
    points: &[usize],
    options: &[String],
    arguments: &[String],
) -> Vec<Vec<String>> {
    let plan = &study.plan;
    let line = |nodes: usize, ranks: usize, array: Option<String>| {
        let name = if array.is_some() { "%x-%A-%a.log" } else { "%x-%j.log" };
        let mut words = vec!["sbatch".to_string(), "--parsable".into(), format!("--nodes={nodes}")];
        words.push(format!("--ntasks-per-node={}", ranks.div_ceil(nodes)));
        words.push(format!("--cpus-per-task={threads}"));
        words.push(format!("--output={}", study.dir().join(name).display()));
        words.extend(array.map(|numbers| format!("--array={numbers}")));
        words.extend(options.iter().cloned());
        words.extend([script.display().to_string(), "--out".into(), study.dir().display().to_string()]);
        words.extend(arguments.iter().cloned());
        words
    };
    if !separate {
        let nodes = points.iter().map(|&n| plan.points[n].nodes).max().unwrap_or(1);
        return vec![line(nodes, nodes * plan.ranks_per_node, None)];
    }
    let mut counts: Vec<(usize, usize)> =
        points.iter().map(|&n| (plan.points[n].nodes, plan.points[n].ranks)).collect();
    counts.sort_unstable();
    counts.dedup_by_key(|(nodes, _)| *nodes);
    let arrays = counts.into_iter().map(|(nodes, _)| {
        let of = points.iter().filter(|&&n| plan.points[n].nodes == nodes);
        let ranks = of.clone().map(|&n| plan.points[n].ranks).max().unwrap_or(nodes);
        let numbers: Vec<String> = of.map(usize::to_string).collect();
        line(nodes, ranks, Some(numbers.join(",")))
    });
    arrays.collect()
}
