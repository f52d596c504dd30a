//! What a scaling study measures: points, made of a configuration, node counts and rules. Nothing runs here.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Globs, Rule, Task};
use crate::data::Dataset;
use crate::plan::cluster::Cluster;
use crate::study::variant::Variant;
use crate::{Error, Result};

/// What grows with the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Modules of a pipeline: the same network in more pieces, the same batch.
    #[default]
    Modules,
    /// Replicas, at a fixed global batch: each works on fewer clips.
    Strong,
    /// Replicas, at a fixed batch a replica: more clips in all.
    Weak,
}

impl std::fmt::Display for Axis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Axis::Modules => "modules",
            Axis::Strong => "strong",
            Axis::Weak => "weak",
        })
    }
}

/// Nodes of a point, and ranks on each, at most.
const MOST_NODES: u64 = 1 << 16;
const MOST_RANKS_PER_NODE: u64 = 1 << 10;
/// Of a run: some thirty years.
const MOST_SECONDS: u64 = 1_000_000_000;

/// What a study is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What grows.
    pub axis: Axis,
    /// Node counts, growing.
    pub nodes: Vec<usize>,
    /// Ranks a node; absent: as many as give each module a rank at the first point, 1 along [`Axis::Modules`].
    pub ranks_per_node: Option<usize>,
    /// The rules; empty: the configuration's.
    pub rules: Vec<Variant>,
    /// Runs a point.
    pub repeat: usize,
    /// Batches that count in a run.
    pub batches: u64,
    /// Seconds after which a run is out of time.
    pub limit: u64,
    /// What predictions take messages and replicas' gradients to need; absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<Cluster>,
}

/// One point: a rule on a number of nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Its name, and its folder's.
    pub name: String,
    /// Nodes.
    pub nodes: usize,
    /// Ranks on all of them.
    pub ranks: usize,
    /// D
    pub modules: usize,
    /// R
    pub replicas: usize,
    /// B, clips a replica.
    pub batch: usize,
    /// How gradients are made.
    pub variant: Variant,
}

impl Point {
    /// Clips that all replicas work on at once.
    pub fn global_batch(&self) -> usize {
        self.batch * self.replicas
    }
}

/// A study, planned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What was asked for.
    pub request: Request,
    /// Ranks a node.
    pub ranks_per_node: usize,
    /// The points, rule by rule.
    pub points: Vec<Point>,
    /// The configuration, resolved, as TOML.
    pub config: String,
}

/// The shape of a pipeline on some nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    ranks: usize,
    modules: usize,
    replicas: usize,
    batch: usize,
}

/// What shapes follow from.
struct Base {
    axis: Axis,
    first: usize,
    ranks_per_node: usize,
    modules: usize,
    replicas: usize,
    batch: usize,
}

impl Base {
    fn new(config: &Config, request: &Request) -> Result<Self> {
        let first = request.nodes[0];
        let (replicas, batch) = (config.train.replicas, config.data.batch);
        let given = config.model.cuts.as_ref().map(|cuts| cuts.len() + 1).or(config.model.modules);
        let workers = given.map(|modules| modules * replicas);
        let ranks_per_node = match (request.ranks_per_node, request.axis, workers) {
            (Some(ranks), ..) => ranks,
            (None, Axis::Modules, _) | (None, _, None) => 1,
            (None, _, Some(workers)) if workers.is_multiple_of(first) => workers / first,
            (None, _, Some(workers)) => {
                return Err(Error::input(format!(
                    "{workers} workers (modules x replicas) on {first} nodes at the first point: give --ranks-per-node"
                )));
            }
        };
        let modules = match (request.axis, given) {
            (Axis::Modules, _) => 0,
            (_, Some(modules)) => modules,
            (_, None) => (first * ranks_per_node / replicas).max(1),
        };
        Ok(Base { axis: request.axis, first, ranks_per_node, modules, replicas, batch })
    }

