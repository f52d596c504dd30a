//! A made-up dataset in which only motion tells the label.
//!
//! Textured shapes move over a textured background; the label is the direction they move in (8 directions of 45°:
//! label k is the angle k·45°, 0 to the right, 2 *down*, as rows count downwards). The frame is a torus: what leaves
//! on one side comes back on the other. Starting places are uniform on the torus, so at every time t the places are
//! uniform whatever the direction, and textures, colours, sizes and the background's drift are drawn without looking
//! at the label: the distribution of any single frame is *exactly* the same for all labels. A network has to compare
//! frames.
//!
//! Video number i is a pure function of (seed, split, i): any number of threads make the same files.

mod texture;

use std::ops::Range;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::jpeg;
use super::prepare::output;
use super::shard::{Encoding, ShardHeader, ShardWriter};
use crate::{Error, Result};
use texture::{Palette, Texture, bilinear, lerp};

/// The classes, in label order.
pub const CLASS_NAMES: [&str; 8] = ["right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"];

/// What a synthetic video looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// Frames of a video.
    pub frames: usize,
    /// Height and width, in pixels.
    pub size: usize,
    /// Pixels a frame; each video draws its own, uniformly.
    pub speed: Range<f64>,
    /// Shapes in a video (discs and squares).
    pub shapes: usize,
    /// Radius of a disc, half the side of a square, in pixels.
    pub radius: f64,
    /// Size of the textures' features, in pixels.
    pub texture: f64,
    /// Speed of the background's drift, in pixels a frame; its direction has nothing to do with the label.
    pub camera: f64,
    /// Standard deviation of the noise added to each value, in grey levels (of 255).
    pub noise: f64,
    /// All textures grey and of one contrast (mean 128, standard deviation 45) instead of random colours.
    pub grey: bool,
}

/// What to make: a [`Scene`] and how many videos of it are stored how.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthOptions {
    /// The videos' look.
    pub scene: Scene,
    /// Videos of the `train` split.
    pub videos: usize,
    /// Videos of the `test` split; may be 0.
    pub test_videos: usize,
    /// Everything random follows from it.
    pub seed: u64,
    /// How frames are stored.
    pub encoding: Encoding,
    /// JPEG quality, 1..=100.
    pub quality: u8,
    /// Videos of a shard, at most.
    pub per_shard: usize,
    /// Replace shards of these splits that are there already.
    pub overwrite: bool,
}

/// One synthetic video.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthVideo {
    /// Its direction, an index into [`CLASS_NAMES`].
    pub label: i32,
    /// Its frames, each `[size, size, 3]` bytes of RGB.
    pub frames: Vec<Vec<u8>>,
    /// Where the centre of each shape is (x, y), in pixels: `places[t][shape]`.
    pub places: Vec<Vec<[f64; 2]>>,
}

/// Videos made at a time: enough for all threads, few enough to hold in memory.
const BLOCK: usize = 64;
/// Bytes that these take, at most.
const MOST_MEMORY: usize = 32 << 30;
/// Shapes in a video, at most.
const MOST_SHAPES: usize = 10_000;
/// Videos of a split, at most.
const MOST_VIDEOS: usize = 100_000_000;

impl Scene {
    /// Checks the values and that they fit each other.
    ///
    /// # Errors
    /// [`Error::Input`] naming the value and what it has to be.
    pub fn validate(&self) -> Result<()> {
        let size = self.size as f64;
        let need = |ok: bool, text: String| if ok { Ok(()) } else { Err(Error::input(text)) };
        let (lo, hi) = (self.speed.start, self.speed.end);
        need(self.frames >= 1, "--frames must be at least 1".into())?;
        need((4..=4096).contains(&self.size), format!("--size {}: it must be 4..=4096 pixels", self.size))?;
        // So many videos are in memory at a time.
        let bytes = self.frames.checked_mul(self.size * self.size * 3 * BLOCK);
        need(
            bytes.is_some_and(|bytes| bytes <= MOST_MEMORY),
            format!(
                "--frames {} of --size {}: {BLOCK} videos at a time would take more than {} GiB of memory",
                self.frames,
                self.size,
                MOST_MEMORY >> 30
            ),
        )?;
        need(self.shapes >= 1, "--shapes must be at least 1: without shapes nothing tells the label".into())?;
        need(self.shapes <= MOST_SHAPES, format!("--shapes {}: it must be at most {MOST_SHAPES}", self.shapes))?;
        need(
            lo > 0.0 && lo <= hi && hi < size / 2.0,
            format!("--speed {lo}..{hi}: it must be above 0 and below half the frame ({} pixels)", size / 2.0),
        )?;
        need(
            self.radius >= 0.5 && 2.0 * self.radius + 1.0 <= size,
            format!("--radius {}: it must be at least 0.5 and the shape must fit the {size} pixel frame", self.radius),
        )?;
        need(
            self.texture >= 1.0 && self.texture <= size,
            format!("--texture {}: it must be 1..={size} pixels", self.texture),
        )?;
        need(
            self.camera >= 0.0 && self.camera < size / 2.0,
            format!("--camera {}: it must be 0 or more and below half the frame ({} pixels)", self.camera, size / 2.0),
        )?;
        need((0.0..=255.0).contains(&self.noise), format!("--noise {}: it must be 0 to 255 grey levels", self.noise))
    }

