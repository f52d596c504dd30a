//! Biases, and channels side by side.

use candle_core::Tensor;
use sideways::Result;
use sideways::backend::cpu::activation;
use sideways::backend::cuda::{Array, ops};

use super::{On, bits, random, tensor};

#[test]
fn biases_and_their_gradients() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for (rows, c) in [(1, 1), (35, 3), (1000, 8), (5003, 64), (77, 100), (9, 2048), (4700, 1000)] {
            let (x, b, start) = (on.random(rows * c, 7), random(c, 8), random(c, 9));
            let (tx, tb) = (tensor(&x, &[rows, c])?, tensor(&b, &[c])?);
            let bias = gpu.upload(&b)?;
            for relu in [false, true] {
                let y = on.up(&x)?;
                let expected = tx.broadcast_add(&tb)?;
                match relu {
                    false => ops::bias(gpu, &y, &bias, c)?,
                    true => ops::bias_relu(gpu, &y, &bias, c)?,
                }
                on.same("bias", &y, &if relu { activation::relu(&expected)? } else { expected });
            }
            let scratch = on.floats(ops::bias_gradient_scratch(rows, c))?;
            let (y, gy, gb) = (on.random(rows * c, 18), on.up(&x)?, gpu.upload(&start)?);
            ops::bias_relu_vjp(gpu, &on.up(&y)?, &gy, &gy, &gb, c, &scratch)?;
            let expected = activation::relu_vjp(&tensor(&y, &[rows, c])?, &tx)?;
            on.same("bias_relu_vjp", &gy, &expected);
            on.sums("bias_relu_vjp", &gb, &(expected.sum(0)? + tensor(&start, &[c])?)?);
            let gradient = |scratch: &Array| -> Result<Array> {
                let gb = gpu.upload(&start)?;
                ops::bias_gradient(gpu, &on.up(&x)?, &gb, c, scratch)?;
                Ok(gb)
            };
            let gb = gradient(&scratch)?;
            on.sums("bias gradient", &gb, &(tx.sum(0)? + tensor(&start, &[c])?)?);
            let again = gradient(&scratch)?;
            assert_eq!(bits(&gpu.download(&gb)?), bits(&gpu.download(&again)?));
        }
        Ok(())
    })
}

#[test]
fn channels_are_put_and_got() -> Result<()> {
    On::each(|on| {
        let rows = 37;
        for parts in [vec![3, 4, 1], vec![8, 16], vec![5], vec![16, 8, 40]] {
            let c: usize = parts.iter().sum();
            let whole = on.empty(rows * c)?;
            let mut tensors = Vec::new();
            let mut first = 0;
            for &own in &parts {
                let part = on.random(rows * own, own as u64);
                ops::put_channels(&on.gpu, &on.up(&part)?, &whole, own, c, first)?;
                tensors.push(tensor(&part, &[rows, own])?);
                first += own;
            }
            on.same("put_channels", &whole, &Tensor::cat(&tensors, 1)?);
            first = 0;
            for (&own, expected) in parts.iter().zip(&tensors) {
                let part = on.empty(rows * own)?;
                ops::get_channels(&on.gpu, &whole, &part, own, c, first)?;
                on.same("get_channels", &part, expected);
                let beyond = ops::get_channels(&on.gpu, &whole, &part, own, c, c - own + 1).unwrap_err().to_string();
                assert!(beyond.contains(&format!("{own} channels from {} on", c - own + 1)), "{beyond}");
                first += own;
            }
        }
        Ok(())
    })
}
