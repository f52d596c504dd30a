//! Which classes are taken for which: accuracy by class and a heat map, of what `sideways eval` writes.

use std::fmt::Write;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::study::page::escaped;
use crate::{Error, Result};

/// Up to so many classes each cell has its number; beyond, a cell is a pixel.
const LABELLED: usize = 40;
/// A cell's side in pixels, where it has a number.
const CELL: usize = 26;
/// Classes of the short list, from each end.
const SHOWN: usize = 10;

/// Counts of videos by class and prediction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confusion {
    /// Classes, in label order.
    pub names: Vec<String>,
    /// `[label][prediction]`
    pub counts: Vec<u64>,
}

impl Confusion {
    /// Reads what `eval --confusion` writes (`label`, then a column a class), or `eval --scores` as CSV (`video`, `label`,
    /// `predicted`, then a column a class).
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &[u8]) -> std::result::Result<Self, String> {
        let mut reader = csv::ReaderBuilder::new().from_reader(text);
        let header: Vec<String> = reader.headers().map_err(|e| e.to_string())?.iter().map(String::from).collect();
        let scores = header.iter().take(3).eq(["video", "label", "predicted"]);
        let names = match header.first().map(String::as_str) {
            Some("label") => header[1..].to_vec(),
            Some("video") if scores => header[3..].to_vec(),
            _ => return Err("a table, but neither of scores nor of confusion, as eval writes them".into()),
        };
        let classes = names.len();
        if classes == 0 || classes > 1 << 14 {
            return Err(format!("it has {classes} classes"));
        }
        let mut counts = vec![0u64; classes * classes];
        for (n, record) in reader.records().enumerate() {
            let record = record.map_err(|e| e.to_string())?;
            let number = |column: usize| {
                let cell = record.get(column).unwrap_or_default();
                cell.parse::<u64>().map_err(|_| format!("line {}, column {}: {cell:?} is no number", n + 2, column + 1))
            };
            if scores {
                let (label, predicted) = (number(1)? as usize, number(2)? as usize);
                if label >= classes || predicted >= classes {
                    return Err(format!("line {}: class {} of {classes}", n + 2, label.max(predicted)));
                }
                counts[label * classes + predicted] += 1;
                continue;
            }
            if n >= classes {
                return Err(format!("it has more than {classes} lines, one a class"));
            }
            for k in 0..classes {
                counts[n * classes + k] = number(k + 1)?;
            }
        }
        Ok(Confusion { names, counts })
    }

    /// Of each class: videos, and how many of them were found.
    fn found(&self) -> Vec<(u64, u64)> {
        let rows = self.counts.chunks_exact(self.names.len()).enumerate();
        rows.map(|(k, row)| (row.iter().fold(0u64, |sum, &n| sum.saturating_add(n)), row[k])).collect()
    }

    /// As HTML: how many, the classes that are found least and most, all of them folded away, and the heat map.
    ///
    /// # Errors
    /// [`Error::Run`] if the picture cannot be made.
    pub fn html(&self) -> Result<String> {
        let found = self.found();
        let total = |of: fn(&(u64, u64)) -> u64| found.iter().map(of).fold(0u64, u64::saturating_add);
        let (videos, right) = (total(|class| class.0), total(|class| class.1));
        let share = |&(all, right): &(u64, u64)| right as f64 / all.max(1) as f64;
        let mut order: Vec<usize> = (0..found.len()).filter(|&k| found[k].0 > 0).collect();
        order.sort_by(|&a, &b| share(&found[a]).total_cmp(&share(&found[b])));
        let mean = order.iter().map(|&k| share(&found[k])).sum::<f64>() / order.len().max(1) as f64;
        let mut html = format!(
            "<p>{videos} videos of {} classes: top-1 {:.2} %, mean over classes {:.2} %.</p>\n",
            order.len(),
            100.0 * right as f64 / videos.max(1) as f64,
            100.0 * mean
        );
        if order.len() > 2 * SHOWN {
            html += &self.table("Found least", &order[..SHOWN]);
            html += &self.table("Found most", &order[order.len() - SHOWN..]);
            html += "<details><summary>All classes</summary>\n";
            html += &self.table("By accuracy", &order);
            html += "</details>\n";
        } else {
            html += &self.table("By accuracy", &order);
        }
        html += &if self.names.len() <= LABELLED { self.labelled() } else { self.picture()? };
        Ok(html)
    }

    fn table(&self, caption: &str, classes: &[usize]) -> String {
        let found = self.found();
        let mut table = format!(
            "<div class=\"wide\"><table><caption>{caption}</caption><tr><th>class</th><th>videos</th><th>found</th><th>most often taken \
             for</th></tr>\n"
        );
        for &k in classes {
            let (videos, right) = found[k];
            let row = &self.counts[k * self.names.len()..][..self.names.len()];
            let other = (0..row.len()).filter(|&other| other != k && row[other] > 0).max_by_key(|&other| row[other]);
            let taken = other.map_or("-".into(), |other| format!("{} ({})", self.names[other], row[other]));
            let _ = writeln!(
                table,
                "<tr><td>{}</td><td>{videos}</td><td>{:.1} %</td><td>{}</td></tr>",
                escaped(&self.names[k]),
                100.0 * right as f64 / videos.max(1) as f64,
                escaped(&taken)
            );
        }
        table + "</table></div>\n"
    }

    /// The share of each label's videos that fell on each class.
    fn shares(&self) -> Vec<f64> {
        let found = self.found();
        let classes = self.names.len();
        self.counts.iter().enumerate().map(|(n, &count)| count as f64 / found[n / classes].0.max(1) as f64).collect()
    }

    /// The heat map with a number in each cell.
    fn labelled(&self) -> String {
        let (classes, shares) = (self.names.len(), self.shares());
        let left = 10 + 7 * self.names.iter().map(|name| name.chars().count().min(30)).max().unwrap_or(0);
        // The line above it has its own length.
        let (width, height) = ((left + classes * CELL + 10).max(left + 320), classes * CELL + left + 30);
        let mut svg = format!(
            "<div class=\"wide\"><svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" style=\"max-width:none\" font-family=\"sans-serif\" font-size=\"11\" role=\"img\" aria-label=\"Confusion\">\n\
             <text x=\"{left}\" y=\"14\" font-size=\"13\">Down: class; across: prediction; number of videos</text>\n"
        );
        let name = |k: usize| escaped(&self.names[k].chars().take(30).collect::<String>());
        for row in 0..classes {
            let y = 24 + row * CELL;
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", left - 6, y + 17, name(row));
            for column in 0..classes {
                let (x, share) = (left + column * CELL, shares[row * classes + column]);
                let [r, g, b] = colour(share);
                let _ = write!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"#{r:02x}{g:02x}{b:02x}\" stroke=\"#ddd\"/>"
                );
                let count = self.counts[row * classes + column];
                if count > 0 {
                    let ink = if share > 0.55 { "#fff" } else { "#222" };
                    let _ = write!(
                        svg,
                        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"{ink}\">{count}</text>",
                        x + CELL / 2,
                        y + 17
                    );
                }
            }
            svg.push('\n');
        }
        for column in 0..classes {
            let (x, y) = (left + column * CELL + 17, 30 + classes * CELL);
            let _ = writeln!(
                svg,
                "<text transform=\"translate({x} {y}) rotate(-90)\" text-anchor=\"end\">{}</text>",
                name(column)
            );
        }
        svg + "</svg></div>\n"
    }

    /// The heat map with a pixel a cell.
    fn picture(&self) -> Result<String> {
        let classes = self.names.len();
        let pixels: Vec<u8> = self.shares().iter().flat_map(|&share| colour(share)).collect();
        let mut png = Vec::new();
        let mut encoder = png::Encoder::new(&mut png, classes as u32, classes as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
        written.map_err(|e| Error::Run(format!("drawing a heat map: {e}")))?;
        let side = classes.clamp(600, 1200);
        Ok(format!(
            "<figure><img width=\"{side}\" height=\"{side}\" style=\"image-rendering:pixelated\" alt=\"Confusion of {classes} classes\" \
             src=\"data:image/png;base64,{}\"><figcaption>Down: class, across: prediction, both in label order; the darker, the larger the \
             share of the class's videos.</figcaption></figure>\n",
            BASE64_STANDARD.encode(png)
        ))
    }
}