    /// Video number `index` of `split`. The scene has to be valid.
    pub fn video(&self, seed: u64, split: &str, index: u64) -> SynthVideo {
        let mut rng = generator(seed, split, "video", index);
        let label = label(seed, split, index);
        let size = self.size as f64;
        let speed = self.speed.start + (self.speed.end - self.speed.start) * rng.random::<f64>();
        let velocity = polar(f64::from(label) * std::f64::consts::FRAC_PI_4, speed);
        let drift = polar(rng.random::<f64>() * std::f64::consts::TAU, self.camera);
        let ground = Sprite::new(self, &mut rng);
        let shapes: Vec<Sprite> = (0..self.shapes).map(|_| Sprite::new(self, &mut rng)).collect();
        let moved = |s: &Sprite, v: [f64; 2], t: usize| [0, 1].map(|i| (s.start[i] + t as f64 * v[i]).rem_euclid(size));
        let mut video = SynthVideo { label, frames: Vec::new(), places: Vec::new() };
        let mut canvas = vec![0.0f32; self.size * self.size * 3];
        for t in 0..self.frames {
            let places: Vec<_> = shapes.iter().map(|shape| moved(shape, velocity, t)).collect();
            ground.fill(&mut canvas, self.size, moved(&ground, drift, t));
            for (shape, &at) in shapes.iter().zip(&places) {
                shape.draw(&mut canvas, self.size, self.radius, at);
            }
            video.frames.push(self.bytes(&canvas, &mut rng));
            video.places.push(places);
        }
        video
    }

    fn bytes(&self, canvas: &[f32], rng: &mut ChaCha8Rng) -> Vec<u8> {
        let sigma = self.noise as f32;
        if sigma == 0.0 {
            return canvas.iter().map(|&x| (x + 0.5) as u8).collect();
        }
        let normal = StandardNormal;
        canvas
            .iter()
            .map(|&x| {
                let n: f32 = normal.sample(rng);
                // A float's `as u8` saturates at 0 and 255.
                (x + sigma * n + 0.5) as u8
            })
            .collect()
    }
}

/// A texture that moves: the background, or a shape cut out of it.
struct Sprite {
    texture: Texture,
    palette: Palette,
    start: [f64; 2],
    square: bool,
}

impl Sprite {
    fn new(scene: &Scene, rng: &mut ChaCha8Rng) -> Self {
        let size = scene.size as f64;
        Sprite {
            start: [rng.random::<f64>() * size, rng.random::<f64>() * size],
            square: rng.random(),
            palette: if scene.grey { Palette::GREY } else { Palette::random(rng) },
            texture: Texture::random(scene.size, scene.texture, rng),
        }
    }

    /// Covers the whole canvas, the texture's origin at `at` (x, y).
    fn fill(&self, canvas: &mut [f32], size: usize, at: [f64; 2]) {
        let (x0, fx) = split(size as f64 - at[0], size);
        let (y0, fy) = split(size as f64 - at[1], size);
        for (y, row) in canvas.chunks_exact_mut(size * 3).enumerate() {
            let rows = self.texture.two_rows((y0 + y) % size);
            for (x, pixel) in row.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                *pixel = self.palette.colour(bilinear(rows, (x0 + x) % size, fx, fy));
            }
        }
    }

    /// Draws the shape with its centre at `at` (x, y), its edge anti-aliased over one pixel.
    fn draw(&self, canvas: &mut [f32], size: usize, radius: f64, at: [f64; 2]) {
        // Pixel i's centre is at i + 0.5; the shape touches the pixels whose centre is less than half a pixel outside
        // it. Its texture sits still in it: the origin is the shape's centre.
        let span = |c: f64| (c - radius).floor() as i64..(c + radius).ceil() as i64;
        let (columns, lines) = (span(at[0]), span(at[1]));
        let (x0, fx) = split(size as f64 - at[0], size);
        let (y0, fy) = split(size as f64 - at[1], size);
        let n = size as i64;
        for j in lines {
            let y = j.rem_euclid(n) as usize;
            let dy = j as f64 + 0.5 - at[1];
            let rows = self.texture.two_rows((y0 + y) % size);
            for i in columns.clone() {
                let dx = i as f64 + 0.5 - at[0];
                let outside = if self.square { dx.abs().max(dy.abs()) } else { dx.hypot(dy) } - radius;
                let cover = (0.5 - outside).clamp(0.0, 1.0) as f32;
                if cover == 0.0 {
                    continue;
                }
                let x = i.rem_euclid(n) as usize;
                let colour = self.palette.colour(bilinear(rows, (x0 + x) % size, fx, fy));
                let place = (y * size + x) * 3;
                for c in 0..3 {
                    canvas[place + c] = lerp(canvas[place + c], colour[c], cover);
                }
            }
        }
    }
}

