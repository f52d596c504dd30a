//! Mistakes that a GPU would not tell of.

use cudarc::driver::PushKernelArg;

use crate::{Gpu, address, emulated, threads};

/// A kernel writes to element `at` of an array of 100.
fn write_at(at: i32, freed: bool) {
    let gpu = Gpu::new();
    let kernel = gpu.kernel("write_at");
    let array = gpu.stream.alloc_zeros::<f32>(100).unwrap();
    let place = address(&array, &gpu.stream);
    match freed {
        true => drop(array),
        false => std::mem::forget(array),
    }
    gpu.stream.synchronize().unwrap();
    // SAFETY: it is not, which is what is tested.
    unsafe { gpu.stream.launch_builder(&kernel).arg(&place).arg(&at).launch(threads(1, 1)) }.unwrap();
    gpu.stream.synchronize().unwrap();
}

#[test]
fn writing_beside_an_array_is_noticed_at_the_end() {
    let death = Some("guard zone: something wrote 4 bytes past the end of the device allocation of 400 bytes");
    emulated("mistakes::writing_beside_an_array_is_noticed_at_the_end", &[], death, || write_at(101, false));
}

#[test]
fn writing_far_beside_an_array_is_noticed_at_once() {
    let death = Some("kernel write_at is out of bounds");
    emulated("mistakes::writing_far_beside_an_array_is_noticed_at_once", &[], death, || write_at(1000, false));
}

#[test]
fn writing_before_an_array_is_noticed() {
    let death = Some("before the device allocation of 400 bytes");
    emulated("mistakes::writing_before_an_array_is_noticed", &[], death, || write_at(-1, false));
}

#[test]
fn using_freed_memory_is_noticed() {
    let death = Some("kernel write_at used device memory that was freed");
    emulated("mistakes::using_freed_memory_is_noticed", &[], death, || write_at(3, true));
}

#[test]
fn a_barrier_that_not_all_reach_is_noticed() {
    emulated("mistakes::a_barrier_that_not_all_reach_is_noticed", &[], Some("kernel hang hangs"), || {
        let gpu = Gpu::new();
        let mut out = gpu.stream.alloc_zeros::<f32>(1).unwrap();
        let _ = unsafe { gpu.stream.launch_builder(&gpu.kernel("hang")).arg(&mut out).launch(threads(1, 32)) };
        let _ = gpu.stream.synchronize();
    });
}