    fn on(&self, nodes: usize) -> Result<Shape> {
        let Base { ranks_per_node, modules, replicas, batch, .. } = *self;
        let ranks = nodes * ranks_per_node;
        let wrong = |why: String| Error::input(format!("--nodes {nodes}, {ranks_per_node} rank(s) a node: {why}"));
        if self.axis == Axis::Modules {
            return match ranks.is_multiple_of(replicas) {
                true => Ok(Shape { ranks, modules: ranks / replicas, replicas, batch }),
                false => Err(wrong(format!("{ranks} ranks cannot be shared by {replicas} replicas"))),
            };
        }
        let grown = replicas * nodes;
        if !grown.is_multiple_of(self.first) {
            let first = self.first;
            return Err(wrong(format!("{replicas} replica(s) on {first} node(s) do not make a whole number here")));
        }
        let grown = grown / self.first;
        if ranks > modules * grown {
            return Err(wrong(format!(
                "{ranks} ranks, but {modules} modules x {grown} replicas take {} at most",
                modules * grown
            )));
        }
        let batch = match self.axis {
            Axis::Strong if !(batch * replicas).is_multiple_of(grown) => {
                let global = batch * replicas;
                return Err(wrong(format!("the global batch of {global} clips cannot be shared by {grown} replicas")));
            }
            Axis::Strong => batch * replicas / grown,
            _ => batch,
        };
        Ok(Shape { ranks, modules, replicas: grown, batch })
    }
}

impl Plan {
    /// Makes the points of `config`.
    ///
    /// # Errors
    /// [`Error::Input`] for whatever cannot be made of it, with what to change.
    pub fn new(config: &Config, request: &Request) -> Result<Self> {
        let mut request = request.clone();
        request.nodes.sort_unstable();
        request.nodes.dedup();
        if request.rules.is_empty() {
            request.rules = vec![Variant::of(config)];
        }
        if request.nodes.first().is_none_or(|&first| first == 0) {
            return Err(Error::input("--nodes is a list of node counts from 1, such as 1,2,4,8"));
        }
        let most_nodes = request.nodes.last().copied().unwrap_or(1);
        for (option, value, most) in [
            ("--nodes", most_nodes as u64, MOST_NODES),
            ("--ranks-per-node", request.ranks_per_node.unwrap_or(1) as u64, MOST_RANKS_PER_NODE),
            ("--repeat", request.repeat as u64, 1 << 16),
            ("--batches", request.batches, 1 << 32),
            ("--limit", request.limit, MOST_SECONDS),
        ] {
            if !(1..=most).contains(&value) {
                return Err(Error::input(format!("{option} {value}: it must be 1..={most}")));
            }
        }
        if request.axis == Axis::Modules && config.model.skip.as_ref().is_some_and(|skip| !skip.edges.is_empty()) {
            return Err(Error::input(
                "model.skip.edges names modules, of which there are others at every point of --axis modules: use model.skip.spans, \
                 or another axis",
            ));
        }
        let base = Base::new(config, &request)?;
        if let Some(cluster) = request.cluster.as_ref().filter(|c| c.ranks_per_node != base.ranks_per_node) {
            return Err(Error::input(format!(
                "--cluster: it has {} ranks a node, and the study {}: change one, or --ranks-per-node",
                cluster.ranks_per_node, base.ranks_per_node
            )));
        }
        let mut points: Vec<Point> = Vec::new();
        for &variant in &request.rules {
            // One process is one point.
            let nodes = if in_one_process(variant.rule) { &request.nodes[..1] } else { &request.nodes[..] };
            for &nodes in nodes {
                let point = point(variant, nodes, base.on(nodes)?);
                if points.iter().all(|other| other.name != point.name) {
                    points.push(point);
                }
            }
        }
        let plan = Plan { ranks_per_node: base.ranks_per_node, points, config: config.to_toml()?, request };
        for point in &plan.points {
            plan.config_of(point)?.validate().map_err(|e| e.within(&point.name))?;
        }
        Ok(plan)
    }

    /// The points past the last one, at twice and four times its nodes, as far as there are any: for prediction alone.
    pub fn beyond(&self) -> Result<Vec<Point>> {
        let config = Config::parse(&self.config, "plan", &[])?;
        let base = Base::new(&config, &self.request)?;
        let last = self.request.nodes.last().copied().unwrap_or(1);
        let shapes: Vec<(usize, Shape)> =
            [2, 4].iter().map(|k| k * last).map_while(|n| base.on(n).ok().map(|shape| (n, shape))).collect();
        let variants = self.request.rules.iter().filter(|variant| !in_one_process(variant.rule));
        Ok(variants.flat_map(|&v| shapes.iter().map(move |&(nodes, shape)| point(v, nodes, shape))).collect())
    }

