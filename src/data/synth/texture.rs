//! Periodic textures and the colours they are shown in.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// White noise, low-passed to features of a given size, periodic: values 0..=1, `[size, size]`.
pub(super) struct Texture {
    size: usize,
    values: Vec<f32>,
}

impl Texture {
    pub(super) fn random(size: usize, feature: f64, rng: &mut ChaCha8Rng) -> Self {
        let mut values: Vec<f32> = (0..size * size).map(|_| rng.random::<f32>() - 0.5).collect();
        // Three box filters in a row are close to a Gaussian. A feature (a bright or a dark blob) is about as wide
        // as two such boxes.
        let radius = feature / 4.0;
        let mut line = vec![0.0; size];
        for _ in 0..3 {
            for row in values.chunks_exact_mut(size) {
                blur(row, 1, radius, &mut line);
            }
            for x in 0..size {
                blur(&mut values[x..], size, radius, &mut line);
            }
        }
        // To mean 1/2 and standard deviation 1/4; the few values beyond 0..1 are clipped.
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        let scale = 0.25 / variance.sqrt().max(1e-9);
        for v in &mut values {
            *v = ((*v - mean) * scale + 0.5).clamp(0.0, 1.0);
        }
        Texture { size, values }
    }

    /// Row `y` and the one below it, around the torus.
    pub(super) fn two_rows(&self, y: usize) -> [&[f32]; 2] {
        [y, (y + 1) % self.size].map(|y| &self.values[y * self.size..(y + 1) * self.size])
    }
}

/// A periodic box filter of half-width `radius` (not necessarily whole) over `line.len()` values, `step` apart.
fn blur(values: &mut [f32], step: usize, radius: f64, line: &mut [f32]) {
    let n = line.len();
    // The box covers 2·radius + 1 pixels, its two end pixels in part; it never wraps onto itself.
    let radius = radius.min((n - 1) as f64 / 2.0);
    let whole = radius.floor() as usize;
    let (rest, width) = ((radius - radius.floor()) as f32, (2.0 * radius + 1.0) as f32);
    for (i, v) in line.iter_mut().enumerate() {
        *v = values[i * step];
    }
    let at = |line: &[f32], i: usize| line[i % n];
    let mut sum: f32 = (0..=2 * whole).map(|k| at(line, n + k - whole)).sum();
    for i in 0..n {
        let ends = at(line, 2 * n + i - whole - 1) + at(line, i + whole + 1);
        values[i * step] = (sum + rest * ends) / width;
        sum += at(line, i + whole + 1) - at(line, n + i - whole);
    }
}

/// The value at column `x + fx` between the two rows, `fy` of the way down.
#[inline]
pub(super) fn bilinear(rows: [&[f32]; 2], x: usize, fx: f32, fy: f32) -> f32 {
    let next = if x + 1 == rows[0].len() { 0 } else { x + 1 };
    lerp(lerp(rows[0][x], rows[0][next], fx), lerp(rows[1][x], rows[1][next], fx), fy)
}

#[inline]
pub(super) fn lerp(a: f32, b: f32, f: f32) -> f32 {
    a + (b - a) * f
}

/// Two colours; a texture's value says how far between them a pixel is.
pub(super) struct Palette {
    dark: [f32; 3],
    light: [f32; 3],
}

impl Palette {
    /// A texture's deviation of 1/4 becomes 45 grey levels around 128.
    pub(super) const GREY: Palette = Palette { dark: [38.0; 3], light: [218.0; 3] };

    /// Two random colours, and a random contrast between them.
    pub(super) fn random(rng: &mut ChaCha8Rng) -> Self {
        let mut colour = || -> [f32; 3] { std::array::from_fn(|_| rng.random::<f32>() * 255.0) };
        let (dark, light) = (colour(), colour());
        // At least half of the contrast the two colours have, so that no texture is invisible by lot alone.
        let contrast = 0.5 + 0.5 * rng.random::<f32>();
        let towards_middle = |a: f32, b: f32| lerp((a + b) / 2.0, a, contrast);
        Palette {
            dark: std::array::from_fn(|c| towards_middle(dark[c], light[c])),
            light: std::array::from_fn(|c| towards_middle(light[c], dark[c])),
        }
    }

    #[inline]
    pub(super) fn colour(&self, value: f32) -> [f32; 3] {
        std::array::from_fn(|c| lerp(self.dark[c], self.light[c], value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_blur_keeps_the_sum_and_is_periodic() {
        for (n, radius) in [(8, 0.0), (8, 1.0), (9, 2.75), (5, 99.0), (4, 1.5)] {
            let mut values: Vec<f32> = (0..n).map(|i| (i * i % 7) as f32).collect();
            let shifted: Vec<f32> = (0..n).map(|i| values[(i + 3) % n]).collect();
            let sum: f32 = values.iter().sum();
            let mut other = shifted.clone();
            blur(&mut values, 1, radius, &mut vec![0.0; n]);
            blur(&mut other, 1, radius, &mut vec![0.0; n]);
            assert!((values.iter().sum::<f32>() - sum).abs() < 1e-3, "n {n} radius {radius}: {values:?}");
            for i in 0..n {
                assert!((other[i] - values[(i + 3) % n]).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_texture_has_the_spread_and_the_feature_size_asked_for() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // The correlation of neighbours grows with the feature size.
        let mut last = 0.0;
        for feature in [1.0, 3.0, 6.0, 12.0] {
            let t = Texture::random(64, feature, &mut rng);
            let mean = t.values.iter().sum::<f32>() / 4096.0;
            let var = t.values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 4096.0;
            assert!((mean - 0.5).abs() < 0.02 && (var.sqrt() - 0.25).abs() < 0.03, "{mean} {var}");
            let next: f32 = (0..4096).map(|i| (t.values[i] - mean) * (t.values[(i + 2) % 4096] - mean)).sum();
            let correlation = next / 4096.0 / var;
            assert!(correlation > last - 0.05, "{feature}: {correlation} after {last}");
            last = correlation;
        }
        assert!(last > 0.8);
    }
}
