//! From a whole decoded frame to what module 1 reads: crop, resize, mirror, colour, scale. One [`View`] serves all
//! frames of a clip, so that what moves in it is the video and not the augmentation.

use super::sampler::{Draw, draw};
use crate::backend::cpu::vectorized;
use crate::{Error, Result};

/// Random changes of clips in training; off by default.
#[derive(Clone, Debug, PartialEq)]
pub struct Augmentation {
    /// Mirror left and right, at random.
    pub flip: bool,
    /// Random resized crop: the part of the frame's area that is kept, from and to; `None`: a crop without resizing.
    pub crop_scale: Option<[f64; 2]>,
    /// Random resized crop: width to height of what is kept, from and to.
    pub crop_ratio: [f64; 2],
    /// Colours are multiplied by a factor out of 1 ± this.
    pub brightness: f64,
    /// The distance of colours from mid-grey is multiplied by a factor out of 1 ± this.
    pub contrast: f64,
    /// The distance of colours from their pixel's grey is multiplied by a factor out of 1 ± this.
    pub saturation: f64,
}

impl Default for Augmentation {
    fn default() -> Self {
        Augmentation {
            flip: false,
            crop_scale: None,
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
        }
    }
}

impl Augmentation {
    /// Checks the ranges; `crop` is the side of the square delivered.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key.
    pub fn validate(&self, crop: Option<usize>) -> Result<()> {
        let range = |[low, high]: [f64; 2], most: f64| low > 0.0 && low <= high && high <= most;
        if let Some(scale) = self.crop_scale {
            if !range(scale, 1.0) {
                return Err(Error::input(format!(
                    "data.crop_scale = {scale:?}: it is the part of a frame's area that is kept, from and to, \
                     0 < from <= to <= 1, for instance [0.5, 1.0]"
                )));
            }
            if crop.is_none() {
                return Err(Error::input("data.crop_scale needs data.crop, the side that crops are resized to"));
            }
        }
        if !range(self.crop_ratio, f64::MAX) {
            return Err(Error::input(format!(
                "data.crop_ratio = {:?}: it is width to height, from and to, 0 < from <= to",
                self.crop_ratio
            )));
        }
        for (key, value) in
            [("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation)]
        {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::input(format!(
                    "data.{key} = {value}: factors are drawn out of 1 - {key} to 1 + {key}, so it is within 0 and 1"
                )));
            }
        }
        Ok(())
    }
}

/// Sizes of frames before and after, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Of a stored frame.
    pub height: usize,
    /// Of a stored frame.
    pub width: usize,
    /// Of a delivered frame.
    pub out_height: usize,
    /// Of a delivered frame.
    pub out_width: usize,
}

impl Geometry {
    /// `crop` is the side of the square delivered; `None`: whole frames.
    ///
    /// # Errors
    /// [`Error::Input`] for a crop larger than the frames.
    pub fn new(height: usize, width: usize, crop: Option<usize>) -> Result<Self> {
        let (out_height, out_width) = crop.map_or((height, width), |c| (c, c));
        if out_height == 0 || out_height > height || out_width > width {
            return Err(Error::input(format!(
                "data.crop = {out_height} does not fit the dataset's {height}x{width} frames (HxW): use 1..={}",
                height.min(width)
            )));
        }
        Ok(Self { height, width, out_height, out_width })
    }

    /// Whether so many different crops fit along the longer side.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no room beside the centre.
    pub fn check_crops(&self, crops: usize) -> Result<()> {
        let room = if self.width >= self.height { self.width - self.out_width } else { self.height - self.out_height };
        if crops > 1 && room < crops - 1 {
            return Err(Error::input(format!(
                "{crops} crops of {}x{} do not differ in frames of {}x{} (HxW): set data.crop to less than the longer side",
                self.out_height, self.out_width, self.height, self.width
            )));
        }
        Ok(())
    }

    /// Values of a delivered frame.
    pub fn frame_len(&self) -> usize {
        self.out_height * self.out_width * 3
    }

    /// Bytes of a whole decoded frame.
    pub fn stored_len(&self) -> usize {
        self.height * self.width * 3
    }
}

/// How bytes become values: (u8/255 − mean) / std.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Of each channel.
    pub mean: [f32; 3],
    /// Of each channel.
    pub std: [f32; 3],
}

/// What is done to every frame of one window.
#[derive(Clone, Debug)]
pub struct View {
    geometry: Geometry,
    top: usize,
    left: usize,
    mirrored: bool,
    /// Random resized crop: weights of rows and columns.
    resize: Option<(Vec<Taps>, Vec<Taps>)>,
    scaling: Scaling,
    colour: Colour,
    saturation: Option<f32>,
}

