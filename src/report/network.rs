//! The network as a drawing: modules with what they hold and where they ran, edges with what travels.

use std::fmt::Write;

use bytesize::ByteSize;

use crate::metrics::attempt::{Attempt, PlacedModule};
use crate::study::page::escaped;

/// Pixels: a module's box, the room between two, a line of text, a skip's height a module that it passes.
const BOX: usize = 132;
const GAP: usize = 64;
const LINE: usize = 16;
const ARC: usize = 34;
/// The colours of hosts, in turn.
const HOSTS: [&str; 6] = ["#dbe9f6", "#fde3cf", "#dcf2e3", "#f3dff0", "#fbf3cf", "#e3e3e3"];

/// As SVG; nothing where the network is not on record.
pub fn drawing(attempt: &Attempt) -> Option<String> {
    let modules = attempt.modules.len();
    if modules == 0 {
        return None;
    }
    let place = |module: usize| (module >= 1 && module <= modules).then(|| (module - 1) * (BOX + GAP) + 8);
    let edges: Vec<_> =
        attempt.edges.iter().filter(|e| e.from < e.to && place(e.from).is_some() && place(e.to).is_some()).collect();
    let highest = edges.iter().map(|e| e.to - e.from).filter(|span| *span > 1).max().unwrap_or(0);
    let top = 12 + highest * ARC;
    let texts: Vec<Vec<String>> = attempt.modules.iter().map(|module| lines(attempt, module)).collect();
    let height = LINE * (texts.iter().map(Vec::len).max().unwrap_or(0) + 1);
    let (width, whole) = (modules * (BOX + GAP) - GAP + 16, top + height + 12);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {whole}\" width=\"{width}\" height=\"{whole}\" \
         style=\"max-width:none\" font-family=\"sans-serif\" font-size=\"12\" role=\"img\" aria-label=\"The network\">\n"
    );
    let middle = top + height / 2;
    for edge in edges {
        let (Some(from), Some(to)) = (place(edge.from), place(edge.to)) else { continue };
        let size = ByteSize(edge.bytes);
        let delay = if edge.delay > 1 { format!(", {} ticks", edge.delay) } else { String::new() };
        if edge.to == edge.from + 1 {
            let (a, b) = (from + BOX, to);
            let _ = writeln!(
                svg,
                "<path d=\"M{a} {middle}H{}\" stroke=\"#333\" fill=\"none\"/><path d=\"M{b} {middle}l-7 -4v8z\" fill=\"#333\"/>\
                 <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" font-size=\"10\">{size}</text>",
                b - 6,
                usize::midpoint(a, b),
                middle - 6
            );
            continue;
        }
        // From the upper edge of one box to that of the other.
        let (a, b) = (from + BOX * 2 / 3, to + BOX / 3);
        let peak = top - (edge.to - edge.from) * ARC;
        let _ = writeln!(
            svg,
            "<path d=\"M{a} {top}C{a} {peak} {b} {peak} {b} {}\" stroke=\"#06c\" fill=\"none\"/><path d=\"M{b} {top}l-4 -7h8z\" fill=\"#06c\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" font-size=\"10\" fill=\"#06c\">{size}{delay}</text>",
            top - 6,
            usize::midpoint(a, b),
            top - (top - peak) * 3 / 4 - 4
        );
    }
    for (n, (module, text)) in attempt.modules.iter().zip(&texts).enumerate() {
        let x = n * (BOX + GAP) + 8;
        let host = attempt.host(module.rank);
        let known = attempt.hosts.iter().position(|(name, _)| Some(name.as_str()) == host).unwrap_or(0);
        let _ = writeln!(
            svg,
            "<g><title>module {}: {}</title><rect x=\"{x}\" y=\"{top}\" width=\"{BOX}\" height=\"{height}\" rx=\"6\" fill=\"{}\" \
             stroke=\"#333\"/>",
            n + 1,
            escaped(&module.layers.join(", ")),
            HOSTS[known % HOSTS.len()]
        );
        for (k, line) in text.iter().enumerate() {
            let weight = if k == 0 { " font-weight=\"bold\"" } else { "" };
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\"{weight}>{}</text>",
                x + BOX / 2,
                top + LINE * (k + 1),
                escaped(line)
            );
        }
        svg += "</g>\n";
    }
    svg += "</svg>\n";
    Some(svg)
}

/// What stands in a module's box.
fn lines(attempt: &Attempt, module: &PlacedModule) -> Vec<String> {
    let number = attempt.modules.iter().position(|other| std::ptr::eq(other, module)).map_or(0, |n| n + 1);
    let [height, width, channels] = module.output;
    let mut lines = vec![format!("module {number}")];
    // A box has room for some twenty characters.
    lines.extend(layers(module).into_iter().map(|line| short(&line, 22)));
    lines.push(format!("\u{2192} {height}x{width}x{channels}"));
    lines.push(format!("{} parameters", rounded(module.parameters)));
    lines.push(ByteSize(module.memory).to_string());
    lines.push(format!("rank {}", module.rank));
    lines.extend(attempt.host(module.rank).map(|host| short(host, 20)));
    lines
}

/// The layers that hold parameters, by kind, with how many.
fn layers(module: &PlacedModule) -> Vec<String> {
    const WITHOUT: [&str; 8] =
        ["relu", "max-pool", "avg-pool", "global-avg-pool", "dropout", "upsample", "flatten", "sigmoid"];
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for kind in module.layers.iter().map(String::as_str).filter(|kind| !WITHOUT.contains(kind)) {
        match kinds.iter_mut().find(|(other, _)| *other == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    kinds.iter().map(|(kind, count)| if *count == 1 { kind.to_string() } else { format!("{count} {kind}") }).collect()
}

fn short(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['\u{2026}']).collect(),
        false => text.to_string(),
    }
}

fn rounded(count: u64) -> String {
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.1} k", count as f64 / 1e3),
        _ => format!("{:.1} M", count as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::attempt::PlacedEdge;

    #[test]
    fn modules_and_edges_are_drawn() {
        let module = |rank| PlacedModule {
            layers: ["conv2d", "relu", "conv2d"].map(String::from).to_vec(),
            output: [8, 8, 16],
            parameters: 12_345,
            rank,
            memory: 3 << 20,
        };
        let edge = |from, to, delay| PlacedEdge { from, to, delay, bytes: 64 << 10 };
        let attempt = Attempt {
            hosts: vec![("left".into(), 2), ("ri<ght".into(), 1)],
            modules: [0, 1, 2].map(module).to_vec(),
            // The last one is of a damaged file.
            edges: vec![edge(1, 2, 1), edge(2, 3, 1), edge(1, 3, 2), edge(7, 9, 1)],
            ..Attempt::default()
        };
        let svg = drawing(&attempt).unwrap();
        assert_eq!((svg.matches("<rect").count(), svg.matches("<path").count()), (3, 6), "{svg}");
        for text in ["module 3", "2 conv2d", "12.3 k parameters", "3.0 MiB", "64.0 KiB, 2 ticks", "rank 2", "ri&lt;ght"]
        {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        assert_eq!(drawing(&Attempt::default()), None);
    }
}
