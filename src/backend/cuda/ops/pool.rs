//! Pools over windows, to any size and over whole frames, up-sampling by factors and to any size, and their gradients, all as
//! gathers.

use super::{Argument, Array, Columns, Element, Gpu, arguments, each, launch, require, signed, small, width};
use crate::backend::cpu::Window;
use crate::backend::cpu::pool::MOST_ELEMENTS;
use crate::{Error, Result};

/// Each window's maximum of `x` `[B, H, W, C]` into `y` `[B, H', W', C]`, and which of the window's elements it was into
/// `winners` (a byte an output): the first of equals. What is not a number wins.
///
/// # Errors
/// [`Error::Input`] on a window that does not fit; [`Error::Run`] if sizes do not fit or the launch fails.
pub fn max_pool(gpu: &Gpu, shape: [usize; 4], window: &Window, x: &Array, y: &Array, winners: &Array) -> Result<()> {
    let pool = Pool::new(shape, window)?;
    pool.check(x, y)?;
    pool.check_winners(y, winners)?;
    pool.launch(gpu, "max_pool", x.element(), arguments![x, y, winners], y.len(), None)
}

/// The input's cotangent of [`max_pool`] on an input of `shape`: `gy` at each window's winner, added where windows overlap.
///
/// # Errors
/// As [`max_pool`].
pub fn max_pool_vjp(
    gpu: &Gpu,
    shape: [usize; 4],
    window: &Window,
    winners: &Array,
    gy: &Array,
    gx: &Array,
) -> Result<()> {
    let pool = Pool::new(shape, window)?;
    pool.check(gx, gy)?;
    pool.check_winners(gy, winners)?;
    let arrays = arguments![winners, gy, gx];
    if pool.tiles() {
        return pool.launch(gpu, "max_pool_vjp_tiles", gy.element(), arrays, gy.len(), None);
    }
    pool.launch(gpu, "max_pool_vjp", gy.element(), arrays, gx.len(), None)
}

/// Each window's mean of `x` `[B, H, W, C]` into `y` `[B, H', W', C]`; borders count as zeros.
///
/// # Errors
/// As [`max_pool`].
pub fn average_pool(gpu: &Gpu, shape: [usize; 4], window: &Window, x: &Array, y: &Array) -> Result<()> {
    let pool = Pool::new(shape, window)?;
    pool.check(x, y)?;
    pool.launch(gpu, "average_pool", x.element(), arguments![x, y], y.len(), Some(pool.scale()))
}

/// The input's cotangent of [`average_pool`] on an input of `shape`.
///
/// # Errors
/// As [`max_pool`].
pub fn average_pool_vjp(gpu: &Gpu, shape: [usize; 4], window: &Window, gy: &Array, gx: &Array) -> Result<()> {
    let pool = Pool::new(shape, window)?;
    pool.check(gx, gy)?;
    pool.launch(gpu, "average_pool_vjp", gy.element(), arguments![gy, gx], gx.len(), Some(pool.scale()))
}

/// The mean of `x` `[B, H, W, C]` down to any `to` (height, width) into `y`, as [`crate::backend::cpu::pool::adaptive_average`].
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn adaptive_average(gpu: &Gpu, shape: [usize; 4], to: [usize; 2], x: &Array, y: &Array) -> Result<()> {
    if let Some(window) = Window::of_whole_ratio([shape[1], shape[2]], to) {
        return average_pool(gpu, shape, &window, x, y);
    }
    let resize = Resize::averaging(shape, to)?;
    resize.check(x, y)?;
    resize.launch(gpu, "adaptive_average", x, y)
}

/// The input's cotangent of [`adaptive_average`] on an input of `shape`.
///
/// # Errors
/// As [`adaptive_average`].
pub fn adaptive_average_vjp(gpu: &Gpu, shape: [usize; 4], to: [usize; 2], gy: &Array, gx: &Array) -> Result<()> {
    if let Some(window) = Window::of_whole_ratio([shape[1], shape[2]], to) {
        return average_pool_vjp(gpu, shape, &window, gy, gx);
    }
    let resize = Resize::averaging(shape, to)?;
    resize.check(gx, gy)?;
    resize.launch(gpu, "adaptive_average_vjp", gy, gx)
}

