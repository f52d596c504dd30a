//! `sideways bench layers` on a GPU: layers by the GPU's own clock, launched kernel by kernel and as graphs, and whole modules'
//! ticks with the memory they take.

use bytesize::ByteSize;
use serde::Serialize;

use super::super::peak::Peak;
use super::{LayersArgs, Row, layer_parts, module_rows, modules_or_blocks, print_modules, print_rows, rows};
use crate::backend::{Peaks, cuda};
use crate::cli::output::{json, table};
use crate::config::Precision;
use crate::network::blocks::Blocks;
use crate::plan::gpu::OnGpu;
use crate::plan::measure::{Ticks, ticks};
use crate::plan::profile::Conditions;
use crate::setup::Setup;
use crate::setup::footprint::gpu_memory;
use crate::{Error, Result};

/// A module's tick.
#[derive(Serialize)]
struct TickRow {
    layers: [usize; 2],
    #[serde(flatten)]
    ticks: Ticks,
    /// Bytes that training takes it to need, with its messages; where there are modules.
    predicted: Option<u64>,
}

/// Measures and prints.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &LayersArgs, setup: &Setup, base: &Conditions) -> Result<()> {
    let Some(on) = &base.gpu else { return Err(Error::Run("no GPU was chosen".into())) };
    if args.ticks {
        let ticks = tick_rows(setup, base, on)?;
        if args.json {
            return json(&serde_json::json!({ "gpu": on, "batch": base.batch, "ticks": ticks }));
        }
        outln!("{}, cuDNN {}, {:?}, B = {}", on.name, on.cudnn, on.precision, base.batch);
        print_ticks(&ticks);
        return Ok(());
    }
    let peaks = cuda::peaks(on.ordinal)?;
    let peak = Peak { flops: arithmetic(&peaks, on), memory: peaks.memory, cache: peaks.memory };
    let mut tables = Vec::new();
    for graphs in [false, true] {
        let base = Conditions { gpu: Some(OnGpu { graphs, ..on.clone() }), ..base.clone() };
        let (parts, names) = layer_parts(setup)?;
        tables.push(rows(&base, parts, names)?);
    }
    let modules = module_rows(setup, base)?;
    let ticks = tick_rows(setup, base, on)?;
    if args.json {
        return json(&serde_json::json!({
            "gpu": on, "batch": base.batch, "peaks": peaks,
            "launches": tables[0], "graphs": tables[1], "modules": modules, "ticks": ticks,
        }));
    }
    print_peaks(&peaks, on, base.batch);
    for (table, how) in tables.iter().zip(["launched kernel by kernel", "as CUDA graphs"]) {
        outln!("Layers, {how}:");
        print_rows(&peak, table);
    }
    print_sums(&tables);
    outln!(
        "weights: the vector-Jacobian product without the input's cotangent; inputs: what that adds; roof: the least time that \
         peak arithmetic and memory allow, over the time it took"
    );
    print_modules(&modules);
    print_ticks(&ticks);
    Ok(())
}

fn arithmetic(peaks: &Peaks, on: &OnGpu) -> f64 {
    match on.precision {
        Precision::F32 => peaks.f32,
        Precision::Tf32 => peaks.tf32,
        Precision::Bf16 => peaks.bf16,
    }
}

fn tick_rows(setup: &Setup, base: &Conditions, on: &OnGpu) -> Result<Vec<TickRow>> {
    let blocks = Blocks::new(&setup.network.layers, setup.network.input)?;
    let parts = modules_or_blocks(setup, &blocks);
    let modules = !setup.config.cut_is_open();
    let ranges: Vec<[usize; 2]> =
        parts.iter().map(|p| [p.layers[0].0, p.layers.last().map_or(0, |(n, _)| n + 1)]).collect();
    let found = ticks(&base.with(parts), on)?.into_iter().zip(ranges).enumerate();
    let predicted = |w: usize| modules.then(|| gpu_memory(setup, w, on.element_bytes()));
    Ok(found.map(|(w, (ticks, layers))| TickRow { layers, ticks, predicted: predicted(w) }).collect())
}

fn print_peaks(p: &Peaks, on: &OnGpu, batch: usize) {
    outln!("{}, cuDNN {}, {:?}, B = {batch}", on.name, on.cudnn, on.precision);
    outln!(
        "peaks: products {:.1} (f32), {:.1} (tf32), {:.1} (bf16) TFLOP/s; memory {:.0} GB/s; to and from the host {:.1} and \
         {:.1} GB/s",
        p.f32 / 1e12,
        p.tf32 / 1e12,
        p.bf16 / 1e12,
        p.memory / 1e9,
        p.to_device / 1e9,
        p.to_host / 1e9
    );
}

/// What graphs save over all layers: residual blocks count as a whole.
fn print_sums(tables: &[Vec<Row>]) {
    let sum = |rows: &[Row]| -> f64 {
        let own = rows.iter().filter(|row| !row.name.starts_with(' '));
        own.map(|row| row.forward.seconds + row.weights.seconds + row.inputs.seconds).sum()
    };
    let [launches, graphs] = [sum(&tables[0]), sum(&tables[1])];
    outln!(
        "all layers one by one: {:.3} ms launched, {:.3} ms as graphs, ratio {:.3}",
        1e3 * launches,
        1e3 * graphs,
        graphs / launches.max(1e-12)
    );
}

fn print_ticks(ticks: &[TickRow]) {
    outln!("Ticks (forward + vjp + update), many back to back:");
    let row = |name: String, launches: f64, graphs: f64| {
        let ratio = graphs / launches.max(1e-12);
        format!("{name}\t{:.3}\t{:.3}\t{ratio:.3}", 1e3 * launches, 1e3 * graphs)
    };
    let each = ticks.iter().map(|TickRow { layers: [first, end], ticks, predicted }| {
        let times = row(format!("layers {first}-{}", end - 1), ticks.launches, ticks.graphs);
        let predicted = predicted.map_or("-".into(), |bytes| ByteSize(bytes).to_string());
        format!("{times}\t{}\t{predicted}", ByteSize(ticks.allocated as u64))
    });
    let sum = |of: fn(&Ticks) -> f64| ticks.iter().map(|row| of(&row.ticks)).sum::<f64>();
    let all = row("all".into(), sum(|t| t.launches), sum(|t| t.graphs));
    let header = "module (or block)\tlaunched ms\tas graphs ms\tratio\tGPU memory\tpredicted";
    table(1, header, each.chain([all]));
    outln!(
        "GPU memory: the module, its optimizer and cuDNN's workspace; predicted: what training asks for, with messages and a \
         copy to go back to, without the workspace"
    );
}
