//! Plots of a study: frames a second and efficiency by nodes, both axes logarithmic, as SVG and PNG.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::coord::combinators::IntoLogRange;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::plan::Point;
use super::table::Row;
use crate::study::forecast::Forecast;
use crate::{Error, Result};

/// Width and height in pixels.
const SIZE: (u32, u32) = (900, 600);
pub(crate) const FONT: &str = "sans-serif";
/// Colours that stay apart for those who see few (Okabe and Ito), black aside.
pub(crate) const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// One rule.
#[derive(Clone, Debug, Default, PartialEq)]
struct Series {
    rule: String,
    /// Nodes, and the least, middle and most.
    measured: Vec<(f64, [f64; 3])>,
    /// Nodes of points without a measurement.
    missing: Vec<f64>,
    ideal: Vec<(f64, f64)>,
    predicted: Vec<(f64, f64)>,
}

/// One plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Its file's name, without the ending.
    pub name: &'static str,
    title: String,
    unit: &'static str,
    /// Whether the upper left corner is empty, where speed grows with nodes.
    grows: bool,
    series: Vec<Series>,
}

/// The two plots of a study: `rows` as measured, `predicted` points past the last one.
pub fn charts(rows: &[Row], predicted: &[(Point, Forecast)]) -> Vec<Chart> {
    let mut rules: Vec<&str> = Vec::new();
    for row in rows {
        if !rules.contains(&row.rule.as_str()) {
            rules.push(&row.rule);
        }
    }
    let axis = rows.first().map_or("", |row| row.axis.as_str());
    let mut speed = Vec::new();
    let mut efficiency = Vec::new();
    for rule in rules {
        let of: Vec<&Row> = rows.iter().filter(|row| row.rule == rule).collect();
        let frames = |row: &Row, tick_ms: f64| 1e3 * row.global_batch as f64 / tick_ms;
        let known = of.iter().filter_map(|row| Some((row.nodes, row.ranks, frames(row, row.predicted_tick_ms?))));
        let beyond = predicted.iter().filter(|(point, _)| point.variant.to_string() == rule);
        let beyond = beyond.map(|(point, forecast)| (point.nodes, point.ranks, forecast.frames_per_second));
        let known: Vec<(usize, usize, f64)> = known.chain(beyond).collect();
        let missing = of.iter().filter(|row| row.runs == 0).map(|row| row.nodes as f64).collect();
        let mut series = Series { rule: rule.to_string(), missing, ..Series::default() };
        for row in &of {
            if let (Some(low), Some(middle), Some(high)) =
                (row.frames_per_second_min, row.frames_per_second, row.frames_per_second_max)
            {
                series.measured.push((row.nodes as f64, [low, middle, high]));
            }
        }
        let mut relative = series.clone();
        series.predicted = known.iter().map(|&(nodes, _, speed)| (nodes as f64, speed)).collect();
        let first = of.iter().find(|row| row.frames_per_second.is_some());
        if let Some((first, middle)) = first.and_then(|row| Some((row, row.frames_per_second?))) {
            let last = known.iter().map(|k| k.0).chain(of.iter().map(|row| row.nodes)).max().unwrap_or(first.nodes);
            let grown = |nodes: f64| middle * nodes / first.nodes as f64;
            if last > first.nodes {
                let ends = [first.nodes as f64, last as f64];
                series.ideal = ends.iter().map(|&nodes| (nodes, grown(nodes))).collect();
                relative.ideal = ends.iter().map(|&nodes| (nodes, 1.0)).collect();
            }
            for (nodes, range) in &mut relative.measured {
                let ideal = grown(*nodes);
                range.iter_mut().for_each(|speed| *speed /= ideal);
            }
        }
        if let Some(&(_, ranks, speed)) = known.first() {
            let of_first = |&(nodes, r, s): &(usize, usize, f64)| (nodes as f64, s / speed * ranks as f64 / r as f64);
            relative.predicted = known.iter().map(of_first).collect();
        }
        speed.push(series);
        efficiency.push(relative);
    }
    vec![
        Chart {
            name: "speed",
            title: format!("Frames a second by nodes ({axis})"),
            unit: "frames/s",
            grows: true,
            series: speed,
        },
        Chart {
            name: "efficiency",
            title: format!("Efficiency by nodes, to each rule's first point ({axis})"),
            unit: "efficiency",
            grows: false,
            series: efficiency,
        },
    ]
}

