//! Element by element: activations, sums, conversions, dropout, and the guard against what is not finite.

use candle_core::DType;
use sideways::Result;
use sideways::backend::cpu::activation;
use sideways::backend::cpu::mix::{Mixing, mix};
use sideways::backend::cuda::{Element, ops};

use super::{On, bits, list, random, tensor};

#[test]
fn elementwise() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for n in [1, 7, 8, 255, 2048, 5003, 9001] {
            let (a, b) = (on.random(n, 1), on.random(n, 2));
            let (x, z) = (on.up(&a)?, on.up(&b)?);
            let (ta, tb) = (tensor(&a, &[n])?, tensor(&b, &[n])?);
            let y = on.empty(n)?;
            ops::relu(gpu, &x, &y)?;
            on.same("relu", &y, &activation::relu(&ta)?);
            let gx = on.empty(n)?;
            ops::relu_vjp(gpu, &y, &z, &gx)?;
            on.same("relu_vjp", &gx, &activation::relu_vjp(&ta, &tb)?);
            ops::add(gpu, &x, &z, &y)?;
            on.same("add", &y, &activation::add(&ta, &tb)?);
            ops::add_relu(gpu, &x, &z, &y)?;
            on.same("add_relu", &y, &activation::add_relu(&ta, &tb)?);
            ops::gelu(gpu, &x, &y)?;
            on.same("gelu", &y, &activation::gelu(&ta)?);
            ops::gelu_vjp(gpu, &x, &z, &y)?;
            on.same("gelu_vjp", &y, &activation::gelu_vjp(&ta, &tb)?);
            let sum = gpu.upload(&random(n, 3))?;
            let other = on.floats(3)?;
            gpu.write(&other, &[1.0, 2.0, 3.0])?;
            let pairs = [(x.clone(), sum.clone()), (on.up(&[0.5, 0.5, 0.5])?, other.clone())];
            ops::Accumulation::new(gpu, &pairs)?.launch(gpu)?;
            on.sums("accumulated", &sum, &(tensor(&random(n, 3), &[n])? + &ta)?);
            assert_eq!(on.down(&other)?, [1.5, 2.5, 3.5]);
            // In place.
            ops::add_to(gpu, &x, &z)?;
            on.same("add_to", &z, &(&ta + &tb)?);
            ops::relu(gpu, &x, &x)?;
            on.same("relu in place", &x, &activation::relu(&ta)?);
            ops::fill(gpu, &x, 3.5)?;
            assert!(on.down(&x)?.iter().all(|&v| v == 3.5));
        }
        Ok(())
    })
}

/// To the bit what the host makes of the terms in that order, from words that begin anywhere, into one of the terms.
#[test]
fn sums_are_in_the_order_of_terms() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for (terms, n, first) in [(1, 5, 0), (2, 1000, 3), (3, 257, 1), (7, 5003, 5)] {
            let mut values: Vec<Vec<f32>> = (0..terms).map(|k| random(n + first, k as u64)).collect();
            // Where the order shows: a small one between two large ones.
            values.iter_mut().enumerate().for_each(|(k, v)| v[first] = [1e8, 1.0, -1e8, -0.0, 3.0, 1e-40, 2.0][k]);
            let arrays = values.iter().map(|v| gpu.upload(v)).collect::<Result<Vec<_>>>()?;
            let at: Vec<u64> = arrays.iter().map(|array| array.pointer() + 4 * first as u64).collect();
            let own = terms / 2;
            ops::sum_in_order(gpu, &gpu.compute, at[own], &at, 1.0 / 3.0, n)?;
            let expected: Vec<f32> =
                (first..first + n).map(|i| values.iter().fold(0.0, |sum, v| sum + v[i]) * (1.0 / 3.0)).collect();
            let found = gpu.download(&arrays[own])?;
            assert_eq!(bits(&found[first..]), bits(&expected), "{terms} terms");
            assert_eq!(bits(&found[..first]), bits(&values[own][..first]), "words before are touched");
        }
        assert!(ops::sum_in_order(gpu, &gpu.compute, 0, &[0; 8], 1.0, 1).is_err());
        Ok(())
    })
}

