//! `sideways bench layers`: how long each layer takes, beside what the machine could do.
//!
//! Layers are timed in a chain, as a module runs them: each finds the caches as the one before left them. Arithmetic is
//! counted as the plain convolution has it, so an algorithm that needs less may pass the machine's peak; memory traffic as the
//! least there must be (inputs, outputs, parameters once each), so data that stay in a cache may pass memory's.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::peak::Peak;
use crate::backend::cpu;
use crate::cli::output::{json, table, whole};
use crate::config::{Config, Task};
use crate::network::blocks::Blocks;
use crate::nn::spec::{LayerSpec, Shape};
use crate::plan::measure::measure;
use crate::plan::predict::{Parts, block_parts, conditions, module_parts};
use crate::plan::profile::{Conditions, Part, Times};
use crate::setup::Setup;
use crate::sys::cpus::{own_processors, processor_name};
use crate::{Error, Result};

mod gpu;

/// Options of `sideways bench layers`.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// The run's configuration (TOML).
    pub config: PathBuf,
    /// Override a key (may be repeated).
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Classes to tell apart [default: model.classes, or the shards'].
    #[arg(long, value_name = "K", value_parser = whole(1, 1 << 20))]
    pub classes: Option<usize>,
    /// Numbers of threads to measure with.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1", value_parser = whole(1, 1 << 10))]
    pub threads: Vec<usize>,
    /// On a GPU: whole modules' ticks alone.
    #[arg(long)]
    pub ticks: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// A pass of a layer: how long, and how much work it is.
#[derive(Clone, Copy, Serialize)]
struct Work {
    seconds: f64,
    flops: f64,
    bytes: f64,
}

impl Work {
    /// The least time the machine's peaks allow, over the time it took.
    fn of_roofline(&self, peak: &Peak) -> f64 {
        (self.flops / peak.flops).max(self.bytes / peak.memory) / self.seconds.max(1e-12)
    }

    fn cells(&self, peak: &Peak) -> String {
        // Differences of two times can come out as nothing.
        if self.seconds < 1e-9 || self.bytes == 0.0 {
            return "-\t\t\t".into();
        }
        let rate = |amount: f64| amount / self.seconds / 1e9;
        let gflops = if self.flops > 0.0 { format!("{:.1}", rate(self.flops)) } else { String::new() };
        let share = 100.0 * self.of_roofline(peak);
        format!("{:.3}\t{gflops}\t{:.1}\t{share:.0}%", 1e3 * self.seconds, rate(self.bytes))
    }
}

/// A layer, or a convolution inside a residual block.
#[derive(Serialize)]
struct Row {
    name: String,
    input: Shape,
    output: Shape,
    forward: Work,
    weights: Work,
    inputs: Work,
}

/// A module beside the products in it.
#[derive(Serialize)]
struct ModuleRow {
    layers: [usize; 2],
    /// Forward pass and vector–Jacobian product.
    seconds: f64,
    /// The same of its convolutions and linear layers alone.
    #[serde(rename = "products_seconds")]
    products: f64,
}

/// Measures and prints.
///
/// # Errors
/// Whatever in the configuration cannot work.
pub(super) fn run(args: &LayersArgs) -> Result<()> {
    let mut config = Config::load(&args.config, &args.set)?;
    if config.model.task == Task::Recognition && args.classes.is_some() {
        config.model.classes = args.classes;
    }
    if args.threads.contains(&0) {
        return Err(Error::input("--threads: numbers from 1"));
    }
    let ranks = config.model.modules.or(config.model.cuts.as_ref().map(|c| c.len() + 1)).unwrap_or(1);
    let setup = Setup::dry(&config, ranks * config.train.replicas)?;
    let here = conditions(&setup, 1, Parts::Modules)?;
    if here.gpu.is_none() && args.ticks {
        return Err(Error::input("--ticks is for a GPU (run.device = \"cuda\")"));
    }
    if here.gpu.is_some() {
        return gpu::run(args, &setup, &Conditions { messages: false, ..here });
    }
    let mut figures = Vec::new();
    for &threads in &args.threads {
        let peak = Peak::measure(threads);
        let base = Conditions { threads, messages: false, ..here.clone() };
        let (parts, names) = layer_parts(&setup)?;
        let rows = rows(&base, parts, names)?;
        let modules = module_rows(&setup, &base)?;
        if args.json {
            let of = serde_json::json!({ "threads": threads, "peak": peak, "layers": rows, "modules": modules });
            figures.push(of);
        } else {
            print(&base, &peak, &rows, &modules);
        }
    }
    if args.json {
        let (cpu, kernels, batch) = (here.cpu, here.kernels, here.batch);
        return json(&serde_json::json!({ "cpu": cpu, "kernels": kernels, "batch": batch, "by_threads": figures }));
    }
    Ok(())
}

fn print(base: &Conditions, peak: &Peak, rows: &[Row], modules: &[ModuleRow]) {
    outln!(
        "{}, {}, {} thread(s) of {} core(s), B = {}; peak: {:.1} GFLOP/s, memory {:.1} GB/s, caches {:.1} GB/s",
        processor_name(),
        cpu::back_end(),
        base.threads,
        own_processors().len(),
        base.batch,
        peak.flops / 1e9,
        peak.memory / 1e9,
        peak.cache / 1e9
    );
    print_rows(peak, rows);
    outln!(
        "weights: the vector-Jacobian product without the input's cotangent; inputs: what that adds; roof: the least time that \
         peak arithmetic and memory allow, over the time it took"
    );
    print_modules(modules);
}

fn print_rows(peak: &Peak, rows: &[Row]) {
    let work = "\tGF/s\tGB/s\troof";
    let header = format!("layer\tinput\toutput\tforward ms{work}\tweights ms{work}\tinputs ms{work}");
    let row = |row: &Row| {
        let passes = [row.forward, row.weights, row.inputs].map(|pass| pass.cells(peak)).join("\t");
        format!("{}\t{:?}\t{:?}\t{passes}", row.name, row.input, row.output)
    };
    table(1, &header, rows.iter().map(row));
}

fn print_modules(modules: &[ModuleRow]) {
    let row = |name: String, seconds: f64, products: f64| {
        let ratio = seconds / products.max(1e-12);
        format!("{name}\t{:.3}\t{:.3}\t{ratio:.3}", 1e3 * seconds, 1e3 * products)
    };
    let each =
        modules.iter().map(|m| row(format!("layers {}-{}", m.layers[0], m.layers[1] - 1), m.seconds, m.products));
    let sum = |of: fn(&ModuleRow) -> f64| modules.iter().map(of).sum::<f64>();
    let all = row("all".into(), sum(|m| m.seconds), sum(|m| m.products));
    let header = "module (or block)\tforward + vjp ms\tits products alone ms\tratio";
    table(1, header, each.chain([all]));
}

/// Every layer as a part of its own, and behind a residual block its convolutions.
fn layer_parts(setup: &Setup) -> Result<(Vec<Part>, Vec<String>)> {
    let (mut parts, mut names) = (Vec::new(), Vec::new());
    let mut shape = setup.network.input;
    for (n, layer) in setup.network.layers.iter().enumerate() {
        parts.push(part(n, layer, shape));
        names.push(format!("{n} {}", describe(layer)));
        if matches!(layer, LayerSpec::Residual(_)) {
            for (product, input) in products(layer, shape) {
                names.push(format!("    {}", describe(&product)));
                parts.push(part(n, &product, input));
            }
        }
        shape = layer.output_shape(shape)?;
    }
    Ok((parts, names))
}

fn part(n: usize, layer: &LayerSpec, main: Shape) -> Part {
    Part { layers: vec![(n, layer.clone())], main, skips: Vec::new() }
}

fn describe(layer: &LayerSpec) -> String {
    match layer {
        LayerSpec::Conv2d { kernel, stride, .. } => format!("{} {kernel}x{kernel}/{stride}", layer.kind()),
        LayerSpec::Residual(block) => format!("{} /{}", layer.kind(), block.stride),
        _ => layer.kind().into(),
    }
}

/// The convolutions and linear layers in a layer, each with its input's shape.
fn products(layer: &LayerSpec, input: Shape) -> Vec<(LayerSpec, Shape)> {
    match layer {
        LayerSpec::Conv2d { .. } | LayerSpec::Linear { .. } => vec![(layer.clone(), input)],
        LayerSpec::Residual(block) => {
            let plain = |conv: &cpu::conv::Conv, out: usize| LayerSpec::Conv2d {
                out,
                kernel: conv.window.kernel[0],
                stride: conv.window.stride[0],
                padding: conv.window.padding[0],
                groups: conv.groups,
                bias: false,
            };
            let mut shape = input;
            let mut found = Vec::new();
            for (conv, _, out) in block.convolutions(input[2]) {
                let product = plain(&conv, out);
                let output = product.output_shape(shape).unwrap_or(shape);
                found.push((product, shape));
                shape = output;
            }
            found.extend(block.projection(input[2]).map(|conv| (plain(&conv, block.out), input)));
            found
        }
        _ => Vec::new(),
    }
}

fn rows(base: &Conditions, parts: Vec<Part>, names: Vec<String>) -> Result<Vec<Row>> {
    let batch = base.batch as f64;
    let conditions = base.with(parts);
    let (times, _) = measure(&conditions, 1)?;
    let rows = conditions.parts.iter().zip(times).zip(names).map(|((part, times), name)| {
        let (layer, input) = (&part.layers[0].1, part.main);
        let output = layer.output_shape(input)?;
        let (x, y) = (batch * elements(input), batch * elements(output));
        let (w, flops) = (layer.params(input) as f64, batch * layer.flops(input) as f64);
        let size = base.gpu.as_ref().map_or(4.0, |gpu| gpu.element_bytes() as f64);
        let work = |seconds: f64, flops: f64, elements: f64| Work { seconds, flops, bytes: size * elements };
        let Times { forward, backward, backward_leaf, .. } = times;
        // A layer without parameters does nothing but its input's cotangent.
        let (weights, inputs) = match w > 0.0 {
            true => (backward_leaf, backward - backward_leaf),
            false => (0.0, backward),
        };
        Ok(Row {
            name,
            input,
            output,
            forward: work(forward, flops, x + y + w),
            weights: work(weights, flops, if w > 0.0 { x + y + 2.0 * w } else { 0.0 }),
            inputs: work(inputs.max(0.0), flops, x + y + w),
        })
    });
    rows.collect()
}

/// Modules as the configuration cuts them, or where it does not, blocks.
fn modules_or_blocks(setup: &Setup, blocks: &Blocks) -> Vec<Part> {
    if setup.config.cut_is_open() { block_parts(setup, blocks) } else { module_parts(setup) }
}

/// Each of them beside its products.
fn module_rows(setup: &Setup, base: &Conditions) -> Result<Vec<ModuleRow>> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let parts = modules_or_blocks(setup, &blocks);
    let (mut alone, mut count) = (Vec::new(), Vec::new());
    for module in &parts {
        let mut shape = module.main;
        let before = alone.len();
        for (n, layer) in &module.layers {
            alone.extend(products(layer, shape).into_iter().map(|(product, input)| part(*n, &product, input)));
            shape = layer.output_shape(shape)?;
        }
        count.push(alone.len() - before);
    }
    let ranges: Vec<[usize; 2]> =
        parts.iter().map(|p| [p.layers[0].0, p.layers.last().map_or(0, |(n, _)| n + 1)]).collect();
    let (whole, _) = measure(&base.with(parts), 1)?;
    let (alone, _) = measure(&base.with(alone), 1)?;
    // The network's first layer never computes its input's cotangent.
    let seconds = |k: usize, t: &Times| t.forward + if k == 0 { t.backward_leaf } else { t.backward };
    let mut next = 0;
    let modules = whole.iter().zip(&count).zip(ranges).enumerate().map(|(k, ((times, &count), layers))| {
        let products = (next..next + count).map(|k| seconds(k, &alone[k])).sum();
        next += count;
        ModuleRow { layers, seconds: seconds(k, times), products }
    });
    Ok(modules.collect())
}

fn elements(shape: Shape) -> f64 {
    shape.iter().product::<usize>() as f64
}