    /// The configuration of a point, with made-up frames in the data's place; where the network is cut may still be open.
    ///
    /// # Errors
    /// [`Error::Input`] if the plan is damaged.
    pub fn config_of(&self, point: &Point) -> Result<Config> {
        let mut config = Config::parse(&self.config, "plan", &[])?;
        (config.data.batch, config.train.replicas) = (point.batch, point.replicas);
        (config.train.rule, config.train.stash) = (point.variant.rule, point.variant.stash);
        if self.request.axis == Axis::Modules {
            (config.model.modules, config.model.cuts) = (None, None);
            // A skip needs two modules to go from and to.
            if let Some(skip) = &mut config.model.skip {
                skip.spans.retain(|&span| span < point.modules);
            }
        }
        if in_one_process(point.variant.rule) && config.model.cuts.is_none() {
            config.model.modules = Some(point.modules);
        }
        if point.variant.rule == Rule::Sideways {
            config.model.skip = None;
        }
        Ok(config)
    }

    /// The most nodes that a point takes.
    pub fn largest(&self) -> usize {
        self.points.iter().map(|point| point.nodes).max().unwrap_or(1)
    }
}

/// `config` for made-up frames, which have the size of `data.crop` (or of the data's frames, where these are there and square) and
/// so many `classes` (or as many as the configuration or the data have).
///
/// # Errors
/// [`Error::Input`] where the size or the classes are not known.
pub fn without_data(config: &Config, classes: Option<usize>) -> Result<Config> {
    let mut config = config.clone();
    let recognition = config.model.task == Task::Recognition;
    config.model.classes = classes.or(config.model.classes).filter(|_| recognition);
    if config.data.crop.is_none() || recognition && config.model.classes.is_none() {
        let dataset = Dataset::open(&config.data.train.list()).ok();
        let side = dataset.as_ref().and_then(|data| (data.height == data.width).then_some(data.height));
        config.data.crop = config.data.crop.or(side);
        if recognition {
            config.model.classes = config.model.classes.or(dataset.map(|data| data.class_names.len()));
        }
    }
    if config.data.crop.is_none() {
        return Err(Error::input(
            "studies run on made-up frames, and data.crop is not set: set it to their side in pixels",
        ));
    }
    if recognition && config.model.classes.is_none() {
        return Err(Error::input(
            "studies run on made-up frames, and the number of classes is not known: give --classes K, or set model.classes",
        ));
    }
    (config.data.train, config.data.test, config.data.validation) =
        (Globs::default(), Globs::default(), Globs::default());
    (config.train.validate_every, config.train.until, config.train.init) = (0, None, None);
    Ok(config)
}

/// Whether a rule runs in one process alone, so that there is nothing to scale: a point to compare with.
fn in_one_process(rule: Rule) -> bool {
    rule == Rule::Bp
}