/// White for nothing, dark blue for all; small shares stay visible.
fn colour(share: f64) -> [u8; 3] {
    let depth = share.clamp(0.0, 1.0).powf(0.4);
    [(8.0, 247.0), (48.0, 251.0), (107.0, 255.0)].map(|(dark, light)| (light + (dark - light) * depth).round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_tables_are_read() {
        let matrix = Confusion::parse(b"label,\"a,b\",c\n\"a,b\",3,1\nc,0,2\n").unwrap();
        assert_eq!((matrix.names.clone(), matrix.counts.clone()), (vec!["a,b".into(), "c".into()], vec![3, 1, 0, 2]));
        let scores = Confusion::parse(b"video,label,predicted,\"a,b\",c\nv,0,0,1,0\nw,0,1,0.5,0.5\n").unwrap();
        assert_eq!(scores.counts, [1, 1, 0, 0]);
        let html = matrix.html().unwrap();
        assert!(html.contains("6 videos of 2 classes: top-1 83.33 %, mean over classes 87.50 %"), "{html}");
        assert!(html.contains("<td>a,b</td><td>4</td><td>75.0 %</td><td>c (1)</td>"), "{html}");
        for (text, says) in [
            (&b"a,b\n1,2\n"[..], "neither of scores"),
            (b"label,a\nx,7e3\n", "line 2, column 2: \"7e3\" is no number"),
            (b"label,a\nx,1\ny,2\n", "more than 1 lines"),
            (b"video,label,predicted,a\nv,0,1,1\n", "class 1 of 1"),
        ] {
            let why = Confusion::parse(text).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }

    #[test]
    fn many_classes_are_a_small_picture() {
        let names: Vec<String> = (0..600).map(|k| format!("class {k}")).collect();
        let counts = (0..600 * 600).map(|n| if n % 601 == 0 { 50 } else { u64::from(n % 97 == 0) }).collect();
        let html = Confusion { names, counts }.html().unwrap();
        assert!(html.contains("data:image/png;base64,iVBOR") && html.len() < 600_000, "{}", html.len());
        assert!(html.contains("Found least") && html.contains("All classes"));
    }
}