/// A place on the torus as whole pixels (0..size) and the rest (0..1).
fn split(place: f64, size: usize) -> (usize, f32) {
    let whole = place.floor();
    (whole as usize % size, (place - whole) as f32)
}

fn polar(angle: f64, length: f64) -> [f64; 2] {
    [angle.cos() * length, angle.sin() * length]
}

fn generator(seed: u64, split: &str, what: &str, index: u64) -> ChaCha8Rng {
    let key = format!("{what}/{split}/{index}");
    ChaCha8Rng::seed_from_u64(xxh3_64_with_seed(key.as_bytes(), seed))
}

/// Eight successive videos have all eight labels, in an order of their own: balanced, without a rhythm that batches
/// could fall into.
fn label(seed: u64, split: &str, index: u64) -> i32 {
    let mut order: [i32; 8] = std::array::from_fn(|i| i as i32);
    let mut rng = generator(seed, split, "labels", index / 8);
    for i in (1..8).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order[(index % 8) as usize]
}

/// Makes the dataset: `train-00000.h5` … and `test-00000.h5` … in the folder `out`. Calls `progress` with the number
/// of videos made since the last call. Returns the shards, in order.
///
/// # Errors
/// [`Error::Input`] for values that make no sense, shards that are there already, a folder that cannot be written, or in
/// which another process makes these splits.
pub fn make(out: &Path, options: &SynthOptions, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<PathBuf>> {
    options.scene.validate()?;
    output::check(options.per_shard, options.quality)?;
    for (name, videos, least) in [("--videos", options.videos, 1), ("--test-videos", options.test_videos, 0)] {
        if !(least..=MOST_VIDEOS).contains(&videos) {
            return Err(Error::input(format!("{name} {videos}: it must be {least}..={MOST_VIDEOS}")));
        }
    }
    let mut splits = vec![("train", options.videos)];
    if options.test_videos > 0 {
        splits.push(("test", options.test_videos));
    }
    let names: Vec<&str> = splits.iter().map(|(name, _)| *name).collect();
    let _locks = output::prepare_folder(out, &names, options.overwrite)?;
    let mut shards = Vec::new();
    for (split, videos) in splits {
        for (number, first) in (0..videos).step_by(options.per_shard).enumerate() {
            let path = output::shard_path(out, split, number);
            let range = first..videos.min(first + options.per_shard);
            shards.push(make_shard(&path, split, range, options, progress)?);
        }
    }
    Ok(shards)
}

fn make_shard(
    path: &Path,
    split: &str,
    videos: Range<usize>,
    options: &SynthOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<PathBuf> {
    let size = options.scene.size;
    let header = ShardHeader {
        encoding: options.encoding,
        // Nothing moves in seconds here; 25 lets players show it at a sensible speed.
        fps: 25.0,
        height: size,
        width: size,
        dataset: "synthetic-motion".into(),
        split: split.into(),
        class_names: CLASS_NAMES.map(String::from).to_vec(),
    };
    let mut writer = ShardWriter::create(path, header)?;
    for first in videos.clone().step_by(BLOCK) {
        let block = first..videos.end.min(first + BLOCK);
        let made = block
            .clone()
            .into_par_iter()
            .map(|i| {
                let mut video = options.scene.video(options.seed, split, i as u64);
                if options.encoding == Encoding::Jpeg {
                    for frame in &mut video.frames {
                        *frame = jpeg::encode(frame, size, size, options.quality)?;
                    }
                }
                Ok(video)
            })
            .collect::<Result<Vec<_>>>()?;
        for (i, video) in block.zip(made) {
            writer.append(&format!("{split}-{i:06}"), video.label, &video.frames)?;
            progress(1);
        }
    }
    writer.finish()
}
