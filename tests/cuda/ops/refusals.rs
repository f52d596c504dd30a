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
        let errors = [
            ops::relu(gpu, &a, &b).unwrap_err(),
            ops::add(gpu, &a, &b, &a).unwrap_err(),
            ops::add_to(gpu, &b, &a).unwrap_err(),
            ops::from_f32(gpu, &c, &a).unwrap_err(),
            ops::Accumulation::new(gpu, &[(a.clone(), c.clone())]).unwrap_err(),
            ops::bias(gpu, &b, &c, 3).unwrap_err(),
            ops::bias(gpu, &a, &c, 4).unwrap_err(),
            norm.forward(gpu, &a, &a).unwrap_err(),
            short.forward(gpu, &a, &a).unwrap_err(),
            ops::max_pool(gpu, dims, &Window::square(3, 1, 0), &a, &b, &c).unwrap_err(),
            ops::average_pool(gpu, dims, &Window::square(2, 1, 0), &a, &b).unwrap_err(),
            ops::global_average(gpu, dims, &a, &b).unwrap_err(),
            ops::upsample(gpu, dims, 0, &a, &a).unwrap_err(),
            ops::cross_entropy(gpu, &b, &c, None, None, &c, &scratch).unwrap_err(),
            ops::set_words(gpu, &c, 0, &[1, 2]).unwrap_err(),
        ];
        assert!(errors.iter().all(|e| !e.to_string().is_empty()));
        Ok(())
    })
}