#[test]
fn rounding_is_to_nearest_even_and_what_is_no_number_stays_none() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        let mut values = vec![0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, 1e-40, f32::INFINITY, f32::NEG_INFINITY];
        // Ties both ways, and neighbours of ties.
        values.extend([0x3f80_8000u32, 0x3f81_8000, 0x3f80_8001, 0x3f81_7fff].map(f32::from_bits));
        values.extend(random(1000, 4));
        let found = on.down(&on.up(&values)?)?;
        assert_eq!(bits(&found), bits(&on.rounded(values)));
        let odd = on.up(&[f32::NAN, -1.0, f32::from_bits(0x7f80_0001), f32::NEG_INFINITY])?;
        ops::relu(gpu, &odd, &odd)?;
        let found = on.down(&odd)?;
        assert!(found[0].is_nan() && found[2].is_nan() && found[1] == 0.0 && found[3] == 0.0, "{found:?}");
        Ok(())
    })
}

/// Clips whose length is a multiple of what a thread takes, or not; partners that come in any order, one its own.
#[test]
fn clips_are_mixed_as_on_the_cpu() -> Result<()> {
    On::each(|on| {
        let partners = [2, 0, 1, 3, 5, 4];
        for clip in [1, 3, 16, 147] {
            let frames = random(6 * clip, 6);
            let words: Vec<f32> = partners.iter().map(|&n| f32::from_bits(n as u32)).collect();
            let (x, partners_there, y) = (on.gpu.upload(&frames)?, on.gpu.upload(&words)?, on.empty(6 * clip)?);
            ops::mix(&on.gpu, &x, &partners_there, 0.3, &y)?;
            let there = tensor(&frames, &[6, clip])?.to_dtype(DType::F32)?;
            let expected = mix(&there, &Mixing { weight: 0.3, partners: &partners })?;
            on.same("mixed", &y, &expected.to_dtype(DType::F64)?);
        }
        Ok(())
    })
}

#[test]
fn dropout_has_the_cpus_masks() -> Result<()> {
    On::each(|on| {
        let n = 5003;
        let (x, y, keys) = (on.random(n, 5), on.empty(n)?, on.gpu.zeros(12, Element::F32)?);
        let device = on.up(&x)?;
        ops::set_words(&on.gpu, &keys, 0, &[1, 2, 3, 4])?;
        ops::set_words(&on.gpu, &keys, 4, &[u64::MAX, 0x0123_4567_89ab_cdef])?;
        for (index, key, rate) in [(2, 3, 0.5), (4, u64::MAX, 0.1), (5, 0x0123_4567_89ab_cdef, 0.9), (0, 1, 0.0)] {
            ops::dropout(&on.gpu, &device, &y, rate, &keys, index)?;
            let expected = activation::dropout(&tensor(&x, &[n])?, rate, key)?;
            on.same("dropout", &y, &expected);
            let zeros = on.down(&y)?.iter().map(|&v| v == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros, list(&expected).iter().map(|&v| v == 0.0).collect::<Vec<_>>());
        }
        let beyond = ops::dropout(&on.gpu, &device, &y, 0.5, &keys, 6).unwrap_err().to_string();
        assert!(beyond.contains("with key 6 of an array of 48 bytes"), "{beyond}");
        Ok(())
    })
}

#[test]
fn the_guard_finds_and_clears() -> Result<()> {
    On::each(|on| {
        let gpu = &*on.gpu;
        for n in [5, 2048, 700_001] {
            let scratch = on.floats(ops::guard_scratch(n))?;
            let flag = gpu.zeros(1, Element::F32)?;
            let good = on.random(n, 6);
            let x = on.up(&good)?;
            ops::guard(gpu, &x, &flag, &scratch, true)?;
            assert_eq!(gpu.download(&flag)?, [0.0]);
            assert_eq!(bits(&on.down(&x)?), bits(&good));
            for (round, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                let mut values = good.clone();
                values[n - 1 - round] = bad;
                let x = on.up(&values)?;
                ops::guard(gpu, &x, &flag, &scratch, false)?;
                assert_eq!(gpu.download(&flag)?, [2.0 * round as f32 + 1.0]);
                assert_eq!(on.down(&x)?[0], good[0]);
                ops::guard(gpu, &x, &flag, &scratch, true)?;
                assert_eq!(gpu.download(&flag)?, [2.0 * round as f32 + 2.0]);
                assert!(on.down(&x)?.iter().all(|&v| v == 0.0));
            }
        }
        Ok(())
    })
}