/// What each byte of each channel becomes: scaled, or in 0..=1 where saturation is still to be changed.
#[derive(Clone, Debug)]
enum Colour {
    /// `byte * factor + shift`, factors and shifts of [`LANES`] successive values.
    Affine(Box<[[f32; LANES]; 2]>),
    /// Brightness and contrast, which end at black and white.
    Table(Box<[[f32; 256]; 3]>),
}

/// Whole pixels and whole vectors of every width.
const LANES: usize = 48;

thread_local! {
    /// A row of values, and the rows that resizing has made narrow.
    static ROWS: std::cell::RefCell<(Vec<f32>, Vec<f32>)> = const { std::cell::RefCell::new((Vec::new(), Vec::new())) };
}

/// The source pixels that make up one resized pixel.
#[derive(Clone, Debug)]
struct Taps {
    first: usize,
    weights: Vec<f32>,
}

impl View {
    /// Crop `crop` of `crops` along the frame's longer side, one being the centre; unchanged.
    pub fn fixed(geometry: Geometry, scaling: Scaling, (crop, crops): (usize, usize)) -> Self {
        let (rows, columns) = (geometry.height - geometry.out_height, geometry.width - geometry.out_width);
        let along = |room: usize| if crops > 1 { room * crop / (crops - 1) } else { room / 2 };
        let (top, left) = match geometry.width >= geometry.height {
            true => (rows / 2, along(columns)),
            false => (along(rows), columns / 2),
        };
        let colour = Colour::new(&scaling, 1.0, 1.0, true);
        View { geometry, top, left, mirrored: false, resize: None, scaling, colour, saturation: None }
    }

    /// Drawn from (seed, epoch, video) alone.
    pub fn drawn(
        geometry: Geometry,
        scaling: Scaling,
        augmentation: &Augmentation,
        (seed, epoch, video): (u64, u64, u64),
    ) -> Self {
        let a = augmentation;
        let whole = |what, n: usize| draw(seed, epoch, video, what, n as u64) as usize;
        let real = |what, low: f64, high: f64| {
            let unit = draw(seed, epoch, video, what, 1 << 53) as f64 / (1u64 << 53) as f64;
            low + (high - low) * unit
        };
        let factor = |what, by: f64| if by > 0.0 { real(what, 1.0 - by, 1.0 + by) as f32 } else { 1.0 };
        let g = geometry;
        let (height, width) = match a.crop_scale {
            None => (g.out_height, g.out_width),
            Some([low, high]) => {
                let area = real(Draw::CropArea, low, high) * (g.height * g.width) as f64;
                let ratio = real(Draw::CropRatio, a.crop_ratio[0].ln(), a.crop_ratio[1].ln()).exp();
                let side = |x: f64, most: usize| (x.sqrt().round() as usize).clamp(1, most);
                (side(area / ratio, g.height), side(area * ratio, g.width))
            }
        };
        let saturation = factor(Draw::Saturation, a.saturation);
        let (brightness, contrast) = (factor(Draw::Brightness, a.brightness), factor(Draw::Contrast, a.contrast));
        View {
            top: whole(Draw::CropRow, g.height - height + 1),
            left: whole(Draw::CropColumn, g.width - width + 1),
            mirrored: a.flip && whole(Draw::Flip, 2) == 1,
            resize: a.crop_scale.map(|_| (taps(height, g.out_height), taps(width, g.out_width))),
            colour: Colour::new(&scaling, brightness, contrast, a.saturation == 0.0),
            saturation: (a.saturation > 0.0).then_some(saturation),
            geometry,
            scaling,
        }
    }

