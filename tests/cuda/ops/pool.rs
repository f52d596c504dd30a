//! Pools over windows, to any size and over whole images, and upsampling.

use sideways::Result;
use sideways::backend::cpu::{Window, pool, resample};
use sideways::backend::cuda::ops;

use super::{On, SHAPES, list, tensor};

fn windows(dims: [usize; 4]) -> Vec<Window> {
    let tall = Window { kernel: [3, 2], stride: [1, 2], padding: [1, 0] };
    let all =
        [Window::square(2, 2, 0), Window::square(3, 2, 1), Window::square(3, 1, 1), Window::square(2, 3, 1), tall];
    let fit: Vec<Window> = all.into_iter().filter(|w| w.output(dims[1], dims[2]).is_ok()).collect();
    assert!(fit.len() > 3, "{dims:?}");
    fit
}

#[test]
fn pools_over_windows() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            let n: usize = dims.iter().product();
            let mut x = on.random(n, 20);
            // Ties, and what is no number.
            x.iter_mut().step_by(3).for_each(|v| *v = 1.0);
            x[n / 2] = f32::NAN;
            let dx = on.up(&x)?;
            let input = tensor(&x, &dims)?;
            let finite: Vec<f32> = x.iter().map(|&v| if v.is_nan() { 2.0 } else { v }).collect();
            let (df, ordinary) = (on.up(&finite)?, tensor(&finite, &dims)?);
            for window in windows(dims) {
                let what = format!("{window:?} over {dims:?}");
                let [oh, ow] = window.output(dims[1], dims[2])?;
                let outputs = dims[0] * oh * ow * dims[3];
                let (y, winners, gx) = (on.empty(outputs)?, on.floats(outputs.div_ceil(4))?, on.empty(n)?);
                ops::max_pool(gpu, dims, &window, &dx, &y, &winners)?;
                let (expected, taps) = pool::max(&input, &window)?;
                let (found, expected) = (on.down(&y)?, list(&expected));
                let same = |(&f, &e): (&f32, &f64)| f64::from(f) == e || f.is_nan() && e.is_nan();
                assert_eq!(found.len(), expected.len(), "max pool {what}");
                assert!(found.iter().zip(&expected).all(same), "max pool {what} ({:?})", on.element);
                let bytes = gpu.download(&winners)?.iter().flat_map(|w| w.to_bits().to_le_bytes()).collect::<Vec<_>>();
                assert_eq!(bytes[..outputs], taps.flatten_all()?.to_vec1::<u8>()?, "max pool {what}");
                let g = on.random(outputs, 21);
                let (dg, gy) = (on.up(&g)?, tensor(&g, &[dims[0], oh, ow, dims[3]])?);
                ops::max_pool_vjp(gpu, dims, &window, &winners, &dg, &gx)?;
                on.same(&format!("max pool's vjp {what}"), &gx, &pool::max_vjp(&dims, &window, &taps, &gy)?);
                ops::average_pool(gpu, dims, &window, &df, &y)?;
                on.same(&format!("average pool {what}"), &y, &pool::average(&ordinary, &window)?);
                ops::average_pool_vjp(gpu, dims, &window, &dg, &gx)?;
                on.same(&format!("average pool's vjp {what}"), &gx, &pool::average_vjp(&dims, &window, &gy)?);
            }
        }
        Ok(())
    })
}

#[test]
fn global_pools_and_upsampling() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            let [b, h, w, c] = dims;
            let n = b * h * w * c;
            let x = on.random(n, 22);
            let (dx, input) = (on.up(&x)?, tensor(&x, &dims)?);
            let (y, gx) = (on.empty(b * c)?, on.empty(n)?);
            ops::global_average(gpu, dims, &dx, &y)?;
            on.same(&format!("global average of {dims:?}"), &y, &pool::global_average(&input)?);
            let g = on.random(b * c, 23);
            ops::global_average_vjp(gpu, dims, &on.up(&g)?, &gx)?;
            let expected = pool::global_average_vjp(&dims, &tensor(&g, &[b, 1, 1, c])?)?;
            on.same(&format!("global average's vjp of {dims:?}"), &gx, &expected);
            for factor in [1, 2, 3] {
                let many = n * factor * factor;
                let y = on.empty(many)?;
                ops::upsample(gpu, dims, factor, &dx, &y)?;
                on.same(&format!("upsample of {dims:?}"), &y, &resample::upsample(&input, factor)?);
                let g = on.random(many, 24);
                ops::upsample_vjp(gpu, dims, factor, &on.up(&g)?, &gx)?;
                let gy = tensor(&g, &[b, h * factor, w * factor, c])?;
                on.same(&format!("upsample's vjp of {dims:?}"), &gx, &resample::upsample_vjp(&gy, factor)?);
            }
        }
        Ok(())
    })
}

/// From each size to others, above and below a block's elements: averaged by whole ratios and by others, spread by whole factors and by
/// others, one side alone.
#[test]
fn to_any_height_and_width() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in SHAPES {
            let [b, h, w, c] = dims;
            let n = b * h * w * c;
            let x = on.random(n, 30);
            let (dx, input, gx) = (on.up(&x)?, tensor(&x, &dims)?, on.empty(n)?);
            for to in [[1, 1], [h, 2], [h / 2 + 1, w - 1], [2, w], [h - 1, w.div_ceil(2)], [h, w]] {
                let what = format!("{dims:?} averaged to {to:?}");
                let many = b * to[0] * to[1] * c;
                let y = on.empty(many)?;
                ops::adaptive_average(gpu, dims, to, &dx, &y)?;
                on.same(&what, &y, &pool::adaptive_average(&input, to)?);
                let g = on.random(many, 31);
                ops::adaptive_average_vjp(gpu, dims, to, &on.up(&g)?, &gx)?;
                let gy = tensor(&g, &[b, to[0], to[1], c])?;
                on.same(&format!("vjp, {what}"), &gx, &pool::adaptive_average_vjp([h, w], &gy)?);
            }
            for to in [[h, w], [2 * h, w], [h + 1, 2 * w - 1], [3 * h - 1, w + 2]] {
                let what = format!("{dims:?} spread to {to:?}");
                let many = b * to[0] * to[1] * c;
                let y = on.empty(many)?;
                ops::spread(gpu, dims, to, &dx, &y)?;
                on.same(&what, &y, &resample::spread(&input, to)?);
                let g = on.random(many, 32);
                ops::spread_vjp(gpu, dims, to, &on.up(&g)?, &gx)?;
                let gy = tensor(&g, &[b, to[0], to[1], c])?;
                on.same(&format!("vjp, {what}"), &gx, &resample::spread_vjp([h, w], &gy)?);
            }
        }
        Ok(())
    })
}
