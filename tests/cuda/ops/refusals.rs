//! Arrays that do not fit one another.

use sideways::Result;
use sideways::backend::cpu::Window;
use sideways::backend::cuda::ops::{self, Norm, NormShape, Over};

use super::{EPSILON, On};

#[test]
fn sizes_that_do_not_fit_are_refused() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        let (a, b, c) = (on.empty(12)?, on.empty(11)?, on.floats(3)?);
        let scratch = on.floats(1)?;
        let dims = [1, 2, 2, 3];
        let norm = Norm {
            shape: NormShape { samples: 1, rows: 4, channels: 3 },
            over: Over::Groups(2),
            epsilon: EPSILON,
            relu: false,
            weight: &c,
            bias: &c,
            statistics: &c,
            scratch: &scratch,
        };
        let short = Norm { over: Over::Groups(3), ..norm };
        for (result, expected) in [
            (ops::relu(gpu, &a, &b), "is an array of 11 elements"),
            (ops::add(gpu, &a, &b, &a), "is an array of 11 elements"),
            (ops::add_to(gpu, &b, &a), "elements of"),
            (ops::from_f32(gpu, &c, &a), "what is cast is an array of 3 elements"),
            (ops::Accumulation::new(gpu, &[(a.clone(), c.clone())]).map(drop), "a gradient is an array of 12 elements"),
            (ops::bias(gpu, &b, &c, 3), "of 3 channels with an array of 11 elements"),
            (ops::bias(gpu, &a, &c, 4), "a bias is an array of 3 elements"),
            (norm.forward(gpu, &a, &a), "normalisation of 3 channels in 2 groups"),
            (short.forward(gpu, &a, &a), "the norm's statistics is an array of 3 elements"),
            (ops::max_pool(gpu, dims, &Window::square(3, 1, 0), &a, &b, &c), "2x2"),
            (
                ops::average_pool(gpu, dims, &Window::square(2, 1, 0), &a, &b),
                "a pool's output is an array of 11 elements",
            ),
            (ops::global_average(gpu, dims, &a, &b), "global pooling's output is an array of 11 elements"),
            (ops::upsample(gpu, dims, 0, &a, &a), "up-sampling by 0"),
            (ops::adaptive_average(gpu, dims, [3, 1], &a, &b), "2x2 pixels cannot be averaged down to 3x1"),
            (
                ops::adaptive_average(gpu, [1, 4, 1, 3], [3, 1], &a, &b),
                "adaptive pooling's output is an array of 11 elements",
            ),
            (ops::spread(gpu, dims, [1, 3], &a, &a), "2x2 pixels cannot be spread to 1x3"),
            (ops::spread_vjp(gpu, dims, [2, 3], &a, &a), "spreading's output is an array of 12 elements"),
            (
                ops::cross_entropy(gpu, &b, &ops::Labels::plain(&c), None, None, &c, &scratch),
                "a loss of 11 elements with 3 labels",
            ),
            (ops::set_words(gpu, &c, 0, &[1, 2]), "setting 2 words from word 0 on of an array of 12 bytes"),
        ] {
            let error = result.expect_err(expected).to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        Ok(())
    })
}