fn point(variant: Variant, nodes: usize, shape: Shape) -> Point {
    let Shape { ranks, modules, replicas, batch } = shape;
    if in_one_process(variant.rule) {
        let (name, batch) = (format!("{variant}-n1"), batch * replicas);
        return Point { name, nodes: 1, ranks: 1, modules, replicas: 1, batch, variant };
    }
    Point { name: format!("{variant}-n{nodes}"), nodes, ranks, modules, replicas, batch, variant }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Stash;

    const CONFIG: &str = "[data]\nframes = 40\nbatch = 12\ncrop = 16\n[model]\npreset = 'motion-small'\nclasses = 4\n\
        skip = { spans = [2, 3] }\n";

    fn request(axis: Axis, nodes: &[usize], rules: &[&str]) -> Request {
        let rules = rules.iter().map(|rule| Variant::parse(rule).unwrap()).collect();
        Request {
            axis,
            nodes: nodes.to_vec(),
            ranks_per_node: None,
            rules,
            repeat: 2,
            batches: 3,
            limit: 60,
            cluster: None,
        }
    }

    fn plan(sets: &[&str], request: &Request) -> Result<Plan> {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Plan::new(&Config::parse(CONFIG, "test", &sets).unwrap(), request)
    }

    /// Name, nodes, ranks, modules, replicas, batch of each point.
    fn rows(plan: &Plan) -> Vec<(&str, [usize; 5])> {
        plan.points.iter().map(|p| (p.name.as_str(), [p.nodes, p.ranks, p.modules, p.replicas, p.batch])).collect()
    }

    fn refused(sets: &[&str], request: &Request, words: &str) {
        let error = plan(sets, request).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
    }

    #[test]
    fn more_modules_at_the_same_batch() {
        let mut wanted = request(Axis::Modules, &[4, 1, 2], &["skip-sideways", "bp"]);
        let made = plan(&["model.modules=6"], &wanted).unwrap();
        let expected = [
            ("skip-sideways-n1", [1, 1, 1, 1, 12]),
            ("skip-sideways-n2", [2, 2, 2, 1, 12]),
            ("skip-sideways-n4", [4, 4, 4, 1, 12]),
            ("bp-n1", [1, 1, 1, 1, 12]),
        ];
        assert_eq!(rows(&made), expected);
        // Skips that reach farther than there are modules are left out.
        let spans = |point: usize| made.config_of(&made.points[point]).unwrap().model.skip.unwrap().spans;
        assert_eq!((spans(0), spans(1), spans(2)), (vec![], vec![], vec![2, 3]));
        let beyond = made.beyond().unwrap();
        let beyond: Vec<_> = beyond.iter().map(|p| (p.nodes, p.modules)).collect();
        assert_eq!(beyond, [(8, 8), (16, 16)]);
        wanted.ranks_per_node = Some(2);
        let made = plan(&["train.replicas=2"], &request_of(&wanted, &["skip-sideways"])).unwrap();
        let expected = [
            ("skip-sideways-n1", [1, 2, 1, 2, 12]),
            ("skip-sideways-n2", [2, 4, 2, 2, 12]),
            ("skip-sideways-n4", [4, 8, 4, 2, 12]),
        ];
        assert_eq!(rows(&made), expected);
        refused(&["train.replicas=3"], &wanted, "cannot be shared by 3 replicas");
        refused(&["model.skip={ edges = [[1, 3]] }"], &wanted, "model.skip.spans");
    }

    fn request_of(request: &Request, rules: &[&str]) -> Request {
        Request { rules: rules.iter().map(|rule| Variant::parse(rule).unwrap()).collect(), ..request.clone() }
    }

    #[test]
    fn more_replicas_at_the_same_global_batch() {
        let wanted = request(Axis::Strong, &[1, 2, 4], &["skip-sideways+stash"]);
        let made = plan(&["model.modules=4"], &wanted).unwrap();
        let expected = [
            ("skip-sideways+stash-n1", [1, 4, 4, 1, 12]),
            ("skip-sideways+stash-n2", [2, 8, 4, 2, 6]),
            ("skip-sideways+stash-n4", [4, 16, 4, 4, 3]),
        ];
        assert_eq!(rows(&made), expected);
        assert!(made.points.iter().all(|point| point.global_batch() == 12));
        let config = made.config_of(&made.points[1]).unwrap();
        assert_eq!((config.data.batch, config.train.replicas, config.train.stash), (6, 2, Stash::Activations));
        assert_eq!(config.model.modules, Some(4));
        refused(
            &["model.modules=4"],
            &Request { nodes: vec![1, 8], ..wanted.clone() },
            "12 clips cannot be shared by 8",
        );
        refused(&["model.modules=4"], &Request { nodes: vec![2, 3], ..wanted.clone() }, "whole number");
        refused(&["model.modules=4"], &Request { nodes: vec![3], ..wanted }, "--ranks-per-node");
    }

    #[test]
    fn more_replicas_at_the_same_batch_each() {
        let wanted = request(Axis::Weak, &[2, 4], &["sideways", "bp"]);
        let made = plan(&["model.modules=4", "train.replicas=2"], &wanted).unwrap();
        let expected = [
            ("sideways-n2", [2, 8, 4, 2, 12]),
            ("sideways-n4", [4, 16, 4, 4, 12]),
            // The first point's global batch.
            ("bp-n1", [1, 1, 4, 1, 24]),
        ];
        assert_eq!(rows(&made), expected);
        assert!(made.config_of(&made.points[0]).unwrap().model.skip.is_none());
        // Fewer ranks than modules: each computes two.
        let made = plan(&["model.modules=4"], &Request { ranks_per_node: Some(1), ..wanted.clone() }).unwrap();
        assert_eq!(rows(&made)[..2], [("sideways-n2", [2, 2, 4, 1, 12]), ("sideways-n4", [4, 4, 4, 2, 12])]);
        refused(&["model.modules=4"], &Request { ranks_per_node: Some(9), ..wanted }, "take 4 at most");
    }

    #[test]
    fn without_rules_those_of_the_configuration() {
        let made = plan(&["train.stash=inputs"], &request(Axis::Modules, &[1, 2], &[])).unwrap();
        assert_eq!(made.points[1].name, "skip-sideways+stash-inputs-n2");
        refused(&["train.boundary=cut"], &request(Axis::Modules, &[0, 2], &[]), "from 1");
    }
}