impl Chart {
    /// As SVG.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be drawn.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        self.draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area())?;
        Ok(text)
    }

    /// As PNG.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be drawn.
    pub fn png(&self) -> Result<Vec<u8>> {
        let (width, height) = SIZE;
        let mut pixels = vec![255; (width * height * 3) as usize];
        self.draw(&BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area())?;
        let failed = |e: png::EncodingError| Error::Run(format!("writing a PNG: {e}"));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }

    /// The least and the most on both axes, with room around; `None` where there is nothing to show.
    fn ranges(&self) -> Option<[(f64, f64); 2]> {
        let of = |s: &Series| -> Vec<(f64, f64)> {
            let measured = s.measured.iter().flat_map(|&(x, range)| range.map(|y| (x, y)));
            measured.chain(s.ideal.iter().copied()).chain(s.predicted.iter().copied()).collect()
        };
        let points: Vec<(f64, f64)> = self.series.iter().flat_map(of).filter(|p| p.0 > 0.0 && p.1 > 0.0).collect();
        let xs = self.series.iter().flat_map(|s| s.missing.iter().copied()).chain(points.iter().map(|p| p.0));
        let range = |values: Vec<f64>, room: f64| {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            (most > 0.0).then_some((least / room, most * room))
        };
        Some([range(xs.collect(), 1.15)?, range(points.iter().map(|p| p.1).collect(), 1.3)?])
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Result<()> {
        with_font()?;
        self.drawn(area).map_err(|e| Error::Run(format!("drawing a plot: {e}")))
    }

    fn drawn<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
        area.fill(&WHITE)?;
        let Some([x, y]) = self.ranges() else {
            area.titled(&format!("{}: nothing measured yet", self.title), (FONT, 22))?;
            return area.present();
        };
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d((x.0..x.1).log_scale().base(2.0), (y.0..y.1).log_scale().base(2.0))?;
        chart
            .configure_mesh()
            .x_desc("nodes")
            .y_desc(self.unit)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .light_line_style(WHITE)
            .x_label_formatter(&|nodes| number(*nodes))
            .y_label_formatter(&|value| number(*value))
            .draw()?;
        for (n, series) in self.series.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            let ideal = series.ideal.iter().copied();
            chart.draw_series(DashedLineSeries::new(ideal, 8, 6, BLACK.mix(0.5).stroke_width(1)))?;
            // The prediction is a thin line, from the first point to past the last.
            chart.draw_series(LineSeries::new(series.predicted.iter().copied(), colour.mix(0.6).stroke_width(1)))?;
            let middle = series.measured.iter().map(|&(x, [_, y, _])| (x, y));
            chart.draw_series(LineSeries::new(middle, colour.stroke_width(3)))?;
            let bars = series
                .measured
                .iter()
                .map(|&(x, [low, y, high])| ErrorBar::new_vertical(x, low, y, high, colour.filled(), 10));
            let missing = if series.missing.is_empty() { "" } else { " (x: missing)" };
            chart
                .draw_series(bars)?
                .label(format!("{}{missing}", series.rule))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
            let at = y.0 * 1.1;
            chart.draw_series(series.missing.iter().map(|&x| Cross::new((x, at), 6, colour.stroke_width(2))))?;
        }
        let key = |style: ShapeStyle| move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style);
        let nothing = || LineSeries::new(std::iter::empty::<(f64, f64)>(), BLACK);
        let thin = key(BLACK.mix(0.6).stroke_width(1));
        chart.draw_series(nothing())?.label("predicted (thin)").legend(thin);
        chart
            .draw_series(nothing())?
            .label("ideal (dashed)")
            .legend(|(x, y)| DashedPathElement::new([(x, y), (x + 20, y)], 6, 4, BLACK.mix(0.5).stroke_width(1)));
        chart
            .configure_series_labels()
            .position(if self.grows { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::LowerLeft })
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 14))
            .draw()?;
        area.present()
    }
}

/// A label with as many digits as tell something.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// Text needs a font: one that comes with the program, so that pages look alike everywhere.
pub(crate) fn with_font() -> Result<()> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let known = KNOWN.get_or_init(|| register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).is_ok());
    if *known { Ok(()) } else { Err(Error::Run("the plots' font cannot be read (a bug)".into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(rule: &str, nodes: usize, speed: Option<f64>) -> Row {
        Row {
            rule: rule.into(),
            axis: "weak".into(),
            nodes,
            ranks: nodes,
            global_batch: 10,
            frames_per_second: speed,
            frames_per_second_min: speed.map(|s| 0.5 * s),
            frames_per_second_max: speed.map(|s| 2.0 * s),
            runs: usize::from(speed.is_some()) * 3,
            predicted_tick_ms: Some(100.0 / nodes as f64),
            ..Row::default()
        }
    }

    #[test]
    fn what_is_drawn_is_what_was_measured() {
        let rows = [row("a", 1, Some(100.0)), row("a", 2, Some(160.0)), row("a", 4, None)];
        let charts = charts(&rows, &[]);
        let speed = &charts[0].series[0];
        assert_eq!(speed.measured, [(1.0, [50.0, 100.0, 200.0]), (2.0, [80.0, 160.0, 320.0])]);
        assert_eq!((&speed.missing[..], &speed.ideal[..]), (&[4.0][..], &[(1.0, 100.0), (4.0, 400.0)][..]));
        assert_eq!(speed.predicted, [(1.0, 100.0), (2.0, 200.0), (4.0, 400.0)]);
        let efficiency = &charts[1].series[0];
        assert_eq!(efficiency.measured[1].1[1], 0.8);
        assert_eq!(efficiency.predicted, [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]);
        let svg = charts[0].svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("frames/s") && svg.contains("(x: missing)"), "{svg}");
        let png = charts[1].png().unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
        assert_eq!((reader.info().width, reader.info().height), SIZE);
    }

    #[test]
    fn nothing_measured_is_a_plot_too() {
        let nothing = charts(&[Row { predicted_tick_ms: None, ..row("a", 1, None) }], &[]);
        assert!(nothing[0].svg().unwrap().contains("nothing measured yet"));
    }
}