/// The mean over all positions of `x` `[B, H, W, C]` into `y` `[B, C]`.
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn global_average(gpu: &Gpu, shape: [usize; 4], x: &Array, y: &Array) -> Result<()> {
    let [b, h, w, c] = shape;
    require("global pooling's input", x, b * h * w * c, x.element())?;
    require("global pooling's output", y, b * c, x.element())?;
    small(x.len())?;
    // As many threads down the rows as there is work for.
    let cut = Columns::new(x.element(), b, h * w, c);
    launch(
        gpu,
        "global_average",
        x.element(),
        [cut.tiles, b, 1],
        arguments![
            x,
            y,
            small(h * w)?,
            small(c)?,
            signed(cut.width)?,
            signed(cut.lanes)?,
            (1.0 / (h * w) as f64) as f32
        ],
    )
}

/// The input's cotangent of [`global_average`] on an input of `shape`.
///
/// # Errors
/// As [`global_average`].
pub fn global_average_vjp(gpu: &Gpu, shape: [usize; 4], gy: &Array, gx: &Array) -> Result<()> {
    let [b, h, w, c] = shape;
    require("global pooling's cotangent", gy, b * c, gx.element())?;
    require("global pooling's input cotangent", gx, b * h * w * c, gx.element())?;
    let lanes = width(gx.element(), &[c]);
    let (n, sample, scale) = (small(gx.len())?, small(h * w * c)?, (1.0 / (h * w) as f64) as f32);
    let arguments = arguments![gy, gx, n, sample, small(c)?, lanes as i32, scale];
    launch(gpu, "global_average_vjp", gx.element(), each(gx.len(), lanes), arguments)
}

/// `x` `[B, H, W, C]` with every pixel repeated `factor` times each way, into `y`.
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn upsample(gpu: &Gpu, shape: [usize; 4], factor: usize, x: &Array, y: &Array) -> Result<()> {
    let [_, h, w, c] = repeated(shape, factor, x, y)?;
    let lanes = width(x.element(), &[c]);
    let (high, wide) = (signed(h * factor)?, signed(w * factor)?);
    let arguments = arguments![x, y, small(y.len())?, small(c)?, lanes as i32, high, wide, signed(factor)?];
    launch(gpu, "upsample", x.element(), each(y.len(), lanes), arguments)
}

/// The input's cotangent of [`upsample`] on an input of `shape`: each block of `gy` summed.
///
/// # Errors
/// As [`upsample`].
pub fn upsample_vjp(gpu: &Gpu, shape: [usize; 4], factor: usize, gy: &Array, gx: &Array) -> Result<()> {
    let [_, h, w, c] = repeated(shape, factor, gx, gy)?;
    let lanes = width(gy.element(), &[c]);
    let arguments =
        arguments![gy, gx, small(gx.len())?, small(c)?, lanes as i32, signed(h)?, signed(w)?, signed(factor)?];
    launch(gpu, "upsample_vjp", gy.element(), each(gx.len(), lanes), arguments)
}

fn repeated(shape: [usize; 4], factor: usize, small: &Array, large: &Array) -> Result<[usize; 4]> {
    let elements = shape.iter().product::<usize>();
    if factor == 0 {
        return Err(Error::Run("up-sampling by 0".into()));
    }
    require("up-sampling's input", small, elements, small.element())?;
    require("up-sampling's output", large, elements * factor * factor, small.element())?;
    Ok(shape)
}

/// `x` `[B, H, W, C]` spread to any larger `to` (height, width) into `y`, as [`crate::backend::cpu::resample::spread`].
///
/// # Errors
/// [`Error::Run`] if sizes do not fit or the launch fails.
pub fn spread(gpu: &Gpu, shape: [usize; 4], to: [usize; 2], x: &Array, y: &Array) -> Result<()> {
    let resize = Resize::spreading(shape, to)?;
    resize.check(x, y)?;
    resize.launch(gpu, "spread", x, y)
}

/// The input's cotangent of [`spread`] on an input of `shape`: the sum of `gy` over the pixels that took each.
///
/// # Errors
/// As [`spread`].
pub fn spread_vjp(gpu: &Gpu, shape: [usize; 4], to: [usize; 2], gy: &Array, gx: &Array) -> Result<()> {
    let resize = Resize::spreading(shape, to)?;
    resize.check(gx, gy)?;
    resize.launch(gpu, "spread_vjp", gy, gx)
}

/// A change of height and width, from `[B, H, W, C]` to `[B, to, C]`.
struct Resize {
    what: &'static str,
    shape: [usize; 4],
    to: [usize; 2],
}

