//! Losses and their gradients.

use candle_core::{Device, Tensor};
use sideways::Result;
use sideways::backend::cuda::Element;
use sideways::backend::cuda::ops::{self, Labels};
use sideways::nn::loss::{self, Mixed, PixelLoss};

use super::{On, integers, random, tensor};

#[test]
fn cross_entropy() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for (b, k) in [(1, 2), (5, 7), (9, 400), (64, 101)] {
            // Large enough for their exponentials to overflow.
            let logits = on.rounded(random(b * k, 25).into_iter().map(|v| 4.0 * v + 200.0).collect());
            for padded in [0, 1, b] {
                let labels: Vec<i32> = (0..b).map(|i| if i >= b - padded { -1 } else { (i * 31 % k) as i32 }).collect();
                let x = on.up(&logits)?;
                let (gradient, sum) = (on.empty(b * k)?, gpu.upload(&random(b * k, 26))?);
                let (score, scratch) = (gpu.upload(&[10.0, 3.0])?, on.floats(ops::loss_scratch(b * k, b))?);
                let on_gpu = integers(gpu, &labels)?;
                // Smoothed, where all count.
                let smoothing = if padded == 0 { 0.1 } else { 0.0 };
                // Mixed with the next one, where one does not count.
                let valid = b - padded;
                let next = |i: usize| if i < valid { labels[(i + 1) % valid] } else { -1 };
                let mixed = (padded == 1).then(|| Mixed { partners: (0..b).map(next).collect(), weight: 0.3 });
                let partners = mixed.as_ref().map(|mixed| integers(gpu, &mixed.partners)).transpose()?;
                let soft = Labels { own: &on_gpu, mixed: partners.as_ref().map(|partners| (partners, 0.3)), smoothing };
                ops::cross_entropy(gpu, &x, &soft, Some(&gradient), Some(&sum), &score, &scratch)?;
                let t = tensor(&logits, &[b, 1, 1, k])?;
                let (mean, g) = loss::soft_cross_entropy(&t, &labels, mixed.as_ref(), smoothing)?;
                let what = format!("cross-entropy of {b} x {k}, {padded} padded");
                on.same(&what, &gradient, &g);
                let flat = t.flatten_all()?;
                on.sums(&what, &sum, &(flat + tensor(&random(b * k, 26), &[b * k])?)?);
                let counted = (b - padded) as f64;
                let expected = Tensor::new(&[10.0 + mean * counted, 3.0 + counted], &Device::Cpu)?;
                on.sums(&what, &score, &expected);
                ops::cross_entropy(gpu, &x, &soft, None, None, &score, &scratch)?;
                on.sums(
                    &what,
                    &score,
                    &Tensor::new(&[10.0 + 2.0 * mean * counted, 3.0 + 2.0 * counted], &Device::Cpu)?,
                );
            }
        }
        // What is not finite, and a label that is no class, must show.
        for (logits, label) in [([0.0, f32::NAN, 1.0], 0), ([0.0, 1.0, 2.0], 3), ([f32::INFINITY, 0.0, 0.0], 1)] {
            let (score, scratch) = (gpu.zeros(2, Element::F32)?, on.floats(ops::loss_scratch(3, 1))?);
            let label = integers(gpu, &[label])?;
            ops::cross_entropy(gpu, &on.up(&logits)?, &Labels::plain(&label), None, None, &score, &scratch)?;
            assert!(!gpu.download(&score)?[0].is_finite());
        }
        Ok(())
    })
}

#[test]
fn pixel_losses() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for dims in [[4, 5, 7, 3], [3, 8, 8, 8], [2, 50, 50, 16]] {
            let (n, b) = (dims.iter().product::<usize>(), dims[0]);
            let output = on.random(n, 27);
            let wide = random(n, 28);
            for (kind, narrow) in
                [(PixelLoss::Squared, false), (PixelLoss::Absolute, false), (PixelLoss::Squared, true)]
            {
                let mut target = if narrow { on.rounded(wide.clone()) } else { wide.clone() };
                target[5] = output[5];
                let mut labels = vec![0; b];
                labels[b - 1] = -1;
                let on_gpu = integers(gpu, &labels)?;
                let goal = if narrow { on.up(&target)? } else { gpu.upload(&target)? };
                let (gradient, x) = (on.empty(n)?, on.up(&output)?);
                let (score, scratch) = (gpu.zeros(2, Element::F32)?, on.floats(ops::loss_scratch(n, b))?);
                ops::pixel(gpu, kind, &x, &goal, &on_gpu, Some(&gradient), &score, &scratch)?;
                let (mean, g) = loss::pixel(kind, &tensor(&output, &dims)?, &tensor(&target, &dims)?, &labels)?;
                let what = format!("{kind:?} loss of {dims:?}");
                on.same(&what, &gradient, &g);
                let counted = (b - 1) as f64;
                on.sums(&what, &score, &Tensor::new(&[mean * counted, counted], &Device::Cpu)?);
            }
        }
        Ok(())
    })
}