    /// Makes `out` = `[out_height, out_width, 3]` values of `frame` = `[height, width, 3]` bytes.
    pub fn apply(&self, frame: &[u8], out: &mut [f32]) {
        ROWS.with_borrow_mut(|scratch| {
            vectorized(
                #[inline(always)]
                || match &self.resize {
                    None => self.cropped(frame, out),
                    Some((rows, columns)) => self.resized(frame, rows, columns, scratch, out),
                },
            );
        });
        if let Some(saturation) = self.saturation {
            let Scaling { mean, std } = &self.scaling;
            for pixel in out.as_chunks_mut::<3>().0 {
                let grey = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2];
                for c in 0..3 {
                    let value = (grey + saturation * (pixel[c] - grey)).clamp(0.0, 1.0);
                    pixel[c] = (value - mean[c]) / std[c];
                }
            }
        }
    }

    #[inline(always)]
    fn cropped(&self, frame: &[u8], out: &mut [f32]) {
        let g = &self.geometry;
        let mut turned = vec![0; if self.mirrored { g.out_width * 3 } else { 0 }];
        for (y, row) in out.chunks_exact_mut(g.out_width * 3).enumerate() {
            let at = ((self.top + y) * g.width + self.left) * 3;
            let mut bytes = &frame[at..at + row.len()];
            if self.mirrored {
                let pixels = turned.as_chunks_mut::<3>().0.iter_mut().zip(bytes.as_chunks::<3>().0.iter().rev());
                pixels.for_each(|(to, from)| *to = *from);
                bytes = &turned;
            }
            self.colour.apply(bytes, row);
        }
    }

    /// Columns, then rows; colours before both.
    #[inline(always)]
    fn resized(
        &self,
        frame: &[u8],
        rows: &[Taps],
        columns: &[Taps],
        (wide, narrow): &mut (Vec<f32>, Vec<f32>),
        out: &mut [f32],
    ) {
        let g = &self.geometry;
        let end = |taps: &[Taps]| taps.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(0);
        let (height, width, narrow_row) = (end(rows), end(columns), g.out_width * 3);
        // A pixel is read and written as four values, of which the last is the next pixel's or nobody's.
        wide.resize(width * 3 + 1, 0.0);
        narrow.resize(height * narrow_row + 1, 0.0);
        for y in 0..height {
            let at = ((self.top + y) * g.width + self.left) * 3;
            self.colour.apply(&frame[at..at + width * 3], &mut wide[..width * 3]);
            for x in 0..g.out_width {
                let taps = &columns[if self.mirrored { g.out_width - 1 - x } else { x }];
                let mut pixel = [0.0; 4];
                let pixels = wide[taps.first * 3..].windows(4).step_by(3);
                for (from, &weight) in pixels.zip(&taps.weights) {
                    pixel.iter_mut().zip(from).for_each(|(to, from)| *to += weight * from);
                }
                let to = y * narrow_row + x * 3;
                narrow[to..to + 4].copy_from_slice(&pixel);
            }
        }
        for (taps, out) in rows.iter().zip(out.chunks_exact_mut(narrow_row)) {
            out.fill(0.0);
            let sources = narrow[taps.first * narrow_row..].chunks_exact(narrow_row);
            for (source, &weight) in sources.zip(&taps.weights) {
                out.iter_mut().zip(source).for_each(|(to, from)| *to += weight * from);
            }
        }
    }
}

impl Colour {
    /// Brightness, contrast and (if `scaled`) scaling of every byte.
    fn new(scaling: &Scaling, brightness: f32, contrast: f32, scaled: bool) -> Self {
        let scaled = |value: f32, c: usize| if scaled { (value - scaling.mean[c]) / scaling.std[c] } else { value };
        if (brightness, contrast) == (1.0, 1.0) {
            let black = |i: usize| scaled(0.0, i % 3);
            let factor = std::array::from_fn(|i| (scaled(1.0, i % 3) - black(i)) / 255.0);
            return Colour::Affine(Box::new([factor, std::array::from_fn(black)]));
        }
        Colour::Table(Box::new(std::array::from_fn(|c| {
            std::array::from_fn(|byte| {
                let bright = (byte as f32 / 255.0 * brightness).clamp(0.0, 1.0);
                scaled((0.5 + contrast * (bright - 0.5)).clamp(0.0, 1.0), c)
            })
        })))
    }

    /// Whole pixels.
    #[inline(always)]
    fn apply(&self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Colour::Affine(of) => {
                let [factor, shift] = &**of;
                let (bytes, rest) = bytes.as_chunks::<LANES>();
                let (out, last) = out.as_chunks_mut::<LANES>();
                for (out, bytes) in out.iter_mut().zip(bytes) {
                    affine(bytes, factor, shift, out);
                }
                affine(rest, factor, shift, last);
            }
            Colour::Table(table) => {
                let pixels = out.as_chunks_mut::<3>().0.iter_mut().zip(bytes.as_chunks::<3>().0);
                pixels.for_each(|(out, pixel)| *out = std::array::from_fn(|c| table[c][usize::from(pixel[c])]));
            }
        }
    }
}

#[inline(always)]
fn affine(bytes: &[u8], factor: &[f32; LANES], shift: &[f32; LANES], out: &mut [f32]) {
    for ((out, &byte), (factor, shift)) in out.iter_mut().zip(bytes).zip(factor.iter().zip(shift)) {
        *out = f32::from(byte) * factor + shift;
    }
}