impl Resize {
    fn averaging(shape: [usize; 4], to: [usize; 2]) -> Result<Self> {
        Resize { what: "adaptive pooling", shape, to }.fitting("averaged down", |from, to| to <= from)
    }

    fn spreading(shape: [usize; 4], to: [usize; 2]) -> Result<Self> {
        Resize { what: "spreading", shape, to }.fitting("spread", |from, to| to >= from)
    }

    fn fitting(self, does: &str, fits: impl Fn(usize, usize) -> bool) -> Result<Self> {
        let (Resize { shape: [_, h, w, _], to: [oh, ow], .. }, empty) = (&self, self.shape.contains(&0));
        if empty || oh * ow == 0 || !fits(*h, *oh) || !fits(*w, *ow) {
            return Err(Error::Run(format!("{h}x{w} pixels cannot be {does} to {oh}x{ow}")));
        }
        Ok(self)
    }

    fn check(&self, x: &Array, y: &Array) -> Result<()> {
        let ([b, h, w, c], [oh, ow]) = (self.shape, self.to);
        require(&format!("{}'s input", self.what), x, b * h * w * c, x.element())?;
        require(&format!("{}'s output", self.what), y, b * oh * ow * c, x.element())
    }

    /// Launches a kernel that reads one of the two arrays and writes the other.
    fn launch(&self, gpu: &Gpu, name: &'static str, read: &Array, written: &Array) -> Result<()> {
        let ([_, h, w, c], [oh, ow]) = (self.shape, self.to);
        let lanes = width(written.element(), &[c]);
        let (ih, iw, oh, ow) = (signed(h)?, signed(w)?, signed(oh)?, signed(ow)?);
        let arguments = arguments![read, written, small(written.len())?, small(c)?, lanes as i32, ih, iw, oh, ow];
        launch(gpu, name, written.element(), each(written.len(), lanes), arguments)
    }
}

/// A pool's shapes.
struct Pool {
    input: [usize; 4],
    output: [usize; 2],
    window: Window,
}

impl Pool {
    fn new(input: [usize; 4], window: &Window) -> Result<Pool> {
        let output = window.output(input[1], input[2])?;
        let ([kh, kw], padding) = (window.kernel, window.padding);
        if padding[0] >= kh || padding[1] >= kw || kh * kw > MOST_ELEMENTS {
            return Err(Error::input(format!(
                "a pooling window of {kh}x{kw} with padding {padding:?}: padding must be smaller than the window, and \
                 the window at most {MOST_ELEMENTS} elements"
            )));
        }
        Ok(Pool { input, output, window: *window })
    }

    /// Whether windows cover the input once and leave nothing.
    fn tiles(&self) -> bool {
        let Window { kernel, stride, padding } = self.window;
        let covered = [self.output[0] * kernel[0], self.output[1] * kernel[1]];
        kernel == stride && padding == [0, 0] && covered == [self.input[1], self.input[2]]
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.window.kernel[0] * self.window.kernel[1]) as f64) as f32
    }

    fn check(&self, x: &Array, y: &Array) -> Result<()> {
        let [b, _, _, c] = self.input;
        require("a pool's input", x, self.input.iter().product(), x.element())?;
        require("a pool's output", y, b * self.output[0] * self.output[1] * c, x.element())?;
        small(x.len().max(y.len())).map(|_| ())
    }

    fn check_winners(&self, y: &Array, winners: &Array) -> Result<()> {
        if winners.bytes() < y.len() {
            let (n, bytes) = (y.len(), winners.bytes());
            return Err(Error::Run(format!("max pooling's winners take {n} bytes, and their array has {bytes}")));
        }
        Ok(())
    }

    /// Launches a kernel whose threads share `n` elements: its `arrays`, then the shapes, then `scale`.
    fn launch(
        &self,
        gpu: &Gpu,
        name: &'static str,
        element: Element,
        arrays: &[Argument],
        n: usize,
        scale: Option<f32>,
    ) -> Result<()> {
        let [_, ih, iw, c] = self.input;
        let lanes = width(element, &[c]);
        let mut arguments = arrays.to_vec();
        arguments.extend_from_slice(arguments![small(n)?, small(c)?, lanes as i32]);
        let Window { kernel, stride, padding } = self.window;
        for size in [[ih, iw], self.output, kernel, stride, padding].into_iter().flatten() {
            arguments.push(signed(size)?.into());
        }
        arguments.extend(scale.map(Argument::from));
        launch(gpu, name, element, each(n, lanes), &arguments)
    }
}
