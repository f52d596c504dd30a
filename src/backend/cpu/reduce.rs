//! Sums over rows in a fixed order.

use std::ops::Range;

use super::{Real, simd, threads};

/// Rows of one block. Rounding errors grow with a block's length and with the number of blocks, not with their product.
const BLOCK: usize = 256;

/// Sums over `rows` rows: `f(range, out)` adds the rows of one block into `out` (`width` zeros); the blocks' results are
/// added in order.
pub(crate) fn rows<T: Real>(rows: usize, width: usize, f: impl Fn(Range<usize>, &mut [T]) + Sync) -> Vec<T> {
    let blocks = rows.div_ceil(BLOCK);
    let mut parts = vec![T::ZERO; blocks * width];
    if width > 0 {
        threads::chunks(
            &mut parts,
            width,
            || (),
            |(), i, out| {
                simd::vectorized(
                    #[inline(always)]
                    || f(i * BLOCK..((i + 1) * BLOCK).min(rows), out),
                );
            },
        );
    }
    let mut total = vec![T::ZERO; width];
    for part in parts.chunks_exact(width.max(1)) {
        total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
    }
    total
}

/// The sum of all rows of `channels` elements.
pub(crate) fn column_sums<T: Real>(data: &[T], channels: usize) -> Vec<T> {
    rows(
        data.len() / channels.max(1),
        channels,
        #[inline(always)]
        |range, out| {
            for row in data[range.start * channels..range.end * channels].chunks_exact(channels) {
                out.iter_mut().zip(row).for_each(|(o, &r)| *o += r);
            }
        },
    )
}

/// The sum over rows of `(x - centre)^2`.
pub(crate) fn centred_squares<T: Real>(x: &[T], centre: &[T]) -> Vec<T> {
    let channels = centre.len();
    rows(
        x.len() / channels.max(1),
        channels,
        #[inline(always)]
        |range, out| {
            for row in x[range.start * channels..range.end * channels].chunks_exact(channels) {
                for ((o, &v), &m) in out.iter_mut().zip(row).zip(centre) {
                    let d = v - m;
                    *o += d * d;
                }
            }
        },
    )
}

/// The sums over rows of `x - centre`, then of its square: `2 * channels` elements.
pub(crate) fn shifted_moments<T: Real>(x: &[T], centre: &[T]) -> Vec<T> {
    let channels = centre.len();
    rows(
        x.len() / channels.max(1),
        2 * channels,
        #[inline(always)]
        |range, out| {
            let (plain, squares) = out.split_at_mut(channels);
            for row in x[range.start * channels..range.end * channels].chunks_exact(channels) {
                let sums = plain.iter_mut().zip(squares.iter_mut());
                for ((p, s), (&v, &m)) in sums.zip(row.iter().zip(centre)) {
                    let d = v - m;
                    *p += d;
                    *s += d * d;
                }
            }
        },
    )
}

/// Adds the sums over rows of `x - centre`, then those of its square, to `plain` and `squares`.
pub(crate) fn add_shifted_moments<T: Real>(x: &[T], centre: &[T], [plain, squares]: [&mut [T]; 2]) {
    const LANES: usize = 32;
    let channels = centre.len();
    simd::vectorized(
        #[inline(always)]
        || {
            for first in (0..channels).step_by(LANES) {
                let n = LANES.min(channels - first);
                // Copies of a known length, which stay in registers.
                let [mut p, mut s, mut c] = [[T::ZERO; LANES]; 3];
                c[..n].copy_from_slice(&centre[first..][..n]);
                for row in x.chunks_exact(channels) {
                    if let Some(row) = row[first..].first_chunk::<LANES>() {
                        for k in 0..LANES {
                            let d = row[k] - c[k];
                            p[k] += d;
                            s[k] += d * d;
                        }
                    } else {
                        for (k, &v) in row[first..].iter().enumerate() {
                            let d = v - c[k];
                            p[k] += d;
                            s[k] += d * d;
                        }
                    }
                }
                plain[first..][..n].iter_mut().zip(p).for_each(|(sum, v)| *sum += v);
                squares[first..][..n].iter_mut().zip(s).for_each(|(sum, v)| *sum += v);
            }
        },
    );
}

/// The sums over rows of `g`, then of `g * (x - centre)`, for `g = through(scale x + shift, gy)`: `2 * channels` elements.
/// `centre`, `scale` and `shift` are by channel.
pub(crate) fn moments<T: Real>(
    x: &[T],
    gy: &[T],
    by_channel: [&[T]; 3],
    through: impl Fn(T, T) -> T + Copy + Sync,
) -> Vec<T> {
    let channels = by_channel[0].len();
    rows(
        x.len() / channels.max(1),
        2 * channels,
        #[inline(always)]
        |range, out| {
            // Slices of one length that is known here: the loop below has no bounds to check, and becomes vectors.
            let [centre, scale, shift] = by_channel;
            let (centre, scale, shift) = (&centre[..channels], &scale[..channels], &shift[..channels]);
            let (plain, times) = out.split_at_mut(channels);
            let times = &mut times[..channels];
            let span = range.start * channels..range.end * channels;
            for (x, gy) in x[span.clone()].chunks_exact(channels).zip(gy[span].chunks_exact(channels)) {
                for n in 0..channels {
                    let g = through(x[n] * scale[n] + shift[n], gy[n]);
                    plain[n] += g;
                    times[n] += g * (x[n] - centre[n]);
                }
            }
        },
    )
}