/// Bilinear, and a triangle as wide as an output pixel where pixels get fewer (so that nothing is passed over).
fn taps(source: usize, out: usize) -> Vec<Taps> {
    let scale = source as f64 / out as f64;
    let reach = scale.max(1.0);
    (0..out)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            // Pixels k whose centre k + 0.5 is nearer than `reach`.
            let first = ((centre - reach - 0.5).floor() + 1.0).max(0.0) as usize;
            let end = ((centre + reach - 0.5).ceil() as usize).min(source);
            let raw: Vec<f64> = (first..end).map(|k| 1.0 - ((k as f64 + 0.5 - centre) / reach).abs()).collect();
            let sum: f64 = raw.iter().sum();
            Taps { first, weights: raw.iter().map(|w| (w / sum) as f32).collect() }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCALING: Scaling = Scaling { mean: [0.0; 3], std: [1.0; 3] };

    #[test]
    fn resizing_keeps_flat_colours_and_follows_a_ramp() {
        for (source, out) in [(40, 16), (16, 16), (9, 16), (171, 112), (1, 5)] {
            for (i, t) in taps(source, out).iter().enumerate() {
                assert!((t.weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                let at: f32 = t.weights.iter().enumerate().map(|(k, w)| w * (t.first + k) as f32).sum();
                let wanted = ((i as f64 + 0.5) * source as f64 / out as f64 - 0.5) as f32;
                let edge = (source as f32 / out as f32).max(1.0);
                if wanted > edge && wanted < source as f32 - 1.0 - edge {
                    assert!((at - wanted).abs() < 0.26 * edge, "{source} -> {out}: pixel {i} at {at}, not {wanted}");
                }
            }
        }
    }

    #[test]
    fn crops_are_spread_along_the_longer_side() {
        let corners = |height, width, crops: usize| -> Vec<_> {
            let g = Geometry::new(height, width, Some(8)).unwrap();
            let view = |crop| View::fixed(g, SCALING, (crop, crops));
            (0..crops).map(view).map(|view| (view.top, view.left)).collect()
        };
        assert_eq!(corners(10, 21, 1), [(1, 6)]);
        assert_eq!(corners(10, 21, 3), [(1, 0), (1, 6), (1, 13)]);
        assert_eq!(corners(21, 10, 3), [(0, 1), (6, 1), (13, 1)]);
        assert!(Geometry::new(8, 9, Some(8)).unwrap().check_crops(3).is_err());
        assert!(Geometry::new(8, 8, None).unwrap().check_crops(1).is_ok());
    }

    #[test]
    fn the_whole_frame_resized_to_itself_is_the_frame() {
        let g = Geometry::new(16, 16, Some(16)).unwrap();
        let a = Augmentation { crop_scale: Some([1.0, 1.0]), crop_ratio: [1.0, 1.0], ..Augmentation::default() };
        let frame: Vec<u8> = (0..16 * 16 * 3).map(|i| (i * 37 % 256) as u8).collect();
        let (mut plain, mut resized) = (vec![0.0; frame.len()], vec![0.0; frame.len()]);
        View::fixed(g, SCALING, (0, 1)).apply(&frame, &mut plain);
        View::drawn(g, SCALING, &a, (1, 2, 3)).apply(&frame, &mut resized);
        assert!(plain.iter().zip(&resized).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn colours_change_as_their_keys_say() {
        let g = Geometry::new(1, 1, None).unwrap();
        let of = |a: Augmentation, epoch| {
            let mut out = [0.0; 3];
            View::drawn(g, SCALING, &a, (1, epoch, 0)).apply(&[200, 100, 50], &mut out);
            out
        };
        let plain = of(Augmentation::default(), 0);
        assert!([200.0, 100.0, 50.0].iter().zip(plain).all(|(byte, x)| (byte / 255.0 - x).abs() < 1e-6f32));
        let grey = 0.299 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2];
        for epoch in 0..50 {
            let bright = of(Augmentation { brightness: 0.2, ..Augmentation::default() }, epoch);
            let factor = bright[2] / plain[2];
            assert!((0.79..=1.21).contains(&factor) && (bright[1] / plain[1] - factor).abs() < 1e-5);
            let contrast = of(Augmentation { contrast: 0.2, ..Augmentation::default() }, epoch);
            let factor = (contrast[2] - 0.5) / (plain[2] - 0.5);
            assert!((0.79..=1.21).contains(&factor) && ((contrast[1] - 0.5) / (plain[1] - 0.5) - factor).abs() < 1e-4);
            let vivid = of(Augmentation { saturation: 0.2, ..Augmentation::default() }, epoch);
            let factor = (vivid[2] - grey) / (plain[2] - grey);
            assert!((0.79..=1.21).contains(&factor) && ((vivid[0] - grey) / (plain[0] - grey) - factor).abs() < 1e-4);
        }
    }
}
