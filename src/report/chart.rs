//! Line charts as SVG.

use plotters::prelude::*;

use crate::study::plot::{COLOURS, FONT, with_font};
use crate::{Error, Result};

/// Width and height in pixels.
const SIZE: (u32, u32) = (760, 380);
/// Places along x at which a long series is drawn.
const PLACES: usize = 300;

/// One line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Line {
    /// What it is of.
    pub name: String,
    /// As measured, by x.
    pub points: Vec<(f64, f64)>,
    /// Whether points are few, and are drawn as dots too.
    pub dots: bool,
}

/// One chart.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// What y is in.
    pub unit: String,
    /// Its lines.
    pub lines: Vec<Line>,
    /// Places on x that are marked.
    pub marks: Vec<f64>,
    /// Whether lines end high, so that their names stand low.
    pub rises: bool,
}

/// A stretch of a series: where, the least, mean and most of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    x: f64,
    range: [f64; 3],
}

/// `points` in at most [`PLACES`] stretches of as many points each: nothing of a peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<Place> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let stretch = finite.len().div_ceil(PLACES).max(1);
    let place = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        let ys = part.iter().map(|p| p.1);
        let (least, most) = (ys.clone().fold(f64::INFINITY, f64::min), ys.clone().fold(f64::NEG_INFINITY, f64::max));
        Place { x: part.iter().map(|p| p.0).sum::<f64>() / n, range: [least, ys.sum::<f64>() / n, most] }
    };
    finite.chunks(stretch).map(place).collect()
}

/// The colour of line `n` of `lines`: those that stay apart for everyone, as long as there are enough.
fn colour(n: usize, lines: usize) -> RGBColor {
    if lines <= COLOURS.len() {
        return COLOURS[n];
    }
    let (red, green, blue) = HSLColor(n as f64 / lines as f64, 0.75, 0.42).rgb();
    RGBColor(red, green, blue)
}

impl Chart {
    /// As SVG; `None` where there is nothing to show.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be drawn.
    pub fn svg(&self) -> Result<Option<String>> {
        with_font()?;
        let lines: Vec<(&Line, Vec<Place>)> = self.lines.iter().map(|line| (line, thinned(&line.points))).collect();
        let all = || lines.iter().flat_map(|(_, places)| places);
        if all().next().is_none() {
            return Ok(None);
        }
        let of = |value: fn(&Place) -> [f64; 2]| {
            let ends = all().map(value);
            ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), [a, b]| (least.min(a), most.max(b)))
        };
        let (x, y) = (of(|place| [place.x, place.x]), of(|place| [place.range[0], place.range[2]]));
        let room = 0.05 * (y.1 - y.0).max(1e-9 + 0.01 * y.1.abs());
        let mut text = String::new();
        self.draw(&mut text, &lines, (x.0, x.1.max(x.0 + 1.0)), (y.0 - room, y.1 + room))
            .map_err(|e| Error::Run(format!("drawing a chart: {e}")))?;
        Ok(Some(text))
    }

    fn draw(
        &self,
        text: &mut String,
        lines: &[(&Line, Vec<Place>)],
        x: (f64, f64),
        y: (f64, f64),
    ) -> std::result::Result<(), DrawingAreaErrorKind<std::io::Error>> {
        // Labels are some tenth of the range apart.
        let digits = (-((y.1 - y.0) / 10.0).log10().floor()).clamp(0.0, 9.0) as usize;
        let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, (FONT, 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(66)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
        chart
            .configure_mesh()
            .x_desc("batches")
            .y_desc(&self.unit)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .light_line_style(WHITE)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|value| format!("{value:.digits$}"))
            .draw()?;
        for &mark in &self.marks {
            chart.draw_series(DashedLineSeries::new(
                [(mark, y.0), (mark, y.1)],
                4,
                4,
                BLACK.mix(0.5).stroke_width(1),
            ))?;
        }
        for (n, (line, places)) in lines.iter().enumerate() {
            let colour = colour(n, lines.len());
            let edge = |k: usize| places.iter().map(move |place| (place.x, place.range[k]));
            let band: Vec<(f64, f64)> = edge(2).chain(edge(0).rev()).collect();
            chart.draw_series([Polygon::new(band, colour.mix(0.2))])?;
            chart
                .draw_series(LineSeries::new(edge(1), colour.stroke_width(2)))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            if line.dots {
                chart.draw_series(edge(1).map(|at| Circle::new(at, 4, colour.filled())))?;
            }
        }
        if lines.len() > 1 {
            chart
                .configure_series_labels()
                .position(if self.rises { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight })
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .label_font((FONT, 13))
                .draw()?;
        }
        area.present()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten thousand batches become few places, and the one batch that stands out is seen.
    #[test]
    fn a_peak_stays() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|n| (n as f64, if n == 7777 { 50.0 } else { 1.0 })).collect();
        let places = thinned(&points);
        assert!(places.len() <= PLACES, "{}", places.len());
        let most = places.iter().map(|place| place.range[2]).fold(0.0, f64::max);
        assert_eq!((most, places[0].range), (50.0, [1.0, 1.0, 1.0]));
        let few = [(1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)];
        assert_eq!(thinned(&few).iter().map(|place| (place.x, place.range[1])).collect::<Vec<_>>(), [few[0], few[2]]);
    }

    #[test]
    fn nothing_is_no_chart() {
        assert_eq!(Chart::default().svg().unwrap(), None);
        let one = Chart { lines: vec![Line { points: vec![(1.0, 2.0)], ..Line::default() }], ..Chart::default() };
        assert!(one.svg().unwrap().unwrap().starts_with("<svg"));
    }
}
